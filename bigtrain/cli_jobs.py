"""The commands about jobs, which are the same wherever a run has been launched: jobs, logs, cancel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunFolderPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]
Runs = Annotated[list[Path] | None, typer.Argument(metavar="[RUN]...", help="Run folders; left out: all under ./runs.")]


def jobs(runs: Runs = None) -> None:
    """Where runs were launched, and how that stands."""
    from rich.console import Console

    from bigtrain import configfile
    from bigtrain.errors import BigtrainError
    from bigtrain_launch.jobs import of_runs, show

    def steps(run) -> int | None:
        try:
            return configfile.load_saved(run.config).train.steps
        except BigtrainError:  # not there yet, or not ours to judge here
            return None

    rows = of_runs(runs or [])
    if rows:
        show(rows, steps, Console(highlight=False))
    else:
        print("no runs under ./runs; give run folders")
