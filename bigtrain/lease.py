"""Who may train a run: one process at a time, also when several machines see its folder. Standard library only.

On one machine the file lock of RunFolder.lock is exact, however its holder ends. Between machines, where a file system may
know no locks and a holder may lose power, `lease.json` says who trains; it is renewed while that process lives, and runs out
when it has not been for as long as it says. Ages are differences of the file system's own times: clocks of hosts do not matter.

The number of an attempt is the fencing token. A holder that was out of touch for too long, a suspended machine say, finds a
higher one at its next `check` and must write no more.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any, TextIO

from bigtrain.errors import LostRun, UserError
from bigtrain.runfolder import RunFolder, machine, process_start, read_json, write_record

POLL_SECONDS = 0.5


class Lease:
    """The right to train a run, from `take` to `close`."""

    def __init__(self, run: RunFolder, seconds: float, owner: str | None, lock: TextIO):
        self._run, self._seconds, self._owner, self._lock = run, seconds, owner, lock
        self._attempt: int | None = None
        self._since = time.time()
        self._renewed = 0.0

    @classmethod
    def take(cls, run: RunFolder, seconds: float, owner: str | None = None, say: Callable[[str], None] = print) -> Lease:
        """Take the lease of a run whose folder is there; `start` then begins an attempt.

        A holder on this machine that has ended, or whose owner is `owner`, is no obstacle. One on another machine has the rest
        of its lease to show that it lives; `say` gets a line about the wait. Raises UserError, naming the holder, when another
        process trains the run, and OSError.
        """
        lock = run.lock()
        if lock is None:
            raise UserError(_refusal(run, read_json(run.lease)))
        lease = cls(run, seconds, owner, lock)
        try:
            lease._outlast(say)
        except BaseException:
            lease.close()
            raise
        return lease

    def _outlast(self, say: Callable[[str], None]) -> None:
        if not self._run.lease.exists():
            return
        held = read_json(self._run.lease)
        if self._owner and held.get("owner") == self._owner:
            return
        if held.get("machine") and held["machine"] == machine() and held.get("start") != process_start(held.get("pid", 0)):
            return
        renewed = self._run.lease.stat().st_mtime
        while (left := held.get("seconds", self._seconds) - (self._clock() - renewed)) > 0:
            say(f"waiting to see whether the run is still being trained{_who(held)}: {left:.0f} s at most")
            say = _silent
            time.sleep(min(left, POLL_SECONDS))
            if not self._run.lease.exists():
                return
            if self._run.lease.stat().st_mtime != renewed:
                raise UserError(_refusal(self._run, held))

    def _clock(self) -> float:
        """What the file system takes for the present."""
        self._lock.truncate(0)
        self._lock.write(".")
        self._lock.flush()
        os.fsync(self._lock.fileno())
        return os.fstat(self._lock.fileno()).st_mtime

    def start(self) -> int:
        """Begin an attempt and return its number; from now on the lease wants to be renewed. Raises OSError."""
        self._attempt = self._run.start_attempt()
        self._write()
        return self._attempt

    def renew(self) -> None:
        """Say that the holder lives, when it is time to. Called often, from any thread. Raises OSError."""
        if self._attempt and time.monotonic() - self._renewed >= self._seconds / 4 and self._usurper() is None:
            self._write()

    def check(self) -> None:
        """To be called before anything is made final. Raises LostRun when another attempt has taken the run over."""
        usurper = self._usurper()
        if usurper is not None:
            raise LostRun(
                f"{self._run.path}: attempt {usurper} has taken the run over{_who(read_json(self._run.lease))} while attempt"
                f" {self._attempt} was out of touch for over {self._seconds:.0f} s; nothing more is written here"
            )

    def _usurper(self) -> int | None:
        # The lease as well as the folder: a network file system may show an old listing, but a file that is opened is looked up anew.
        newest = max([read_json(self._run.lease).get("attempt", 0), *self._run.attempts()])
        return newest if self._attempt and newest > self._attempt else None

    def _write(self) -> None:
        pid = os.getpid()
        facts = {
            "attempt": self._attempt,
            "host": socket.gethostname(),
            "pid": pid,
            "machine": machine(),
            "start": process_start(pid),
            "owner": self._owner,
            "since": self._since,
            "renewed": time.time(),
            "seconds": self._seconds,
        }
        write_record(self._run.lease, facts, durable=False)
        self._renewed = time.monotonic()

    def close(self) -> None:
        """Give the run back."""
        if self._attempt and read_json(self._run.lease).get("attempt") == self._attempt:
            self._run.lease.unlink(missing_ok=True)
        self._lock.close()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _refusal(run: RunFolder, held: dict[str, Any]) -> str:
    return f"{run.path}: another process is training this run{_who(held)}; wait for it, stop it, or pass --new"


def _who(held: dict[str, Any]) -> str:
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held["since"]))
        return f" (attempt {held['attempt']}, process {held['pid']} on {held['host']}, since {since})"
    except (KeyError, TypeError, ValueError, OverflowError):
        return ""


def _silent(text: str) -> None: ...
