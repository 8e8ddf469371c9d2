"""Keeps the chatter of torch and DeepSpeed off the screen: a rank's output goes to its log from the first import on.

What Python prints passes through here: no secret reaches the log, and no fault of a disk or a terminal reaches the run.
Lines that C code and child processes print go straight to the file descriptors.
"""

from __future__ import annotations

import faulthandler
import io
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from bigtrain.secrets import BEGIN, END, redact

_HELD_BYTES = 1 << 14
"""As much of a private key as is kept waiting for its end; they are shorter."""


class Unbreakable(io.RawIOBase):
    """A file descriptor whose writes never fail: what cannot be written is dropped, and `failed` is told why."""

    def __init__(self, descriptor: int, failed: Callable[[OSError], None] = lambda error: None):
        self._descriptor, self._failed = descriptor, failed

    def write(self, data: bytes) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            self._failed(error)
        return size

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


class _Redacted(Unbreakable):
    """Writes line by line, so that a secret is whole when it is looked for. A line that was begun waits for its end, or for `flush`."""

    def __init__(self, descriptor: int, failed: Callable[[OSError], None]):
        super().__init__(descriptor, failed)
        self._held = b""
        self._lock = threading.RLock()

    def write(self, data: bytes) -> int:
        with self._lock:
            self._held += data
            self._release(self._held.rfind(b"\n") + 1)
        return len(data)

    def flush(self) -> None:
        with self._lock:
            self._release(len(self._held))

    def _release(self, end: int) -> None:
        key = self._held.rfind(BEGIN.encode())
        if key >= 0 and END.encode() not in self._held[key:] and len(self._held) - key < _HELD_BYTES:
            end = min(end, key)
        text, self._held = self._held[:end], self._held[end:]
        if text:
            super().write(_clean(text))


class RankOutput:
    """Takes over file descriptors 1 and 2 and Python's streams; what the person should see is written to `screen`.

    Until the run's folder is known the output is kept aside; `attach` moves it into the log and goes on there.
    """

    def __init__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.screen: TextIO = io.TextIOWrapper(
            io.BufferedWriter(Unbreakable(os.dup(1))), encoding=sys.stdout.encoding or "utf-8", errors="replace"
        )
        self._warn: Callable[[str], None] | None = None
        self._early: io.BufferedRandom | None = tempfile.TemporaryFile()  # noqa: SIM115 (lives until attach)
        self._redirect(self._early.fileno())
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(_Redacted(fd, self._lost), encoding="utf-8", errors="backslashreplace", write_through=True) for fd in (1, 2)
        )

    def attach(self, log: Path, warn: Callable[[str], None] | None = None) -> None:
        """Continue in `log`, with what was kept aside first. `warn` is told once if output is lost; training goes on without."""
        self._warn = warn
        try:
            with open(log, "ab", buffering=0) as file:
                Unbreakable(file.fileno(), self._lost).write(_clean(self._kept()))
                self._redirect(file.fileno())
        except OSError as error:
            self._lost(error)
        else:
            self._early.close()
            self._early = None
        faulthandler.enable()

    def unlogged(self) -> str:
        """What was printed before there was a log, or without one, for a process that fails."""
        return _clean(self._kept()).decode(errors="replace") if self._early else ""

    def _kept(self) -> bytes:
        sys.stdout.flush()
        sys.stderr.flush()
        self._early.seek(0)
        return self._early.read()

    def _lost(self, error: OSError) -> None:
        warn, self._warn = self._warn, None
        if warn:
            warn(f"this rank's log cannot be written ({error.strerror}): its output is being lost; training goes on, free some space")

    @staticmethod
    def _redirect(descriptor: int) -> None:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)


def _clean(output: bytes) -> bytes:
    # surrogateescape: bytes that are no UTF-8 come out as they went in, and the environment's values are read the same way.
    return redact(output.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
