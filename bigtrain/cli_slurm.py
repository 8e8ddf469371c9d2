"""`bigtrain launch slurm`, and the command that runs in its jobs."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bigtrain.cli_common import ConfigPath, DryRun, New, Overrides
from bigtrain.cli_launch import check_batch, forwarded, launch_app, machines, settle, show_environment, train_on
from bigtrain.errors import StopRequested, UserError

if TYPE_CHECKING:
    from bigtrain.config import Config
    from bigtrain.configfile import Source
    from bigtrain_launch.slurm import Job

After = Annotated[str | None, typer.Option(metavar="JOB", help="Begin when this job has ended; or as sbatch takes it: afterok:JOB.")]
Chain = Annotated[int, typer.Option(min=1, max=100, help="Jobs to submit, each to go on when the one before has ended.")]
Sweep = Annotated[
    list[str] | None,
    typer.Option(metavar="SECTION.KEY=V1,V2,...", help="A run for each value, as a job array; given again: for each combination."),
]


@launch_app.command("slurm")
def launch_slurm(
    config: ConfigPath,
    overrides: Overrides = None,
    after: After = None,
    chain: Chain = 1,
    sweep: Sweep = None,
    new: New = False,
    dry_run: DryRun = False,
) -> None:
    """Submit a batch job. It saves before its time limit or for a more urgent job, and goes on when Slurm has begun it again."""
    from bigtrain import configfile
    from bigtrain.runfolder import RunFolder
    from bigtrain_launch import jobs, slurm

    if new and sweep:
        raise UserError("--new: a sweep makes a run for each value; give it a run.name of its own instead")
    given = list(overrides or [])
    source = configfile.read(config, given)
    settings = source.config
    points = _points(sweep or [])
    named = [[f"run.name={settings.run.name}-{number}"] for number in range(1, len(points) + 1)] if sweep else [[]]
    sources = [configfile.read(config, [*given, *point, *name]) for point, name in zip(points, named)]
    configs = [_settled(each, new) for each in sources]
    if not dry_run and (ends := [end for each in configs if (end := _complete(each))]):
        print("\n".join(ends))
        if len(ends) == len(configs):
            return
    runs = [RunFolder(Path(each.run.folder) / each.run.name) for each in configs]
    job = slurm.Job(
        launch=settings.launch,
        name=settings.run.name if sweep else configs[0].run.name,
        folder=settings.run.folder,
        number=max(jobs.next_number(run) for run in runs),
        workdir=os.getcwd(),
        points=tuple(" ".join(point) for point in points) if sweep else (),
    )
    script, first = slurm.render(job), slurm.dependency(after) if after else None
    environment = slurm.environment(os.environ, forwarded(settings))
    if dry_run:
        print(script, end="", flush=True)
        for link in [first, *["afterany:JOB-BEFORE"] * (chain - 1)]:
            print(f"# submitted by: {shlex.join(slurm.command(job.file('sbatch'), link))}", file=sys.stderr)
        show_environment(settings.launch, sys.stderr)
        return
    _write(job, script, configs)
    submitted = 0
    try:
        for id in slurm.submit(job.file("sbatch"), first, chain, environment):
            submitted += 1
            for number, run in enumerate(runs, 1):
                jobs.record(run, "slurm", f"{id}_{number}" if sweep else id, nodes=settings.launch.nodes + settings.launch.spares)
            print(f"job {id}: {job.file('sbatch')}; see bigtrain jobs, logs and cancel {shlex.join(str(run.path) for run in runs[:4])}")
    finally:
        if not submitted:
            _remove(job, len(runs))


def _points(sweep: Sequence[str]) -> list[list[str]]:
    """What to set in each run of a sweep. Raises UserError."""
    import yaml

    from bigtrain import plainyaml

    choices = []
    for text in sweep:
        key, equals, values = text.partition("=")
        listed = f"[{values}]"
        try:
            nodes = yaml.compose(listed, plainyaml.Loader).value if equals else []
        except (yaml.YAMLError, RecursionError):
            nodes = []
        if not key or not nodes or not text.isprintable():
            raise UserError(f"--sweep: expected SECTION.KEY=V1,V2,... with values as in YAML, found {text[:80]!r}")
        if key.split(".")[0] in ("launch", "run"):
            raise UserError(f"--sweep: {key} is the same for all jobs of an array; submit them one by one")
        choices.append([f"{key}={listed[node.start_mark.index : node.end_mark.index]}" for node in nodes])
    return [list(point) for point in itertools.product(*choices)]


def _settled(source: Source, new: bool) -> Config:
    """The config to submit. Raises UserError where its batch cannot be shared out."""
    from bigtrain.start import new_name

    launch = source.config.launch
    if ranks := launch.ranks_per_node or launch.gpus_per_node:
        check_batch(source, launch.nodes * ranks)
    return new_name(source.config) if new else source.config


def _complete(config: Config) -> str | None:
    """What to say of a run that needs no job. Raises UserError for what would end one after hours in the queue, as far as a login
    node can tell: data that is not prepared yet is prepared by the job."""
    from bigtrain.data.shards import MANIFEST
    from bigtrain.start import complete, open_run, with_data

    if not (Path(config.data.folder) / MANIFEST).is_file():
        return None
    start = open_run(with_data(config))
    return complete(start) if start.done else None


def _write(job: Job, script: str, configs: Sequence[Config]) -> None:
    """Write the script, and the config of each run as it is now: the file may change while the job waits. Raises UserError."""
    from bigtrain import configfile
    from bigtrain.runfolder import write_atomically

    texts = {job.file("yaml", point): configfile.dump(config) for point, config in enumerate(configs, 1)} | {job.file("sbatch"): script}
    for file, text in texts.items():
        try:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(file), text)
        except OSError as error:
            raise UserError(f"run.folder: {file} cannot be written ({error.strerror}); set another folder, or make room") from None


def _remove(job: Job, points: int) -> None:
    """Leave nothing behind of what was refused."""
    for file in [job.file("sbatch"), *(job.file("yaml", point) for point in range(1, points + 1))]:
        path = Path(file)
        path.unlink(missing_ok=True)
        with suppress(OSError):  # other things are there
            path.parent.rmdir()
            path.parent.parent.rmdir()


@launch_app.command("slurm-job", hidden=True)
def slurm_job(
    config: ConfigPath,
    starter: Annotated[
        list[str], typer.Argument(metavar="SRUN...", help="How an agent is started on nodes: srun, its options, and what it runs.")
    ],
) -> None:
    """The launcher inside a job of `launch slurm`: in the batch script, on the first node."""
    from bigtrain import configfile, hardware
    from bigtrain_launch import slurmjob
    from bigtrain_launch.cluster import CONNECT_SECONDS, Cluster, Node
    from bigtrain_launch.local import Signals, say
    from bigtrain_launch.supervise import decide

    source = configfile.read(config)
    launch, restarts = source.config.launch, source.config.restarts
    place = slurmjob.here(os.environ, launch)
    variables = forwarded(source.config) | launch.environment
    ranks = launch.ranks_per_node or launch.gpus_per_node or hardware.ranks(source.config, hardware.look())
    nodes = [Node(name, ranks) for name in place.nodes]
    wanted = min(launch.nodes, len(nodes))
    check_batch(source, sum(node.ranks for node in nodes[:wanted]))
    pool = machines(nodes, wanted, source.config)
    with Signals() as signals:
        try:
            job = settle(source, config, None, new=False)
            if job is None:
                return
            before, checkpoints = slurmjob.earlier(job.run, place), slurmjob.checkpoints(job.run)
            if before and (given_up := decide(before, restarts)).code is not None:
                say(f"giving up after {place.restarts} requeues: {given_up.why}")
                raise typer.Exit(given_up.code)
            if place.restarts:
                say(f"job {place.id} begins again, requeue {place.restarts}; {len(before)} of {restarts.max} restarts are used up")
            patience = CONNECT_SECONDS + len(nodes) / 16  # a thousand Pythons come from one file system
            with Cluster(slurmjob.Srun(starter, place.nodes), signals, patience=patience) as cluster:
                code = train_on(cluster, pool, job, variables, before)
        except StopRequested as error:
            code = error.code
            say(str(error))
        progress = slurmjob.checkpoints(job.run) != checkpoints
        slurmjob.finish(job.run, place, code, progress=progress, out=pool.out, restarts=restarts.max)
    raise typer.Exit(code)
