"""Ranks that are killed, stopped, started twice, or lost with their machine: one run suffers all of it, and ends where an
undisturbed one does.

What has to be a real process under `bigtrain train` is one; the rest are forks of a warm process (tests/distributed/warm.py).
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from test_runs import ENVIRONMENT, attempt_of, losses, run_of, warm  # noqa: F401 (a fixture among them)
from training import tensors, write_config

from bigtrain.checkpoint import format
from bigtrain.runfolder import RunFolder, read_json, read_rows
from bigtrain_launch.diagnose import examine

TIMEOUT = 6.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Prepared data and c.yaml, a run on two ranks that saves every 10 steps and is restarted once."""
    folder = tmp_path_factory.mktemp("faults")
    write_config(
        folder,
        train={"steps": 60},
        checkpoint={"every": 10},
        launch={"ranks_per_node": 2, "timeout": TIMEOUT},
        restarts={"max": 1, "backoff": 0.1},
    )
    return folder


def bigtrain_train(folder: Path, name: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "bigtrain", "train", str(folder / "c.yaml"), f"run.name={name}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, cwd=folder, start_new_session=True, **pipes)


def wait_for_rows(run: RunFolder, attempt: int, count: int, process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait until an attempt has written so many rows, and both ranks a heartbeat of a step."""
    end = time.monotonic() + seconds
    while sum(row["attempt"] == attempt for row in read_rows(run.metrics)) < count or not all(
        read_json(run.heartbeat(attempt, rank)).get("step") for rank in (0, 1)
    ):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@dataclass
class Story:
    run: RunFolder
    screen: str
    code: int
    seconds_to_end: float
    """From SIGSTOP of rank 1 to the end of `bigtrain train`."""
    refused: tuple[str, int]
    """What a second start said while the first trained, and its exit code."""
    after_the_end: str
    """Why the run was thought to have ended, when that was all."""


@pytest.fixture(scope="module")
def story(folder) -> Story:
    """While both ranks are suspended a second start is tried. Then rank 1 is killed; in the attempt that follows it is stopped."""
    run, process = run_of(folder, "disturbed"), bigtrain_train(folder, "disturbed")
    try:
        wait_for_rows(run, 1, 1, process)
        while not format.checkpoints(run.checkpoints):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        ranks = [read_json(run.heartbeat(1, rank))["pid"] for rank in (0, 1)]
        for pid in ranks:  # suspended, they hold the run all the same, and are in no hurry
            os.kill(pid, signal.SIGSTOP)
        second = bigtrain_train(folder, "disturbed")
        refused = second.communicate(timeout=60)[0], second.returncode
        os.kill(ranks[1], signal.SIGKILL)
        os.kill(ranks[0], signal.SIGCONT)
        wait_for_rows(run, 2, 3, process)
        os.kill(read_json(run.heartbeat(2, 1))["pid"], signal.SIGSTOP)
        begun = time.monotonic()
        screen = process.communicate(timeout=60)[0]
        return Story(run, screen, process.returncode, time.monotonic() - begun, refused, examine(run.path).what)
    finally:
        process.terminate()
        process.communicate()


def test_a_second_start_is_refused_and_told_who_trains(story):
    said, code = story.refused
    assert code == 2
    pid, host = attempt_of(story.run, 1)["pid"], re.escape(socket.gethostname())
    assert re.search(rf"another process is training this run \(attempt 1, process {pid} on {host}, since \d{{4}}-", said)


def test_a_killed_rank_is_restarted(story):
    said = "bigtrain: rank 1 was killed by SIGKILL (out of memory?); starting again from the newest checkpoint (restart 1 of 1 in 0.1 s)"
    assert said in story.screen.splitlines()
    record = attempt_of(story.run, 1)
    assert (record["exit_code"], record["reason"], record["restart"]) == (1, "rank 1 was killed by SIGKILL (out of memory?)", True)
    resumed = min(row["step"] for row in read_rows(story.run.metrics) if row["attempt"] == 2) - 1
    assert resumed >= 10 and resumed % 10 == 0


def test_a_stopped_rank_is_named_in_time(story):
    assert story.code == 76 and story.seconds_to_end < TIMEOUT + 5, story.screen
    [line] = [line for line in story.screen.splitlines() if line.startswith("bigtrain: no progress for 6 s: ")]
    host = re.escape(socket.gethostname())
    assert re.search(
        rf": rank 1 on {host}, last heard of in step \d+ \((data|agree|forward|backward|optimizer|save) since .*shows no sign of life for",
        line,
    )
    hang, record = read_json(story.run.hang(2)), attempt_of(story.run, 2)
    assert hang["late"] == [1] and f"bigtrain: {hang['reason']}" == line
    assert (record["exit_code"], record["reason"]) == (76, hang["reason"])
    assert "in run_rank" in story.run.log(2, 0).read_text()  # where rank 0 waited
    assert "with exit code 76 in step " in story.after_the_end and hang["reason"] in story.after_the_end


def test_after_a_loss_of_power_the_run_goes_on_elsewhere_to_the_same_end(story, folder, warm):  # noqa: F811
    """The lease that is left says that another machine trains; it has run out."""
    held = read_json(story.run.lease)
    assert held["attempt"] == 2
    story.run.lease.write_text(json.dumps(held | {"host": "node7", "machine": "another"}))
    os.utime(story.run.lease, (time.time() - 61,) * 2)
    codes, screen = warm(folder, 2, "run.name=disturbed")
    assert codes == [0, 0] and "waiting" not in screen and "attempt 3, resuming step-" in screen
    assert not story.run.lease.exists()

    codes, screen = warm(folder, 2, "run.name=undisturbed")
    assert codes == [0, 0], screen
    undisturbed = run_of(folder, "undisturbed")
    assert losses(story.run) == losses(undisturbed)
    ours, theirs = (tensors(format.checkpoints(r.checkpoints)[-1]) for r in (story.run, undisturbed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
