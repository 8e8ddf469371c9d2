"""What the report shows of a run: its folder read with every file optional, and its curves, thinned for drawing."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain import jsonfile, plainyaml
from bigtrain.errors import UserError
from bigtrain.runfolder import RunFolder, latest_rows, read_rows

POINTS = 2000
"""Points that a curve is thinned to; a few more where it has values that are not finite."""
AXES = {"attempt", "step", "time", "tokens"}

Row = dict[str, Any]
Position = tuple[int, float | None, float]
"""Where a row lies on each horizontal axis: step, tokens seen, seconds of training."""


@dataclass(frozen=True)
class Run:
    """One run folder; what is missing or unreadable there is empty here."""

    name: str
    config: dict[str, Any]
    train: list[Row]
    validation: list[Row]
    samples: list[Row]
    attempts: list[dict[str, Any]]
    """attempt.json of each attempt, oldest first."""
    environment: dict[str, Any]
    """environment.json of the latest attempt that has one."""


def read_run(folder: RunFolder, name: str) -> Run:
    """Read a run folder, of a finished, broken or running run. Raises UserError when it holds no run at all."""
    if not any(path.exists() for path in (folder.config, folder.metrics, folder.path / "attempts")):
        raise UserError(f"{folder.path}: holds no run; expected config.yaml or metrics.jsonl in it, as in runs/NAME")
    numbers = folder.attempts()
    environments = [_mapping(folder.attempt(n) / "environment.json") for n in numbers]
    return Run(
        name=name,
        config=_mapping(folder.config),
        train=latest_rows(folder.metrics, "loss"),
        validation=latest_rows(folder.metrics, "validation_loss"),
        samples=read_rows(folder.samples),
        attempts=[{"attempt": n} | _mapping(folder.attempt(n) / "attempt.json") for n in numbers],
        environment=next((e for e in reversed(environments) if e), {}),
    )


def _mapping(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():  # a read of a pipe would wait for ever
            return {}
        text = path.read_text(encoding="utf-8", errors="replace")
        found = jsonfile.parse(text) if path.suffix == ".json" else plainyaml.load(text)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def number(value: Any) -> float | None:
    """A number of a row, where "NaN" and "Infinity" stand for themselves (see trackers.py); None when it is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def numbers(rows: list[Row], key: str, finite: bool = True) -> list[float]:
    """The key's numbers in the rows that have one."""
    found = [n for row in rows if (n := number(row.get(key))) is not None]
    return [n for n in found if math.isfinite(n)] if finite else found


def downsample(values: list[float], points: int = POINTS) -> list[int]:
    """Indices of about `points` of the values, in order: of each bucket the smallest, the largest and the first that
    is not finite, and the two ends. So a spike of a single step stays."""
    n = len(values)
    if n <= points:
        return list(range(n))
    kept = {0, n - 1}
    size = math.ceil(2 * n / points)
    for start in range(0, n, size):
        bucket = range(start, min(start + size, n))
        finite = [i for i in bucket if math.isfinite(values[i])]
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        if len(finite) < len(bucket):
            kept.add(next(i for i in bucket if not math.isfinite(values[i])))
    return sorted(kept)


def bucket_means(values: list[float], points: int = POINTS) -> tuple[list[int], list[float]]:
    """Middle index and mean of the finite values of each bucket: what smoothing works on, since extremes would bias it."""
    size = math.ceil(len(values) / points)
    middles, means = [], []
    for start in range(0, len(values), size):
        finite = [v for v in values[start : start + size] if math.isfinite(v)]
        if finite:
            middles.append(min(start + size // 2, len(values) - 1))
            means.append(math.fsum(finite) / len(finite))
    return middles, means


def positions(rows: list[Row]) -> list[Position]:
    """Where training rows lie. Seconds of training leave out the time between attempts."""
    found, seconds, before = [], 0.0, {}
    for row in rows:
        took = (number(row.get("time")) or 0.0) - (number(before.get("time")) or 0.0)
        if before.get("attempt") != row.get("attempt") or not before:
            took = number(row.get("step_s")) or 0.0
        seconds += took if 0 < took < math.inf else 0.0
        tokens = number(row.get("tokens"))
        found.append((row["step"], tokens if tokens is not None and math.isfinite(tokens) else None, seconds))
        before = row
    return found


def positions_among(rows: list[Row], train: list[Position]) -> list[Position]:
    """Where evaluation rows lie, which carry only a step: with the last training row before them."""
    steps = [step for step, _, _ in train]
    found = []
    for row in rows:
        i = bisect_right(steps, row["step"]) - 1
        found.append((row["step"], train[i][1], train[i][2]) if i >= 0 else (row["step"], 0, 0.0))
    return found


def curves(run: Run) -> dict[str, dict[str, Any]]:
    """Every metric of the run by its key: columns `step`, `tokens`, `time` (seconds) and `y` (None where it is not
    finite), whether each point is worth a `dot`, and the same columns of bucket means under `mean` where it was thinned."""
    train = positions(run.train)
    found = {}
    for rows, where, dots in ((run.train, train, False), (run.validation, positions_among(run.validation, train), True)):
        for key in dict.fromkeys(key for row in rows for key in row if key not in AXES):
            points = [(p, n) for row, p in zip(rows, where) if (n := number(row.get(key))) is not None]
            if points:
                found[key] = _curve(points) | {"dots": dots}
    return found


def _curve(points: list[tuple[Position, float]]) -> dict[str, Any]:
    values = [n for _, n in points]

    def columns(indices: list[int], ys: Iterable[float]) -> dict[str, list]:
        chosen = [points[i][0] for i in indices]
        return {
            "step": [step for step, _, _ in chosen],
            "tokens": [tokens for _, tokens, _ in chosen],
            "time": [round(seconds, 1) for _, _, seconds in chosen],
            "y": [float(f"{y:.6g}") if math.isfinite(y) else None for y in ys],
        }

    kept = downsample(values)
    curve = columns(kept, [values[i] for i in kept])
    return curve if len(kept) == len(values) else curve | {"mean": columns(*bucket_means(values))}
