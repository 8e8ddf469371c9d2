"""The same global batch gives the same loss and the same weights, however it is cut into ranks, passes and rows."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from invariance import reference, weights
from training import prepare_data

ONE_RANK = [
    (0, 1, False, "adamw"),
    (0, 2, False, "adamw"),
    (0, 4, False, "adamw"),
    (2, 1, True, "adamw"),
    (0, 1, True, "sgd"),
    (2, 2, False, "sgd"),
]
TWO_RANKS = [
    *[(stage, accumulation, False, "adamw") for stage in (0, 1, 2, 3) for accumulation in (1, 2)],
    *[(stage, 4, True, "adamw") for stage in (0, 2)],
    *[(stage, 2, True, "adamw") for stage in (1, 3)],
    *[(stage, 2, stage % 2 == 1, "sgd") for stage in (0, 1, 2, 3)],
]


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("invariance")
    prepare_data(folder)
    losses = {}
    for world, layouts in ((1, ONE_RANK), (2, TWO_RANKS)):
        losses |= ranks("invariance:train", world, folder / f"ranks-{world}", data=str(folder), layouts=layouts)[0]
    return folder, losses


CASES = [f"{world}-{s}-{a}-{p}-{o}" for world, layouts in ((1, ONE_RANK), (2, TWO_RANKS)) for s, a, p, o in layouts]


@pytest.mark.parametrize("name", CASES)
def test_layout_changes_nothing(runs, name):
    folder, losses = runs
    expected_losses, expected = reference(name.rsplit("-", 1)[1])
    torch.testing.assert_close(torch.tensor(losses[name]), torch.tensor(expected_losses), rtol=2e-6, atol=2e-6, check_dtype=False)
    found = weights(folder / f"ranks-{name[0]}", name)
    assert found.keys() == expected.keys()
    for parameter, value in found.items():
        torch.testing.assert_close(value.double(), expected[parameter], rtol=0, atol=2e-6, msg=lambda m, p=parameter: f"{p}: {m}")
