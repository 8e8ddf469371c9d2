"""The commands about jobs, which are the same wherever a run has been launched: jobs, logs, cancel."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from bigtrain.screen import printable

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
        # A pipe has no width: a row is a line there.
        show(rows, steps, Console(highlight=False, width=None if sys.stdout.isatty() else 1000))
    else:
        print("no runs under ./runs; give run folders")


def logs(
    run: RunFolderPath,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines are written, over restarts, until the run ends.")] = False,
    rank: Annotated[
        list[int] | None, typer.Option(min=0, help="Whose log, several if given again; left out: rank 0's, with --grep all.")
    ] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="Of which start of the run; left out: the newest.")] = None,
    grep: Annotated[str | None, typer.Option(metavar="REGEX", help="Only lines in which this is found.")] = None,
) -> None:
    """What the ranks of a run have printed."""
    from bigtrain_launch import jobs, readlogs

    for number in (signal.SIGINT, signal.SIGPIPE):  # Ctrl-C and `| head` end it without a word
        signal.signal(number, signal.SIG_DFL)
    sys.stdout.reconfigure(errors="replace")
    shown = printable if sys.stdout.isatty() else str
    folder = jobs.open_run(run)
    newest = jobs.read(folder)[-1]
    if newest.kind == "kubernetes" and not folder.attempts():
        given = [f"--rank={number}" for number in rank or []] + ([f"--attempt={attempt}"] if attempt else [])
        given += ([f"--grep={grep}"] if grep is not None else []) + (["--follow"] if follow else [])
        lines = readlogs.from_pods(newest, given)
    else:
        lines = readlogs.lines(folder, rank, attempt, grep, follow, _say)
    for line in lines:
        print(shown(line), flush=follow)


def cancel(run: RunFolderPath) -> None:
    """End a run wherever it was launched: it saves a checkpoint, and the same command goes on from there."""
    from bigtrain_launch.cancel import cancel as end
    from bigtrain_launch.jobs import open_run

    end(open_run(run), _say)


def _say(text: str) -> None:
    print(f"bigtrain: {printable(text)}", file=sys.stderr, flush=True)
