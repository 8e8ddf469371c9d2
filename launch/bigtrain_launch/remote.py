"""The ranks of one start on many machines, as local.watch sees those of one."""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from bigtrain_launch.channel import Message
from bigtrain_launch.local import Exit, say
from bigtrain_launch.strays import ATTEMPT, RUN

POLL_SECONDS = 0.05
KILL_SECONDS = 5.0  # for an agent to confirm that its ranks are dead


@dataclass(frozen=True)
class Node:
    """A machine of a run, and how many ranks it gets."""

    name: str
    ranks: int


class Links(Protocol):
    """What is to be had of the machines here; see cluster.Cluster."""

    show: Callable[[str], None]

    def poll(self, seconds: float) -> list[tuple[str, Message]]: ...

    def send(self, name: str, kind: str, /, **facts: Any) -> None: ...

    def lost(self, name: str) -> str | None: ...

    def drop(self, name: str, why: str) -> None: ...


class Meeting(NamedTuple):
    """Where the ranks meet, as seen from one machine."""

    address: str
    port: int
    towards: str | None
    """Another machine that its ranks talk to; None where there is none."""


class Remote:
    """The ranks of one start on all machines (a local.Group). When this context ends, so have they."""

    def __init__(self, cluster: Links, nodes: Sequence[Node], show_first: bool):
        self._cluster, self._nodes, self._show_first = cluster, nodes, show_first
        self._token = secrets.token_hex(8)
        numbers = itertools.count()
        self._left = {node.name: set(itertools.islice(numbers, node.ranks)) for node in nodes}
        self.running = set(range(next(numbers)))

    def start(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        meeting: Mapping[str, Meeting],
        run: str,
        tail: int,
    ) -> None:
        for number, node in enumerate(self._nodes):
            place = meeting[node.name]
            numbers = {
                "WORLD_SIZE": len(self.running),
                "LOCAL_WORLD_SIZE": node.ranks,
                "NODE_RANK": number,
                "MASTER_ADDR": place.address,
                "MASTER_PORT": place.port,
                ATTEMPT: self._token,
                RUN: run,
            }
            self._cluster.send(
                node.name,
                "start",
                token=self._token,
                argv=list(argv),
                folder=os.getcwd(),
                ranks=sorted(self._left[node.name]),
                environment={**environment, **{key: str(value) for key, value in numbers.items()}},
                machines=len(self._nodes),
                towards=place.towards,
                show=[0] if self._show_first else [],
                tail=tail,
            )

    def ended(self, seconds: float) -> list[Exit]:
        exits = []
        for name, message in self._cluster.poll(seconds):
            if message.get("token") != self._token:
                continue  # the last words of an earlier start
            if message["kind"] == "output":
                self._cluster.show(message["text"])
            elif message["kind"] == "note":
                say(f"{name}: {message['text']}")
            elif message["kind"] == "refused":
                exits += self._lose(name, f"{name} cannot start ranks: {message['why']}")
            elif message["kind"] == "ended" and message["rank"] in self._left[name]:
                self._left[name].remove(message["rank"])
                exits.append(Exit(message["rank"], message["code"], name, None, message["tail"]))
        for name, left in self._left.items():
            if left and (why := self._cluster.lost(name)):
                exits += self._lose(name, f"{name} is gone: {why}")
        self.running.difference_update(one.rank for one in exits)
        return exits

    def send(self, number: int) -> None:
        for name in self._busy():
            self._cluster.send(name, "signal", token=self._token, number=int(number))

    def _lose(self, name: str, why: str) -> list[Exit]:
        """A machine is lost, with all its ranks that have not ended."""
        lost, self._left[name] = sorted(self._left[name]), set()
        return [Exit(rank, -signal.SIGKILL, name, why) for rank in lost]

    def _busy(self) -> list[str]:
        return [name for name, left in self._left.items() if left]

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *exception: object) -> None:
        self.send(signal.SIGKILL)
        until = time.monotonic() + KILL_SECONDS
        while self.running and time.monotonic() < until:
            self.ended(POLL_SECONDS)
        for name in self._busy():
            self._cluster.drop(name, "its agent did not end its ranks")
