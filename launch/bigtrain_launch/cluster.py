"""Many machines as one: an agent on each, reached through a channel, and the ranks that the agents start.

How an agent comes to a machine is a transport's business (hosts.py: ssh). This process must see the same file system as the
machines, at the same paths, and agents work in its working directory.
"""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from bigtrain.errors import BAD_NODE, StopRequested, UserError
from bigtrain_launch.channel import PROTOCOL, Channel, Message
from bigtrain_launch.local import End, Exit, Signals, say, watch

CONNECT_SECONDS = 30.0
"""For an agent to answer after it was started; with a scheduler that starts it, and a cold disk, this is little."""
ANSWER_SECONDS = 20.0  # for a question to an agent
KILL_SECONDS = 5.0  # for an agent to confirm that its ranks are dead
TAIL_BYTES = 1 << 13  # of what a rank printed, kept in case that it fails
ANSWER_BYTES = 1 << 20  # the same for a rank that answers in JSON
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Node:
    """A machine of a run, and how many ranks it gets."""

    name: str
    ranks: int


class Transport(Protocol):
    """How agents come to machines. Nothing here waits."""

    def start(self, names: Sequence[str]) -> None:
        """Begin to start agents on these machines; one that is still there from before on a machine is ended, or ends by itself."""

    def connected(self) -> list[tuple[str, Message, Channel]]:
        """Agents that have come since the last call: the machine's name, their greeting, their channel."""

    def failed(self) -> list[tuple[str, str]]:
        """Machines of which it is clear since the last call that no agent will come, and why, in a line."""

    def close(self) -> None:
        """Let go of all machines."""


class Cluster:
    """The machines that a transport reaches. To be used as a context, from the main thread.

    `signals`, collected by the caller, go to the ranks while there are some; else every method raises StopRequested for one.
    `show` gets what rank 0 prints.
    """

    def __init__(self, transport: Transport, signals: Signals, show: Callable[[str], None] | None = None):
        self._transport, self.signals, self.show = transport, signals, show or _to_screen
        self._channels: dict[str, Channel] = {}
        self._greetings: dict[str, Message] = {}
        self._lost: dict[str, str] = {}
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exception: object) -> None:
        for name in list(self._channels):
            self.drop(name, "closed")
        self._transport.close()
        self._selector.close()

    def connect(self, names: Sequence[str], seconds: float = CONNECT_SECONDS) -> dict[str, str]:
        """Have an agent on each of these machines. Returns those of which none can be had, and why, in a line each."""
        awaited = {name for name in names if name not in self._channels}
        failed: dict[str, str] = {}
        if not awaited:
            return failed
        self._transport.start([name for name in names if name in awaited])
        until = time.monotonic() + seconds
        while awaited:
            for name, greeting, channel in self._transport.connected():
                if name not in awaited:
                    channel.close()
                elif greeting.get("protocol") != PROTOCOL:
                    there = greeting.get("version", "another version")
                    failed[name] = f"bigtrain {there} there does not fit this one: install the same version on all machines"
                    channel.close()
                else:
                    self._add(name, greeting, channel)
            failed |= {name: why for name, why in self._transport.failed() if name in awaited}
            if time.monotonic() > until:
                failed |= {name: f"no agent has answered for {seconds:.0f} s" for name in awaited - set(self._channels)}
            awaited -= {*self._channels, *failed}
            if awaited:
                self.poll(POLL_SECONDS)
                self._heed_signals()
        return failed

    def greeting(self, name: str) -> Message:
        """What the agent of a connected machine said first: host, pid, python, version, addresses."""
        return self._greetings[name]

    def attempt(
        self,
        nodes: Sequence[Node],
        argv: Sequence[str],
        environment: Mapping[str, str],
        *,
        defaults: Mapping[str, str] | None = None,
        run: str = "",
        port: int | None = None,
    ) -> End:
        """Run `python -m bigtrain *argv` as ranks on connected machines, rank 0 on the first, and return how they ended.

        environment: variables of the ranks. defaults: the same, where a machine does not set them itself. run: folder of the run;
        what an earlier start of it has left on the machines is ended first. port: where the ranks meet, on the first machine; left
        out, a free one. Signals, time limits and exit codes are as in local.launch. Raises UserError when the port is taken.
        """
        meeting = self._meet(nodes, port)
        if isinstance(meeting, End):
            return meeting
        ranks = _Remote(self, nodes, shown=True)
        ranks.start(["-m", "bigtrain", *argv], environment, defaults or {}, meeting, run, TAIL_BYTES)
        try:
            end = watch(ranks, self.signals)
        finally:
            ranks.kill()
        if ranks.refused:
            name, why = next(iter(ranks.refused.items()))
            return replace(end, host=name, suspects=tuple(ranks.refused), reason=f"{name}: {why}")
        return end

    def gather(
        self, nodes: Sequence[Node], module: str, argv: Sequence[str], environment: Mapping[str, str], seconds: float
    ) -> dict[int, dict[str, Any]]:
        """Run `python -m MODULE *argv` as ranks, as `attempt` does, and return the JSON object that each printed last, by rank.
        Who did not answer in time, or is on a machine that is gone or does not reach the first, is missing."""

    def facts(self, nodes: Sequence[Node], asked: Mapping[str, Any], seconds: float = ANSWER_SECONDS) -> dict[str, dict[str, Any]]:
        """What the agents find out about their machines (facts.py), by name, with `clock`: how many seconds theirs is ahead of
        ours, to within `round_trip`. Who did not answer in time is missing."""
