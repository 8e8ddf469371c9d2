"""A rank that gets nowhere is noticed, named and ended. Ranks here are small processes without torch."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigtrain.errors import HANG
from bigtrain.lease import Lease
from bigtrain.runfolder import RunFolder, read_json
from bigtrain.watchdog import Pulse, Watchdog, find_late

ROOT = Path(__file__).parents[1]


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# ---- The pulse ----


def test_what_a_pulse_tells():
    pulse = Pulse()
    pulse("data", 12, 88)
    pulse("forward")
    assert (pulse.phase, pulse.step, pulse.position, pulse.beat, pulse.waiting) == ("forward", 12, 88, 2, False)
    with pulse.meeting("sum"):
        assert pulse.waiting and pulse.collective == "sum" and pulse.beat == 2
    assert not pulse.waiting and pulse.beat == 3  # that the others came is progress
    assert list(pulse.each("evaluate", "ab")) == ["a", "b"] and (pulse.phase, pulse.beat) == ("evaluate", 5)
    pulse.alive()
    assert (pulse.beat, pulse.signs) == (5, 1)  # not a place: ranks have files of different numbers
    pulse("data", 13, 96)
    assert (pulse.step, pulse.beat, pulse.steps) == (13, 1, 2)


# ---- Who is late ----


def beat(rank: int, step: int = 12, beat: int = 5, **facts) -> dict:
    base = {"rank": rank, "host": f"node{rank}", "step": step, "beat": beat, "phase": "forward", "since": 0.0, "age": 0.5}
    return base | {"waiting": False, "collective": "sum"} | facts


@pytest.mark.parametrize(
    ("beats", "late", "says"),
    [
        ([beat(0, beat=9), beat(1)], [1], "rank 1 on node1, in step 12 (forward since "),
        ([beat(0, step=11), beat(1, beat=1), beat(2)], [0], "rank 0 on node0, in step 11"),
        ([beat(0, waiting=True), beat(1)], [1], "is late"),
        ([beat(0), beat(1, beat=9, age=31.0)], [1], "rank 1 on node1, last heard of in step 12 (forward since "),
        ([beat(0), beat(1, age=31.0), beat(2, age=31.0)], [1, 2], "shows no sign of life for 31 s"),
        ([beat(0, beat=1), beat(1, exit_code=1, reason="broke {so}")], [1], "has ended (broke {so})"),
        ([beat(0), beat(2)], [1], "rank 1 never wrote a heartbeat"),
        ([beat(0), beat(1)], [], "all ranks are at the same place"),
        ([beat(0, waiting=True), beat(1, waiting=True)], [], "waiting for the others (sum)"),
        ([beat(0)], [0], "is late"),
    ],
)
def test_who_is_late(beats, late, says):
    ranks = 1 if late == [0] and len(beats) == 1 else max(2, *(b["rank"] + 1 for b in beats))
    found, why = find_late(beats, ranks, stale_seconds=30.0)
    assert found == late and says in why


# ---- Processes ----

RANK = """
import json, os, sys, time
from pathlib import Path
from bigtrain.runfolder import RunFolder
from bigtrain.watchdog import Pulse, Watchdog
folder, rank, ranks, timeout, does = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
run, pulse = RunFolder(folder), Pulse()
screen = os.fdopen(os.dup(1), "w")
log = os.open(run.log(1, rank), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
os.dup2(log, 1); os.dup2(log, 2)
watchdog = Watchdog(run, 1, rank, ranks, pulse, timeout, screen)
watchdog.start()
def heard_of(step):
    while json.loads(run.heartbeat(1, rank).read_text())["step"] < step:
        time.sleep(0.01)
def run_rank_of_a_test():
    step = 0
    while True:
        step += 1
        pulse("data", step, 8 * step)
        pulse("forward")
        Path(folder, f"step-{rank}").write_text(str(step))
        with pulse.meeting("sum"):  # the file of the other rank stands for its coming
            while not all(int(Path(folder, f"step-{r}").read_text() or 0) >= step for r in range(ranks)):
                time.sleep(0.01)
        if step == 5 and rank == ranks - 1:
            exec(does)
        time.sleep(0.01)
run_rank_of_a_test()
"""


@pytest.fixture
def ranks(tmp_path):
    """Two ranks that take steps together: ranks(what rank 1 does after its step 5, time-out) -> the run, the processes."""
    started = []
    run = RunFolder(tmp_path / "r")
    run.start_attempt()

    def start(does: str, timeout: float = 3.0, count: int = 2):
        for rank in range(count):
            (run.path / f"step-{rank}").write_text("0")
        for rank in range(count):
            command = [sys.executable, "-c", RANK, str(run.path), str(rank), str(count), str(timeout), does]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started.append(subprocess.Popen(command, env={"PYTHONPATH": str(ROOT)}, **pipes))
        return run, started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_stopped_rank_is_named(ranks):
    run, (first, second) = ranks("import signal; heard_of(5); os.kill(os.getpid(), signal.SIGSTOP)")
    os.waitid(os.P_PID, second.pid, os.WSTOPPED | os.WNOWAIT)
    begun = time.monotonic()
    screen = first.communicate(timeout=30)[0]
    assert first.returncode == HANG and 1.0 < time.monotonic() - begun < 3.0 + 5.0
    [line, stacks] = [line for line in screen.splitlines() if line]
    assert line.startswith("bigtrain: no progress for 3 s: rank 1 on ") and ", last heard of in step 5 (forward since " in line
    assert (
        "shows no sign of life for " in line
        and "; the run is in step " in line
        and stacks == f"bigtrain: stacks of the ranks: {run.attempt(1)}/logs"
    )
    hang = read_json(run.hang(1))
    assert (hang["late"], hang["found_by"], [r["rank"] for r in hang["ranks"]]) == ([1], 0, [0, 1])
    record = read_json(run.record(1))
    assert (record["exit_code"], record["restart"]) == (HANG, True) and f"bigtrain: {record['reason']}" == line
    assert "run_rank_of_a_test" in run.log(1, 0).read_text()


def test_a_busy_rank_is_named_and_shows_its_stack(ranks):
    """It lives, but gets nowhere: both find that, one says so, and both print where they are."""
    run, started = ranks("def lost_in_thought(): time.sleep(60)\npulse('backward'); lost_in_thought()")
    screens = [process.communicate(timeout=30)[0] for process in started]
    assert [process.returncode for process in started] == [HANG, HANG]
    assert sum("rank 1 on " in screen for screen in screens) == 1 and sum(map(bool, screens)) == 1
    hang = read_json(run.hang(1))
    assert hang["late"] == [1] and "in step 5 (backward since " in hang["reason"] and hang["reason"].endswith("is late")
    assert "lost_in_thought" in run.log(1, 1).read_text()


def test_a_rank_that_holds_the_interpreter_still_shows_its_stack(ranks):
    """Its watchdog cannot run; the other one's signal makes it print."""
    run, (first, _) = ranks("def stuck_in_c():\n    import ctypes\n    ctypes.PyDLL(None).sleep(60)\nstuck_in_c()")
    first.communicate(timeout=30)
    assert first.returncode == HANG and read_json(run.hang(1))["late"] == [1]
    until(lambda: "stuck_in_c" in run.log(1, 1).read_text())


def test_a_suspended_machine_is_no_hang(ranks):
    """Both ranks are suspended for longer than the time-out, the first while it waits for the second, and go on."""
    run, started = ranks("pass", timeout=6.0)
    until(lambda: (run.path / "step-0").read_text() > "5")
    started[1].send_signal(signal.SIGSTOP)
    time.sleep(1.5)  # the watchdog of the first has seen it wait
    started[0].send_signal(signal.SIGSTOP)
    time.sleep(6.0)
    step = int((run.path / "step-0").read_text())
    for process in started:
        process.send_signal(signal.SIGCONT)
    until(lambda: int((run.path / "step-0").read_text() or 0) > step + 200)
    assert [process.poll() for process in started] == [None, None] and not run.hang(1).exists()


def test_a_long_save_is_no_hang(ranks):
    run, started = ranks("for _ in range(40): time.sleep(0.1); pulse.alive()", timeout=1.5, count=1)
    until(lambda: int((run.path / "step-0").read_text() or 0) > 10)
    assert started[0].poll() is None and not run.hang(1).exists()


def test_a_full_disk_is_one_warning(tmp_path, capfd):
    run = RunFolder(tmp_path / "r")
    run.start_attempt()
    run.heartbeat(1, 0).parent.write_text("in the way")
    watchdog = Watchdog(run, 1, 0, 1, Pulse(), 60, sys.stdout)
    watchdog.start()
    watchdog.close(0, "done", restart=False, lost=False)
    assert capfd.readouterr().err.count("warning: no heartbeat of rank 0") == 1


def test_a_collective_below_us_is_seen_in_the_stack(tmp_path):
    """DeepSpeed's collectives do not tell the pulse; where two ranks are in the same phase, they tell who waits for whom."""
    (tmp_path / "distributed_c10d.py").write_text("def all_gather_into_tensor(wait): wait()")
    torch_does = runpy.run_path(str(tmp_path / "distributed_c10d.py"))["all_gather_into_tensor"]
    run = RunFolder(tmp_path / "r")
    run.start_attempt()
    watchdog = Watchdog(run, 1, 0, 1, Pulse(), 0.4, sys.stdout)
    watchdog.start()

    def heartbeat() -> tuple[bool, str | None]:
        beat = read_json(run.heartbeat(1, 0))
        return beat["waiting"], beat["collective"]

    assert heartbeat() == (False, None)
    torch_does(lambda: until(lambda: heartbeat() == (True, "all_gather_into_tensor")))
    until(lambda: heartbeat() == (False, None))
    watchdog.close(0, "done", restart=False, lost=False)


def test_it_renews_the_lease_and_leaves_last_words(tmp_path):
    run = RunFolder(tmp_path / "r")
    run.path.mkdir()
    with Lease.take(run, 0.4) as lease:
        lease.start()
        watchdog = Watchdog(run, 1, 0, 1, Pulse(), 0.4, sys.stdout, lease)
        watchdog.start()
        assert "exit_code" not in read_json(run.heartbeat(1, 0))
        os.utime(run.lease, (0, 0))
        until(lambda: run.lease.stat().st_mtime > 0)
        watchdog.close(1, "broke", restart=True, lost=False)
    words = json.loads(run.heartbeat(1, 0).read_text())
    assert (words["exit_code"], words["reason"], words["restart"], words["lost"], words["pid"]) == (1, "broke", True, False, os.getpid())
