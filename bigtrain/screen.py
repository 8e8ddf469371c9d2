"""What a person sees while a run trains, on rank 0.

On a terminal: a header, one progress bar and, above it, evaluations, samples and warnings. Anywhere else (a pipe, a
scheduler's log): plain lines at a sensible pace, without control characters and without secrets. Nothing here runs on a
thread: the bar is repainted by `update`, at most REPAINTS times a second, so that a step pays microseconds.
"""

from __future__ import annotations

import math
import os
import time
from typing import Any, TextIO

from bigtrain.secrets import redact

REPAINTS = 4
"""Repaints of the bar a second, at most."""
LINE_SECONDS = 10.0
"""Seconds between plain lines, at least."""

Row = dict[str, Any]


class Screen:
    """Shows a run on `stream` (logs.RankOutput's: its writes never fail); call `close` (contextlib.closing does) so that the
    terminal gets its cursor back."""

    def __init__(self, stream: TextIO):
        terminal = stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        self._out = _Terminal(stream) if terminal else _Plain(stream)
        self._interval = 1 / REPAINTS if terminal else LINE_SECONDS
        self._warned: set[str] = set()
        self._row: Row = {}
        self._start: tuple[int, float] | None = None
        self._shown_at = -math.inf
        self._unshown: tuple[int, int] | None = None

    def header(self, facts: dict[str, Any]) -> None:
        """What the run is, as labels and values."""
        self._out.header({label: printable(value) for label, value in facts.items()})

    def update(self, step: int, total: int, row: Row | None) -> None:
        """The step just done, and the newest training row there is (see metrics.jsonl), None before the first."""
        now = time.monotonic()
        self._row = row or self._row
        self._start = self._start or (step, now)
        self._unshown = (step, total)
        if now - self._shown_at >= self._interval or step >= total:
            self._shown_at = now
            self._show()

    def evaluation(self, row: Row) -> None:
        """An evaluation row: step, validation_loss, perplexity, bits_per_byte."""
        parts = [f"validation loss {row['validation_loss']:.4f}"]
        parts += [f"{key.replace('_', ' ')} {row[key]:.4g}" for key in ("perplexity", "bits_per_byte") if key in row]
        self._out.line(f"step {row['step']:,}  " + "  ".join(parts), "bold green")

    def sample(self, prompt: str, text: str) -> None:
        """What the model wrote after a prompt."""
        self._out.sample(printable(prompt), printable(text))

    def message(self, text: str) -> None:
        self._out.line(printable(text), "")

    def warn(self, text: str) -> None:
        """A warning, shown once however often it is given."""
        if text not in self._warned:
            self._warned.add(text)
            self._out.line(printable(f"warning: {text}"), "yellow")

    def close(self) -> None:
        """Show the last step and leave the terminal as it was found."""
        self._show()
        self._out.close()

    def _show(self) -> None:
        if self._unshown:
            step, total = self._unshown
            self._unshown = None
            self._out.progress(step, total, self._row, self._seconds_left(step, total))

    def _seconds_left(self, step: int, total: int) -> float | None:
        first, started = self._start
        return (time.monotonic() - started) / (step - first) * (total - step) if step > first else None


class _Plain:
    def __init__(self, stream: TextIO):
        self._stream = stream

    def header(self, facts: dict[str, str]) -> None:
        width = max(map(len, facts), default=0)
        self._write("\n".join(f"{label:{width}}  {value}" for label, value in facts.items()))

    def progress(self, step: int, total: int, row: Row, left: float | None) -> None:
        self._write("  ".join([f"step {step:,}/{total:,}", *numbers(row), *([f"{duration(left)} left"] if left else [])]))

    def line(self, text: str, style: str) -> None:
        self._write(text)

    def sample(self, prompt: str, text: str) -> None:
        self._write("\n".join("  | " + line for line in (prompt + text).split("\n")))

    def close(self) -> None:
        pass

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class _Terminal:
    def __init__(self, stream: TextIO):
        from rich.console import Console

        try:
            width = os.get_terminal_size(stream.fileno()).columns  # rich would ask descriptors 0 to 2, which a rank has redirected
        except OSError:
            width = None
        self._console = Console(file=stream, width=width, force_terminal=True, highlight=False, markup=False, emoji=False)
        self._bar = None

    def header(self, facts: dict[str, str]) -> None:
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, value in facts.items():
            grid.add_row(Text(label), Text(value))
        self._console.print(Panel(grid, title="bigtrain", title_align="left", border_style="blue", expand=False))

    def progress(self, step: int, total: int, row: Row, left: float | None) -> None:
        if self._bar is None:
            self._bar, self._task = self._start_bar(total)
        parts = numbers(row, brief=True) + ([f"{duration(left)} left"] if left else [])
        self._bar.update(self._task, completed=step, total=total, numbers="  ".join(parts))
        self._bar.refresh()

    def _start_bar(self, total: int):
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        steps = Column(no_wrap=True, min_width=len(f"{total:,}/{total:,}"))
        bar = Progress(
            TextColumn("{task.completed:,}/{task.total:,}", markup=False, table_column=steps),
            BarColumn(bar_width=None, complete_style="blue", finished_style="green", table_column=Column(ratio=1, min_width=8)),
            TextColumn("{task.fields[numbers]}", markup=False, table_column=Column(no_wrap=True)),
            console=self._console,
            auto_refresh=False,
            expand=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        bar.start()
        return bar, bar.add_task("", total=total, numbers="")

    def line(self, text: str, style: str) -> None:
        self._console.print(text, style=style)

    def sample(self, prompt: str, text: str) -> None:
        from rich.padding import Padding
        from rich.text import Text

        self._console.print(Padding(Text.assemble((prompt, "bold cyan"), (text, "dim")), (0, 2)))

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def printable(value: Any) -> str:
    """Text whose control characters and secrets cannot reach the terminal: a model may well write an escape sequence."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in redact(str(value)))


def numbers(row: Row, brief: bool = False) -> list[str]:
    """The numbers of a training row in a reader's units; those it lacks are left out."""
    shown = {
        "loss": "loss {:.4f}",
        "lr": "lr {:.2e}",
        "grad_norm": "grad {:.3g}",
        "tokens_per_s": "{:,.0f} tokens/s",
        "mfu": "MFU {:.1%}",
        "memory_gib": "{:.1f} GiB",
    }
    left_out = ("lr", "grad_norm", "memory_gib") if brief else ()
    return [form.format(row[key]) for key, form in shown.items() if row.get(key) is not None and key not in left_out]


def duration(seconds: float) -> str:
    """59s, 3m 05s, 2h 07m, 3d 04h."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m {s % 60:02d}s"
    return f"{s // 3600}h {s % 3600 // 60:02d}m" if s < 86400 else f"{s // 86400}d {s % 86400 // 3600:02d}h"
