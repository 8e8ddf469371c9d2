"""The layout of a run's folder: what the launcher, the ranks and the report must agree on. Standard library only.

    runs/NAME/
        config.yaml                     the resolved configuration
        metrics.jsonl                   one row per logged step or evaluation, each with its attempt and step
        samples.jsonl                   what the model wrote: attempt, step, prompt, text
        checkpoints/step-00000100/      see checkpoint/format.py
        attempts/1/attempt.json         who ran, when, how it ended
        attempts/1/environment.json     versions, hardware, git commit, DeepSpeed config
        attempts/1/logs/rank-00000.log  everything that the rank, torch and DeepSpeed printed
        tensorboard/  report.html  .lock

An attempt is one start of the run's processes; a resumed run has several. Rows are only ever appended, so a step that
was repeated after a resume has a row of each attempt: readers keep the latest attempt's.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any, TextIO


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
        """Keep other processes from training this run for as long as the returned file is open; None when one already does.

        The system gives the lock back however this process ends. A file system that knows no locks does not protect.
        """
        file = open(self.path / ".lock", "a")  # noqa: SIM115 (the caller's, for as long as it trains)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.close()
                return None
        return file

    def log(self, attempt: int, rank: int) -> Path:
        return self.attempt(attempt) / "logs" / f"rank-{rank:05d}.log"


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file whole: a reader, or a crash, sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


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
