"""The table of docs/optimizers.md: every optimizer at every ZeRO stage, on the device and offloaded, gives stage 0's numbers."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from training import prepare_data

OPTIMIZERS = ("adamw", "lion", "muon", "sgd", "rmsprop")
PLACES = [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]
CASES = [(o, stage, offload) for o in OPTIMIZERS for stage, offload in PLACES]


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizers")
    prepare_data(folder)
    return ranks("stages:optimizers", 2, folder / "out", data=str(folder), cases=CASES)[0]


@pytest.mark.parametrize("optimizer, stage, offload", CASES)
def test_optimizer_at_stage(runs, optimizer, stage, offload):
    result, base = runs[f"{optimizer}-{stage}-{offload}"], runs[f"{optimizer}-0-False"]
    losses, expected = (torch.tensor([row[1] for row in r["straight"]]) for r in (result, base))
    assert losses[-1] < losses[0]
    # Muon's Newton-Schulz iteration runs in bfloat16, so its stages agree to that rounding only.
    tolerance = 2e-3 if optimizer == "muon" else 2e-5
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=0)
    assert result["problems"] == []
    if "cross" in result:
        torch.testing.assert_close(torch.tensor([row[1] for row in result["cross"]]), expected[3:], rtol=tolerance, atol=0)
    if optimizer == "muon":
        assert result["resumed"] == result["straight"][3:]
