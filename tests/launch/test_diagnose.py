"""`bigtrain diagnose`: each kind of end in plain words, from folders as runs leave them."""

import io
import json
import os
import socket
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bigtrain.cli import app
from bigtrain.runfolder import RunFolder, machine, process_start
from bigtrain_launch.diagnose import examine, show

TRACEBACK = """bigtrain chatter
Traceback (most recent call last):
  File "old.py", line 1, in old
KeyError: 'an older one'
more chatter
Traceback (most recent call last):
  File "bigtrain/session.py", line 60, in run_rank
    _train(config)
  File "bigtrain/tasks/causal.py", line 9, in loss
    1 / 0
ZeroDivisionError: division by zero
[W] a warning of torch's
"""
STACKS = """Thread 0x00007f01 (most recent call first):
  File "threading.py", line 327 in wait
  File "bigtrain/data/loader.py", line 9 in step

Current thread 0x00007f02 (most recent call first):
  File "bigtrain/watchdog.py", line 9 in _hang

Thread 0x00007f03 (most recent call first):
  File "bigtrain/tasks/causal.py", line 41 in loss
  File "bigtrain/session.py", line 60 in run_rank
"""


class Run:
    """A run folder, filled as its processes would."""

    def __init__(self, path: Path):
        self.folder = RunFolder(path)
        path.mkdir()

    def attempt(self, **record) -> int:
        number = self.folder.start_attempt()
        facts = {"attempt": number, "host": "node0", "pid": 41, "ranks": 2, "started": 1e9} | record
        self.folder.record(number).write_text(json.dumps(facts))
        self.folder.heartbeat(number, 0).parent.mkdir()
        return number

    def beat(self, rank: int, log: str = "", age: float = 0.0, **facts) -> None:
        number = self.folder.attempts()[-1]
        now = time.time() - age
        base = {"rank": rank, "host": f"node{rank}", "pid": 41 + rank, "step": 12, "position": 88, "phase": "forward", "beat": 5}
        base |= {"since": now, "time": now, "waiting": False, "collective": "sum"}
        path = self.folder.heartbeat(number, rank)
        path.write_text(json.dumps(base | facts))
        os.utime(path, (now, now))
        self.folder.log(number, rank).write_text(log)

    def lease(self, age: float = 0.0, **facts) -> None:
        held = {"attempt": self.folder.attempts()[-1], "host": "node0", "pid": 41, "machine": "another", "start": "1", "seconds": 60}
        self.folder.lease.write_text(json.dumps(held | facts))
        os.utime(self.folder.lease, (time.time() - age,) * 2)

    def checkpoint(self, step: int) -> None:
        path = self.folder.checkpoints / f"step-{step:08d}"
        path.mkdir(parents=True)
        (path / "manifest.json").touch()

    def diagnosis(self) -> str:
        out = io.StringIO()
        show(examine(self.folder.path), Console(file=out, width=300, highlight=False))
        return out.getvalue()


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "r")


ENDED = {"ended": 1e9 + 100}


def words(code: int, reason: str, restart: bool = False, lost: bool = False) -> dict:
    return {"exit_code": code, "reason": reason, "restart": restart, "lost": lost}


def test_there_is_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, says in (("empty", "nothing was started here (no attempts/1)"), ("gone", "no such folder")):
        result = CliRunner().invoke(app, ["diagnose", str(tmp_path / name)])
        assert result.exit_code == 2 and result.stderr.startswith(f"bigtrain: {tmp_path / name}: {says}") and result.stderr.count("\n") == 1


def test_the_command(run):
    run.attempt(**ENDED, exit_code=0, reason="done")
    result = CliRunner().invoke(app, ["diagnose", str(run.folder.path)])
    assert result.exit_code == 0 and "reached the end of the run" in result.stdout


def test_a_run_that_is_well(run):
    run.attempt()
    run.lease(host=socket.gethostname(), machine=machine(), pid=os.getpid(), start=process_start(os.getpid()))
    run.beat(0)
    run.beat(1, waiting=True)
    text = run.diagnosis()
    assert "attempt 1 is running since 2001-" in text and "in step 12" in text and "What to do: nothing; all ranks are well" in text
    rows = [line for line in text.splitlines() if "node" in line]
    assert len(rows) == 2 and "alive" in rows[0] and "forward, waiting (sum)" in rows[1] and "0 s ago" in rows[1]


def test_a_run_on_another_machine_is_believed_while_its_lease_runs(run):
    run.attempt()
    run.beat(0)
    run.lease(age=50)
    assert "attempt 1 is running" in run.diagnosis()
    run.lease(age=70)
    assert "ended without a record" in run.diagnosis()


def test_a_run_with_a_silent_rank(run):
    run.attempt()
    run.lease()
    run.beat(0)
    run.beat(1, age=25)
    assert "but rank 1 on node1 silent for 25 s" in run.diagnosis() and "wait for launch.timeout" in run.diagnosis()


def test_a_run_without_progress(run):
    run.attempt()
    run.lease()
    run.beat(0, since=time.time() - 90)
    assert "without progress: rank 0 on node0 in forward for 90 s" in run.diagnosis()


def test_killed_without_a_record(run):
    run.attempt()
    run.lease(host=socket.gethostname(), machine=machine(), pid=os.getpid(), start="another process of this id")
    run.beat(0)
    run.checkpoint(10)
    text = run.diagnosis()
    assert "attempt 1 ended without a record in step 12: rank 0 (process 41 on node0) was killed, or its machine lost power" in text
    assert "dmesg" in text and "then the same command goes on from step-00000010" in text


def test_a_crash(run):
    run.attempt(**ENDED, exit_code=1, reason="rank 1: ZeroDivisionError: division by zero", restart=True)
    run.beat(0, **words(1, "the connection broke", restart=True, lost=True))
    run.beat(1, TRACEBACK, **words(1, "ZeroDivisionError: division by zero", restart=True))
    text = run.diagnosis()
    assert "with exit code 1 in step 12: rank 1: ZeroDivisionError: division by zero" in text
    assert f"{run.folder.log(1, 1)}:" in text and str(run.folder.log(1, 0)) not in text
    assert "in loss\n      1 / 0\n  ZeroDivisionError: division by zero\nWhat to do" in text
    assert "older" not in text and "a warning of torch's" not in text
    assert "What to do: read the traceback; then the same command starts again; there is no checkpoint yet" in text


def test_the_same_crash_twice(run):
    run.attempt(**ENDED, exit_code=1, reason="ValueError: x\nand more", restart=True)
    run.attempt(**ENDED, exit_code=78, reason="the same crash twice at step 12: ValueError: x", restart=True)
    run.beat(0, TRACEBACK, **words(1, "ValueError: x", restart=True))
    text = run.diagnosis()
    assert text.startswith("attempt 1: 2001-") and "exit code 1: ValueError: x\n" in text
    assert "it is no accident" in text and "begins at sequence 88" in text


def test_a_hang(run):
    number = run.attempt(**ENDED, exit_code=76, reason="no progress for 600 s: rank 1 on node1 is late", restart=True)
    run.folder.hang(number).write_text(json.dumps({"late": [1], "found_by": 0}))
    run.beat(0, STACKS, waiting=True)
    run.beat(1, STACKS)
    text = run.diagnosis()
    assert "no progress for 600 s: rank 1 on node1 is late" in text and "What to do: look at node1 (dmesg" in text
    rows = [line for line in text.splitlines() if "node" in line and "│" in line]
    assert "waited" in rows[0] and "late" in rows[1]
    assert "line 41 in loss" in text and "loader.py" not in text and "watchdog.py" not in text
    assert str(run.folder.log(1, 1)) in text and str(run.folder.log(1, 0)) not in text

    run.folder.log(number, 1).write_text("")  # it was stopped, and could not say where
    assert str(run.folder.log(1, 0)) in run.diagnosis() and "line 41 in loss" in run.diagnosis()


def test_out_of_memory(run):
    run.attempt(**ENDED, exit_code=1, reason="rank 1 was killed by SIGKILL (out of memory?)", restart=True)
    run.beat(0, **words(1, "lost", restart=True, lost=True))
    run.beat(1)
    assert (
        "look at dmesg on node1" in run.diagnosis() and "train.micro_batch" in run.diagnosis() and "ended without a word" in run.diagnosis()
    )


@pytest.mark.parametrize(
    ("code", "reason", "advice"),
    [
        (2, "data.folder: too short", "mend what the message names; then the same command"),
        (75, "stopped on request after step 12", "the same command goes on from step-00000012"),
        (1, "step 12: the loss is nan", "do what the message says"),
        (77, "node1 failed", "take the machine out"),
    ],
)
def test_other_ends(run, code, reason, advice):
    run.attempt(**ENDED, exit_code=code, reason=reason, restart=False)
    run.beat(0, **words(code, reason))
    run.checkpoint(12)
    assert reason in run.diagnosis() and advice in run.diagnosis()


def test_what_is_missing_or_damaged_is_passed_over(run):
    number = run.folder.start_attempt()
    assert "attempt 1 ended without a record before its first step: rank 0 was killed" in run.diagnosis()
    run.folder.record(number).write_text("{")
    run.folder.hang(number).write_text("[]")
    run.folder.lease.write_text("")
    run.folder.heartbeat(number, 0).parent.mkdir()
    run.folder.heartbeat(number, 0).write_text("")
    assert "ended without a record" in run.diagnosis()


def test_a_log_cannot_reach_the_terminal(run):
    run.attempt(**ENDED, exit_code=1, reason="\x1b[2Jx", restart=True)
    run.beat(0, "Traceback (most recent call last)\n\x1b[2J[bold]\nError: x\n", **words(1, "x", restart=True))
    assert "\x1b" not in run.diagnosis()
