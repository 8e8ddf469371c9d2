"""Stopped and gone on with is the same, to the bit, as never stopped: weights, optimizer, moving average, losses."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from training import prepare_data, tensors

CASES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    prepare_data(folder)
    return folder, ranks("stages:resume", 2, folder / "out", data=str(folder), cases=CASES)[0]


@pytest.mark.parametrize("stage, precision", CASES)
def test_resumed_equals_straight(runs, stage, precision):
    folder, results = runs
    name = f"{stage}-{precision}"
    result = results[name]
    assert [row[0] for row in result["straight"]] == list(range(1, 21))
    assert result["stopped"] == 10
    assert result["first"] + result["second"] == result["straight"]
    straight, resumed = (tensors(folder / f"out/runs/{name}-{kind}/checkpoints/step-00000020") for kind in ("straight", "resumed"))
    assert {key.split("|")[1] for key in straight} == {"model", "exp_avg", "exp_avg_sq", "ema"}
    assert straight.keys() == resumed.keys()
    for key, value in straight.items():
        assert torch.equal(value, resumed[key]), key


def test_keeps_the_newest(runs):
    folder, _ = runs
    kept = sorted(p.name for p in (folder / "out/runs/2-fp32-straight/checkpoints").iterdir())
    assert kept == ["step-00000015", "step-00000020"]
