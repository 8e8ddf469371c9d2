"""`bigtrain doctor`: is this machine fit to train, and are others?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bigtrain.cli_common import Overrides
from bigtrain.cli_launch import Hostfile, forwarded, listed
from bigtrain.errors import UserError

if TYPE_CHECKING:
    from bigtrain.configfile import Source
    from bigtrain_launch.preflight import Verdict


class Kind(str, Enum):
    hosts = "hosts"


def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="Look at what this config needs; left out: in general.")] = None,
    overrides: Overrides = None,
    launch: Annotated[Kind | None, typer.Option("--launch", help="Look at the machines of `launch hosts` too, and between them.")] = None,
    hostfile: Hostfile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Is this machine fit to train? Python, packages, GPUs, disks, and more; ends with 1 where there is a problem."""
    from rich.console import Console

    from bigtrain import configfile, hardware, opbuild
    from bigtrain.configlaunch import Launch
    from bigtrain_launch.doctor import examine, for_config, show
    from bigtrain_launch.preflight import show as show_preflight

    source = configfile.read(config, overrides or []) if config else None
    if launch and source is None:
        raise UserError("--launch hosts: give a CONFIG too; its launch section says which machines, and its data is looked for there")
    here, settings = hardware.look(), source.config.launch if source else Launch()
    ops = opbuild.needed(source.config, here.kind) if source else list(opbuild.ALL)
    ranks = hardware.ranks(source.config, here) if source else max(1, here.devices)
    lines = for_config(hardware.problems(source.config, here)) if source and not launch else []
    with Console(stderr=True).status("looking at this machine") as status:
        for line in examine(settings, Path(source.config.run.folder if source else "runs"), ops, here, ranks):
            lines.append(line)
            status.update(f"looking at this machine: {line.what} is known")
    verdict = _between(source, overrides or [], hostfile) if launch else None
    if as_json:
        machines = [asdict(finding) for finding in verdict.findings] if verdict else None
        print(json.dumps({"here": [asdict(line) for line in lines], "machines": machines}, indent=1))
    else:
        show(lines, Console())
        if verdict:
            show_preflight(verdict, Console())
    raise typer.Exit(int(any(line.state == "problem" for line in lines) or bool(verdict and verdict.failed)))


def _between(source: Source, overrides: Sequence[str], hostfile: Path | None) -> Verdict:
    """A preflight over all machines of a hostfile, the spares among them."""
    from bigtrain.runfolder import RunFolder
    from bigtrain_launch.cluster import Cluster
    from bigtrain_launch.doctor import existing
    from bigtrain_launch.local import Signals, say
    from bigtrain_launch.preflight import Verdict, check
    from bigtrain_launch.verdict import Finding

    nodes, _, transport = listed(source, hostfile)
    variables = forwarded(source.config) | source.config.launch.environment
    run = RunFolder(existing(Path(source.config.run.folder)))
    with Signals() as signals, Cluster(transport, signals) as cluster:
        unreached = cluster.connect([node.name for node in nodes])
        findings = [Finding(name, why, "look at that machine, and at what ssh says") for name, why in unreached.items()]
        there = [node for node in nodes if node.name not in unreached]
        if not there:
            return Verdict(nodes, findings)
        verdict = check(cluster, there, source.config, run, [str(source.path), *overrides], variables, say)
    return replace(verdict, nodes=nodes, findings=[*findings, *verdict.findings])
