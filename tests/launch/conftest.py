"""Machines that are processes of this one: real agents, each over a pair of pipes, without ssh. And what tests of jobs need: a run's
folder, stand-ins for a scheduler's commands, and processes that are gone at the end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bigtrain.runfolder import RunFolder, write_record
from bigtrain_launch import jobs
from bigtrain_launch.channel import Channel, Message
from bigtrain_launch.cluster import Cluster
from bigtrain_launch.local import Signals

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "launch")))
PATH = f"{ROOT}{os.pathsep}{ROOT / 'launch'}"


class Pipes:
    """A transport to agents on this machine. `dead` names cannot be had."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.agents: dict[str, subprocess.Popen] = {}
        self.dead: dict[str, str] = {}
        self._channels: dict[str, Channel] = {}
        self._failed: list[tuple[str, str]] = []

    def start(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self.dead:
                self._failed.append((name, self.dead[name]))
                continue
            command = [sys.executable, "-m", "bigtrain_launch.agent"]
            environment = {**os.environ, "PYTHONPATH": PATH, "BIGTRAIN_NODE": name}
            with open(self._folder / f"{name}.errors", "w") as errors:
                agent = subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, stderr=errors, start_new_session=True, cwd="/")
            self._channels[name] = Channel(os.dup(agent.stdout.fileno()), os.dup(agent.stdin.fileno()))
            agent.stdin.close()
            agent.stdout.close()
            self.agents[name] = agent

    def connected(self) -> list[tuple[str, Message, Channel]]:
        come = [(name, greeting, channel) for name, channel in self._channels.items() if (greeting := channel.next(0))]
        for name, *_ in come:
            del self._channels[name]
        return come

    def failed(self) -> list[tuple[str, str]]:
        failed, self._failed = self._failed, []
        return failed

    def close(self) -> None:
        for agent in self.agents.values():
            agent.wait(20)  # it has noticed


@pytest.fixture
def pipes(tmp_path) -> Iterator[Pipes]:
    transport = Pipes(tmp_path)
    yield transport
    for agent in transport.agents.values():
        agent.kill()
        agent.wait()


@pytest.fixture
def cluster(pipes, shown) -> Iterator[Cluster]:
    """A cluster over `pipes`."""
    with Signals() as signals, Cluster(pipes, signals, shown.append) as made:
        yield made


@pytest.fixture
def shown() -> list[str]:
    """What rank 0 has printed."""
    return []


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "runs/one")
    run.path.mkdir(parents=True)
    return run


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Put a command on the path: tool("squeue", "echo hello"). What it was called with is in `tool.calls`. Nothing else is found:
    this machine may have a Slurm."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("cat", "head", "sleep", "yes"):
        (folder / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(folder))

    def make(name: str, script: str) -> None:
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\n{script}\n')
        (folder / name).chmod(0o755)

    make.calls = lambda: (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    return make


@pytest.fixture
def process():
    """Start processes that are gone at the end."""
    started = []

    def start(code: str, *argv: str, **options) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": PATHS}
        started.append(subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], text=True, env=environment, **options))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.wait()


@pytest.fixture
def attempt():
    """Leave behind what an attempt of a run would: attempt(run, 1, "its log", exit_code=0)."""

    def make(run: RunFolder, number: int, log: str = "", **facts) -> None:
        (run.attempt(number) / "logs").mkdir(parents=True)
        run.log(number, 0).write_text(log)
        write_record(run.record(number), {"started": time.time(), **facts})

    return make


@pytest.fixture
def put():
    """Record a job of a run: put(run, "slurm", "4711")."""

    def make(run: RunFolder, kind: str, id: str, **facts) -> jobs.Job:
        jobs.record(run, kind, id, **facts)
        return jobs.read(run)[-1]

    return make


@pytest.fixture
def bigtrain():
    """Run `bigtrain` with these arguments."""

    def run(*argv: str, **options) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": PATHS}
        options = {"env": environment, "text": True, "capture_output": True, "timeout": 60, "cwd": ROOT} | options
        return subprocess.run([sys.executable, "-m", "bigtrain", *argv], **options)

    return run


@pytest.fixture
def until():
    """Wait until a function returns something, and return that."""

    def wait(condition, seconds: float = 30.0):
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.01)
        return found

    return wait
