"""Kubernetes: a run as a JobSet, or as a TrainJob of Kubeflow Trainer, and its submission. What happens in the pods is pods.py.

Manifests are built as plain values and written by a YAML library: no text of the user's is ever pasted into YAML.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from bigtrain.configlaunch import Launch
from bigtrain.errors import FAILURE, HANG, SAME_CRASH, STOPPED, USER_MISTAKE, RunError, UserError
from bigtrain_launch.listener import ADDRESS, TOKEN
from bigtrain_launch.tools import Unanswered, ask

GRACE_SECONDS = 120.0  # to save in before a pod is killed, where launch.grace does not say
SUBMIT_SECONDS = 60.0
PORT = 20700
"""Where pod 0 awaits the agents of the others; a pod has its ports to itself."""
JOB, INDEX = "BIGTRAIN_JOB", "JOB_COMPLETION_INDEX"
"""Variables of a pod with the id of the job, and with its number in it, which Kubernetes sets."""
CONFIG = "/etc/bigtrain/config.yaml"
GROUP, CONTAINER = "node", "node"  # the names that Kubeflow Trainer looks for
JOB_LABEL, RUN = "bigtrain/job", "bigtrain/run"  # a label with the name of the job, an annotation with the run's folder
LONGEST_NAME = 42  # pods add -node-0-INDEX-abcde to it, and 63 characters is the end
DECIDED = (FAILURE, USER_MISTAKE, HANG, SAME_CRASH)
"""Exit codes with which the launcher gives a run up: it has started the ranks again by itself, as often as `restarts` allows."""

_WORD = "[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_NAME = re.compile("[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
_LABEL = re.compile(rf"([a-z0-9]([a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_WORD}")
_IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9._-]*(:[0-9]+)?(/[a-z0-9][a-z0-9._-]*)*(:[A-Za-z0-9._-]+)?(@sha256:[0-9a-f]{64})?")

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What is submitted."""

    launch: Launch
    name: str
    """Of the objects in Kubernetes; see `object_name`."""
    run: str
    """The run's folder, in the pods."""
    restarts: int
    config: str
    """Text of the resolved config."""

    @property
    def id(self) -> str:
        return f"{self.launch.kubernetes.namespace}/{self.launch.kubernetes.kind}/{self.name}"

    @property
    def python(self) -> str:
        """The Python of the image."""
        return f"{self.launch.venv.rstrip('/')}/bin/python" if self.launch.venv else "python3"

    @property
    def pods(self) -> int:
        return self.launch.nodes + self.launch.spares


def object_name(run: str, number: int) -> str:
    """A name that Kubernetes takes (RFC 1035), another one for every run and every submission of it."""
    slug = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-") or "run"
    slug = slug if slug[0].isalpha() else f"r{slug}"
    end = f"-{number}"
    if slug != run or len(slug + end) > LONGEST_NAME:
        end = f"-{hashlib.sha256(run.encode()).hexdigest()[:6]}{end}"
    return f"{slug[: LONGEST_NAME - len(end)].rstrip('-')}{end}"


def host(name: str, pod: int) -> str:
    """The name by which the others reach a pod, from the headless service that JobSet makes."""
    return f"{name}-{GROUP}-0-{pod}.{name}"


def render(job: Job) -> list[Manifest]:
    """The manifests, in the order in which they are to be created. Raises UserError for settings that cannot be."""
    _check(job)
    config = _object("v1", "ConfigMap", job) | {"immutable": True, "data": {PurePosixPath(CONFIG).name: job.config}}
    if job.launch.kubernetes.kind == "jobset":
        return [config, _queued(_object("jobset.x-k8s.io/v1alpha2", "JobSet", job), job) | {"spec": _job_set(job)}]
    trainer = "trainer.kubeflow.org/v1alpha1"
    runtime = _object(trainer, "TrainingRuntime", job) | {"spec": {"mlPolicy": {"numNodes": job.pods}, "template": {"spec": _job_set(job)}}}
    reference = {"apiGroup": trainer.partition("/")[0], "kind": "TrainingRuntime", "name": job.name}
    train = {"runtimeRef": reference, "trainer": {"numNodes": job.pods}}
    return [config, runtime, _queued(_object(trainer, "TrainJob", job), job) | {"spec": train}]


def dump(manifests: Sequence[Manifest]) -> str:
    """YAML that kubectl reads."""
    options = {"sort_keys": False, "allow_unicode": True, "width": math.inf}
    return "".join("---\n" + yaml.dump(manifest, Dumper=_Dumper, **options) for manifest in manifests)


def submit(job: Job, manifests: Sequence[Manifest]) -> None:
    """Create the objects, all or none. Raises RunError where Kubernetes does not take them."""
    try:
        ask(["kubectl", "create", "--output=name", "--filename=-"], dump(manifests), SUBMIT_SECONDS)
    except Unanswered as error:
        made = [line for line in error.told.split() if re.fullmatch(r"[a-z0-9.]+/[a-z0-9.-]+", line)]
        where = f"--namespace={job.launch.kubernetes.namespace}"
        left = ""
        try:
            if made:
                ask(["kubectl", "delete", where, "--wait=false", *made], seconds=SUBMIT_SECONDS)
        except Unanswered:
            left = f"; `kubectl delete {where} {' '.join(made)}` removes what was made"
        raise RunError(f"Kubernetes did not take the job: {error}{left}. --dry-run shows the manifests") from None


def _check(job: Job) -> None:
    """Kubernetes would refuse some of this itself, some only when a pod starts, and not in the user's words."""
    settings, pods = job.launch, job.launch.kubernetes
    if not settings.container:
        raise UserError("launch.container.image: missing; name the image in which the pods run, with bigtrain installed")
    image = settings.container.image
    if not _IMAGE.fullmatch(image) or image.endswith((".sqsh", ".sif")):
        raise UserError(f"launch.container.image: {image} is no image of a registry; give one, as in registry.example.com/bigtrain:1")
    if settings.container.mounts:
        raise UserError("launch.container.mounts: a pod mounts launch.kubernetes.claim, and no folders of its machine; remove them")
    if not pods.claim:
        raise UserError(
            "launch.kubernetes.claim: missing; name a PersistentVolumeClaim that all pods can write (ReadWriteMany): it keeps the run and"
            " its checkpoints, which are gone with the pods otherwise"
        )
    if settings.forward:
        raise UserError(
            f"launch.forward: a manifest would hold the values of {', '.join(settings.forward)}, for all to read; put them into a Secret"
            " (kubectl create secret generic NAME --from-literal=KEY=VALUE) and name it in launch.kubernetes.secrets"
        )
    names = [("namespace", pods.namespace), ("claim", pods.claim), *(("secrets", name) for name in pods.secrets)]
    for key, name in [*names, *([("queue", pods.queue)] if pods.queue else [])]:
        if not _NAME.fullmatch(name) or (key == "namespace" and "." in name):
            raise UserError(
                f"launch.kubernetes.{key}: {name} is no name in Kubernetes; they are of a-z, 0-9 and -, as in my-{key.rstrip('s')}"
            )
    for label, value in pods.node_selector.items():
        if not _LABEL.fullmatch(label) or not re.fullmatch(f"({_WORD})?", value):
            raise UserError(
                f"launch.kubernetes.node_selector: {label}: {value!r} is no label of a node; see `kubectl get nodes --show-labels`"
            )
    workdir, run = PurePosixPath(pods.workdir), PurePosixPath(pods.workdir, job.run)
    if workdir == PurePosixPath("/"):
        raise UserError("launch.kubernetes.workdir: the claim mounted at / would hide the image; give a folder, as in /workspace")
    if ".." in run.parts or workdir not in run.parents:
        raise UserError(
            f"run.folder: {job.run} is not below launch.kubernetes.workdir ({workdir}), where the claim is mounted, and would be gone with"
            " the pods; give a path below it"
        )


def _object(version: str, kind: str, job: Job) -> Manifest:
    labels = {"app.kubernetes.io/managed-by": "bigtrain", JOB_LABEL: job.name}
    metadata = {"name": job.name, "namespace": job.launch.kubernetes.namespace, "labels": labels}
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _queued(manifest: Manifest, job: Job) -> Manifest:
    manifest["metadata"]["annotations"] = {RUN: job.run}
    if job.launch.kubernetes.queue:
        manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = job.launch.kubernetes.queue
    return manifest


def _job_set(job: Job) -> Manifest:
    """One job with a pod for each node. Where the launcher has given the run up, that is the end. A pod that was evicted, or has saved
    because another was, is replaced and goes on with the others, for nothing. Whatever else ends a pod starts all of them again,
    restarts.max times."""
    pods = {
        "completionMode": "Indexed",
        "completions": job.pods,
        "parallelism": job.pods,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": sorted(DECIDED)}},
                {"action": "Ignore", "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [STOPPED]}},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"metadata": {"labels": {JOB_LABEL: job.name}, "annotations": {RUN: job.run}}, "spec": _pod(job)},
    }
    labels = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"} if job.launch.kubernetes.kind == "trainjob" else {}
    template = {**({"metadata": {"labels": labels}} if labels else {}), "spec": pods}
    decided = {"name": "decided", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {"maxRestarts": job.restarts, "rules": [decided]},
        "replicatedJobs": [{"name": GROUP, "replicas": 1, "template": template}],
    }


def _pod(job: Job) -> Manifest:
    settings = job.launch.kubernetes
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(job.launch.grace or GRACE_SECONDS),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "containers": [_container(job)],
        "volumes": [
            {"name": "config", "configMap": {"name": job.name}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}},
            {"name": "work", "persistentVolumeClaim": {"claimName": settings.claim}},
        ],
    }
    return pod | ({"nodeSelector": dict(settings.node_selector)} if settings.node_selector else {})


def _container(job: Job) -> Manifest:
    settings, gpus = job.launch.kubernetes, job.launch.gpus_per_node
    devices = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    if settings.rdma:
        devices[settings.rdma] = str(gpus or 1)
    amounts = {name: amount for name, amount in (("cpu", settings.cpu), ("memory", settings.memory)) if amount}
    limits = {**devices, **({"memory": settings.memory} if settings.memory else {})}  # of cores, what is free may be used
    resources = {key: value for key, value in (("requests", {**devices, **amounts}), ("limits", limits)) if value}
    container = {
        "name": CONTAINER,
        "image": job.launch.container.image,
        "command": [_literal(job.python), "-m", "bigtrain", "launch", "pod", CONFIG],
        "workingDir": settings.workdir,
        "env": [*_environment(job)],
        "resources": resources,
        "volumeMounts": [
            {"name": "config", "mountPath": str(PurePosixPath(CONFIG).parent), "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "work", "mountPath": settings.workdir},
        ],
    }
    if settings.secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in settings.secrets]
    if settings.rdma:
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    return container


def _environment(job: Job) -> list[Manifest]:
    """The token by which pods know each other is the id of their Job: it stands in no file, and each start of all pods has a new one."""
    uid = {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/controller-uid']"}}
    own = {
        JOB: {"value": job.id},
        ADDRESS: {"value": f"{host(job.name, 0)}:{PORT}"},
        TOKEN: {"valueFrom": uid},
    }
    users = {name: {"value": _literal(value)} for name, value in job.launch.environment.items()}
    return [{"name": name, **value} for name, value in {**users, **own}.items()]


def _literal(text: str) -> str:
    """As Kubernetes must be told it: $(NAME) in a command or a variable is replaced by it."""
    return text.replace("$", "$$")


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as such, and quotes whatever some version of YAML would take for something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    plain = re.fullmatch(r"[A-Za-z/][A-Za-z0-9_./:=-]+", text)
    printable = text.replace("\n", "").isprintable()
    style = "|" if "\n" in text and printable else None if plain else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
