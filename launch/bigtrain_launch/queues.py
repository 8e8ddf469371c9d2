"""What Slurm and Kubernetes say of a job. Their tools may be missing, hang or answer anything: then nothing is known, and why."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bigtrain_launch.tools import ASK_SECONDS, Unanswered, ask, one_line

SLURM_ID = re.compile(r"[0-9]+(_[0-9]+)?")
KUBERNETES_ID = re.compile(r"([a-z0-9][a-z0-9.-]*)/(jobset|trainjob)/([a-z0-9][a-z0-9.-]*)")
RESOURCES = {"jobset": "jobsets.jobset.x-k8s.io", "trainjob": "trainjobs.trainer.kubeflow.org"}

_SLURM_ACTIVE = {
    *("PENDING", "RUNNING", "SUSPENDED", "STOPPED", "CONFIGURING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT"),
    *("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"),
}
_SLURM_OVER = {
    *("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "REVOKED"),
    "LAUNCH_FAILED",
}
_ROW = r"(?P<task>[0-9]+(_[0-9]+|_\[[0-9,%-]+\])?)\|(?P<state>[A-Z_]+)"
_WORDS = {"PENDING": "waiting", "COMPLETED": "done"}


@dataclass(frozen=True)
class State:
    """How a job stands."""

    word: str
    why: str = ""
    active: bool | None = False
    """It runs, or will: True. None: not known."""

    def __str__(self) -> str:
        return f"{self.word} ({self.why})" if self.why else self.word


def unknown(why: str) -> State:
    return State("unknown", why, None)


def slurm(ids: Sequence[str]) -> dict[str, State]:
    """The state of each job, of an array all its tasks together: asked of squeue, which forgets, and then of sacct, which not every
    cluster has."""
    found = {id: unknown(f"{one_line(id)!r} is no number of a Slurm job") for id in ids if not SLURM_ID.fullmatch(id)}
    rest = [id for id in ids if id not in found]
    if not rest:
        return found
    try:
        queued = _tasks(
            ["squeue", "--noheader", "--states=all", f"--jobs={','.join(rest)}", "--format=%i|%T|%r"], rf"{_ROW}\|(?P<reason>.*)"
        )
    except Unanswered as error:
        if "invalid job id" not in str(error).lower():
            return found | {id: unknown(str(error)) for id in rest}
        queued = []  # so says squeue of one job that it does not know, or no longer
    found |= {id: _together(tasks) for id in rest if (tasks := _of(id, queued))}
    if not (rest := [id for id in rest if id not in found]):
        return found
    try:
        options = ["--noheader", "--parsable2", "--allocations", f"--jobs={','.join(rest)}", "--format=JobID,State"]
        past = _tasks(["sacct", *options], rf"{_ROW}( by [0-9]+)?")
    except Unanswered as error:
        return found | {id: State("ended", f"squeue no longer knows it; {error}") for id in rest}
    return found | {id: _together(tasks) if (tasks := _of(id, past)) else State("ended", "Slurm does not know it") for id in rest}


def kubernetes(id: str) -> State:
    """The state of a JobSet or a TrainJob, `NAMESPACE/KIND/NAME`."""
    if not (parts := KUBERNETES_ID.fullmatch(id)):
        return unknown(f"{one_line(id)!r} is no job in Kubernetes")
    namespace, kind, name = parts.groups()
    options = [f"--namespace={namespace}", "--ignore-not-found", "--output=json", f"--request-timeout={ASK_SECONDS:.0f}s"]
    try:
        told = ask(["kubectl", "get", RESOURCES[kind], name, *options], seconds=ASK_SECONDS + 5)
        if not told.strip():
            return State("ended", "deleted from the cluster")
        status = json.loads(told).get("status") or {}
        return _from_status(status)
    except Unanswered as error:
        return unknown(str(error))
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return unknown(f"kubectl: no JSON of a job, but {one_line(told)[:60]!r}")


def _from_status(status: dict[str, Any]) -> State:
    true = {c["type"]: str(c.get("message", "")) for c in status.get("conditions") or [] if c["status"] == "True"}
    for name, word in (("Completed", "done"), ("Complete", "done"), ("Failed", "failed")):
        if name in true:
            return State(word, one_line(true[name]) if word == "failed" else "")
    if "Suspended" in true:
        return State("waiting", "suspended, in a queue say", True)
    groups = status.get("replicatedJobsStatus") or status.get("jobsStatus") or []
    ready = sum(int(group.get("ready", 0)) for group in groups)
    restarts = f"restart {status['restarts']}" if status.get("restarts") else ""
    return State("running", restarts, True) if ready else State("starting", restarts or "its pods are not ready", True)


def _tasks(argv: Sequence[str], row: str) -> list[tuple[str, str, str]]:
    """Task, state and reason from each line of a Slurm table that looks like `row`. Raises Unanswered where none of them does."""
    lines = [line for line in ask(argv, seconds=ASK_SECONDS).splitlines() if line.strip()]
    rows = [found for line in lines if (found := re.fullmatch(row, line))]
    if lines and not rows:
        raise Unanswered(f"{argv[0]}: no table of jobs, but {one_line(lines[0])[:60]!r}")
    return [(row["task"], row["state"], row.groupdict().get("reason", "")) for row in rows]


def _of(id: str, tasks: Sequence[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """(state, reason) of a job's tasks, or of a task."""
    return [(state, reason) for task, state, reason in tasks if id in (task, task.partition("_")[0])]


def _together(tasks: Sequence[tuple[str, str]]) -> State:
    words = Counter(state for state, _ in tasks)
    if strange := next((word for word in words if word not in _SLURM_ACTIVE | _SLURM_OVER), None):
        return unknown(f"Slurm calls it {one_line(strange)[:40]!r}")
    active = any(word in _SLURM_ACTIVE for word in words)
    named = {word: _WORDS.get(word, word.lower().replace("_", " ")) for word in words}
    if len(words) > 1:
        return State(", ".join(f"{count} {named[word]}" for word, count in words.items()), "", active)
    (word, reason), reasons = next(iter(tasks)), {reason for _, reason in tasks}
    waits = word == "PENDING" and len(reasons) == 1 and reason not in ("", "None")
    return State(named[word], one_line(reason) if waits else "", active)
