"""`bigtrain launch kubernetes`, and the command that its pods run."""

from __future__ import annotations

import os
import sys

import typer

from bigtrain.cli_common import ConfigPath, DryRun, Overrides
from bigtrain.cli_launch import check_batch, launch_app, machines, settle, show_environment, train_on
from bigtrain.errors import DONE


@launch_app.command("kubernetes")
def launch_kubernetes(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train in pods, as a JobSet or a TrainJob. The run's folder is on a claim that they share; kubectl must know the cluster."""
    from bigtrain import configfile
    from bigtrain.runfolder import RunFolder
    from bigtrain_launch import jobs, kubernetes

    source = configfile.read(config, overrides or [])
    settings = source.config
    launch, run = settings.launch, RunFolder(f"{settings.run.folder}/{settings.run.name}")
    if ranks := launch.ranks_per_node or launch.gpus_per_node:
        check_batch(source, launch.nodes * ranks)
    name = kubernetes.object_name(settings.run.name, jobs.next_number(run))
    job = kubernetes.Job(launch, name, str(run.path), settings.restarts.max, configfile.dump(settings))
    manifests = kubernetes.render(job)
    if dry_run:
        print(kubernetes.dump(manifests), end="")
        show_environment(launch, sys.stderr)
        return
    kubernetes.submit(job, manifests)
    jobs.record(run, "kubernetes", job.id, nodes=job.pods)
    print(f"{launch.kubernetes.kind} {name} in namespace {launch.kubernetes.namespace}: see bigtrain jobs, logs and cancel {run.path}")


@launch_app.command("pod", hidden=True)
def launch_pod(config: ConfigPath) -> None:
    """What runs in each pod of `launch kubernetes`."""
    from bigtrain import configfile, hardware
    from bigtrain.runfolder import RunFolder
    from bigtrain_launch import jobs
    from bigtrain_launch.cluster import Cluster, Node
    from bigtrain_launch.local import Signals
    from bigtrain_launch.pods import PATIENCE_SECONDS, Pod, Pods, serve

    source = configfile.read(config)
    launch, run = source.config.launch, RunFolder(f"{source.config.run.folder}/{source.config.run.name}")
    pod = Pod.here(os.environ)
    if pod.index:
        raise typer.Exit(serve(pod, run))
    ranks = hardware.ranks(source.config, hardware.look())
    nodes = [Node(pod.name(index), ranks) for index in range(launch.nodes + launch.spares)]
    check_batch(source, launch.nodes * ranks)
    if not jobs.find(run, "kubernetes", pod.id):
        jobs.record(run, "kubernetes", pod.id, nodes=len(nodes))

    def train() -> int:
        job = settle(source, config, None, new=False)
        return train_on(cluster, machines(nodes, launch.nodes, job.config), job, launch.environment) if job else DONE

    with Signals() as signals, Cluster(Pods(pod), signals, patience=PATIENCE_SECONDS) as cluster:
        # The record is complete before the agents lose their launcher, and look into it.
        raise typer.Exit(jobs.launch(run, "kubernetes", pod.id, train))
