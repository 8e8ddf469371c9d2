"""Slurm from the login node: a run as a batch script, and its submission. What happens inside the job is slurmjob.py."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bigtrain.configlaunch import Launch
from bigtrain.errors import UserError
from bigtrain_launch.hostlist import expand
from bigtrain_launch.tools import Unanswered, ask, one_line

LATE_SECONDS = 10  # by which Slurm may send a signal late
GRACE_SECONDS = 120.0  # to save in before the time limit, where launch.grace does not say
SUBMIT_SECONDS = 60.0  # a busy controller takes its time

LIMITS = ("time", "partition", "account", "qos", "constraint", "exclude")
DECIDED = {
    "--array": "--sweep", "--chdir": "the folder it is started in", "--dependency": "--after", "--export": "launch.forward",
    "--gpus-per-node": "launch.gpus_per_node", "--job-name": "run.name", "--nodes": "launch.nodes", "--ntasks": "launch.ranks_per_node",
    "--ntasks-per-node": "launch.ranks_per_node", "--open-mode": "bigtrain", "--output": "run.folder", "--signal": "launch.grace",
    "--wrap": "bigtrain", **{f"--{key}": f"launch.{key}" for key in LIMITS},
}  # fmt: skip
"""Options of sbatch that launch.sbatch may not give, and what decides them."""
SHARES = {"--exclusive", "--oversubscribe", "--cpus-per-task", "--cpus-per-gpu", "--mincpus"}
"""Options that say how much of a node to have."""
SRUN = (
    *("srun", "--ntasks-per-node=1", "--export=ALL", "--input=none", "--cpu-bind=none", "--mpi=none"),
    *("--overlap", "--no-kill", "--kill-on-bad-exit=0", "--wait=0"),
)
"""An agent has all cores of its node; what another one does, or did, is no reason to end it: the launcher decides."""
KEPT = re.compile(r"HOME|USER|LOGNAME|SHELL|PATH|LD_LIBRARY_PATH|PYTHONPATH|LANG|LC_[A-Z]+|TZ|SLURM_CONF|SBATCH_(?!EXPORT$)[A-Z_]+")
"""Variables of the submitting shell that a job gets besides those of launch.forward: what Python and sbatch need to start."""


@dataclass(frozen=True)
class Job:
    """What is submitted: a run or, with `points`, a sweep of as many runs, whose names end in -1, -2, ..."""

    launch: Launch
    name: str
    folder: str
    """run.folder of the config."""
    number: int
    """Of this submission in the run's folder: jobs/0001 and so on."""
    workdir: str
    points: tuple[str, ...] = ()
    """What is set in each run of a sweep."""

    def file(self, kind: str, point: int | str = 1) -> str:
        """A file of the submission, such as runs/NAME/jobs/0001.yaml; of a sweep, in the folder of that point."""
        return f"{self.folder}/{self.name}{f'-{point}' if self.points else ''}/jobs/{self.number:04d}.{kind}"


def render(job: Job) -> str:
    """The batch script. Raises UserError for settings that cannot be."""
    settings = job.launch
    _check(job)
    nodes, given = settings.nodes + settings.spares, {option.partition("=")[0] for option in settings.sbatch}
    spare = f", {settings.spares} of them to spare" if settings.spares else ""
    log = f"{job.folder}/{job.name}".replace("%", "%%") + ("-%a/jobs/%A_%a.log" if job.points else "/jobs/%j.log")
    forwarded = ", ".join(["PATH and the like", *settings.forward])
    lines = [
        "#!/bin/bash",
        f"# Made by `bigtrain launch slurm`; {job.file('yaml', 'N')} holds the config as it was then.",
        *(f"# {number}: {point}" for number, point in enumerate(job.points, 1)),
        _option("job-name", job.name),
        *_if(job.points, _option("array", f"1-{len(job.points)}")),
        _option("chdir", job.workdir),
        _option("output", log),
        _option("open-mode", "append"),
        f"# {nodes} node{'s' * (nodes > 1)}{spare}; one task on each starts the ranks there.",
        _option("nodes", nodes),
        _option("ntasks-per-node", 1),
        *_if(settings.gpus_per_node, _option("gpus-per-node", settings.gpus_per_node)),
        *_if(nodes > 1 and not SHARES & given, "# All cores, unless launch.sbatch says how many.", _option("exclusive")),
        *(_option(key, getattr(settings, key)) for key in LIMITS if getattr(settings, key)),
        f"# Before the time limit: save, and go on after a requeue. Slurm may be {LATE_SECONDS} s late.",
        _option("signal", f"B:USR1@{notice(settings):.0f}"),
    ]
    lines += _if("--no-requeue" not in given, _option("requeue"))
    may_lose = settings.spares or (settings.min_nodes or settings.nodes) < settings.nodes
    lines += _if(may_lose, "# A lost node ends the ranks, not the job: the others go on.", _option("no-kill"))
    lines += [f"# All that `bigtrain launch slurm` hands to sbatch: {forwarded}. No value stands in a file.", _option("export", "ALL")]
    lines += _if(settings.sbatch, "# launch.sbatch", *(_option(*option[2:].split("=", 1)) for option in settings.sbatch))
    return "\n".join([*lines, "", *_start(job), ""])


def notice(settings: Launch) -> float:
    """Seconds before the time limit at which to be told: time to save, and for Slurm to be late."""
    usual = GRACE_SECONDS if settings.seconds is None else min(GRACE_SECONDS, settings.seconds / 4)
    return (settings.grace or usual) + LATE_SECONDS


def _check(job: Job) -> None:
    settings = job.launch
    for what, path in (("run.folder", job.folder), ("the working folder", job.workdir)):
        if not path.isprintable():
            raise UserError(f"{what}: {path!r} cannot stand in a script; name the folder otherwise")
    for option in settings.sbatch:
        if owner := DECIDED.get(option.partition("=")[0]):
            raise UserError(f"launch.sbatch: {option}: {owner} decides this; set that, and remove it here")
    if settings.exclude:
        try:
            expand(settings.exclude)
        except UserError as error:
            raise UserError(f"launch.exclude: {error}") from None
    if settings.seconds is not None and settings.seconds <= notice(settings):
        raise UserError(
            f"launch.time: {settings.time} is {settings.seconds:.0f} s, but the run saves {notice(settings):.0f} s before its end"
            f" (launch.grace, and {LATE_SECONDS} s that Slurm may be late); allow more time, or lower launch.grace"
        )
    if settings.container and re.search("[,:]", job.workdir):
        raise UserError(f"launch.container: {job.workdir} cannot be shown inside: no comma or colon may be in its path; rename the folder")


def _option(name: str, value: object = None) -> str:
    """A line of options, quoted as sbatch reads it: # begins a comment there, and a blank ends a value."""
    text = "" if value is None else f"={value}"
    if not re.fullmatch(r"[\w./:@%+,=\[\]-]*", text, re.ASCII):
        text = '="' + re.sub(r'(["\\])', r"\\\1", text[1:]) + '"'
    return f"#SBATCH --{name}{text}"


def _if(condition: object, *lines: str) -> Sequence[str]:
    return lines if condition else ()


def _start(job: Job) -> list[str]:
    """Start the launcher on the first node, and tell it after `--` how to start an agent on each; it adds on which nodes."""
    settings, container = job.launch, job.launch.container
    agent = f"{settings.venv.rstrip('/')}/bin/python" if settings.venv else "python3" if container else sys.executable
    launcher = sys.executable if container else agent
    starter = [agent, "-m", "bigtrain_launch.slurmtask"]
    inside = []
    if container:
        mounts = ",".join([f"{job.workdir}:{job.workdir}", *container.mounts])
        if container.runtime == "pyxis":
            inside = [f"--container-image={container.image}", f"--container-mounts={mounts}", f"--container-workdir={job.workdir}"]
        else:
            devices = _if(settings.gpus_per_node, "--nv")
            starter = ["apptainer", "exec", *devices, "--bind", mounts, "--pwd", job.workdir, container.image, *starter]
    config = re.sub(r'([\\"$`])', r"\\\1", job.file("yaml", "\0")).replace("\0", "$SLURM_ARRAY_TASK_ID")
    return [
        "# The launcher runs on the first node. After --: how it starts an agent on each of the nodes that it chooses.",
        f'exec {shlex.quote(launcher)} -m bigtrain launch slurm-job "{config}" -- \\',
        *(f"    {shlex.join(part)} \\" for part in (SRUN, inside) if part),
        f"    {shlex.join(starter)}",
    ]


def environment(shell: Mapping[str, str], forward: Mapping[str, str]) -> dict[str, str]:
    """What sbatch, and with it the job, is given of the submitting shell's variables. With --export=NONE or a list of names, Slurm would
    start a login shell of the user's on a compute node to fill in the rest, and hold the job where that is slow; with all of
    them, a stray RANK or CUDA_VISIBLE_DEVICES of this shell would reach the ranks."""
    return {name: value for name, value in shell.items() if KEPT.fullmatch(name)} | dict(forward)


def dependency(after: str) -> str:
    """What --after means for sbatch: a job's number waits for its end, however it ends. Raises UserError."""
    if re.fullmatch(r"[0-9]+(_[0-9]+)?", after):
        return f"afterany:{after}"
    if re.fullmatch(r"(after|afterany|afterok|afternotok|aftercorr)(:[0-9]+(_[0-9]+)?)+", after):
        return after
    raise UserError(f"--after: expected a job's number, or as sbatch takes it (afterok:123), found {after[:40]!r}")


def command(file: str, after: str | None) -> list[str]:
    return ["sbatch", "--parsable", *([f"--dependency={after}"] if after else []), file]


def submit(file: str, after: str | None, links: int, environment: Mapping[str, str]) -> Iterator[str]:
    """Hand a script to Slurm `links` times, each to begin when the one before has ended, and tell each job's number. Raises UserError
    when it is refused, with Slurm's own words."""
    for _ in range(links):
        try:
            told = ask(command(file, after), seconds=SUBMIT_SECONDS, environment=environment)
        except Unanswered as error:
            raise UserError(f"not submitted: {error}; mend it, or look at the script with --dry-run") from None
        # A wrapper of the site's may chat before it; `;` begins the name of the cluster.
        found = re.search(r"^([0-9]+)(;[^\s;]+)?\s*\Z", told, re.MULTILINE)
        if not found:
            raise UserError(f"sbatch: expected the number of a job, found {one_line(told)[:80]!r}; `squeue --me` shows what became of it")
        after = f"afterany:{found[1]}"
        yield found[1]
