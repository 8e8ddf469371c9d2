"""`bigtrain launch ...`: one config on one machine or on many, with the same steps before the ranks start."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from bigtrain.cli_common import SETTINGS, ConfigPath, DryRun, New, Overrides, prepare, require_torch
from bigtrain.errors import BadNode, UserError

if TYPE_CHECKING:
    from bigtrain.config import Config
    from bigtrain.configfile import Source
    from bigtrain.configlaunch import Launch
    from bigtrain.runfolder import RunFolder
    from bigtrain_launch.cluster import Cluster, Node
    from bigtrain_launch.hosts import Hosts
    from bigtrain_launch.pool import Pool
    from bigtrain_launch.supervise import Ended

launch_app = typer.Typer(help="Train on this machine, on a list of hosts, under Slurm or Kubernetes.", **SETTINGS)

Hostfile = Annotated[
    Path | None, typer.Option("--hostfile", help="Machines, a line `NAME slots=N` each; left out: launch.hostfile of the config.")
]


@launch_app.command("local")
def launch_local(config: ConfigPath, overrides: Overrides = None, new: New = False, dry_run: DryRun = False) -> None:
    """Train on this machine, or go on with a run that was stopped; `bigtrain train` does the same."""
    from bigtrain import configfile, hardware, opbuild
    from bigtrain_launch import environment, local
    from bigtrain_launch.supervise import supervise

    require_torch()
    source = configfile.read(config, overrides or [])
    here = hardware.look()
    found = hardware.problems(source.config, here)
    if (nodes := source.config.launch.nodes) > 1:
        found.append(("launch.nodes", f"{nodes} machines, but this trains on one; use launch hosts, slurm or kubernetes, or set it to 1"))
    if found:
        raise source.error(found)
    if (allocated := os.environ.get("SLURM_JOB_NUM_NODES", "1")) != "1":
        local.say(f"warning: this Slurm job has {allocated} machines, and one trains; all do with bigtrain launch slurm, or under srun")
    ranks = hardware.ranks(source.config, here)
    chosen = source.config.launch.environment
    settings = environment.rank_environment(environment.Place(here, ranks, 1, None), {**os.environ, **chosen})
    if dry_run:
        print(f"{ranks} x {shlex.join([sys.executable, '-m', 'bigtrain', *_arguments(config, overrides, None)])}")
        print(*environment.show(settings, chosen, []), sep="\n")
        return
    os.environ.update(opbuild.environment())
    if (job := settle(source, config, overrides, new)) is None:
        return
    opbuild.build(opbuild.needed(job.config, here.kind), print)
    variables = {setting.name: setting.value for setting in settings} | chosen

    def start(own: Mapping[str, str]) -> local.End:
        return local.launch(job.argv, ranks, port=job.config.launch.port, environment={**variables, **own})

    with local.Signals() as signals:
        raise typer.Exit(recorded(job.run, "local", 1, lambda: supervise(start, job.run, job.config, signals)))


@launch_app.command("hosts")
def launch_hosts(
    config: ConfigPath, overrides: Overrides = None, hostfile: Hostfile = None, new: New = False, dry_run: DryRun = False
) -> None:
    """Train on machines that ssh reaches. They see this folder, the data and the run's folder at the same paths."""
    from bigtrain import configfile
    from bigtrain_launch.cluster import Cluster
    from bigtrain_launch.local import Signals

    source = configfile.read(config, overrides or [])
    launch = source.config.launch
    nodes, wanted, transport = listed(source, hostfile)
    variables = forwarded(source.config) | launch.environment
    if dry_run:
        for number, node in enumerate(nodes):
            role = f"{node.ranks} rank{'s' * (node.ranks > 1)}" if number < wanted else "spare"
            print(f"# {node.name}: {role}")
            print(shlex.join(transport.command(node.name)))
        print(f"# each rank: python -m bigtrain {shlex.join(_arguments(config, overrides, None))}")
        show_environment(launch, sys.stdout)
        return
    if (job := settle(source, config, overrides, new)) is None:
        return
    with Signals() as signals, Cluster(transport, signals) as cluster:
        pool = machines(nodes, wanted, job.config)
        raise typer.Exit(recorded(job.run, "hosts", [node.name for node in nodes], lambda: train_on(cluster, pool, job, variables)))


@dataclass(frozen=True)
class Job:
    """A run that is ready to be started."""

    config: Config
    run: RunFolder
    argv: list[str]
    """Arguments of `bigtrain` for its ranks."""


def machines(nodes: Sequence[Node], wanted: int, config: Config) -> Pool:
    """Machines to train on `wanted` of, the others being spares."""
    from bigtrain_launch.pool import Pool

    return Pool(nodes, wanted, min(wanted, config.launch.min_nodes or wanted), config.restarts.node_failures)


def train_on(cluster: Cluster, pool: Pool, job: Job, variables: Mapping[str, str], earlier: Sequence[Ended] = ()) -> int:
    """Train on machines of this pool and return the exit code. `variables`: for the ranks. `earlier`: see supervise."""
    from bigtrain_launch.pool import start_on
    from bigtrain_launch.supervise import supervise

    launch = job.config.launch
    ready: set[str] = set()
    passed: set[str] = set()

    def check(chosen: Sequence[Node]) -> dict[str, str]:
        """Look at machines that have not been seen together, and have DeepSpeed's ops on every one before ranks need them."""
        names = {node.name for node in chosen}
        if launch.preflight.enabled and len(names) > 1 and not names <= passed:
            if unfit := preflight(cluster, chosen, job, variables):
                return unfit
            passed.clear()
            passed.update(names)
        fresh = [node for node in chosen if node.name not in ready]
        failed = cluster.run(fresh, ["ops", "build", *job.argv[1:]], variables)
        ready.update(node.name for node in fresh if node.name not in failed)
        return failed

    start = start_on(cluster, pool, job.run, job.argv, variables, port=launch.port, check=check)
    return supervise(start, job.run, job.config, cluster.signals, earlier)


def recorded(run: RunFolder, kind: str, nodes: int | Sequence[str], go: Callable[[], int]) -> int:
    """Train by `go`, with a record of this launcher in the run's folder (see `bigtrain jobs`), and return the exit code."""
    from bigtrain_launch import jobs

    id = str(os.getpid())
    jobs.record(run, kind, id, nodes=nodes)
    return jobs.launch(run, kind, id, go)


def preflight(cluster: Cluster, chosen: Sequence[Node], job: Job, variables: Mapping[str, str]) -> dict[str, str]:
    """Those of these machines that a preflight finds unfit, and why. Raises BadNode where the matter lies with none of them."""
    from rich.console import Console

    from bigtrain_launch.local import say
    from bigtrain_launch.preflight import check, show

    verdict = check(cluster, chosen, job.config, job.run, job.argv[1:], variables, say)
    show(verdict, Console(stderr=True), whole=False)
    if verdict.failed and not verdict.problems:
        raise BadNode("the preflight failed, and no machine can be blamed; launch.preflight.enabled=false starts without one")
    return {name: "; ".join(texts) for name, texts in verdict.problems.items()}


def show_environment(launch: Launch, file: TextIO) -> None:
    """Print the variables that ranks on machines which are not here will get, with the reasons."""
    from bigtrain_launch.environment import planned, show

    print("# each rank's environment, where the machine does not have it already:", file=file)
    print(*show(planned(launch.environment), launch.environment, launch.forward), sep="\n", file=file)


def forwarded(config: Config) -> dict[str, str]:
    """The variables of this shell that the ranks are to have. Raises UserError for one that is not set."""
    if absent := [name for name in config.launch.forward if name not in os.environ]:
        raise UserError(f"launch.forward: {', '.join(absent)} not set in this shell; export it, or take it out")
    return {name: os.environ[name] for name in config.launch.forward}


def listed(source: Source, hostfile: Path | None) -> tuple[list[Node], int, Hosts]:
    """The machines of a hostfile to use, how many of them are no spares, and how they are reached. Raises UserError."""
    from bigtrain_launch.hosts import Hosts, read_hostfile

    launch = source.config.launch
    if (path := hostfile or (Path(launch.hostfile) if launch.hostfile else None)) is None:
        raise UserError(
            f"launch.hostfile: not set in {source.path}; name a file with a line `NAME slots=N` for each machine, or pass --hostfile"
        )
    python = f"{launch.venv.rstrip('/')}/bin/python" if launch.venv else sys.executable
    return *_machines(source, read_hostfile(path), path), Hosts(python)


def settle(source: Source, config: Path, overrides: Sequence[str] | None, new: bool) -> Job | None:
    """Prepare the data, find out what there is to do, and make the run's folder; None, with a word about it, where all is done.
    A folder that cannot be had, and a run that another process trains, are known at once: rank 0 looks again later."""
    from bigtrain.start import complete, create, new_name, open_run, with_data

    prepare(source.config.data)
    settled = with_data(new_name(source.config) if new else source.config)
    start = open_run(settled)
    if start.done:
        print(complete(start))
        return None
    create(settled, start.run).close()
    return Job(settled, start.run, _arguments(config, overrides, settled.run.name if new else None))


def _arguments(config: Path, overrides: Sequence[str] | None, name: str | None) -> list[str]:
    return ["train", str(config), *(overrides or []), *([f"run.name={name}"] if name else [])]


def _machines(source: Source, there: Sequence[Node], path: Path) -> tuple[list[Node], int]:
    """The machines to use, with the number of their ranks, and how many of them are no spares. Raises UserError."""
    from bigtrain_launch.cluster import Node

    launch = source.config.launch
    wanted = launch.nodes if launch.nodes > 1 else max(1, len(there) - launch.spares)  # a list is for all of it
    if wanted + launch.spares > len(there):
        asked = f"launch.nodes {wanted}{f' and launch.spares {launch.spares}' if launch.spares else ''}"
        raise UserError(
            f"{path}: names {len(there)} machine{'s' * (len(there) > 1)}, but {asked} are asked for; add some, or ask for fewer"
        )
    chosen = list(there[: wanted + launch.spares])
    if ranks := launch.ranks_per_node or launch.gpus_per_node:
        if small := [f"{node.name} ({node.ranks})" for node in chosen if node.ranks < ranks]:
            raise UserError(
                f"{path}: fewer slots than the {ranks} ranks that launch asks for on {', '.join(small)}; lower one, or raise the other"
            )
        chosen = [Node(node.name, ranks) for node in chosen]
    check_batch(source, sum(node.ranks for node in chosen[:wanted]))
    return chosen, wanted


def check_batch(source: Source, ranks: int) -> None:
    """Raise UserError where so many ranks cannot share the batch."""
    from bigtrain.config import batch_arithmetic

    try:
        batch_arithmetic(source.config.train, ranks)
    except ValueError as error:
        raise source.error([("train.global_batch", str(error))]) from None
