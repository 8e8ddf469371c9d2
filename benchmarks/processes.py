"""Processes measured from outside, so that every variant is measured alike, whatever it says of itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bigtrain.errors import RunError

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Usage:
    """What a set of processes, and all that they started and waited for, has used."""

    started: float
    """Seconds since 1970."""
    resident_gib: float
    """Most that any one of them has held in memory."""
    cores_elsewhere: float | None
    """CPU time that other processes took meanwhile, in cores; None where the system does not say."""


def run(commands: list[tuple[list[str], dict[str, str]]], log: Path, timeout: float) -> Usage:
    """Run (command, environment) pairs side by side until all have ended; what they print goes to `log`.

    Raises RunError, with the last line of the log, when one of them fails or runs longer than `timeout` seconds.
    """
    busy_before, started = busy_seconds(), time.time()
    running: list[subprocess.Popen] = []
    usages = []
    try:
        with open(log, "wb") as output:
            for command, environment in commands:
                running.append(
                    subprocess.Popen(
                        command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                    )
                )
        while running:
            for process in list(running):
                # Popen.wait would throw away what wait4 says the process and its descendants have used.
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    running.remove(process)
                    process.returncode = os.waitstatus_to_exitcode(status)
                    usages.append(usage)
                    if process.returncode:
                        raise RunError(f"{log}: exit code {process.returncode}: {last_line(log)}")
            if time.time() - started > timeout:
                raise RunError(f"{log}: still running after {timeout:.0f} s: {last_line(log)}")
            time.sleep(POLL_SECONDS)
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    busy, own = busy_seconds(), sum(usage.ru_utime + usage.ru_stime for usage in usages)
    elsewhere = None if busy is None or busy_before is None else max(0.0, busy - busy_before - own) / (time.time() - started)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return Usage(started, max(usage.ru_maxrss for usage in usages) * unit / 2**30, elsewhere)


def busy_seconds() -> float | None:
    """CPU time that everyone's processes have used, since the machine started, on the cores that this one may use.

    From /proc/stat (proc(5): user, nice, system, idle, iowait, irq, softirq in ticks); None where there is none.
    """
    try:
        cores = {f"cpu{n}" for n in os.sched_getaffinity(0)}
        rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        ticks = sum(int(row[i]) for row in rows if row[0] in cores for i in (1, 2, 3, 6, 7))
    except (OSError, AttributeError):
        return None
    return ticks / os.sysconf("SC_CLK_TCK")


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it printed nothing")
