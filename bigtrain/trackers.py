"""Where metrics and samples go: the run's own .jsonl files, always, and TensorBoard and Weights & Biases when asked.

The files are written at once, one unbuffered write a row, so that a crash loses nothing that was logged. The other
trackers are conveniences: each works on its own thread behind a bounded queue, imports its library there when the
first row arrives, and is switched off with one warning when anything goes wrong. None of them can stop or slow a step.

No secret gets past `log` and `log_samples` (see secrets.py). Numbers that are not finite stand in the files as the
strings "NaN", "Infinity" and "-Infinity", because JSON has no such numbers; `float()` reads them all.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from bigtrain.config import Tracking
from bigtrain.runfolder import RunFolder
from bigtrain.secrets import redacted

QUEUED_ROWS = 1000
INIT_SECONDS = 20
"""How long Weights & Biases may take to answer before it is given up."""
CLOSE_SECONDS = 20
"""How long a tracker may take to finish its queue when the run ends."""
SIGN_SECONDS = 0.1
"""Between signs of life meanwhile."""

Row = dict[str, Any]


class Trackers:
    """All trackers of a run, on rank 0. `log` and `log_samples` neither raise nor wait for a network.

    `warn` takes one line of text; it is called on the caller's thread only.
    """

    def __init__(self, tracking: Tracking, run: RunFolder, attempt: int, resolved_config: dict[str, Any], warn: Callable[[str], None]):
        self._stamp = {"attempt": attempt}
        resolved_config = redacted(resolved_config)
        self._warn = warn
        self._metrics = _JsonLines(run.metrics, warn)
        self._samples = _JsonLines(run.samples, warn)
        self._others: list[_Background] = []
        self._wandb = tracking.wandb != "off"
        if tracking.tensorboard:
            self._others.append(_Background("TensorBoard", lambda first: _TensorBoard(run.tensorboard, first, resolved_config)))
        if tracking.wandb != "off":
            self._others.append(_Background("wandb", lambda first: _Wandb(tracking, run, attempt, resolved_config)))

    def log(self, row: Row) -> None:
        """Append a training or evaluation row; it needs `step`. `attempt` and `time` (seconds since 1970) are added."""
        row = redacted(self._stamp | {"time": round(time.time(), 3)} | row)
        self._metrics.write([row])
        self._pass_on("log", row)

    def log_samples(self, rows: list[Row]) -> None:
        """Append what the model wrote: rows of `step`, `prompt` and `text`, all of one step."""
        if rows:
            rows = redacted([self._stamp | row for row in rows])
            self._samples.write(rows)
            self._pass_on("log_samples", rows)

    def close(self, alive: Callable[[], None] = lambda: None) -> None:
        """Finish every tracker, waiting about CLOSE_SECONDS at most for all of them; `alive` is called meanwhile. Call it however the
        run ends."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for other in self._others:
            other.finish()
        for other in self._others:
            other.join(deadline, alive)
        self._report_problems()
        self._others = []
        if self._wandb:
            _release_wandb(max(time.monotonic() + 1.0, deadline), alive)
        self._metrics.close()
        self._samples.close()

    def _pass_on(self, method: str, argument: Any) -> None:
        self._report_problems()
        for other in self._others:
            other.put(method, argument)

    def _report_problems(self) -> None:
        for other in list(self._others):
            if other.problem:
                self._warn(other.problem)
                self._others.remove(other)


class _JsonLines:
    """Appends rows to a .jsonl file. A failed write (a full disk) warns once and the next row tries again."""

    def __init__(self, path: Path, warn: Callable[[str], None]):
        self._path = path
        self._warn = warn
        self._warned = False
        self._file = None
        self._cut = False  # the last line has no end: a write failed half-way, or an earlier process died in one

    def write(self, rows: list[Row]) -> None:
        # ASCII only: a text's own line separators (U+2028) or lone surrogates cannot break a line of the file.
        text = "\n" * self._cut + "".join(json.dumps(_finite(row), allow_nan=False, default=str) + "\n" for row in rows)
        try:
            if self._file is None:
                self._file = open(self._path, "a+b", buffering=0)  # noqa: SIM115 - open until close()
                if self._file.seek(0, os.SEEK_END):
                    self._file.seek(-1, os.SEEK_END)
                    if self._file.read(1) != b"\n":
                        text = "\n" + text
            self._cut = True
            if self._file.write(text.encode()) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._cut = False
        except OSError as error:
            if not self._warned:
                self._warned = True
                self._warn(f"{self._path}: rows are being lost ({error.strerror}); training goes on, free some space")

    def close(self) -> None:
        if self._file:
            self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


class _Tracker(Protocol):
    def log(self, row: Row) -> None: ...
    def log_samples(self, rows: list[Row]) -> None: ...
    def close(self) -> None: ...


class _Background:
    """Runs one tracker on a daemon thread. `problem` says why it was switched off, None while it works."""

    def __init__(self, name: str, make: Callable[[Row], _Tracker]):
        self.problem: str | None = None
        self._name = name
        self._make = make
        self._queue: queue.Queue[tuple[str, Any] | None] = queue.Queue(QUEUED_ROWS)
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)

    def put(self, method: str, argument: Any) -> None:
        if not self._thread.ident:
            self._thread.start()
        try:
            self._queue.put_nowait((method, argument))
        except queue.Full:
            self.problem = f"{self._name} fell {QUEUED_ROWS} rows behind and was switched off; metrics.jsonl has every row"

    def finish(self) -> None:
        with contextlib.suppress(queue.Full):  # join reports it
            self._queue.put_nowait(None)

    def join(self, deadline: float, alive: Callable[[], None]) -> None:
        if self._thread.ident:
            _join(self._thread, deadline, alive)
            if self._thread.is_alive():
                self.problem = f"{self._name} did not finish within {CLOSE_SECONDS} seconds; metrics.jsonl has every row"

    def _work(self) -> None:
        try:
            tracker = None
            while (work := self._queue.get()) is not None:
                method, argument = work
                if tracker is None:
                    tracker = self._make(argument if method == "log" else argument[0])
                getattr(tracker, method)(argument)
            if tracker:
                tracker.close()
        except Exception as error:  # a convenience must not stop a run, whatever its library raises
            text = " ".join(str(error).split()) or type(error).__name__
            self.problem = f"{self._name} was switched off: {text[:300]}; metrics.jsonl has every row"


def tagged(row: Row) -> dict[str, float]:
    """A row's numbers under the names that trackers group by: train/loss, validation/loss, validation/perplexity."""
    group = "validation" if "validation_loss" in row else "train"
    return {
        f"{group}/{key.removeprefix('validation_')}": float(value)
        for key, value in row.items()
        if key not in ("attempt", "step", "time") and isinstance(value, (int, float))
    }


class _TensorBoard:
    def __init__(self, folder: Path, first: Row, config: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter  # seconds of import

        # A resumed attempt repeats steps: TensorBoard hides the earlier attempt's from here on.
        self._writer = SummaryWriter(str(folder), purge_step=first["step"])
        self._writer.add_text("config", _indented(json.dumps(_finite(config), indent=2, default=str)), first["step"])

    def log(self, row: Row) -> None:
        for tag, value in tagged(row).items():
            self._writer.add_scalar(tag, value, row["step"], walltime=row["time"])

    def log_samples(self, rows: list[Row]) -> None:
        for i, row in enumerate(rows):
            self._writer.add_text(f"samples/{i}", _indented(f"{row['prompt']}{row['text']}"), row["step"])

    def close(self) -> None:
        self._writer.close()


def _indented(text: str) -> str:
    """A code block in Markdown, which TensorBoard would otherwise make of the text's own characters."""
    return "\n".join("    " + line for line in text.splitlines())


class _Wandb:
    def __init__(self, tracking: Tracking, run: RunFolder, attempt: int, config: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise RuntimeError("the package is missing; pip install wandb, or set tracking.wandb: off") from None

        if tracking.wandb == "online" and not wandb.login(prompt=False):
            raise RuntimeError("no account on this machine; run `wandb login` once, or set tracking.wandb: offline")
        self._wandb = wandb
        # Nothing of the machine but what is logged here: not the terminal, argv, source, git state or package list.
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_code=True,
            save_code=False,
            disable_git=True,
            disable_job_creation=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            init_timeout=INIT_SECONDS,
            finish_timeout=CLOSE_SECONDS - 5,
        )
        # A run there cannot go back to an earlier step, so an attempt is a run and the run is their group.
        self._run = wandb.init(
            project=tracking.wandb_project,
            group=run.name,
            name=run.name if attempt == 1 else f"{run.name}-{attempt}",
            dir=str(run.path),
            mode=tracking.wandb,
            config=_finite(config),
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Row) -> None:
        self._run.log({"step": row["step"], **tagged(row)})

    def log_samples(self, rows: list[Row]) -> None:
        table = self._wandb.Table(columns=["prompt", "text"], data=[[row["prompt"], row["text"]] for row in rows])
        self._run.log({"step": rows[0]["step"], "samples": table})

    def close(self) -> None:
        self._run.finish()


def _join(thread: threading.Thread, deadline: float, alive: Callable[[], None]) -> None:
    """Wait for a thread until `deadline`, with a sign of life again and again: the wait may outlast a time-out of the run."""
    while thread.is_alive() and (left := deadline - time.monotonic()) > 0:
        alive()
        thread.join(min(left, SIGN_SECONDS))


def _release_wandb(deadline: float, alive: Callable[[], None]) -> None:
    """Take back wandb's exit hook, which waits for its service process without a limit: with an unreachable server
    that process now and then never ends, and the rank would hang on its way out."""

    def release() -> None:
        with contextlib.suppress(Exception):
            sys.modules["wandb"].teardown()

    if "wandb" in sys.modules:
        thread = threading.Thread(target=release, name="tracker-wandb-release", daemon=True)
        thread.start()
        _join(thread, deadline, alive)
