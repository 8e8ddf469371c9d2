"""Many machines as one: an agent on each, reached through a channel, and the ranks that the agents start.

How an agent comes to a machine is a transport's business (hosts.py: ssh). This process must see the same file system as the
machines, at the same paths, and agents work in its working directory.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import selectors
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from bigtrain.errors import BAD_NODE, DONE, StopRequested, UserError
from bigtrain_launch.channel import PROTOCOL, Channel, Message, last_lines
from bigtrain_launch.local import GRACE_SECONDS, End, Signals, say, watch
from bigtrain_launch.remote import POLL_SECONDS, Meeting, Node, Remote

CONNECT_SECONDS = 30.0
"""For an agent to answer after it was started; with a scheduler that starts it, and a cold disk, this is little."""
ANSWER_SECONDS = 20.0  # for a question to an agent
TAIL_BYTES = 1 << 13  # of what a rank printed, kept in case that it fails
ANSWER_BYTES = 1 << 20  # the same for a rank that answers in JSON


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
    `show` gets what rank 0 prints. `patience`: for an agent to come, in seconds.
    """

    def __init__(
        self, transport: Transport, signals: Signals, show: Callable[[str], None] | None = None, patience: float = CONNECT_SECONDS
    ):
        self._transport, self.signals, self.show, self._patience = transport, signals, show or _to_screen, patience
        _allow_descriptors()
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

    def connect(self, names: Sequence[str]) -> dict[str, str]:
        """Have an agent on each of these machines. Returns those of which none can be had, and why, in a line each."""
        awaited = {name for name in names if name not in self._channels}
        failed: dict[str, str] = {}
        if not awaited:
            return failed
        self._transport.start([name for name in names if name in awaited])
        until = time.monotonic() + self._patience
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
                failed |= {name: f"no agent has answered for {self._patience:.0f} s" for name in awaited - set(self._channels)}
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
        run: str = "",
        port: int | None = None,
    ) -> End:
        """Run `python -m bigtrain *argv` as ranks on connected machines, rank 0 on the first, and return how they ended.

        environment: variables of the ranks, on top of a machine's own; environment.py adds to both. run: folder of the run; what
        an earlier start of it has left on the machines is ended first. port: where the ranks meet, on the first machine; left out,
        a free one. Signals, time limits and exit codes are as in local.launch. Raises UserError when the port is taken.
        """
        meeting, apart = self._meet(nodes, port)
        if apart:
            for why in apart.values():
                say(why)
            return End(BAD_NODE, suspects=tuple(apart), gone=tuple(apart), reason="; ".join(apart.values()))
        with Remote(self, nodes, show_first=True) as ranks:
            ranks.start(["-m", "bigtrain", *argv], environment, meeting, run, TAIL_BYTES)
            return watch(ranks, self.signals)

    def run(self, nodes: Sequence[Node], argv: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
        """Run `python -m bigtrain *argv` once on each of these connected machines. Returns those where it failed, and what was the
        matter, in a line each."""
        failed = {}
        alone = {node.name: Meeting("127.0.0.1", 0, None) for node in nodes}
        with Remote(self, [Node(node.name, 1) for node in nodes], show_first=False) as ranks:
            ranks.start(["-m", "bigtrain", *argv], environment, alone, "", TAIL_BYTES)
            while ranks.running:
                for one in ranks.ended(POLL_SECONDS):
                    if one.code != DONE:
                        failed[one.host] = one.gone or f"`bigtrain {argv[0]}` failed there: {last_lines(one.tail)}"
                self._heed_signals()
        return failed

    def gather(
        self, nodes: Sequence[Node], module: str, argv: Sequence[str], environment: Mapping[str, str], seconds: float
    ) -> dict[int, dict[str, Any]]:
        """Run `python -m MODULE *argv` as ranks, as `attempt` does, and return the JSON object that each printed last, by rank.

        Missing is who printed none, or did not end in time; after a failure the others have GRACE_SECONDS. Empty when machines do not
        reach the first: `apart` says which.
        """
        meeting, apart = self._meet(nodes, None)
        if apart:
            return {}
        answers: dict[int, dict[str, Any]] = {}
        until = time.monotonic() + seconds
        with Remote(self, nodes, show_first=False) as ranks:
            ranks.start(["-m", module, *argv], environment, meeting, "", ANSWER_BYTES)
            while ranks.running and time.monotonic() < until:
                for one in ranks.ended(POLL_SECONDS):
                    if (answer := _last_object(one.tail)) is not None:
                        answers[one.rank] = answer
                    if one.code != DONE:
                        until = min(until, time.monotonic() + GRACE_SECONDS)
                self._heed_signals()
        return answers

    def apart(self, nodes: Sequence[Node]) -> dict[str, str]:
        """Machines that do not reach the first of these connected ones over the network, and why, in a line each. Where none of
        several does, it is the first that is named."""
        return self._meet(nodes, None)[1]

    def facts(self, nodes: Sequence[Node], asked: Mapping[str, Any], seconds: float = ANSWER_SECONDS) -> dict[str, dict[str, Any]]:
        """What the agents find out about their machines (facts.py), by name, with `clock`: how many seconds theirs is ahead of
        ours, to within `round_trip`. Who did not answer in time is missing."""
        names = [node.name for node in nodes]
        clocks = self._ask(names, "time", ANSWER_SECONDS)
        answers = self._ask(names, "facts", seconds, asked=dict(asked))
        return {name: {**answers[name]["facts"], **_clock(clocks.get(name))} for name in names if name in answers}

    def poll(self, seconds: float) -> list[tuple[str, Message]]:
        """Messages that have come from the agents, waited for at most so long. Who is gone is dropped."""
        self._selector.select(seconds)
        messages = []
        for name, channel in list(self._channels.items()):
            for message in channel.receive():
                if message["kind"] == "signalled":  # a scheduler has told the agent instead of us
                    self.signals.add(int(message["number"]))
                else:
                    messages.append((name, {**message, "arrived": time.time()}))
            if channel.lost:
                self.drop(name, channel.lost)
        return messages

    def send(self, name: str, kind: str, /, **facts: Any) -> None:
        """Tell a machine's agent something; one that is gone is told nothing."""
        if name in self._channels:
            self._channels[name].send(kind, **facts)

    def lost(self, name: str) -> str | None:
        """Why a machine is not connected any more, None where it is."""
        return None if name in self._channels else self._lost.get(name, "it was never there")

    def drop(self, name: str, why: str) -> None:
        """Part with a machine: its agent kills its ranks, and ends."""
        channel = self._channels.pop(name)
        self._selector.unregister(channel)
        channel.close()
        self._lost[name] = why

    def _add(self, name: str, greeting: Message, channel: Channel) -> None:
        self._channels[name], self._greetings[name] = channel, greeting
        self._selector.register(channel, selectors.EVENT_READ)

    def _ask(self, names: Sequence[str], kind: str, seconds: float, **facts: Any) -> dict[str, Message]:
        """Ask machines something, and return their answers; who did not answer in time is missing."""
        token, until, sent = secrets.token_hex(8), time.monotonic() + seconds, time.time()
        for name in names:
            self.send(name, kind, token=token, **facts)
        answers: dict[str, Message] = {}
        while time.monotonic() < until and any(name in self._channels for name in names if name not in answers):
            answers |= {name: {**m, "sent": sent} for name, m in self.poll(POLL_SECONDS) if m.get("token") == token}
            self._heed_signals()
        return answers

    def _meet(self, nodes: Sequence[Node], port: int | None) -> tuple[dict[str, Meeting], dict[str, str]]:
        """Agree on where the ranks meet, by trying it out: (by machine the way there; who does not get there, and why)."""
        first, *others = [node.name for node in nodes]
        opened = self._ask([first], "open", ANSWER_SECONDS, port=port, name=first.rpartition("@")[2]).get(first)
        if opened is None:
            return {}, {first: f"{first} is gone: {self.lost(first) or 'its agent does not answer'}"}
        if "problem" in opened:
            raise UserError(f"launch.port: {opened['problem']} on {first}; choose another, or leave it out and a free one is taken")
        place = {key: opened[key] for key in ("ways", "port", "nonce")}
        answers = self._ask(others, "knock", ANSWER_SECONDS, **place) if others else {}
        visitor = self._ask([first], "met", ANSWER_SECONDS).get(first, {}).get("visitor")
        apart = {}
        for name in others:
            if "address" not in (answer := answers.get(name, {})):
                why = answer.get("problem") or self.lost(name) or "its agent does not answer"
                apart[name] = f"{name} does not reach {first}, where rank 0 is to be: {why}"
        if len(apart) == len(others) > 1:
            apart = {first: f"no machine reaches {first}, where rank 0 is to be: {next(iter(apart.values())).partition(': ')[2]}"}
        reached = {name: answer["address"] for name, answer in answers.items() if "address" in answer}
        meeting = {name: Meeting(address, opened["port"], address) for name, address in reached.items()}
        return {first: Meeting(next(iter(reached.values()), "127.0.0.1"), opened["port"], visitor), **meeting}, apart

    def _heed_signals(self) -> None:
        if any(True for _ in self.signals.take()):
            raise StopRequested("stopped on request while no rank was running; the same command goes on")


def _allow_descriptors() -> None:
    """Let this process open as many files as it may: a machine takes three, and 1,024 are the usual limit."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):  # some systems call it unlimited, and are not
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _clock(answer: Message | None) -> dict[str, float]:
    if answer is None or "time" not in answer:
        return {}
    return {"clock": answer["time"] - (answer["sent"] + answer["arrived"]) / 2, "round_trip": answer["arrived"] - answer["sent"]}


def _last_object(text: str) -> dict[str, Any] | None:
    """The last line that is a JSON object; what libraries print as they end comes after it."""
    for line in reversed(text.splitlines()):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return None


def _to_screen(text: str) -> None:
    rest = memoryview(text.encode("utf-8", "surrogateescape"))
    with suppress(OSError):  # nobody reads: not worth a run
        sys.stdout.flush()
        while rest:
            rest = rest[os.write(1, rest) :]
