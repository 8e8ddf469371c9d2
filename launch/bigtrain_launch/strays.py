"""Processes of a run that have outlived whoever had to end them, a rank's child or the ranks of an agent that is stuck, say:
they hold devices and memory that the next start needs. Linux only; standard library only."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from bigtrain.runfolder import OWNER, process_start

RUN = "BIGTRAIN_RUN"
"""Variable with the folder of the run to which a process belongs; ATTEMPT tells the start, AGENT who has started it."""
ATTEMPT = "BIGTRAIN_ATTEMPT"
AGENT = "BIGTRAIN_AGENT"
END_SECONDS = 5.0


def myself() -> str:
    """This process, as the value of AGENT."""
    return f"{os.getpid()} {process_start(os.getpid())}"


def end(environment: Mapping[str, str]) -> int:
    """Kill what earlier starts of a run have left on this machine, and return how many processes that were. `environment`: that
    of the ranks to come.

    A stray is a process of the same run whose agent is gone, or that the same launcher had started earlier. Those of a
    launcher that is at work are none of ours: it is the lease that keeps two of them apart.
    """
    if not environment.get(RUN):
        return 0
    found = list(_strays(environment))
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + END_SECONDS
    while time.monotonic() < until and any(process_start(pid) for pid in found):
        time.sleep(0.02)
    return len(found)


def _strays(environment: Mapping[str, str]) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            pairs = (entry.partition(b"=") for entry in (folder / "environ").read_bytes().split(b"\0"))
            theirs = {name.decode(errors="replace"): os.fsdecode(value) for name, _, value in pairs}
        except OSError:  # it has ended, or belongs to someone else
            continue
        if theirs.get(RUN) != environment[RUN] or theirs.get(ATTEMPT) == environment.get(ATTEMPT):
            continue
        pid, _, start = theirs.get(AGENT, "").partition(" ")
        orphaned = not (pid.isdecimal() and process_start(int(pid)) == start)
        if orphaned or (OWNER in theirs and theirs[OWNER] == environment.get(OWNER)):
            yield int(folder.name)
