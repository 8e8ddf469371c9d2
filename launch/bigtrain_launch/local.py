"""Start the ranks of a run on this machine, pass signals on to them, and say in one exit code how they ended."""

from __future__ import annotations

import ctypes
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from bigtrain.errors import DONE, FAILURE, HANG, STOPPED, USER_MISTAKE, UserError

GRACE_SECONDS = 10.0  # for the other ranks after one has failed, and once more between SIGTERM and SIGKILL
HANG_SECONDS = 2.0  # for the other ranks' last words after one has found a hang; who does not answer now never will
POLL_SECONDS = 0.05
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1


class Exit(NamedTuple):
    """How one rank has ended."""

    rank: int
    code: int
    """Its exit code; negative: the signal that killed it."""
    host: str | None = None
    """Its machine, where there are several."""
    gone: str | None = None
    """That machine is lost to the run, and why: a sentence that names it."""
    tail: str = ""
    """The last that it printed, where that was not shown."""


@dataclass(frozen=True)
class End:
    """How the ranks of one start have ended, all together."""

    code: int
    """Their common exit code."""
    rank: int | None = None
    """The rank that it comes from, None where all are done."""
    killed_by: int | None = None
    """The signal that killed that rank."""
    asked: bool = False
    """A signal had asked the ranks to stop."""
    host: str | None = None
    """The machine of that rank, where there are several."""
    suspects: tuple[str, ...] = ()
    """Machines to blame: those that are gone, else that of the rank that failed first."""
    gone: tuple[str, ...] = ()
    """Machines that are lost to the run."""
    reason: str | None = None
    """Why, where no rank can say it."""


class Group(Protocol):
    """Ranks that were started together, wherever they run."""

    running: Collection[int]

    def ended(self, seconds: float) -> Sequence[Exit]:
        """Those that have ended since the last call. Waits for at most so long."""

    def send(self, number: int) -> None:
        """Send a signal to those that still run."""


def launch(argv: Sequence[str], ranks: int, *, port: int | None, environment: Mapping[str, str]) -> End:
    """Run `python -m bigtrain *argv` as `ranks` processes on this machine and return how they ended.

    port: where the ranks meet, left out: a free one. environment: variables on top of this process's own, for example what
    environment.py adds. Call it from the main thread: signals are handled here, and Linux ends the ranks when the thread
    that started them ends.

    SIGINT, SIGTERM and SIGUSR1 go to every rank once, and their end is waited for; a second Ctrl-C kills them. The exit code is 2
    where any rank found a user's mistake, else 76 where one found a hang, else that of the rank that failed first (a death
    by signal counts as 1), else 0. Raises UserError when the port is taken.
    """
    shared = {
        **os.environ,
        **environment,
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port() if port is None else checked_port(port)),
    }
    environments = {rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)}
    with Signals() as signals, Processes(["-m", "bigtrain", *argv], environments) as processes:
        return watch(processes, signals)


class Processes:
    """The ranks that run on this machine, each in a session of its own. They end with this process, however that happens, and
    with this context."""

    def __init__(self, argv: Sequence[str], environments: Mapping[int, Mapping[str, str]], output: int | None = None):
        """Run this Python with `argv` once for each of `environments`, by rank. `output`: where they print, as for Popen."""
        self.running: dict[int, subprocess.Popen] = {}
        with ExitStack() as stack:
            stack.callback(self.kill)
            for rank, environment in environments.items():
                # A session of its own keeps the terminal's Ctrl-C from reaching a rank twice: it comes from here, once.
                self.running[rank] = subprocess.Popen(
                    [sys.executable, *argv],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output and subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=die_with_parent(),
                )
            stack.pop_all()

    def ended(self, seconds: float) -> list[Exit]:
        exits = [Exit(rank, process.returncode) for rank, process in self.running.items() if process.poll() is not None]
        for rank, *_ in exits:
            del self.running[rank]
        if not exits:
            time.sleep(seconds)
        return exits

    def send(self, number: int) -> None:
        for process in self.running.values():
            process.send_signal(number)

    def kill(self) -> None:
        """Kill those that still run, with what they have started."""
        for process in self.running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.running.values():
            process.wait()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()


def checked_port(port: int) -> int:
    """The port itself when it can be listened on, else a UserError."""
    if not _is_free(port):
        raise UserError(f"launch.port: {port} is in use on this machine; choose another, or leave it out and a free one is taken")
    return port


def free_port() -> int:
    """A port that nobody listens on, below the range from which the system picks ports for outgoing connections."""
    for _ in range(100):
        port = 20000 + secrets.randbelow(10000)
        if _is_free(port):
            return port
    raise UserError("found no free port between 20000 and 29999 on this machine; set launch.port")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # Connections of an earlier run that are still fading (TIME_WAIT) do not count as use.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def watch(ranks: Group, signals: Signals) -> End:
    """Wait until every rank has ended, or will not; who still runs then is the caller's to kill.

    After a failure the others get GRACE_SECONDS, then SIGTERM, then SIGKILL; after a hang, or with a machine gone, only
    HANG_SECONDS, then SIGKILL: a rank that is stopped, or waits for one that is gone, would not even see the SIGTERM.
    """
    exits: list[Exit] = []
    forwarded = None  # the signal that asked the ranks to stop
    deadline, terminated, hanging = math.inf, False, False
    while ranks.running:
        for one in ranks.ended(POLL_SECONDS):
            # A rank that was still starting dies of the signal: that is a stop too, there is nothing to save.
            exits.append(one._replace(code=STOPPED) if forwarded and one.code == -forwarded else one)
            if one.code == HANG or one.gone:
                deadline, hanging = min(deadline, time.monotonic() + HANG_SECONDS), True
            elif one.code not in (DONE, STOPPED):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        for number in signals.take():
            if forwarded is None:
                forwarded = number
                ranks.send(number)
                if number == signal.SIGINT:
                    say("asked the ranks to save and stop; Ctrl-C again kills them")
            elif number == signal.SIGINT:
                say("killing the ranks")
                return End(FAILURE, asked=True)
        if ranks.running and time.monotonic() > deadline:
            if terminated or hanging:
                seconds = HANG_SECONDS if hanging else 2 * GRACE_SECONDS
                named = ", ".join(map(str, sorted(ranks.running)[:10])) + (", ..." if len(ranks.running) > 10 else "")
                say(f"killing rank {named}: still running {seconds:.0f} s after another had failed")
                break
            ranks.send(signal.SIGTERM)
            deadline, terminated = time.monotonic() + GRACE_SECONDS, True
    return outcome(exits, asked=forwarded is not None)


def outcome(exits: Sequence[Exit], asked: bool) -> End:
    """The end that means most, of those of the ranks in the order in which they came. What the screen does not show yet is said."""
    failed = [one for one in exits if one.code != DONE]
    if not failed:
        return End(DONE, asked=asked)
    # Whoever loses another rank may be seen to end before it; SIGTERM may be our own.
    kinds = (
        lambda one: one.code == USER_MISTAKE,
        lambda one: one.code == HANG and one.tail,  # who found it, and says so
        lambda one: one.code == HANG,
        lambda one: one.gone,
        lambda one: one.code < 0 and one.code != -signal.SIGTERM,
        lambda one: True,
    )
    first = next(one for kind in kinds for one in failed if kind(one))
    gone = tuple(dict.fromkeys(one.host for one in failed if one.gone and one.host))
    suspects = gone or ((first.host,) if first.host and first.code not in (USER_MISTAKE, STOPPED, HANG) else ())
    end = End(max(first.code, FAILURE), first.rank, max(0, -first.code) or None, asked, first.host, suspects, gone)
    who = f"rank {first.rank} on {first.host}" if first.host else f"rank {first.rank}"
    if first.gone:
        say(first.gone)
        end = replace(end, killed_by=None, reason=first.gone)
    elif first.code < 0:
        say(f"{who} {killed_by(-first.code)}")
    elif first.code != STOPPED and (first.tail or (first.code != HANG and first.rank != 0)):
        # Rank 0 has the screen and has said so itself; on one machine so has who found a hang.
        log = f"; its log is rank-{first.rank:05d}.log in the run's newest attempts/*/logs"
        say(f"{who} ended with exit code {first.code}{log if first.code != USER_MISTAKE else ''}")
    if first.tail and first.code != STOPPED:
        print(first.tail.rstrip(), file=sys.stderr, flush=True)
    return end


def killed_by(number: int) -> str:
    """A death by signal in words."""
    return f"was killed by {signal.Signals(number).name}{' (out of memory?)' if number == signal.SIGKILL else ''}"


class Signals:
    """Collects the signals to pass on while it is entered; those that were ignored before (nohup) stay ignored."""

    def __enter__(self) -> Signals:
        self._arrived: list[int] = []
        self._before = {n: signal.getsignal(n) for n in FORWARDED if signal.getsignal(n) is not signal.SIG_IGN}
        for number in self._before:
            signal.signal(number, lambda arrived, frame: self._arrived.append(arrived))
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def add(self, number: int) -> None:
        """Take a signal that has reached this run elsewhere for one that has arrived here."""
        self._arrived.append(number)

    def take(self) -> Iterator[int]:
        """Signals since the last call. A hang-up asks the ranks to stop as SIGTERM does."""
        while self._arrived:
            number = self._arrived.pop(0)
            yield signal.SIGTERM if number == signal.SIGHUP else number


def die_with_parent() -> Callable[[], None] | None:
    """For the child to call before it starts: ask Linux to kill it when this process dies, however that happens."""
    if sys.platform != "linux":
        return None
    # Looked up before the fork: the child may only make calls that take no locks.
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(FAILURE)

    return ask


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(f"bigtrain: {text}", file=sys.stderr, flush=True)
