"""Any ZeRO stage on any number of ranks goes on from what any other saved: to the bit in its state, to rounding in its losses.

`benchmarks/faults.py layouts` tries all 144 pairs.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from layouts import GONE_ON, SAVED, checkpoint
from training import prepare_data, tensors

STAGES, RANKS = (0, 1, 2, 3), (1, 2, 4)
PAIRS = {  # ranks that load: (stage, offload, who saved)
    1: [(0, False, ["adamw-3-1"]), (1, False, ["adamw-2-2"]), (2, True, ["adamw-3-2"]), (3, False, ["adamw-0-1", "adamw-3-4"])],
    2: [(0, False, ["adamw-1-4"]), (1, False, ["adamw-3-1", "adamw-1-2"]), (2, False, ["adamw-0-4"]), (3, False, ["adamw-2-1", "adamw-2-4"])],
    4: [(0, False, ["adamw-3-2"]), (1, True, ["adamw-0-2"]), (2, False, ["adamw-1-1"]), (3, False, ["adamw-1-2", "adamw-3-4"])],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    prepare_data(folder)
    return folder


@pytest.fixture(scope="module")
def straight(folder, ranks) -> dict[str, list]:
    """Rows of the runs that were never interrupted, by their layout; their checkpoints are in `folder`."""
    rows: dict[str, list] = {}
    for n in RANKS:
        rows |= ranks("layouts:save", n, folder, data=str(folder), stages=STAGES)[0]
    return rows


@pytest.fixture(scope="module")
def gone_on(folder, ranks, straight) -> dict[str, list]:
    rows: dict[str, list] = {}
    for n, cases in PAIRS.items():
        rows |= ranks("layouts:load", n, folder, data=str(folder), cases=cases)[0]
    return rows


def pairs() -> list[tuple[str, str]]:
    return [
        (s, f"adamw-{stage}-{n}{'-offload' * offload}") for n, cases in PAIRS.items() for stage, offload, sources in cases for s in sources
    ]


def test_sixteen_pairs_that_reach_every_layout():
    assert len(pairs()) == 16
    assert {target.removesuffix("-offload") for _, target in pairs()} == {f"adamw-{s}-{n}" for s in STAGES for n in RANKS}
    assert len({source for source, _ in pairs()}) >= 10


@pytest.mark.parametrize(("source", "target"), pairs())
def test_state_and_losses(folder, straight, gone_on, source, target):
    name = f"{source}-to-{target}"
    before, after = tensors(checkpoint(folder, source)), tensors(checkpoint(folder, name))
    assert before.keys() == after.keys() and {key.split("|")[1] for key in before} == {"model", "ema", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(before[key].view(torch.int32), after[key].view(torch.int32)) for key in before)
    expected = [row for row in straight[source] if row[0] > SAVED]
    assert [row[0] for row in gone_on[name]] == [row[0] for row in expected] == list(range(SAVED + 1, SAVED + GONE_ON + 1))
    if source == target:
        assert gone_on[name] == expected
    for (_, loss, norm), (_, loss_before, norm_before) in zip(gone_on[name], expected):
        assert loss == pytest.approx(loss_before, rel=2e-6) and norm == pytest.approx(norm_before, rel=2e-5)


def test_frozen_parameters_stay(folder, straight):
    start = tensors(checkpoint(folder, "adamw-3-2"))
    end = tensors(next((folder / "runs" / "adamw-3-2" / "checkpoints").glob(f"step-{SAVED + GONE_ON:08d}")))
    frozen = [key for key in start if key.startswith(("layers.0.mlp.", "layers.1.attention_norm."))]
    assert {key.split("|")[1] for key in frozen} == {"model", "ema"} and len(frozen) == 8
    assert all(torch.equal(start[key], end[key]) for key in frozen)
    assert not torch.equal(start["layers.1.mlp.up.weight|model"], end["layers.1.mlp.up.weight|model"])
