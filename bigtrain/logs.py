"""Keeps the chatter of torch and DeepSpeed off the screen: a rank's output goes to its log from the first import on."""

from __future__ import annotations

import faulthandler
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import TextIO


class RankOutput:
    """Takes over file descriptors 1 and 2; what the person should see is written to `screen`.

    Until the run's folder is known the output is kept aside; `attach` moves it into the log and goes on there.
    """

    def __init__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.screen: TextIO = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding or "utf-8", errors="replace")
        self._early: io.BufferedRandom | None = tempfile.TemporaryFile()  # noqa: SIM115 (lives until attach)
        self._redirect(self._early.fileno())

    def attach(self, log: Path) -> None:
        """Continue in `log`, with what was kept aside first."""
        with open(log, "ab", buffering=0) as file:
            sys.stdout.flush()
            sys.stderr.flush()
            self._early.seek(0)
            file.write(self._early.read())
            self._redirect(file.fileno())
        self._early.close()
        self._early = None
        faulthandler.enable()

    def unlogged(self) -> str:
        """What was printed before there was a log, for a process that dies before `attach`."""
        if self._early is None:
            return ""
        sys.stdout.flush()
        sys.stderr.flush()
        self._early.seek(0)
        return self._early.read().decode(errors="replace")

    @staticmethod
    def _redirect(descriptor: int) -> None:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
