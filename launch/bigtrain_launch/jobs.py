"""The jobs of a run: every launch leaves a record in the run's folder, jobs/NNNN.json.

How a job stands is asked of whoever knows: this machine's processes, Slurm, Kubernetes, and where none of them can tell, what the
run's attempts have left.
"""

from __future__ import annotations

import math
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bigtrain.errors import BAD_NODE, DONE, FAILURE, HANG, SAME_CRASH, STOPPED, USER_MISTAKE, BigtrainError, UserError
from bigtrain.runfolder import RunFolder, machine, process_start, read_json, write_record
from bigtrain_launch import queues
from bigtrain_launch.local import say
from bigtrain_launch.queues import State, unknown
from bigtrain_launch.tools import one_line

HERE = ("local", "hosts")
"""Kinds of job that live and die with the process that launched them."""
KINDS = (*HERE, "slurm", "kubernetes")
_SKEW_SECONDS = 5.0  # by which the clocks of hosts may differ
_WORDS = {DONE: "done", USER_MISTAKE: "mistake", STOPPED: "stopped", HANG: "hang", BAD_NODE: "bad node", SAME_CRASH: "same crash twice"}


@dataclass(frozen=True)
class Job:
    """One launch of a run. `kind` is empty where the record is damaged, and for what some other launcher has started."""

    run: RunFolder
    number: int
    kind: str
    id: str
    submitted: float
    facts: dict[str, Any]
    attempts: tuple[int, ...] = ()
    """The run's attempts since then, until the next job."""

    @property
    def path(self) -> Path:
        return _path(self.run, self.number)

    @property
    def nodes(self) -> str:
        """How many machines, as the record says it: a number, or a list of names."""
        nodes = self.facts.get("nodes")
        return str(len(nodes)) if isinstance(nodes, list) else str(nodes) if isinstance(nodes, int) else ""

    @property
    def step(self) -> int | None:
        """The step that the job has reached, None before its first."""
        if not self.attempts:
            return None
        beats = self.run.heartbeats(self.attempts[-1], now=0.0)
        return max((beat["step"] for beat in beats if isinstance(beat.get("step"), int)), default=0) or None


def record(run: RunFolder, kind: str, id: str, **facts: Any) -> None:
    """Write down that a job of `run` was started by this process, or handed to a scheduler. `nodes` is a number or the names.
    Raises UserError where the run's folder cannot be written."""
    now = {"kind": kind, "id": id, "host": socket.gethostname(), "command": shlex.join(sys.argv), "submitted": time.time()}
    if kind in HERE:
        now |= {"pid": os.getpid(), "start": process_start(os.getpid()), "machine": machine()}
    try:
        run.jobs.mkdir(parents=True, exist_ok=True)
        number = next_number(run)
        while True:  # two launches never get the same number
            try:
                _path(run, number).open("x").close()
                break
            except FileExistsError:
                number += 1
        write_record(_path(run, number), now | facts)
    except OSError as error:
        raise UserError(f"run.folder: {run.jobs} cannot be written ({error.strerror}): {kind} job {id} is not recorded") from None


def launch(run: RunFolder, kind: str, id: str, go: Callable[[], int]) -> int:
    """Let `go`, the launcher of a job that is recorded, do its work, and record the exit code, which is returned."""
    code = FAILURE
    try:
        code = go()
    except BigtrainError as error:
        code = error.code
        raise
    finally:
        _end(run, kind, id, code)
    return code


def _end(run: RunFolder, kind: str, id: str, code: int) -> None:
    if job := find(run, kind, id):
        try:
            note(job, ended=time.time(), exit_code=code)
        except OSError as error:  # a record is not worth a run
            say(f"warning: {job.path} not written: {error.strerror}")


def find(run: RunFolder, kind: str, id: str) -> Job | None:
    """A job by its id, without its attempts; the newest, where there are several."""
    jobs = (_read(run, number) for number in reversed(_numbers(run)))
    return next((job for job in jobs if (job.kind, job.id) == (kind, id)), None)


def next_number(run: RunFolder) -> int:
    """The number that the next job of a run is going to have, unless somebody is quicker."""
    return max(_numbers(run), default=0) + 1


def read(run: RunFolder) -> list[Job]:
    """The jobs of a run, oldest first, and last a nameless one for attempts that no recorded job has made."""
    jobs = [_read(run, number) for number in _numbers(run)]
    begun: dict[int, list[int]] = {}
    for attempt in run.attempts():
        begin = read_json(run.record(attempt))
        started, named = begin.get("started"), begin.get("job")
        since = started + _SKEW_SECONDS if isinstance(started, (int, float)) else math.inf  # no record yet: the newest
        by_name = (job.number for job in jobs if job.kind == "slurm" and job.id == named)
        owner = next(by_name, max((job.number for job in jobs if job.submitted <= since), default=0))
        begun.setdefault(owner, []).append(attempt)
    jobs = [replace(job, attempts=tuple(begun.get(job.number, ()))) for job in jobs]
    if not jobs and begun:
        started = read_json(run.record(begun[0][-1])).get("started")
        jobs.append(Job(run, 0, "", "", started if isinstance(started, float) else time.time(), {}, tuple(begun[0])))
    return jobs


def note(job: Job, **facts: Any) -> None:
    """Add facts to the record of a job. Raises OSError."""
    write_record(job.path, job.facts | facts)


def mark_cancelled(job: Job) -> None:
    """Write down that somebody wants the job to end, and not to begin again. Raises OSError."""
    note(job, cancelled=time.time())


def states(jobs: Sequence[Job]) -> list[State]:
    """How each job stands. Schedulers are asked once for all, and none of them can make this fail or wait for long."""
    slurm = queues.slurm([job.id for job in jobs if job.kind == "slurm"])
    silent: State | None = None  # kubectl gave no answer: the next would cost as much time
    found = []
    for job in jobs:
        if job.kind == "slurm":
            state = slurm[job.id]
            if state.word in ("failed", "ended") and job.attempts:  # every exit code but 0; a job that Slurm has forgotten
                state = _left(job)
        elif job.kind == "kubernetes" and job.facts.get("exit_code") == DONE:
            state = State("done")  # by the launcher's own word; any other end may not be the last
        elif job.kind == "kubernetes":
            state = silent or queues.kubernetes(job.id)
            silent = state if "no answer" in state.why else None
        else:
            state = _process(job)
        found.append(state)
    return found


def of_runs(paths: Sequence[Path]) -> list[tuple[Job, State]]:
    """All jobs of these runs; without any, of every run under ./runs those that are not over, or else the newest.

    Raises UserError for a path that is no run."""
    folder = Path("runs")
    runs = [open_run(path) for path in paths] or [RunFolder(path) for path in (sorted(folder.iterdir()) if folder.is_dir() else [])]
    jobs = [job for run in runs for job in read(run)]
    newest = {job.run: job for job in jobs}
    return [(job, state) for job, state in zip(jobs, states(jobs)) if paths or state.active or job is newest[job.run]]


def show(rows: Sequence[tuple[Job, State]], steps: Callable[[RunFolder], int | None], console: Console) -> None:
    """Print jobs as a table; `steps` knows how many steps a run has."""
    table = Table("run", "kind", "id", "nodes", "state", "step", "age", box=None, pad_edge=False)
    for job, state in rows:
        total = steps(job.run)
        step = f"{job.step or 0} of {total}" if total else str(job.step or "")
        age = _age(time.time() - job.submitted) if math.isfinite(job.submitted) else ""
        cells = str(job.run.path), job.kind, job.id, job.nodes, str(state), step, age
        table.add_row(*(Text(one_line(cell), overflow="fold") for cell in cells))
    console.print(table)


def open_run(path: Path) -> RunFolder:
    """The run at `path`. Raises UserError where there is none."""
    run = RunFolder(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run's folder, as in runs/NAME")
    if not (run.attempts() or _numbers(run)):
        raise UserError(f"{path}: nothing was started here (no attempts/1, no jobs/0001.json); give a run's folder, as in runs/NAME")
    return run


def _path(run: RunFolder, number: int) -> Path:
    return run.jobs / f"{number:04d}.json"


def _numbers(run: RunFolder) -> list[int]:
    return sorted(int(path.stem) for path in run.jobs.glob("*.json") if path.stem.isdecimal())


def _read(run: RunFolder, number: int) -> Job:
    facts = read_json(_path(run, number))
    kind, id, submitted = facts.get("kind"), facts.get("id"), facts.get("submitted")
    if kind not in KINDS or not isinstance(id, str) or not isinstance(submitted, (int, float)):
        return Job(run, number, "", "", math.inf, {})
    return Job(run, number, kind, id, float(submitted), facts)


def _process(job: Job) -> State:
    """The state of a job that is a process of this machine or of another, or of which only attempts are known."""
    facts, newest = job.facts, job.attempts[-1] if job.attempts else None
    if "ended" in facts:
        return _left(job)
    if facts.get("machine") and facts["machine"] == machine() and isinstance(facts.get("pid"), int):
        alive = facts.get("start") == process_start(facts["pid"])
        return State("running", active=True) if alive else _left(job)
    if newest and job.run.is_held(newest, time.time()):
        return State("running", f"on {facts['host']}" if facts.get("host") else "", True)
    if newest and (not job.kind or _is_final(read_json(job.run.record(newest)))):
        return _left(job)
    if not job.kind:
        return unknown(f"jobs/{job.path.name} is damaged, or being written")
    return unknown(f"its launcher is process {facts.get('pid')} on {facts.get('host')}")


def _is_final(record: dict[str, Any]) -> bool:
    """No launcher starts the run again after an attempt that ended so."""
    return "ended" in record and not record.get("restart")


def _left(job: Job) -> State:
    """What its record, or that of its newest attempt, says of the end of a job."""
    if not job.attempts and "ended" not in job.facts:
        return State("failed", "before the run was opened")
    end = job.facts if "ended" in job.facts else read_json(job.run.record(job.attempts[-1]))
    if "ended" not in end:
        held = job.run.is_held(job.attempts[-1], time.time())
        return State("running", "started by another launcher", None) if held else State("killed")
    return State(next((word for code, word in _WORDS.items() if code == end.get("exit_code")), "failed"))


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
