"""An agent by itself: over TCP, without a launcher, with one that goes. What it does for one is in test_cluster.py."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from bigtrain.runfolder import process_start
from bigtrain_launch.channel import Channel
from bigtrain_launch.listener import Listener

ROOT = Path(__file__).parents[2]
PATH = f"{ROOT}{os.pathsep}{ROOT / 'launch'}"
START = {"argv": ["-c", ""], "ranks": [0], "environment": {}, "machines": 1, "towards": None, "show": [0], "tail": 100, "token": "t"}


@pytest.fixture
def agent():
    """Starts an agent: agent(**its environment) -> the process."""
    started = []

    def start(**environment: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "bigtrain_launch.agent"]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env={**os.environ, "PYTHONPATH": PATH, **environment}, cwd="/", **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def called(agent):
    """An agent that has come to this process over TCP: (process, its greeting, channel)."""
    listener = Listener("the token")
    process = agent(BIGTRAIN_LAUNCHER=f"127.0.0.1:{listener.port}", BIGTRAIN_TOKEN="the token", BIGTRAIN_NODE="n7")
    end = time.monotonic() + 30
    while not (come := listener.accepted()):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    yield process, *come[0]
    come[0][1].close()
    listener.close()


def answers(channel: Channel, last: str) -> list[dict]:
    """Messages up to one of a kind."""
    found = []
    while not found or found[-1]["kind"] != last:
        message = channel.next(30)
        assert message, (found, channel.lost)
        found.append(message)
    return found


def test_it_comes_over_tcp_and_its_ranks_do_not_learn_the_token(called, tmp_path):
    process, greeting, channel = called
    assert (greeting["node"], greeting["pid"], greeting["python"]) == ("n7", process.pid, sys.executable)
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    channel.send("start", **{**START, "argv": ["-c", show], "folder": str(tmp_path), "environment": {"MINE": "1"}})
    *output, ended = answers(channel, "ended")
    environment = json.loads("".join(message["text"] for message in output))
    assert environment["MINE"] == "1" and environment["RANK"] == environment["LOCAL_RANK"] == "0"
    assert not {"BIGTRAIN_TOKEN", "BIGTRAIN_LAUNCHER"} & set(environment)
    assert ended == {"kind": "ended", "token": "t", "rank": 0, "code": 0, "tail": ""}
    channel.close()
    assert process.wait(20) == 0


def test_it_kills_its_ranks_and_what_they_have_started_when_the_launcher_is_gone(called, tmp_path):
    process, _, channel = called
    script = "import os, subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True); import time; time.sleep(600)"
    channel.send("start", **{**START, "argv": ["-c", script], "folder": str(tmp_path)})
    child = int(answers(channel, "output")[-1]["text"])
    try:
        channel.close()
        assert process.wait(20) == 0
        end = time.monotonic() + 10
        while process_start(child):
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_what_it_is_not_asked_for_by_this_start_it_does_not_do(called, tmp_path):
    _, _, channel = called
    channel.send("start", **{**START, "argv": ["-c", "import time; print('on', flush=True); time.sleep(600)"], "folder": str(tmp_path)})
    answers(channel, "output")
    channel.send("signal", token="an earlier start", number=9)
    channel.send("no such kind")
    channel.send("time", token="q")
    assert answers(channel, "answer")[-1]["token"] == "q"  # and no "ended" before
    channel.send("signal", token="t", number=int(signal.SIGTERM))
    assert answers(channel, "ended")[-1]["code"] == -signal.SIGTERM


def test_a_new_start_ends_the_old_one(called, tmp_path):
    _, _, channel = called
    wait = "import time, os; print(os.getpid(), flush=True); time.sleep(600)"
    channel.send("start", **{**START, "argv": ["-c", wait], "folder": str(tmp_path)})
    before = int(answers(channel, "output")[-1]["text"])
    channel.send("start", **{**START, "token": "u", "folder": str(tmp_path)})
    assert answers(channel, "ended")[-1]["token"] == "u" and process_start(before) is None


def test_without_a_launcher_it_ends(agent):
    process = agent()
    greeting = process.communicate(timeout=20)[0].splitlines()[-1]
    assert process.returncode == 0 and json.loads(greeting)["kind"] == "hello"
