"""Checkpoints of whole runs: damaged ones are passed over, a failed one costs nothing, and a stop need not wait for a step."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_runs import folder, run_of, straight, warm  # noqa: F401 (fixtures)
from training import prepare_data, tensors

from bigtrain.checkpoint import format
from bigtrain.runfolder import RunFolder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("saving")
    prepare_data(data)
    return data


def copy_of(run: RunFolder, name: str) -> RunFolder:
    """A finished run under another name, its config told so."""
    other = RunFolder(run.path.with_name(name))
    shutil.copytree(run.path, other.path)
    other.config.write_text(other.config.read_text().replace("straight", name))
    return other


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "rank-00001-0.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


# ---- Damaged checkpoints ----


def test_a_damaged_one_is_named_and_passed_over(folder, straight, warm):  # noqa: F811
    run = copy_of(straight, "damaged")
    newest = format.checkpoints(run.checkpoints)[-1]
    truncate(newest)
    codes, screen = warm(folder, 2, "run.name=damaged")
    assert codes == [0, 0], screen
    said = " ".join(screen.split())
    assert f"warning: {newest}/rank-00001-0.safetensors: " in said and "the manifest says" in said and f"Passing over {newest.name}" in said
    format.verify(newest)
    ours, theirs = tensors(newest), tensors(format.checkpoints(straight.checkpoints)[-1])
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_all_of_them_damaged_is_no_new_start(folder, straight, warm):  # noqa: F811
    run = copy_of(straight, "ruined")
    for checkpoint in format.checkpoints(run.checkpoints):
        truncate(checkpoint)
    before = contents(run.checkpoints)
    codes, screen = warm(folder, 2, "run.name=ruined")
    [message] = [line for line in screen.splitlines() if line.startswith("bigtrain:")]
    assert codes == [1, 1] and message.startswith("bigtrain: every checkpoint of this run is damaged: ")
    assert message.count("the manifest says") == 2 and contents(run.checkpoints) == before


def test_another_global_batch_is_refused(folder, straight, warm):  # noqa: F811
    run = copy_of(straight, "batch")
    for checkpoint in format.checkpoints(run.checkpoints):  # not done: there would be nothing to go on with
        state = json.loads((checkpoint / "state.json").read_text())
        (checkpoint / "state.json").write_text(json.dumps({**state, "done": False}))
        (checkpoint / "manifest.json").write_text(json.dumps(format.manifest(checkpoint, {})))
    codes, screen = warm(folder, 2, "run.name=batch", "train.global_batch=null", "train.accumulation=3")
    assert codes == [2, 2] and "train.global_batch: the run has 8 sequences a step, this start would have 12 (2 x 3 on 2 ranks)" in screen


# ---- Checkpoints that fail, stops in a step ----

CASES = [(True, "continue"), (True, "stop"), (False, "continue"), (False, "stop")]


@pytest.fixture(scope="module")
def failed(ranks, data) -> list:
    return ranks("saving:failing", 2, data, data=str(data), cases=CASES)


@pytest.mark.parametrize(("asynchronous", "on_error"), CASES)
def test_one_that_cannot_be_written(failed, asynchronous, on_error):
    each = [found[f"failing-{asynchronous}-{on_error}"] for found in failed]
    assert each[0] == each[1]  # on all ranks the same
    found = each[0]
    said = "step-00000006: not written, rank 1 says: [Errno 28] No space left on device; the newest complete checkpoint is "
    if on_error == "continue":
        assert len(found["warnings"]) == 1 and said in found["warnings"][0] and found["warnings"][0].endswith("Training goes on")
        assert found["saved"] == [3, 9, 12] and found["steps"] == 12 and not found["raised"]
    else:
        assert said in found["raised"] and found["saved"] == [3] and not found["warnings"]
        assert 6 <= found["steps"] <= 8  # in the background it surfaces at the next step that begins


def test_one_that_fails_before_a_stop_is_tried_once_more(ranks, data):
    """checkpoint.on_error: stop would have it end the run, which ends anyway: better with a checkpoint than without."""
    for found in ranks("saving:failing_before_a_stop", 2, data, data=str(data)):
        for case in found.values():
            [warning] = case["warnings"]
            assert "step-00000006: not written, rank 1 says: " in warning and warning.endswith(". Another one is written now")
        again, full = found["again"], found["full"]
        assert again["raised"].startswith("stopped on request after step 7;") and again["saved"] == [3, 7]
        assert "step-00000007: not written, rank 1 says: [Errno 28]" in full["raised"] and full["saved"] == [3]


def test_in_the_background_or_waited_for_it_is_the_same(failed, data):
    ours, theirs = (
        {name: content for name, content in contents(data / f"runs/failing-{kind}-continue/checkpoints").items() if "config" not in name}
        for kind in (True, False)
    )
    assert ours.keys() == theirs.keys() and len([name for name in ours if name.endswith(".safetensors")]) == 6
    assert [name for name in ours if ours[name] != theirs[name]] == [name for name in ours if name.endswith("manifest.json")]


@pytest.fixture(scope="module")
def stopped(ranks, data) -> list:
    return ranks("saving:stops", 2, data, data=str(data))


def test_a_stop_in_the_middle_of_a_step(stopped, data):
    for found in (each["in a step"] for each in stopped):
        assert found["said"].startswith("stopped on request in the middle of step 6, which was given up")
        assert found["passes"] == 3 and found["saved"] == [3, 5]
        assert found["read"] == []  # that of step 5 was verified before the run went on from it
    ours, theirs = (tensors(data / f"runs/{name}/checkpoints/step-00000012") for name in ("stopped", "straight"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_stop_in_the_first_step_of_an_attempt(stopped, data):
    """How long it takes nobody knows, so it is given up whatever the grace, and the run goes on from its beginning."""
    for found in (each["in the first step"] for each in stopped):
        for attempt in ("first", "second"):
            assert found[attempt]["said"].startswith("stopped on request in the middle of step 1, which was given up")
            assert found[attempt]["passes"] == [1, 1, 1] and found[attempt]["saved"] == [0]
        # A step that follows a checkpoint is none whose length nobody knows.
        assert found["third"]["said"].startswith("stopped on request after step 4") and found["third"]["saved"] == [0, 3, 4]
        passes = found["third"]["passes"] + found["last"]["passes"]
        assert found["last"]["said"] == "" and passes[:48] == [step for step in range(1, 13) for _ in range(4)]
    ours, theirs = (tensors(data / f"runs/{name}/checkpoints/step-00000012") for name in ("begun", "straight"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_run_that_was_taken_over_ends(ranks, data):
    """Although checkpoint.on_error says to go on."""
    for found in ranks("saving:lost", 2, data, data=str(data)):
        assert "step-00000006: not written, rank 0 says: attempt 2 has taken the run over" in found["raised"]
        assert found["saved"] == [3] and found["step"] < 12


def test_metrics_that_are_not_finite_keep_no_checkpoint_from_being_written(ranks, data):
    [found] = ranks("saving:diverged", 1, data, data=str(data))
    assert found == {"3": {"validation_loss": 800.0}, "6": {"validation_loss": 800.0}}
