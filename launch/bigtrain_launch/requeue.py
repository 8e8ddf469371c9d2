"""Have Slurm begin a job again, asked from inside it: by its launcher, or where that has died with its node, by the tasks of the others.
Standard library only."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Sequence
from typing import NamedTuple

from bigtrain.errors import UserError
from bigtrain_launch.hostlist import expand, fold
from bigtrain_launch.local import say
from bigtrain_launch.tools import Unanswered, ask, one_line

RUNNING = {"RUNNING", "SIGNALING", "RESIZING", "STAGE_OUT", "SUSPENDED", "STOPPED"}
EXCLUDE_SECONDS = 20.0  # to have suspect nodes left out; Slurm gives an ended job KillWait seconds, 30 by default
POLL_SECONDS = 1.0
NAMES = ("JobState", "Restarts", "ExcNodeList", "BatchHost", "PreemptTime")


class Standing(NamedTuple):
    """What Slurm says of a job."""

    state: str
    restarts: int
    """How often it was begun again, or is going to be."""
    excluded: str
    """Nodes that it must not get, as a host list."""
    host: str
    """The node of its batch script."""
    preempted: bool
    """A more urgent job is to have its nodes."""


def standing(job: str) -> Standing:
    """Ask about a job. Raises Unanswered."""
    told = ask(["scontrol", "--oneliner", "show", "job", job])
    found = [re.search(rf"(?:^|\s){name}=(\S+)", told) for name in NAMES]
    state, restarts, excluded, host, preempted = (match[1] if match else "" for match in found)
    if not re.fullmatch("[A-Z_]+", state) or not re.fullmatch("[0-9]{1,9}", restarts):
        raise Unanswered(f"scontrol: expected JobState= and Restarts= of job {job}, found {one_line(told)[:80]!r}")
    return Standing(state, int(restarts), "" if excluded == "(null)" else excluded, host, preempted[:1].isdigit())


def preempted(job: str) -> bool:
    """Whether a job is to make room for a more urgent one, as far as Slurm tells."""
    try:
        return standing(job).preempted
    except Unanswered:
        return False


def requeue(job: str, restarts: int, without: Sequence[str] = ()) -> bool:
    """Have a job, which was begun again `restarts` times before, begin again, on other nodes than `without`; whether it is going to.

    Once at most, whoever else asks for it: Slurm itself does so when it preempts a job or loses a node. A job that was cancelled,
    or has reached its time limit, is left alone. Slurm sends SIGTERM to the caller at once, and SIGKILL soon; from here on the caller,
    and what it asks Slurm with, ignores the first.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        before = standing(job)
        if before.restarts == restarts:
            if before.state not in RUNNING:
                say(f"job {job} is ending ({before.state}), so it is not requeued; the same command goes on")
                return False
            ask(["scontrol", "requeue", job])
            if standing(job).restarts == restarts:
                raise Unanswered("scontrol: requeued nothing, and did not say why")
    except Unanswered as error:
        say(f"job {job} is not requeued: {error}; the same command goes on")
        return False
    say(f"job {job} is requeued{f' without {fold(without)}' if without else ''}")
    if without:
        _exclude(job, [*_hosts(before.excluded), *without])
    return True


def _exclude(job: str, hosts: Sequence[str]) -> None:
    """Keep a requeued job from nodes; tried again, since Slurm may not want to hear of it while the job is still ending."""
    until = time.monotonic() + EXCLUDE_SECONDS
    while True:
        try:
            ask(["scontrol", "update", f"JobId={job}", f"ExcNodeList={fold(dict.fromkeys(hosts))}"])
            return
        except Unanswered as error:
            if time.monotonic() > until:
                say(f"warning: Slurm may choose {fold(hosts)} again: {error}")
                return
            time.sleep(POLL_SECONDS)


def _hosts(text: str) -> list[str]:
    try:
        return expand(text) if text else []
    except UserError:  # Slurm's own list, in words that this does not know: the new names must do
        return []


def watch_over(job: str, restarts: int, seconds: float) -> None:
    """On a node that has lost its launcher: have the job begin again when Slurm, too, misses the node of the launcher.

    A job that may go on after the loss of a node (--no-kill) does so even when nothing is left that leads it. Returns when the job
    has ended, or is begun again; asks every `seconds`.
    """
    while True:
        try:
            now = standing(job)
            if now.state not in RUNNING or now.restarts != restarts:
                return
            node = ask(["sinfo", "--noheader", f"--nodes={now.host}", "--format=%T"]).strip()
            if node.endswith("*") or node.startswith("down"):
                say(f"{now.host}, where the launcher ran, is gone")
                requeue(job, restarts)
                return
        except Unanswered as error:
            say(f"the launcher is gone, and whether its node is cannot be seen: {error}; if job {job} stays, `scancel {job}` ends it")
            return
        time.sleep(seconds)
