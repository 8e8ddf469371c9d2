"""Machines that are processes of this one: real agents, each over a pair of pipes, without ssh."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bigtrain_launch.channel import Channel, Message
from bigtrain_launch.cluster import Cluster
from bigtrain_launch.local import Signals

ROOT = Path(__file__).parents[2]
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
