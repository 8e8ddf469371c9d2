"""The layout of a run's folder: what the launcher, the ranks and the report must agree on. Standard library only.

    runs/NAME/
        config.yaml                     the resolved configuration
        metrics.jsonl                   one row per logged step or evaluation, each with its attempt and step
        samples.jsonl                   what the model wrote: attempt, step, prompt, text
        checkpoints/step-00000100/      see checkpoint/format.py
        attempts/1/attempt.json         who ran, when, how it ended
        attempts/1/environment.json     versions, hardware, git commit, DeepSpeed config
        attempts/1/logs/rank-00000.log  everything that the rank, torch and DeepSpeed printed
        attempts/1/heartbeat/rank-00000.json  what the rank does, written every second; at last how it ended
        attempts/1/hang.json            after a hang: which rank was late, and where all of them were
        jobs/0001.json                  a launch: where to, by whom, under which id; see bigtrain_launch.jobs
        lease.json                      who trains the run now; see lease.py
        tensorboard/  report.html  .lock

An attempt is one start of the run's processes; a resumed run has several. Rows are only ever appended, so a step that
was repeated after a resume has a row of each attempt: readers keep the latest attempt's.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

from bigtrain.secrets import redacted

OWNER = "BIGTRAIN_OWNER"
"""Variable in which a supervisor tells its ranks the token by which they know the lease of an earlier attempt as their own."""


class RunFolder:
    """Paths of one run, and the small files in it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.report = self.path / "report.html"
        self.lease = self.path / "lease.json"
        self.jobs = self.path / "jobs"

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def attempts(self) -> list[int]:
        """Numbers of the attempts so far, oldest first."""
        folder = self.path / "attempts"
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.is_dir() else []

    def attempt(self, number: int) -> Path:
        return self.path / "attempts" / str(number)

    def start_attempt(self) -> int:
        """Create the folder of the next attempt and return its number; two processes never get the same one."""
        number = max(self.attempts(), default=0) + 1
        while True:
            try:
                (self.attempt(number) / "logs").mkdir(parents=True)
                return number
            except FileExistsError:
                number += 1

    def lock(self) -> TextIO | None:
        """Keep other processes from training this run for as long as the returned file is open; None when one already does."""
        return lock_file(self.path / ".lock")

    def log(self, attempt: int, rank: int) -> Path:
        return self.attempt(attempt) / "logs" / f"rank-{rank:05d}.log"

    def hang(self, attempt: int) -> Path:
        return self.attempt(attempt) / "hang.json"

    def record(self, attempt: int) -> Path:
        return self.attempt(attempt) / "attempt.json"

    def end_attempt(self, number: int, code: int, reason: str, restart: bool, facts: dict[str, Any], replace: bool = False) -> None:
        """Complete the record of an attempt; one that is complete is left alone, unless `replace`. Raises OSError.

        `restart` says that starting again may help: a crash, and no end that the run itself has decided on.
        """
        known = read_json(self.record(number))
        if "ended" in known and not replace:
            return
        end = {"ended": known.get("ended", time.time()), "exit_code": code, "reason": reason, "restart": restart}
        write_record(self.record(number), known | facts | end)

    def is_held(self, attempt: int, now: float) -> bool:
        """Whether the process that began the attempt lives: known on its own machine, elsewhere believed while its lease runs."""
        lease = read_json(self.lease)
        if lease.get("attempt") != attempt:
            return False
        try:
            if lease.get("machine") and lease["machine"] == machine():
                return lease.get("start") == process_start(lease["pid"])
            return now - self.lease.stat().st_mtime < lease["seconds"]
        except (OSError, KeyError, TypeError):  # given back meanwhile, or damaged
            return False

    def heartbeat(self, attempt: int, rank: int) -> Path:
        return self.attempt(attempt) / "heartbeat" / f"rank-{rank:05d}.json"

    def heartbeats(self, attempt: int, now: float) -> list[dict[str, Any]]:
        """The newest heartbeat of every rank that has written one, with its `age` in seconds at the time `now` of the file system."""
        found = []
        for path in sorted(self.heartbeat(attempt, 0).parent.glob("rank-*.json")):
            if beat := read_json(path):
                found.append(beat | {"age": max(0.0, now - path.stat().st_mtime)})
        return found


def lock_file(path: Path) -> TextIO | None:
    """Lock a file, made if need be, until what is returned is closed; None while another process has the lock. Raises OSError.

    The system gives the lock back however this process ends. A file system that knows no locks does not protect.
    """
    file = open(path, "a")  # noqa: SIM115 (the caller's)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            file.close()
            return None
    return file


def machine() -> str:
    """Tells this machine, as it was booted, and this container from all others; "" where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def process_start(pid: int) -> str | None:
    """When process `pid` of this machine began: with the id it names one process, since ids are used again. None: it has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]


def read_json(path: Path) -> dict[str, Any]:
    """A small file of the run as a mapping; empty when it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_atomically(path: Path, text: str, durable: bool = True) -> None:
    """Replace a small file whole: a reader, or a crash, sees the old text or the new one. Raises OSError.

    Not `durable`: the loss of power may lose it; nothing waits for the disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_record(path: Path, facts: dict[str, Any], durable: bool = True) -> None:
    """Write a small JSON file of the run, as `write_atomically` does, with what looks like a secret taken out."""
    write_atomically(path, json.dumps(redacted(facts), indent=1), durable)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file of the run. A last line cut short by a crash is passed over; a missing file has no rows."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def latest_rows(path: Path, key: str) -> list[dict[str, Any]]:
    """Rows that carry `key`, one per step (the latest attempt's), in the order of the steps.

    Steps that a later attempt has gone back behind, and not yet repeated, are the earlier attempt's.
    """
    best: dict[int, dict[str, Any]] = {}
    for row in read_rows(path):
        if key in row:
            known = best.get(row["step"])
            if known is None or row.get("attempt", 0) >= known.get("attempt", 0):
                best[row["step"]] = row
    return [best[step] for step in sorted(best)]
