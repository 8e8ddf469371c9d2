"""A gradient that is not finite, or spikes, on one rank: all ranks leave their weights and states alone, at every stage."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from training import prepare_data

CASES = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
BAD = {4, 6, 33, 34}


@pytest.fixture(scope="module")
def found(ranks, tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("skipping")
    prepare_data(folder)
    return ranks("faulty:train", 2, folder, data=str(folder), cases=CASES)


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_steps_that_are_passed_over(found, stage, precision):
    for rank in (0, 1):
        case = found[rank][f"{stage}-{precision}"]
        assert case["finite"]
        # The first step has no states to compare with yet: they come with it.
        assert {step for step, same in enumerate(case["same"], 1) if same and step > 1} == BAD
        assert case["norms"] == 36 - len(BAD)
        norms = {step: norm for step, _, norm in case["rows"]}
        assert all(math.isfinite(norms[step]) for step in norms if step not in (4, 6)) and norms[33] > 1e3
        assert [w.split(":")[0] for w in case["warnings"]] == [f"step {step}" for step in sorted(BAD)]
        assert "2 in a row, train.skip_limit is 2" in case["warnings"][3]
        assert "usual is" in case["warnings"][2] and "(sequences 128 to 131)" in case["warnings"][2]
    losses = [[row[1] for row in found[rank][f"{stage}-{precision}"]["rows"]] for rank in (0, 1)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


def test_stages_agree(found):
    rows = {stage: found[0][f"{stage}-fp32"]["rows"] for stage in (0, 1, 2, 3)}
    for stage in (1, 2, 3):
        assert [row[1] for row in rows[stage]] == pytest.approx([row[1] for row in rows[0]], rel=1e-5)
