"""One process trains a run at a time: exact on one machine, by a lease that runs out between machines."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bigtrain import lease as module
from bigtrain.errors import RunError, UserError
from bigtrain.lease import Lease
from bigtrain.runfolder import RunFolder

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunFolder:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.02)
    run = RunFolder(tmp_path / "r")
    run.path.mkdir()
    return run


def left_behind(run: RunFolder, seconds_ago: float, **facts) -> None:
    """The lease of an attempt whose holder is out of reach: another machine's, unless `facts` say otherwise."""
    held = {"attempt": run.start_attempt(), "host": "node7", "pid": 42, "machine": "another", "start": "1", "since": 0, "seconds": 60}
    run.lease.write_text(json.dumps(held | facts))
    at = time.time() - seconds_ago
    os.utime(run.lease, (at, at))


def taken(run: RunFolder, **arguments) -> int:
    """Take the lease, begin an attempt, give it back."""
    with Lease.take(run, 60, **arguments) as lease:
        return lease.start()


def test_it_says_who_trains_and_is_gone_at_the_end(run):
    with Lease.take(run, 60, "token") as lease:
        assert not run.lease.exists()
        assert lease.start() == 1
        held = json.loads(run.lease.read_text())
        assert (held["attempt"], held["pid"], held["owner"], held["seconds"]) == (1, os.getpid(), "token", 60)
        lease.check()
        with pytest.raises(UserError, match=rf"this run \(attempt 1, process {os.getpid()} on .+, since \d+-.*\); wait for it"):
            Lease.take(run, 60)
    assert not run.lease.exists() and taken(run) == 2


HOLDER = """
import sys
from bigtrain.lease import Lease
from bigtrain.runfolder import RunFolder
try:
    lease = Lease.take(RunFolder(sys.argv[1]), 60)
    print(lease.start(), flush=True)
    sys.stdin.read()
except Exception as error:
    print(error, flush=True)
"""


def holders(run: RunFolder, count: int) -> list[subprocess.Popen]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", HOLDER, str(run.path)]
    return [subprocess.Popen(command, env={"PYTHONPATH": str(ROOT)}, **pipes) for _ in range(count)]


def test_of_many_that_start_at_once_one_wins(run):
    started = holders(run, 5)
    said = [process.stdout.readline() for process in started]
    assert said.count("1\n") == 1 and sum("another process is training this run" in line for line in said) == 4, said
    assert run.attempts() == [1]
    for process in started:
        process.communicate()


def test_a_killed_holder_on_this_machine_holds_nothing(run):
    [process] = holders(run, 1)
    assert process.stdout.readline() == "1\n"
    process.kill()
    process.communicate()
    assert run.lease.exists() and taken(run, say=pytest.fail) == 2


def test_another_process_of_the_same_id_is_not_the_holder(run):
    left_behind(run, 0, machine=module.machine(), pid=os.getpid(), start="not when this one began")
    assert taken(run, say=pytest.fail) == 2


@pytest.mark.parametrize("damaged", ["", "{", "[]", "{}"])
def test_a_damaged_lease_runs_out(run, damaged):
    run.lease.write_text(damaged)
    os.utime(run.lease, (0, 0))
    assert taken(run, say=pytest.fail) == 1


def test_a_lease_that_has_run_out_is_taken_over_at_once(run):
    left_behind(run, 61)
    assert taken(run, say=pytest.fail) == 2


def test_a_silent_holder_has_the_rest_of_its_lease_to_show_that_it_lives(run):
    left_behind(run, 58.0)
    said, begun = [], time.monotonic()
    assert taken(run, say=said.append) == 2
    assert time.monotonic() - begun > 0.5
    [line] = said
    assert "still being trained (attempt 1, process 42 on node7, since 19" in line


def test_a_holder_that_lives_elsewhere_is_left_alone(run):
    left_behind(run, 30)
    heartbeat = threading.Timer(0.1, lambda: os.utime(run.lease))
    with pytest.raises(UserError, match="process 42 on node7"):
        taken(run, say=lambda text: heartbeat.start())
    assert run.attempts() == [1]
    run.lock().close()  # given back


def test_the_clock_of_the_file_system_counts(run, monkeypatch):
    left_behind(run, 61)
    monkeypatch.setattr(module.time, "time", lambda: 0.0)  # this host's clock is far behind
    assert taken(run, say=pytest.fail) == 2


def test_its_own_supervisor_may_take_it_over_at_once(run):
    left_behind(run, 0, owner="token")
    assert taken(run, owner="token", say=pytest.fail) == 2


def test_it_is_renewed_only_when_it_is_time_to(run, monkeypatch):
    later, now = 0.0, time.monotonic
    monkeypatch.setattr(module.time, "monotonic", lambda: now() + later)
    with Lease.take(run, 1000) as lease:
        lease.start()
        os.utime(run.lease, (0, 0))
        lease.renew()
        assert run.lease.stat().st_mtime == 0
        later = 250.0
        lease.renew()
        assert run.lease.stat().st_mtime > 0


@pytest.fixture
def lockless(monkeypatch):
    """A file system that knows no locks, as between two machines."""
    monkeypatch.setattr(RunFolder, "lock", lambda run: (run.path / ".lock").open("a"))


def test_who_was_out_of_touch_writes_no_more(run, lockless):
    suspended = Lease.take(run, 0.1)
    assert suspended.start() == 1
    os.utime(run.lease, (0, 0))
    left_behind(run, 0)  # attempt 2, on node7
    held = run.lease.read_bytes()
    with pytest.raises(RunError, match=r"attempt 2 has taken the run over \(attempt 2, process 42 on node7.* nothing more is written here"):
        suspended.check()
    time.sleep(0.05)
    suspended.renew()
    suspended.close()
    assert run.lease.read_bytes() == held  # it is not ours to change
    run.lease.unlink()  # attempt 2 is done meanwhile
    with pytest.raises(RunError, match="attempt 2 has taken the run over"):
        suspended.check()


def test_of_two_that_race_without_locks_one_goes_on(run, lockless):
    both = [Lease.take(run, 60), Lease.take(run, 60)]
    assert [lease.start() for lease in both] == [1, 2]
    with pytest.raises(RunError):
        both[0].check()
    both[1].check()
