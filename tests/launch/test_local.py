"""Starting ranks on this machine: their environment, how signals reach them, and what their ends add up to.

A small stand-in for `python -m bigtrain` in the working directory lets each test say what every rank does.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigtrain.errors import FAILURE, HANG, STOPPED, USER_MISTAKE, UserError
from bigtrain_launch import local

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Run a script as every rank: `ranks(script, n, **launch arguments)` -> exit code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bigtrain").mkdir()
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.4)

    def run(script: str, n: int = 2, *, port=None, environment=None) -> int:
        prelude = "import json, os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
        (tmp_path / "bigtrain/__main__.py").write_text(prelude + script)
        return local.launch(["train", "x"], n, port=port, environment=environment or {}).code

    return run


WRITE_ENVIRONMENT = "json.dump([sys.argv[1:], dict(os.environ)], open(f'{rank}.json', 'w'))"


def test_environment_of_the_ranks(ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert ranks(WRITE_ENVIRONMENT, 2, environment={"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "5"}) == 0
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for rank, (argv, environment) in enumerate(seen):
        assert argv == ["train", "x"]
        assert [environment[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == [str(rank)] * 2 + ["2", "2"]
        assert environment["MASTER_ADDR"] == "127.0.0.1" and environment["DS_ACCELERATOR"] == "cpu"
        assert environment["OMP_NUM_THREADS"] == "5" and environment["CUDA_VISIBLE_DEVICES"] == "3,1"
    assert seen[0][1]["MASTER_PORT"] == seen[1][1]["MASTER_PORT"]


def test_a_port_in_use_is_the_users_mistake(ranks):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"launch.port: {port} is in use"):
            ranks("", port=port)
    assert ranks(f"sys.exit(os.environ['MASTER_PORT'] != '{port}')", port=port) == 0


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        ([(0, 0), (1, 0)], 0),
        ([(1, 1), (0, 2)], USER_MISTAKE),
        ([(1, 77), (0, 1)], 77),
        ([(0, STOPPED), (1, STOPPED)], STOPPED),
        ([(0, 0), (1, STOPPED)], STOPPED),
        ([(1, 1), (0, STOPPED)], 1),
        ([(1, -signal.SIGSEGV), (0, 3)], FAILURE),
        ([(0, 1), (1, HANG)], HANG),
    ],
)
def test_the_exit_code_that_means_most(ended, code):
    assert local.outcome([local.Exit(*one) for one in ended], asked=False).code == code


def test_who_lost_another_rank_is_not_blamed():
    """A poll may find the one that lost the connection before the one that was killed."""
    exits = [local.Exit(0, 1), local.Exit(1, -signal.SIGKILL)]
    assert local.outcome(exits, asked=False) == local.End(FAILURE, 1, signal.SIGKILL, asked=False)
    assert local.outcome([local.Exit(0, 5), local.Exit(1, -signal.SIGTERM)], asked=False).rank == 0  # that one was our own
    assert local.outcome([local.Exit(0, STOPPED)], asked=True).asked


def test_a_machine_that_is_gone_explains_the_failures_of_others():
    exits = [local.Exit(0, 1, "n1"), local.Exit(2, -9, "n2", "n2 is gone: x"), local.Exit(3, -9, "n2", "n2 is gone: x")]
    assert local.outcome(exits, asked=False) == local.End(FAILURE, 2, host="n2", suspects=("n2",), gone=("n2",), reason="n2 is gone: x")
    assert local.outcome([*exits, local.Exit(1, USER_MISTAKE, "n1")], asked=False).code == USER_MISTAKE


def test_a_stopped_rank_is_killed_soon_after_a_hang(ranks, capfd, monkeypatch):
    monkeypatch.setattr(local, "GRACE_SECONDS", 60)
    monkeypatch.setattr(local, "HANG_SECONDS", 0.2)
    start = time.monotonic()
    assert ranks(f"if rank == 0: time.sleep(0.3); sys.exit({HANG})\nos.kill(os.getpid(), signal.SIGSTOP)") == HANG
    assert time.monotonic() - start < 20 and "killing rank 1: still running 0 s after" in capfd.readouterr().err


def test_a_killed_rank_is_named(ranks, capfd):
    assert ranks("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)") == FAILURE
    assert "rank 1 was killed by SIGKILL (out of memory?)" in capfd.readouterr().err


def test_another_rank_than_0_that_fails_is_named_with_its_log(ranks, capfd):
    assert ranks("sys.exit(3 * rank)") == 3
    assert "rank 1 ended with exit code 3; its log is rank-00001.log" in capfd.readouterr().err


@pytest.mark.parametrize("obeys", [True, False])
def test_the_others_do_not_outlive_a_failure(ranks, capfd, obeys):
    ignore = "" if obeys else "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    start = time.monotonic()
    assert ranks(f"if rank == 0: time.sleep(0.2); sys.exit(5)\n{ignore}time.sleep(60)") == 5
    assert time.monotonic() - start < 10
    assert ("killing rank 1" in capfd.readouterr().err) is not obeys


def test_a_rank_that_stops_on_request_does_not_hurry_the_others(ranks, tmp_path):
    script = f"if rank == 0: time.sleep(1.2); open('saved', 'w')\nsys.exit({STOPPED})"  # longer than both graces
    assert ranks(script) == STOPPED
    assert (tmp_path / "saved").exists()


LAUNCHER = "import sys; from bigtrain_launch import local; sys.exit(local.launch([], 2, port=None, environment={}).code)"
COUNT_SIGNALS = """
import os, signal, sys, time
rank = os.environ['RANK']
def arrived(number, frame):
    with open(f'signals-{rank}', 'a') as file: print(number, file=file)
    if STATE == "trains": time.sleep(0.2); sys.exit(75)
if STATE != "starts":
    signal.signal(signal.SIGINT, arrived)
    signal.signal(signal.SIGTERM, arrived)
    signal.signal(signal.SIGUSR1, arrived)
open(f'ready-{rank}', 'w').write(str(os.getpid()))
for _ in range(1500): time.sleep(0.02)
"""


@pytest.fixture
def launcher(tmp_path):
    """A launcher in a process group of its own with two ranks that count the signals that reach them."""
    started = []

    def start(state: str) -> subprocess.Popen:
        # The launcher needs the real bigtrain and the ranks the stand-in, so the stand-in is only in the ranks' way.
        stand_in = tmp_path / "ranks/bigtrain"
        stand_in.mkdir(parents=True)
        (stand_in / "__main__.py").write_text(f"STATE = {state!r}\n{COUNT_SIGNALS}")
        code = f"import bigtrain.errors, os; os.environ['PYTHONPATH'] = '{stand_in.parent}'; {LAUNCHER}"
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launch'}"}
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, start_new_session=True, stderr=-1, text=True
        )
        started.append(process)
        until(lambda: all((tmp_path / f"ready-{rank}").exists() and (tmp_path / f"ready-{rank}").read_text() for rank in (0, 1)))
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_every_rank_once_and_their_saving_is_waited_for(launcher, tmp_path, number):
    process = launcher("trains")
    os.killpg(process.pid, number)  # as a terminal does: to everyone in the launcher's group
    process.send_signal(signal.SIGTERM)  # as a scheduler may do: once more
    assert process.wait(20) == STOPPED
    for rank in (0, 1):
        assert len((tmp_path / f"signals-{rank}").read_text().split()) == 1


def test_a_second_ctrl_c_kills(launcher, tmp_path):
    process = launcher("hangs")
    process.send_signal(signal.SIGINT)
    until(lambda: (tmp_path / "signals-0").exists() and (tmp_path / "signals-1").exists())
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == FAILURE
    assert "killing the ranks" in process.stderr.read()


def test_ranks_die_with_a_killed_launcher(launcher, tmp_path):
    process = launcher("hangs")
    pids = [int((tmp_path / f"ready-{rank}").read_text()) for rank in (0, 1)]
    assert all(map(is_alive, pids))
    process.kill()
    until(lambda: not any(map(is_alive, pids)))


def test_ranks_that_a_signal_ends_while_they_still_start_have_stopped_on_request(launcher):
    process = launcher("starts")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == STOPPED
