"""What is done after which end: the policy as a pure function, then with ranks that are small stand-ins."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigtrain.config import Config
from bigtrain.configlaunch import Restarts
from bigtrain.errors import BAD_NODE, FAILURE, HANG, SAME_CRASH, STOPPED, USER_MISTAKE
from bigtrain.runfolder import RunFolder, read_json
from bigtrain_launch import local
from bigtrain_launch.supervise import Decision, Ended, decide, supervise

ROOT = Path(__file__).parents[2]


# ---- The policy ----


def crash(step: int, reason: str = "rank 1 was killed by SIGKILL", code: int = FAILURE, position: int = 0) -> Ended:
    return Ended(code, reason, True, step, position)


@pytest.mark.parametrize("code", [0, FAILURE, USER_MISTAKE, STOPPED])
def test_an_end_that_the_run_decided_on_is_the_end(code):
    assert decide([crash(1), Ended(code, "so it is", again=False, step=9)], Restarts()) == Decision(code, "so it is")


def test_crashes_are_tried_again_later_and_later_and_not_for_ever():
    settings = Restarts(max=8, backoff=1.5)
    ends = [crash(step) for step in range(1, 10)]
    waits = [decide(ends[: n + 1], settings) for n in range(9)]
    assert [d.wait for d in waits[:8]] == [1.5, 3.0, 6.0, 12.0, 24.0, 48.0, 60.0, 60.0] and all(d.code is None for d in waits[:8])
    assert waits[8] == Decision(FAILURE, "rank 1 was killed by SIGKILL")
    assert decide([crash(1, code=HANG)], Restarts(max=0)).code == HANG
    assert decide([crash(n) for n in range(5000)], Restarts(max=10**9, backoff=1)).wait == 60.0


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (crash(7), crash(7), True),
        (crash(7, "ValueError at 0x7f01, port 20012"), crash(7, "ValueError at 0x7fee, port 28000"), True),
        (crash(7), crash(8), False),
        (crash(7, position=56), crash(7, position=64), False),
        (crash(7), crash(7, "ValueError: x"), False),
        (crash(7), crash(7, code=HANG), False),
    ],
)
def test_the_same_crash_twice_is_no_accident(first, second, same):
    decision = decide([first, second], Restarts())
    assert (decision.code == SAME_CRASH) is same
    assert decide([first, crash(99, "another"), second], Restarts()).code == decision.code  # also with another one between
    if same:
        assert decision.why == f"the same crash twice at step 7: {second.reason}"
    assert "before the first step" in decide([crash(0), crash(0)], Restarts()).why


def test_machines_that_are_lost_are_no_crash_of_the_run():
    lost = Ended(FAILURE, "n1 is gone", True, step=7, lost=True)
    assert decide([lost, lost], Restarts()).code is None and decide([lost] * 4, Restarts()).code == FAILURE


# ---- With ranks ----

PRELUDE = """
import json, os, signal, sys, time
rank, run = int(os.environ['RANK']), os.environ['RUN']
if rank == 0:  # it opens the run
    tries = 1 + len(os.listdir(f'{run}/attempts'))
    os.makedirs(f'{run}/attempts/{tries}/heartbeat')
    json.dump({'attempt': tries, 'owner': os.environ['BIGTRAIN_OWNER']}, open(f'{run}/attempts/{tries}/attempt.json', 'w'))
else:
    tries = 1
    while not os.path.exists(f'{run}/attempts/1/attempt.json'): time.sleep(0.01)
def words(code, reason, restart, lost=False, step=3):
    facts = dict(rank=rank, step=step, position=8 * step, exit_code=code, reason=reason, restart=restart, lost=lost)
    json.dump(facts, open(f'{run}/attempts/{tries}/heartbeat/rank-0000{rank}.json', 'w'))
    sys.exit(code)
"""


def settings(**restarts) -> Config:
    return Config.model_validate(
        {
            "model": {"layers": 1, "width": 8, "heads": 1, "mlp_width": 8, "max_positions": 8},
            "data": {"sequence_length": 8},
            "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
            "optimizer": {"lr": 1.0},
            "restarts": {"backoff": 0.01, **restarts},
        }
    )


@pytest.fixture
def supervised(tmp_path, monkeypatch, capfd):
    """Let every rank run a script after PRELUDE: supervised(script, ranks) -> exit code, screen, the run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bigtrain").mkdir()
    monkeypatch.setattr(local, "GRACE_SECONDS", 3)
    run = RunFolder(tmp_path / "r")
    (run.path / "attempts").mkdir(parents=True)

    def start(script: str, ranks: int = 1, **restarts):
        (tmp_path / "bigtrain/__main__.py").write_text(PRELUDE + script)

        def ranks_here(own):
            return local.launch(["train", "x"], ranks, port=None, environment={"RUN": str(run.path), **own})

        with local.Signals() as signals:
            code = supervise(ranks_here, run, settings(**restarts), signals)
        return code, capfd.readouterr().err, run

    return start


def test_a_killed_rank_is_restarted_and_the_record_completed(supervised):
    code, screen, run = supervised("if tries == 1: os.kill(os.getpid(), signal.SIGKILL)\nwords(0, 'done', False)")
    assert code == 0
    assert screen.splitlines() == [
        "bigtrain: rank 0 was killed by SIGKILL (out of memory?)",
        "bigtrain: rank 0 was killed by SIGKILL (out of memory?); starting again from the newest checkpoint (restart 1 of 3 in 0.01 s)",
    ]
    first, second = (read_json(run.record(n)) for n in (1, 2))
    assert (first["exit_code"], first["reason"], first["restart"]) == (1, "rank 0 was killed by SIGKILL (out of memory?)", True)
    assert first["ended"] <= time.time() and first["owner"] == second["owner"] and len(first["owner"]) == 16
    assert (second["exit_code"], second["restart"]) == (0, False)


@pytest.mark.parametrize("code", [FAILURE, USER_MISTAKE, STOPPED])
def test_what_the_run_decided_on_is_not_tried_again(supervised, code):
    ended, _, run = supervised(f"words({code}, 'the disk is full', False)")
    assert ended == code and run.attempts() == [1]


def test_a_bug_at_the_same_step_is_tried_twice_in_all(supervised):
    code, screen, run = supervised("words(1, f'ValueError: {os.getpid()}', True)", max=9)
    assert code == SAME_CRASH and run.attempts() == [1, 2]
    assert "the same crash twice at step 3: rank 0: ValueError" in screen and f"`bigtrain diagnose {run.path}` tells more" in screen
    record = read_json(run.record(2))
    assert record["exit_code"] == SAME_CRASH and record["reason"].startswith("the same crash twice")


def test_it_gives_up_after_so_many_restarts(supervised):
    code, screen, run = supervised("words(1, 'ValueError', True, step=tries)", max=2)
    assert code == 1 and run.attempts() == [1, 2, 3] and "giving up after 2 restarts: rank 0: ValueError" in screen


def test_a_hang_is_tried_again_and_its_reason_kept(supervised):
    hang = f"json.dump({{'reason': 'rank 1 is late'}}, open(f'{{run}}/attempts/1/hang.json', 'w')); sys.exit({HANG})"
    code, screen, run = supervised(f"if tries == 1: {hang}\nwords(0, 'done', False)")
    assert code == 0 and "rank 1 is late; starting again" in screen and read_json(run.record(1))["exit_code"] == HANG


def test_whoever_lost_another_rank_is_not_the_reason(supervised):
    """Rank 0 ends first, and has the record; rank 1 knows why."""
    script = "if rank == 0: words(1, 'lost', True, lost=True)\ntime.sleep(0.2); words(1, 'ValueError: x', True)"
    code, _, run = supervised(script, ranks=2, max=0)
    assert code == 1 and read_json(run.record(1))["reason"] == "rank 1: ValueError: x"


def test_what_one_rank_decided_on_counts_for_all(supervised):
    script = "if rank == 0: words(1, 'lost', True, lost=True)\ntime.sleep(0.2); words(1, 'no space left', False)"
    code, _, run = supervised(script, ranks=2)
    assert code == 1 and run.attempts() == [1] and read_json(run.record(1))["restart"] is False


def test_what_no_rank_can_say(tmp_path, capfd):
    """A machine that is gone is a reason to start again, before the run was opened too; too few machines are none."""
    ends = [local.End(FAILURE, 3, suspects=("n2",), gone=("n2",), reason="n2 is gone"), local.End(BAD_NODE, reason="too few")]
    with local.Signals() as signals:
        assert supervise(lambda own: ends.pop(0), RunFolder(tmp_path), settings(), signals) == BAD_NODE
    assert capfd.readouterr().err == ("bigtrain: n2 is gone; starting again from the newest checkpoint (restart 1 of 3 in 0.01 s)\n")


def test_ranks_that_fail_before_the_run_is_opened_are_not_tried_again(supervised):
    code, screen, _ = supervised("import shutil; shutil.rmtree(f'{run}/attempts/1'); sys.exit(1)")
    assert code == 1 and "starting again" not in screen


@pytest.fixture
def supervisor(tmp_path):
    """A supervisor in a process of its own, of one rank that runs a script."""
    started = []

    def start(rank: str, **restarts) -> subprocess.Popen:
        # The supervisor needs the real bigtrain and the rank the stand-in, so the stand-in is only in the rank's way.
        stand_in = tmp_path / "ranks/bigtrain"
        stand_in.mkdir(parents=True)
        (stand_in / "__main__.py").write_text(rank)
        script = (
            "import os, sys; from bigtrain.config import Config; from bigtrain.runfolder import RunFolder\n"
            "from bigtrain_launch.local import Signals, launch; from bigtrain_launch.supervise import supervise\n"
            f"os.environ['PYTHONPATH'] = {str(stand_in.parent)!r}\n"
            f"config = Config.model_validate_json({settings(**restarts).model_dump_json()!r})\n"
            "def start(own): return launch([], 1, port=None, environment=own)\n"
            f"with Signals() as signals: sys.exit(supervise(start, RunFolder({str(tmp_path)!r}), config, signals))"
        )
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launch'}"}
        process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_back_off_ends_it(supervisor, number):
    process = supervisor("import os; os.kill(os.getpid(), 9)", backoff=60)
    assert "killed by SIGKILL" in process.stderr.readline()
    assert "restart 1 of 3 in 60 s" in process.stderr.readline()
    process.send_signal(number)
    assert process.wait(20) == STOPPED and "stopped on request between two attempts" in process.stderr.read()


def test_a_stop_on_request_is_never_followed_by_a_restart(supervisor, tmp_path):
    """A rank that crashes while it stops: who asked for the stop does not want another start."""
    process = supervisor("import os, signal, time; signal.signal(15, lambda *a: os.kill(os.getpid(), 9)); open('on', 'w'); time.sleep(60)")
    end = time.monotonic() + 20
    while not (tmp_path / "on").exists():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    screen = process.communicate(timeout=20)[1]
    assert process.returncode == FAILURE and "starting again" not in screen
