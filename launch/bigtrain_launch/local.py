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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bigtrain.errors import DONE, FAILURE, HANG, STOPPED, USER_MISTAKE, UserError

GRACE_SECONDS = 10.0  # for the other ranks after one has failed, and once more between SIGTERM and SIGKILL
HANG_SECONDS = 2.0  # for the other ranks' last words after one has found a hang; who does not answer now never will
POLL_SECONDS = 0.05
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1


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


def launch(argv: Sequence[str], ranks: int, *, port: int | None, environment: Mapping[str, str], threads: int | None) -> End:
    """Run `python -m bigtrain *argv` as `ranks` processes on this machine and return how they ended.

    port: where the ranks meet, left out: a free one. environment: variables on top of this process's own, for example
    DS_ACCELERATOR=cpu. threads: OMP_NUM_THREADS of a rank, left out: this process's cores shared out; a variable that
    the user has set wins over both. Call it from the main thread: signals are handled here, and Linux ends the ranks
    when the thread that started them ends.

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
    shared.setdefault("OMP_NUM_THREADS", str(threads or max(1, _cores() // ranks)))
    command = [sys.executable, "-m", "bigtrain", *argv]
    with Signals() as signals:
        processes: list[subprocess.Popen] = []
        try:
            for rank in range(ranks):
                # A session of its own keeps the terminal's Ctrl-C from reaching a rank twice: it comes from here, once.
                processes.append(
                    subprocess.Popen(
                        command,
                        env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,
                        preexec_fn=_die_with_parent(),
                    )
                )
            return _wait(processes, signals)
        finally:
            for process in processes:
                _kill(process)


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


def _wait(processes: list[subprocess.Popen], signals: Signals) -> End:
    """Wait until every rank has ended. After a failure the others get GRACE_SECONDS, then SIGTERM, then SIGKILL; after a hang
    only HANG_SECONDS, then SIGKILL: a rank that is stopped would not even see the SIGTERM."""
    running = dict(enumerate(processes))
    ended: list[tuple[int, int]] = []
    forwarded = None  # the signal that asked the ranks to stop
    deadline, terminated, hanging = math.inf, False, False
    while running:
        for rank, process in list(running.items()):
            if process.poll() is not None:
                del running[rank]
                # A rank that was still starting dies of the signal: that is a stop too, there is nothing to save.
                code = STOPPED if forwarded and process.returncode == -forwarded else process.returncode
                ended.append((rank, code))
                if process.returncode == HANG:
                    deadline, hanging = min(deadline, time.monotonic() + HANG_SECONDS), True
                elif process.returncode not in (DONE, STOPPED):
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        for number in signals.take():
            if forwarded is None:
                forwarded = number
                for process in running.values():
                    process.send_signal(number)
                if number == signal.SIGINT:
                    say("asked the ranks to save and stop; Ctrl-C again kills them")
            elif number == signal.SIGINT:
                say("killing the ranks")
                return End(FAILURE, asked=True)
        if running and time.monotonic() > deadline:
            if terminated or hanging:
                seconds = HANG_SECONDS if hanging else 2 * GRACE_SECONDS
                say(f"killing rank {', '.join(map(str, running))}: still running {seconds:.0f} s after another had failed")
                break
            for process in running.values():
                process.terminate()
            deadline, terminated = time.monotonic() + GRACE_SECONDS, True
        time.sleep(POLL_SECONDS)
    return outcome(ended, asked=forwarded is not None)


def outcome(ended: Sequence[tuple[int, int]], asked: bool) -> End:
    """The end that means most, of (rank, return code) in the order in which the ranks ended."""
    failed = [(rank, code) for rank, code in ended if code != DONE]
    if not failed:
        return End(DONE, asked=asked)
    # Whoever loses another rank may be seen to end before it; SIGTERM may be our own.
    kinds = (lambda c: c == USER_MISTAKE), (lambda c: c == HANG), (lambda c: c < 0 and c != -signal.SIGTERM), (lambda c: True)
    rank, code = next((r, c) for kind in kinds for r, c in failed if kind(c))
    if code < 0:
        say(f"rank {rank} {killed_by(-code)}")
        return End(FAILURE, rank, -code, asked)
    if code not in (STOPPED, HANG) and rank != 0:  # rank 0 has the screen and has said so itself, and so has who found a hang
        say(f"rank {rank} ended with exit code {code}; its log is rank-{rank:05d}.log in the run's newest attempts/*/logs")
    return End(code, rank, asked=asked)


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

    def take(self) -> Iterator[int]:
        """Signals since the last call. A hang-up asks the ranks to stop as SIGTERM does."""
        while self._arrived:
            number = self._arrived.pop(0)
            yield signal.SIGTERM if number == signal.SIGHUP else number


def _die_with_parent() -> Callable[[], None] | None:
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


def _kill(process: subprocess.Popen) -> None:
    """Kill a rank that still runs, with what it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(f"bigtrain: {text}", file=sys.stderr, flush=True)
