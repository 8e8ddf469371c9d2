"""What the files of commands share: arguments, and what several commands do first."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bigtrain.errors import UserError

if TYPE_CHECKING:
    from bigtrain.config import Data

SETTINGS = {"no_args_is_help": True, "pretty_exceptions_enable": False, "rich_markup_mode": None, "add_completion": False}

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="Config file (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values that win over the file's.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or one of its checkpoints.")]
New = Annotated[bool, typer.Option("--new", help="Start a new run beside one that is there: NAME-2, NAME-3, ...")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print what would be run.")]


def require_torch() -> None:
    """Raise UserError where this Python has no torch."""
    if importlib.util.find_spec("torch") is None:
        raise UserError("torch is not installed in this Python; install bigtrain with its requirements: pip install -c constraints.txt .")


def prepare(data: Data) -> None:
    """Prepare the data if it is not there yet, with a progress bar."""
    from bigtrain.data import prepare as preparing
    from bigtrain.data.shards import MANIFEST

    if (Path(data.folder) / MANIFEST).is_file():
        preparing.prepare(data)  # only compares
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("documents"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, int] = {}

        def progress(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        preparing.prepare(data, progress)
