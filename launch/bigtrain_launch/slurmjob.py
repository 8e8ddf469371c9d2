"""Inside a Slurm job: where it is, agents on its nodes by srun, and what becomes of the job when the run's processes have ended."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from bigtrain.configlaunch import Launch
from bigtrain.errors import BAD_NODE, FAILURE, STOPPED, UserError
from bigtrain.ranks import slurm_job
from bigtrain.runfolder import RunFolder, read_json
from bigtrain_launch import jobs
from bigtrain_launch.channel import Channel, Message, last_lines
from bigtrain_launch.hostlist import expand, fold
from bigtrain_launch.listener import ADDRESS, TOKEN, Listener
from bigtrain_launch.local import say
from bigtrain_launch.network import own_address
from bigtrain_launch.requeue import preempted, requeue
from bigtrain_launch.supervise import Ended

STOP_SECONDS = 3.0  # for srun to end after its agents, and once more after SIGTERM


@dataclass(frozen=True)
class Here:
    """The job that this process runs in."""

    number: str
    """As Slurm counts all jobs."""
    id: str
    """As `bigtrain jobs` knows it; of an array 12_3."""
    nodes: tuple[str, ...]
    """In Slurm's order: this process runs on the first."""
    restarts: int
    """How often Slurm has begun it again."""


def here(environment: Mapping[str, str], settings: Launch) -> Here:
    """Where this process runs. Raises UserError outside of a job, and when the job is not what `launch` asks for: a run on fewer
    nodes than somebody believes is worse than none."""
    number, listed = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_JOB_NODELIST", "")
    if not number or not listed:
        raise UserError("SLURM_JOB_ID: not set, so this is no Slurm job; `bigtrain launch slurm CONFIG` submits one")
    if environment.get("SLURM_STEP_ID", "").isdigit():
        raise UserError("SLURM_STEP_ID: srun has started this, but the launcher is to run once in the batch script, without srun")
    nodes = tuple(expand(listed))
    if (said := environment.get("SLURM_JOB_NUM_NODES", "")) != str(len(nodes)):
        raise UserError(f"SLURM_JOB_NUM_NODES: {said or 'not set'}, but SLURM_JOB_NODELIST names {len(nodes)}: {listed[:200]}")
    if len(nodes) < (least := settings.min_nodes or settings.nodes):
        asked = f"launch.min_nodes {least}" if settings.min_nodes else f"launch.nodes {least}"
        raise UserError(f"job {number} has {len(nodes)} node{'s' * (len(nodes) > 1)} ({listed[:200]}), but {asked}; change one")
    restarts = environment.get("SLURM_RESTART_COUNT") or "0"
    return Here(number, slurm_job(environment) or number, nodes, int(restarts) if restarts.isdigit() else 0)


class Srun:
    """A transport (see cluster.py): one srun for all agents that are started together, which then come over TCP."""

    def __init__(self, command: Sequence[str], nodes: Sequence[str]):
        """`command`: srun, its options, and what it is to run; which nodes is added here."""
        self._command, self._token = list(command), secrets.token_hex(16)
        self._address = _own_address(nodes)
        self._listener = Listener(self._token)
        self._steps: list[_Step] = []

    def start(self, names: Sequence[str]) -> None:
        srun, *rest = self._command
        argv = [srun, f"--nodes={len(names)}", f"--ntasks={len(names)}", f"--nodelist={fold(names)}", *rest]
        environment = {**os.environ, ADDRESS: f"{self._address}:{self._listener.port}", TOKEN: self._token}
        errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the step)
        try:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=errors, env=environment)
        except OSError as error:
            raise UserError(f"{srun}: cannot be run ({error.strerror}); the job's script names it") from None
        self._steps.append(_Step(process, errors, set(names)))

    def connected(self) -> list[tuple[str, Message, Channel]]:
        come = [(str(greeting.get("node")), greeting, channel) for greeting, channel in self._listener.accepted()]
        for step in self._steps:
            step.awaited.difference_update(name for name, *_ in come)
        return come

    def failed(self) -> list[tuple[str, str]]:
        problems = []
        for step in self._steps:
            if step.awaited and (code := step.process.poll()) is not None:
                problems += [(name, f"srun ended with exit code {code}: {step.said()}") for name in sorted(step.awaited)]
                step.awaited.clear()
        return problems

    def close(self) -> None:
        """The agents have been told to end, and so srun ends; one that waits for a lost node must be made to."""
        self._listener.close()
        for step in self._steps:
            step.end()


@dataclass
class _Step:
    process: subprocess.Popen
    errors: IO[bytes]
    awaited: set[str]
    """Nodes whose agents have not come yet."""

    def said(self) -> str:
        self.errors.seek(0)
        return last_lines(self.errors.read().decode(errors="replace")) or "it said nothing"

    def end(self) -> None:
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if number and self.process.poll() is None:
                self.process.send_signal(number)
            try:
                self.process.wait(STOP_SECONDS)
                break
            except subprocess.TimeoutExpired:
                continue
        self.errors.close()


def _own_address(nodes: Sequence[str]) -> str:
    """The address by which the other nodes reach this one."""
    others = [name for name in nodes if name != os.environ.get("SLURMD_NODENAME")]
    try:
        return own_address(others[0]) if others else "127.0.0.1"
    except UserError:  # known to Slurm by an address of its own
        return socket.gethostname()


def earlier(run: RunFolder, place: Here) -> list[Ended]:
    """Failures of this job before Slurm began it again, for the budget of restarts that it has in all. Who has left no word went with
    its node, or was killed before it had saved."""
    ends = []
    for number in run.attempts():
        record = read_json(run.record(number))
        if record.get("job") != place.id:
            continue
        beats = run.heartbeats(number, now=0.0)
        step, position = max(((b["step"], b["position"]) for b in beats), default=(0, 0))
        if "ended" not in record:
            ends.append(Ended(FAILURE, f"attempt {number} ended without a record", True, step, position, lost=True))
        elif record.get("restart"):
            lost = bool(record.get("lost"))
            ends.append(Ended(record.get("exit_code", FAILURE), str(record.get("reason")), True, step, position, lost))
    return ends


def finish(run: RunFolder, place: Here, code: int, *, progress: bool, out: Sequence[str], restarts: int) -> None:
    """Have the job begin again where the end of its processes, `code`, asks for that.

    Slurm has told them to stop: the time limit, or a more urgent job. Without `progress`, a new checkpoint, only the latter counts:
    a time limit in which nothing is done would come again and again. Or too few nodes are left; that counts `restarts` times at
    most. The job does not get those nodes again that were left `out`.
    """
    job = jobs.find(run, "slurm", place.id)
    if code == STOPPED and not (job and job.facts.get("cancelled")):
        if progress or preempted(place.number):
            requeue(place.number, place.restarts, out)
        else:
            say(f"job {place.number} has made no new checkpoint, so it is not requeued; allow more launch.time, or a longer launch.grace")
    elif code == BAD_NODE and out:
        before = job.facts.get("without", []) if job else []
        if len(before) < restarts:
            if job:
                jobs.note(job, without=[*before, fold(out)])  # first: Slurm ends this process soon after
            requeue(place.number, place.restarts, out)


def checkpoints(run: RunFolder) -> set[str]:
    """What there is to go on from: progress is something new here."""
    return {path.parent.name for path in run.checkpoints.glob("step-*/manifest.json")}
