"""What runs on a machine for its launcher: `python -m bigtrain_launch.agent` starts ranks there, passes signals on to them, and
tells how they end. It decides nothing, and when its launcher is gone it kills them and ends.

It talks over its standard input and output (ssh), or, with BIGTRAIN_LAUNCHER and BIGTRAIN_TOKEN set, over TCP. It imports little:
hundreds of agents may be starting from one file system.

    from the launcher            to it
    open port name          port, nonce, ways: where the ranks may meet, to be tried out (meeting.py); or problem
    knock ways port nonce   address: by which that place is reached from here; or problem
    met                     visitor: the address of someone who came there
    time; facts             what the clock says; what facts.py finds out
    start ranks argv ...    output of rank 0, ended for each rank, with the end of what it printed; or refused
    signal number           nothing; SIGKILL reaches all that a rank has started
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from bigtrain import __version__, hardware
from bigtrain.errors import DONE, FAILURE, BigtrainError, UserError
from bigtrain_launch import meeting, strays
from bigtrain_launch.channel import PROTOCOL, Channel, Message
from bigtrain_launch.environment import Place, rank_environment
from bigtrain_launch.listener import ADDRESS, TOKEN, join
from bigtrain_launch.local import Processes, Signals, checked_port, free_port

JOIN_SECONDS = 120.0  # for a launcher that starts later than its agents
KNOCK_SECONDS = 4.0  # for each address that is tried
POLL_SECONDS = 0.1
SOON_SECONDS = 0.005  # the order in which ranks end, on different machines, says who was first
READ_BYTES = 1 << 16
BACKLOG_BYTES = 1 << 20  # a launcher that does not keep up: ranks have to wait until their output is taken


class Agent:
    """Answers one launcher until it is gone. Made and run by the main thread: Linux ends the ranks when that ends."""

    def __init__(self, channel: Channel, signals: Signals):
        self._channel, self._signals = channel, signals
        self._selector = selectors.PollSelector()  # epoll takes no files
        self._selector.register(channel, selectors.EVENT_READ)
        self._door: meeting.Door | None = None
        self._job: _Job | None = None
        self.signalled = False
        """Something on this machine has asked for the end."""

    def run(self) -> None:
        """Returns when the launcher is gone, and no rank is left."""
        try:
            while not self._channel.lost:
                self._selector.select(SOON_SECONDS if self._job and self._job.ending else POLL_SECONDS)
                for message in self._channel.receive():
                    self._answer(message)
                for number in self._signals.take():
                    self.signalled = True
                    self._channel.send("signalled", number=int(number))
                if self._door:
                    self._door.answer()
                if self._channel.backlog > BACKLOG_BYTES:
                    time.sleep(POLL_SECONDS)
                elif self._job:
                    self._job.report()
        finally:
            if self._job:
                self._job.end()

    def _answer(self, message: Message) -> None:
        kind, token = message["kind"], message.get("token")
        questions: dict[str, Callable[[Message], dict[str, Any]]] = {
            "open": self._open,
            "knock": lambda message: meeting.knock(message["ways"], message["port"], message["nonce"], KNOCK_SECONDS),
            "met": self._met,
            "time": lambda message: {"time": time.time()},
            "facts": self._facts,
        }
        if kind in questions:
            self._channel.send("answer", token=token, **questions[kind](message))
        elif kind == "start":
            self._start(message)
        elif kind == "signal" and self._job and self._job.token == token:
            self._job.signal(message["number"])

    def _open(self, message: Message) -> dict[str, Any]:
        try:
            self._door = meeting.Door(free_port() if message["port"] is None else checked_port(message["port"]))
        except (UserError, OSError):
            return {"problem": f"{message['port'] or 'every port from 20000 to 29999'} is in use"}
        return {"port": self._door.port, "nonce": self._door.nonce, "ways": meeting.ways_here(message["name"])}

    def _met(self, message: Message) -> dict[str, Any]:
        door, self._door = self._door, None
        if door is None:
            return {}
        door.close()
        return {"visitor": door.visitor}

    def _facts(self, message: Message) -> dict[str, Any]:
        from bigtrain_launch.facts import collect

        return {"facts": collect(message["asked"])}

    def _start(self, message: Message) -> None:
        if self._job:
            self._job.end()
        try:
            self._job = _Job(message, self._channel, self._selector)
        except OSError as error:
            self._channel.send("refused", token=message["token"], why=f"{error.filename or sys.executable}: {error.strerror}")
        except BigtrainError as error:
            self._channel.send("refused", token=message["token"], why=str(error))


class _Job:
    """The ranks of one start on this machine."""

    def __init__(self, message: Message, channel: Channel, selector: selectors.BaseSelector):
        """Raises OSError or BigtrainError when they cannot be started."""
        self.token, self._show, self._keep = message["token"], set(message["show"]), message["tail"]
        self._channel, self._selector = channel, selector
        os.chdir(message["folder"])
        environment = {**os.environ, **message["environment"], strays.AGENT: strays.myself()}
        place = Place(hardware.look(), len(message["ranks"]), message["machines"], message["towards"])
        environment |= {setting.name: setting.value for setting in rank_environment(place, environment)}
        if found := strays.end(environment):
            many = "es" * (found > 1)
            channel.send("note", token=self.token, text=f"ended {found} process{many} that an earlier start of this run had left")
        ranks = {r: {**environment, "RANK": str(r), "LOCAL_RANK": str(n)} for n, r in enumerate(message["ranks"])}
        self._processes = Processes(message["argv"], ranks, output=subprocess.PIPE)
        self._pipes = {rank: process.stdout for rank, process in self._processes.running.items()}
        self._tails = {rank: b"" for rank in self._pipes}
        for pipe in self._pipes.values():
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ)

    @property
    def ending(self) -> bool:
        """A rank prints no more, but has not ended yet."""
        return len(self._pipes) < len(self._processes.running)

    def report(self) -> None:
        """Tell what the ranks have printed, and which have ended."""
        for rank in list(self._pipes):
            self._read(rank)
        for one in self._processes.ended(0):
            self._read(one.rank)
            self._forget(one.rank)  # what the rank has started may keep the pipe open
            tail = self._tails[one.rank].decode("utf-8", "replace")
            self._channel.send("ended", token=self.token, rank=one.rank, code=one.code, tail=tail)

    def signal(self, number: int) -> None:
        if number == signal.SIGKILL:
            self._processes.kill()
        else:
            self._processes.send(number)

    def end(self) -> None:
        self._processes.kill()
        for rank in list(self._pipes):
            self._forget(rank)

    def _read(self, rank: int) -> None:
        try:
            text = os.read(self._pipes[rank].fileno(), READ_BYTES) if rank in self._pipes else b""
        except BlockingIOError:
            return
        if not text:
            self._forget(rank)
        elif rank in self._show:
            self._channel.send("output", token=self.token, text=text.decode("utf-8", "surrogateescape"))
        else:
            self._tails[rank] = (self._tails[rank] + text)[-self._keep :]

    def _forget(self, rank: int) -> None:
        if pipe := self._pipes.pop(rank, None):
            self._selector.unregister(pipe)
            pipe.close()


def greeting() -> Message:
    """What an agent says first."""
    return {
        "kind": "hello",
        "protocol": PROTOCOL,
        "version": __version__,
        "node": os.environ.get("BIGTRAIN_NODE") or os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": sys.executable,
    }


def main() -> int:
    """Serve the launcher that has started this process, or that the environment names."""
    address, token = os.environ.pop(ADDRESS, None), os.environ.pop(TOKEN, "")  # the ranks need neither
    with Signals() as signals:
        if address:
            channel = join(address, token, greeting(), JOIN_SECONDS)
        else:
            channel = _standard_streams()
            channel.send(**greeting())
        Agent(channel, signals).run()
    return DONE


def _standard_streams() -> Channel:
    """The channel over this process's standard input and output; whatever else would use them gets nothing, and standard error."""
    reader, writer = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    os.write(writer, b"\n")  # ends what a shell has printed without an end of line
    return Channel(reader, writer)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BigtrainError as error:
        print(f"bigtrain: {error}", file=sys.stderr)
        sys.exit(FAILURE)
