"""Stopped and gone on with is the same, to the bit, as never stopped: weights, optimizer, moving average, losses."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from training import prepare_data, tensors

CASES = [(stage, precision) for precision in ("fp32", "bf16", "fp16") for stage in (0, 1, 2, 3)]


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
    assert (result["loss_scale"] is None) == (precision != "fp16")


@pytest.mark.parametrize("stage, precision", [case for case in CASES if case[1] != "fp32"])
def test_sixteen_bits_follow_float32(runs, stage, precision):
    """Loss scaling, clipping and accumulation in 16 bits give float32's losses and gradient norms, to 16 bits' rounding."""
    _, results = runs
    found, expected = (torch.tensor(results[f"{stage}-{p}"]["straight"])[:, 1:] for p in (precision, "fp32"))
    torch.testing.assert_close(found, expected, rtol=0.02 if precision == "fp16" else 0.05, atol=0)


def test_keeps_the_newest(runs):
    folder, _ = runs
    kept = sorted(p.name for p in (folder / "out/runs/2-fp32-straight/checkpoints").iterdir())
    assert kept == ["step-00000015", "step-00000020"]
