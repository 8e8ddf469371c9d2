"""Any ZeRO stage on any number of ranks goes on from what any other saved: to the bit in its state, to rounding in its losses.

`benchmarks/faults.py layouts` tries all 144 pairs (ALL_LAYOUTS=1).
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from layouts import GONE_ON, SAVED, checkpoint
from training import prepare_data, tensors

STAGES, RANKS = (0, 1, 2, 3), (1, 2, 4)
PAIRS = {  # ranks that load: (optimizer, stage-ranks that saved, stage, offload)
    1: [
        *[("adamw", "3-1", 0, False), ("adamw", "2-2", 1, False), ("adamw", "3-2", 2, True), ("adamw", "0-1", 3, False)],
        *[("adamw", "3-4", 3, False)],
        *[(optimizer, "2-2", 3, False) for optimizer in ("lion", "muon", "sgd", "rmsprop")],
    ],
    2: [
        *[("adamw", "1-4", 0, False), ("adamw", "3-1", 1, False), ("adamw", "1-2", 1, False), ("adamw", "0-4", 2, False)],
        *[("adamw", "2-1", 3, True), ("adamw", "2-4", 3, False)],
    ],
    4: [
        *[("adamw", "3-2", 0, False), ("adamw", "0-2", 1, True), ("adamw", "1-1", 2, False), ("adamw", "1-2", 3, False)],
        *[("adamw", "3-4", 3, False)],
        *[(optimizer, "2-2", 1, False) for optimizer in ("lion", "muon", "sgd", "rmsprop")],
    ],
}
if os.environ.get("ALL_LAYOUTS"):  # every pair, and nothing else: half an hour
    SAVED_BY = [f"{stage}-{n}" for stage in STAGES for n in RANKS]
    PAIRS = {n: [("adamw", source, stage, False) for stage in STAGES for source in SAVED_BY] for n in RANKS}
SAVERS = {n: [("adamw", stage) for stage in STAGES] for n in RANKS}
SAVERS[2] += [(optimizer, 2) for optimizer in ("lion", "muon", "sgd", "rmsprop")]
CASES = [(optimizer, source, f"{stage}-{n}") for n, cases in PAIRS.items() for optimizer, source, stage, _ in cases]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    prepare_data(folder)
    return folder


@pytest.fixture(scope="module")
def straight(folder, ranks) -> dict[str, list]:
    """Rows of the runs that were never interrupted, by optimizer and layout; their checkpoints are in `folder`."""
    rows: dict[str, list] = {}
    for n, cases in SAVERS.items():
        rows |= ranks("layouts:save", n, folder, data=str(folder), cases=cases)[0]
    return rows


@pytest.fixture(scope="module")
def gone_on(folder, ranks, straight) -> dict[str, list]:
    rows: dict[str, list] = {}
    for n, cases in PAIRS.items():
        rows |= ranks("layouts:load", n, folder, data=str(folder), cases=cases)[0]
    return rows


def test_sixteen_pairs_that_reach_every_layout():
    pairs = [(source, target) for optimizer, source, target in CASES if optimizer == "adamw"]
    layouts = {f"{stage}-{n}" for stage in STAGES for n in RANKS}
    assert (
        len(set(pairs)) in (16, 144) and {target for _, target in pairs} == layouts and len({source for source, _ in pairs} & layouts) >= 10
    )


@pytest.mark.parametrize(("optimizer", "source", "target"), CASES)
def test_state_and_losses(folder, straight, gone_on, optimizer, source, target):
    name = f"{optimizer}-{source}-to-{target}"
    before, after = tensors(checkpoint(folder, f"{optimizer}-{source}")), tensors(checkpoint(folder, name))
    assert before.keys() == after.keys() and {"model", "ema"} < {key.split("|")[1] for key in before}
    assert all(torch.equal(before[key].view(torch.int32), after[key].view(torch.int32)) for key in before)
    expected = [row for row in straight[f"{optimizer}-{source}"] if row[0] > SAVED]
    assert [row[0] for row in gone_on[name]] == [row[0] for row in expected] == list(range(SAVED + 1, SAVED + GONE_ON + 1))
    if source == target:
        assert gone_on[name] == expected
    close = 2e-6 if optimizer != "muon" else 2e-4  # whose iteration multiplies rounding; its norm is of another gradient at each stage
    for (_, loss, norm), (_, loss_before, norm_before) in zip(gone_on[name], expected):
        assert loss == pytest.approx(loss_before, rel=close)
        assert optimizer == "muon" or norm == pytest.approx(norm_before, rel=10 * close)


def test_frozen_parameters_stay(folder, straight):
    start = tensors(checkpoint(folder, "adamw-3-2"))
    end = tensors(folder / "runs" / "adamw-3-2" / "checkpoints" / f"step-{SAVED + GONE_ON:08d}")
    frozen = [key for key in start if key.startswith(("layers.0.mlp.", "layers.1.attention_norm."))]
    assert {key.split("|")[1] for key in frozen} == {"model", "ema"} and len(frozen) == 8
    assert all(torch.equal(start[key], end[key]) for key in frozen)
    assert not torch.equal(start["layers.1.mlp.up.weight|model"], end["layers.1.mlp.up.weight|model"])
