"""Is this rank still getting anywhere? A thread says so once a second, and ends the run when it is not.

The training thread tells its `Pulse` what it does. A `Watchdog` writes that into the rank's heartbeat, renews the lease of the
run, and when the pulse has stood still for too long finds out from all heartbeats which rank the others wait for.
Standard library only.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, TypeVar

from bigtrain.errors import HANG
from bigtrain.lease import Lease
from bigtrain.runfolder import RunFolder, machine, process_start, write_record

INTERVAL = 1.0  # seconds between heartbeats
START_SECONDS = 300.0
"""What the first step is given at least, whatever the time-out: libraries are imported, kernels compiled, weights read."""
MARGIN = 30.0
"""By how much collectives may outlast the watchdog: it knows more about a hang than they do."""
LAST_SECONDS = 3.0
"""After a hang has been found: the process ends after so long, even when its disk or its terminal answers no more."""

Item = TypeVar("Item")


def patience(timeout: float) -> float:
    """Seconds after which a collective itself gives up, so that the watchdog has spoken before."""
    return max(timeout, START_SECONDS) + MARGIN


class Pulse:
    """What the training thread does now. Every call is a sign of progress; it costs a few assignments and takes no lock."""

    def __init__(self) -> None:
        self.phase, self.step, self.position = "start", 0, 0
        self.since = time.time()  # of the last sign of progress
        self.beat = 0  # signs of progress in this step: the same on all ranks at the same place
        self.steps = 0  # begun in this attempt
        self.signs = 0  # of progress that each rank makes at its own pace: they say that it lives, not where it is
        self.collective: str | None = None  # the newest one
        self.waiting = False  # for the others, in it

    def __call__(self, phase: str, step: int | None = None, position: int | None = None) -> None:
        """Begin `phase`; `step` (the one that is being computed) and `position` (of its first sequence) stay when left out."""
        if step is not None and step != self.step:
            self.step, self.beat = step, 0
            self.steps += 1
        if position is not None:
            self.position = position
        self.phase, self.since = phase, time.time()
        self.beat += 1

    def each(self, phase: str, items: Iterable[Item]) -> Iterator[Item]:
        """`items`, each of which is a sign of progress in `phase`."""
        for item in items:
            self(phase)
            yield item

    def alive(self) -> None:
        """A sign of progress within a phase that may last, a file written say; from any thread that this one waits for."""
        self.signs, self.since = self.signs + 1, time.time()

    @contextmanager
    def meeting(self, collective: str) -> Iterator[None]:
        """Around a collective: this rank is waiting for the others."""
        self.collective, self.waiting = collective, True
        yield
        self.waiting, self.since = False, time.time()
        self.beat += 1


class Watchdog:
    """Watches the pulse of one rank from `start` to `close`; after `timeout` seconds without progress ends the process with HANG.

    Made by the training thread. `screen` gets one line about a hang, from the rank that found it first. Time in which all
    processes were suspended does not count: what is added up is the time in which the watchdog's thread ran.
    """

    def __init__(
        self, run: RunFolder, attempt: int, rank: int, ranks: int, pulse: Pulse, timeout: float, screen: TextIO, lease: Lease | None = None
    ):
        self._run, self._attempt, self._rank, self._ranks = run, attempt, rank, ranks
        self._pulse, self._timeout, self._screen, self._lease = pulse, timeout, screen, lease
        self._interval = min(INTERVAL, timeout / 4)
        self._who = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "machine": machine()}
        self._who["start"] = process_start(os.getpid())
        self._training = threading.get_ident()
        self._warned = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
        self._beat()
        self._thread.start()

    def close(self, code: int, reason: str, restart: bool, lost: bool) -> None:
        """Stop watching and leave a last heartbeat, which says how the rank ended. `lost`: only because of another rank."""
        self._closed.set()
        self._thread.join(LAST_SECONDS)
        self._beat({"exit_code": code, "reason": reason, "restart": restart, "lost": lost})

    def _watch(self) -> None:
        seen, silence, before = None, 0.0, time.monotonic()
        while not self._closed.wait(self._interval):
            now = time.monotonic()
            silence, before = silence + min(now - before, 2 * self._interval), now
            if seen != (seen := (self._pulse.steps, self._pulse.beat, self._pulse.signs)):
                silence = 0.0
            self._beat()
            if self._lease:
                self._try(self._lease.renew)
            if silence > (self._timeout if self._pulse.steps > 1 else max(self._timeout, START_SECONDS)):
                self._hang()

    def _beat(self, ended: dict[str, Any] | None = None) -> None:
        pulse = self._pulse
        now = {"step": pulse.step, "position": pulse.position, "phase": pulse.phase, "since": pulse.since, "beat": pulse.beat}
        below = None if pulse.waiting else self._collective()
        now |= {"collective": below or pulse.collective, "waiting": pulse.waiting or below is not None, "time": time.time()}
        path = self._run.heartbeat(self._attempt, self._rank)

        def write() -> None:
            path.parent.mkdir(exist_ok=True)
            write_record(path, self._who | now | (ended or {}), durable=False)

        self._try(write)

    def _collective(self) -> str | None:
        """The collective of torch's that the training thread is in, as its stack shows: DeepSpeed tells our pulse of none."""
        frame = sys._current_frames().get(self._training)
        while frame and not frame.f_code.co_filename.endswith("distributed_c10d.py"):
            frame = frame.f_back
        return frame.f_code.co_name if frame else None

    def _try(self, action: Callable[[], None]) -> None:
        """What the watchdog writes is not worth a run: say once that it cannot."""
        try:
            action()
        except OSError as error:
            if not self._warned:
                print(f"bigtrain: warning: no heartbeat of rank {self._rank}, or no lease: {error}", file=sys.stderr, flush=True)
            self._warned = True

    def _hang(self) -> None:
        """Say who is late, with every stack that can be had, and end this process."""
        last = threading.Timer(LAST_SECONDS, os._exit, (HANG,))
        last.daemon = True
        last.start()
        faulthandler.dump_traceback(file=2, all_threads=True)
        try:
            now = self._run.heartbeat(self._attempt, self._rank).stat().st_mtime  # written a moment ago
            beats = self._run.heartbeats(self._attempt, now)
        except OSError:
            beats = []
        for beat in beats:
            self._ask_for_stacks(beat)
        late, why = find_late(beats, self._ranks, stale_seconds=max(self._timeout / 2, 2 * self._interval))
        reason = f"no progress for {self._timeout:.0f} s: {why}"
        print(f"bigtrain: {reason}", file=sys.stderr, flush=True)
        try:
            with open(self._run.hang(self._attempt), "x", encoding="utf-8") as file:
                facts = {"time": time.time(), "found_by": self._rank, "timeout": self._timeout, "late": late, "reason": reason}
                json.dump(facts | {"ranks": beats}, file, indent=1)
            first = True
        except OSError as error:
            first = not isinstance(error, FileExistsError)  # a full disk: better said twice than not at all
        if first:
            shown = "\x1b[?25h" if self._screen.isatty() else ""  # the cursor, which a progress bar hides
            self._screen.write(f"{shown}\nbigtrain: {reason}\nbigtrain: stacks of the ranks: {self._run.log(self._attempt, 0).parent}\n")
            self._screen.flush()
            self._try(lambda: self._run.end_attempt(self._attempt, HANG, reason, restart=True, facts={}))
        os._exit(HANG)

    def _ask_for_stacks(self, beat: dict[str, Any]) -> None:
        """Let another rank of this machine print its stacks into its log, if it is still the process that wrote the heartbeat."""
        ours = beat["machine"] == self._who["machine"] and beat["rank"] != self._rank
        if ours and beat["start"] and beat["start"] == process_start(beat["pid"]):
            with suppress(OSError):  # it has ended just now, or belongs to another user
                os.kill(beat["pid"], signal.SIGUSR2)


def find_late(beats: list[dict[str, Any]], ranks: int, stale_seconds: float) -> tuple[list[int], str]:
    """The ranks that the others wait for, by their heartbeats (see RunFolder.heartbeats), and a sentence about them.

    First those that have ended, then those without a heartbeat for `stale_seconds`, then whoever is furthest behind. Empty
    when all are at the same place.
    """
    silent = set(range(ranks)) - {beat["rank"] for beat in beats}
    if ended := [b for b in beats if "exit_code" in b]:
        return [b["rank"] for b in ended], "; ".join(f"{place(b)} has ended ({b['reason']})" for b in ended)
    if stale := [b for b in beats if b["age"] > stale_seconds]:
        # Their place is that of a last heartbeat, a second old when they fell silent.
        said = [
            f"{place(b, 'last heard of ')} shows no sign of life for {b['age']:.0f} s: stopped, dead, or its machine is gone" for b in stale
        ]
        return [b["rank"] for b in stale], "; ".join([*said, f"the run is in step {max(b['step'] for b in beats)}"])
    if silent:
        return sorted(silent), f"rank {', '.join(map(str, sorted(silent)))} never wrote a heartbeat"
    front = max(_progress(b) for b in beats)
    behind = min(_progress(b) for b in beats)
    late = [b for b in beats if _progress(b) == behind]
    if behind == front and ranks > 1:
        return [], f"all ranks are at the same place, {place(late[0])} say: a collective, the network or a device hangs"
    return [b["rank"] for b in late], "; ".join(f"{place(b)} is late" for b in late)


def _progress(beat: dict[str, Any]) -> tuple[int, int, bool]:
    return beat["step"], beat["beat"], beat["waiting"]


def place(beat: dict[str, Any], heard: str = "") -> str:
    """Where a rank is, and since when: by its own clock, so that those of other hosts do not matter."""
    since = time.strftime("%H:%M:%S", time.localtime(beat["since"]))
    waiting = f", waiting for the others ({beat['collective']})" if beat["waiting"] else ""
    return f"rank {beat['rank']} on {beat['host']}, {heard}in step {beat['step']} ({beat['phase']} since {since}{waiting}),"
