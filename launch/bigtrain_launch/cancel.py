"""End the jobs of a run so that a checkpoint is written and none of them begins again, wherever they run."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable

from bigtrain.errors import UserError
from bigtrain.runfolder import RunFolder, machine, process_start
from bigtrain_launch import jobs, queues
from bigtrain_launch.jobs import Job
from bigtrain_launch.kubernetes import JOB_LABEL
from bigtrain_launch.queues import State
from bigtrain_launch.tools import Unanswered, ask, one_line

PROGRESS_SECONDS = 5.0
ASK_AGAIN_SECONDS = 2.0
DELETE_SECONDS = 60.0  # for a busy API server to take note; the end of the pods is waited for afterwards
SILENT_ANSWERS = 5  # of a scheduler in a row, after which it is no longer waited for

Say = Callable[[str], None]


def cancel(run: RunFolder, say: Say) -> None:
    """Ask the jobs of a run to save and end, and wait until they have. `say` gets a line about each thing done.

    Raises UserError where that cannot be done from here, with what can be done instead.
    """
    known = jobs.read(run)
    standing = list(zip(known, jobs.states(known)))
    # The newest first: what waits for the end of another must be gone when that one ends.
    active = [(job, state) for job, state in reversed(standing) if state.active]
    for job, state in active:
        _end(job, state, say)
    if standing and (newest := standing[-1])[1].active is None:
        raise UserError(f"{run.path}: {newest[1]}; {_instead(newest[0])}")
    if not active:
        say(f"nothing to cancel: {run.path}: {standing[-1][1] if standing else 'no job was started'}")
        return
    if active[0][0].kind == "kubernetes" and not run.attempts():
        say("ended; what it has saved is on its claim, and the same command goes on from there")
        return
    saved = sorted(path.name for path in run.checkpoints.glob("step-*")) if run.checkpoints.is_dir() else []
    say(f"ended; the same command goes on from {saved[-1]}" if saved else "ended; there is no checkpoint in this folder")


def _end(job: Job, state: State, say: Say) -> None:
    if job.kind in jobs.HERE and job.facts.get("machine") != machine():
        raise UserError(f"{job.run.path}: its launcher runs on another machine or in another container; {_instead(job)}")
    if not job.kind:
        raise UserError(f"{job.run.path}: it was not started by `bigtrain`; send SIGTERM to its launcher, and it saves and ends")
    try:
        jobs.mark_cancelled(job)
    except OSError as error:
        say(f"warning: {job.path} not written ({error.strerror}): a job that is requeued may begin again")
    if job.kind == "slurm":
        _end_slurm(job, state, say)
    elif job.kind == "kubernetes":
        _end_kubernetes(job, say)
    else:
        _end_process(job, say)


def _instead(job: Job) -> str:
    """What to do where a job cannot be ended from here."""
    path, host = job.run.path.resolve(), one_line(str(job.facts.get("host")))
    if job.kind in jobs.HERE:
        return f"on {host}, run: bigtrain cancel {path}"
    return f"where its scheduler can be asked, run: bigtrain cancel {path}"


def _end_process(job: Job, say: Say) -> None:
    """SIGTERM to the launcher, which asks the ranks to save."""
    pid = job.facts["pid"]
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if job.facts["start"] != process_start(pid):  # it has ended, and another has its number
            return
        signal.pidfd_send_signal(process, signal.SIGTERM)
        say(f"asked the launcher (process {pid}) to save and end; waiting for it. Ctrl-C stops the waiting only")
        progress = _Progress(job, say)
        while not select.select([process], [], [], 0.5)[0]:
            progress.tell()
    except ProcessLookupError:
        return
    except PermissionError:
        raise UserError(f"{job.run.path}: process {pid}, its launcher, is another user's; ask them, or run this as root") from None
    finally:
        os.close(process)


def _end_slurm(job: Job, state: State, say: Say) -> None:
    """A job that waits is taken from the queue. One that runs is only signalled: scancel on its own would kill it KillWait seconds
    later, checkpoint or not. The batch step is the launcher, which asks the ranks to save and, for a cancelled job, does not requeue."""

    def take_from_queue(now: State) -> None:  # of an array, some tasks
        if "waiting" in now.word:
            _told(["scancel", "--state=PENDING", job.id])

    take_from_queue(state)
    if state.word == "waiting":
        say(f"took Slurm job {job.id} from the queue")
        return
    _told(["scancel", "--batch", "--signal=TERM", job.id])
    say(f"asked Slurm job {job.id} to save and end; waiting for it. Ctrl-C stops the waiting only; `scancel {job.id}` ends it at once")

    def ended() -> bool | None:
        now = queues.slurm([job.id])[job.id]
        take_from_queue(now)  # it was requeued in the same moment
        return None if now.active is None else not now.active

    _wait(job, ended, say)


def _end_kubernetes(job: Job, say: Say) -> None:
    """Deleting sends SIGTERM to all pods, and SIGKILL when launch.grace is over. Their config is mounted, and may go at once."""
    namespace, kind, name = queues.KUBERNETES_ID.fullmatch(job.id).groups()
    made = [queues.RESOURCES[kind], *(["trainingruntimes.trainer.kubeflow.org"] if kind == "trainjob" else []), "configmaps"]
    chosen = [f"--namespace={namespace}", f"--selector={JOB_LABEL}={name}"]
    _told(["kubectl", "delete", ",".join(made), *chosen, "--cascade=foreground", "--wait=false"], DELETE_SECONDS)
    say(f"deleted {kind} {name} in namespace {namespace}; its pods save and end, waiting for them. Ctrl-C stops the waiting only")

    def ended() -> bool | None:
        now = queues.kubernetes(job.id)
        return None if now.active is None else not now.active

    _wait(job, ended, say)


def _told(argv: list[str], seconds: float = 30.0) -> None:
    try:
        ask(argv, seconds=seconds)
    except Unanswered as error:
        raise UserError(f"{error}; it is not certain that the job ends: see `bigtrain jobs`, and try again") from None


def _wait(job: Job, ended: Callable[[], bool | None], say: Say) -> None:
    """Until `ended` says so; None from it is no answer."""
    progress, silent = _Progress(job, say), 0
    while not (answer := ended()):
        silent = silent + 1 if answer is None else 0
        if silent == SILENT_ANSWERS:
            raise UserError(f"job {job.id} was asked to end, but whether it has is not known: {jobs.states([job])[0]}")
        progress.tell()
        time.sleep(ASK_AGAIN_SECONDS)


class _Progress:
    """Tells what the ranks do until they have ended."""

    def __init__(self, job: Job, say: Say):
        self._run, self._say, self._shown, self._at = job.run, say, "", time.monotonic()

    def tell(self) -> None:
        if time.monotonic() - self._at < PROGRESS_SECONDS or not self._run.attempts():
            return
        self._at = time.monotonic()
        beats = self._run.heartbeats(self._run.attempts()[-1], time.time())
        first = next((beat for beat in beats if "exit_code" not in beat), None)
        now = one_line(f"rank {first.get('rank')} is in step {first.get('step')}: {first.get('phase')}") if first else ""
        if now and now != self._shown:
            self._shown = now
            self._say(now)
