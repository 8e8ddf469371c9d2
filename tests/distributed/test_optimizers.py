"""The table of docs/optimizers.md: every optimizer at every ZeRO stage, on the device and offloaded, gives stage 0's numbers."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from training import prepare_data

OPTIMIZERS = ("adamw", "lion", "muon", "sgd", "rmsprop")
PLACES = [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]
CASES = [(o, stage, offload, "fp32") for o in OPTIMIZERS for stage, offload in PLACES]


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizers")
    prepare_data(folder)
    return ranks("stages:optimizers", 2, folder / "out", data=str(folder), cases=CASES)[0]


@pytest.mark.parametrize("optimizer, stage, offload, precision", CASES)
def test_optimizer_at_stage(runs, optimizer, stage, offload, precision):
    result = runs[f"{optimizer}-{stage}-{offload}-{precision}"]
    base = runs[f"{optimizer}-0-False-{precision}"]
    losses = torch.tensor([row[1] for row in result["straight"]])
    assert losses[-1] < losses[0]
    # Muon's Newton-Schulz iteration runs in bfloat16, so its stages agree to that rounding only.
    tolerance = 2e-3 if optimizer == "muon" else 2e-5
    torch.testing.assert_close(losses, torch.tensor([row[1] for row in base["straight"]]), rtol=tolerance, atol=0)
    assert result["problems"] == []
    assert result["resumed"] == result["straight"][3:]
    cross = torch.tensor([row[1] for row in result["cross"]])
    torch.testing.assert_close(cross, torch.tensor([row[1] for row in base["straight"][3:]]), rtol=tolerance, atol=0)
