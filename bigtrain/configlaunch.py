"""The sections that say where a run's processes run, and what happens when they end."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from bigtrain.configsection import Count, Fraction, Positive, Section

Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$", json_schema_extra={"words": "text in one line"})]
"""Text that ends up in one line of a script or a manifest."""
Value = Annotated[Line, BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)]
"""Value of an environment variable; YAML takes 1 for a number, the environment knows text only."""
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""Name of an environment variable."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")]
"""A name that Kubernetes or Slurm would take."""
Quantity = Annotated[
    str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$", json_schema_extra={"words": "text such as 500m, 8 or 16Gi"})
]
"""An amount as Kubernetes writes it."""
Time = Annotated[
    str,
    Field(
        pattern=r"^(\d+-)?\d{1,2}(:\d{2}){0,2}$|^\d+$",
        json_schema_extra={"words": "text of the form MINUTES, HH:MM:SS or DAYS-HH:MM:SS"},
    ),
]


class Container(Section):
    """The image in which a node's processes run (Slurm and Kubernetes)."""

    image: Line
    """Name of the image, or a file (.sqsh, .sif)."""
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """Who runs it under Slurm."""
    mounts: list[Annotated[str, Field(pattern=r"^[^\s:,]+:/[^\s:,]*(:ro|:rw)?$")]] = []
    """Folders of the node to show inside, as SOURCE:TARGET or SOURCE:TARGET:ro; the working folder is always there (Slurm)."""


class Kubernetes(Section):
    kind: Literal["jobset", "trainjob"] = "jobset"
    """A JobSet (jobset.x-k8s.io), or a TrainJob of Kubeflow Trainer."""
    namespace: Name = "default"
    shared_memory: Quantity = "16Gi"
    """Size of /dev/shm, which NCCL and data loaders use; a pod has 64 MiB otherwise."""
    cpu: Quantity | None = None
    """Cores of a pod to ask for; left out: the cluster's default. The same for `memory`."""
    memory: Quantity | None = None
    claim: Name | None = None
    """PersistentVolumeClaim with the data and the runs, shared by all pods; mounted at `workdir`, where the command runs."""
    workdir: Annotated[str, Field(pattern=r"^/[^\s:]*$")] = "/workspace"
    secrets: list[Name] = []
    """Secrets whose keys become environment variables of the ranks, WANDB_API_KEY say; the manifest holds their names only."""
    rdma: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")] | None = None
    """Resource of a fast network, such as rdma/hca_shared_devices_a; one for each GPU is asked for, with IPC_LOCK."""
    node_selector: dict[str, str] = {}
    """Labels that a node must have."""
    queue: Name | None = None
    """Local queue of Kueue."""


class Preflight(Section):
    """What is measured and compared on the nodes before a run on more than one; see docs/launch.md."""

    enabled: bool = True
    seconds: Annotated[float, Field(gt=0)] = 60.0
    """Longest that it may take."""
    slow_link: Fraction = 0.5
    """A node, or a pair of nodes, whose bandwidth is below this share of the median is a problem."""
    slow_device: Fraction = 0.7
    """A rank whose matrix product runs below this share of the median is a problem."""
    clock_seconds: Annotated[float, Field(gt=0)] = 1.0
    """Largest difference between clocks; more is a warning."""
    free_gib: Annotated[float, Field(ge=0)] = 1.0
    """Least free space where the run writes, on each node."""


class Launch(Section):
    nodes: Positive = 1
    """Machines to train on; with `launch hosts`, 1 stands for all of the hostfile but the spares."""
    min_nodes: Positive | None = None
    """Go on with as few as this when machines fail and no spare is left; train.global_batch stays what it is. Left out: `nodes`."""
    spares: Count = 0
    """Machines to have beside `nodes`, for those that fail."""
    gpus_per_node: Count | None = None
    """GPUs of a machine to ask a scheduler for, and as many ranks; left out: none are asked for."""
    ranks_per_node: Positive | None = None
    """Processes on a machine; left out: gpus_per_node, else one per GPU found there, or `cpu_ranks` without a GPU."""
    cpu_ranks: Positive = 1
    """Processes on a machine without a GPU."""
    port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """Port on which the ranks meet, on the first machine; left out: a free one."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds without a sign of progress (a collective, a forward pass) after which the run is taken to hang and is ended."""
    grace: Annotated[float, Field(gt=0)] | None = None
    """Seconds between a scheduler's first signal and its kill. Where a step takes longer, a stop gives the step up half-way."""
    lease: Annotated[float, Field(gt=0)] = 60.0
    """Seconds after which a run whose holder has fallen silent (power loss) may be taken over from another host."""
    hostfile: str | None = None
    """Machines for `launch hosts`, in DeepSpeed's format: a line `NAME slots=N` each."""
    venv: Line | None = None
    """Virtual environment on the machines; left out: the Python that launches, at the same path."""
    environment: dict[Variable, Value] = {}
    """Environment variables of the ranks; they win over bigtrain's own (`--dry-run` shows both)."""
    forward: list[Variable] = []
    """Variables of the launching shell whose values the ranks get, WANDB_API_KEY say; values appear in no file or command line."""
    time: Time | None = None
    """Time limit of a Slurm job, as sbatch takes it."""
    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    """Features that a Slurm node must have."""
    exclude: Line | None = None
    """Slurm nodes not to use, as in n[3,7-9]."""
    sbatch: list[Annotated[str, Field(pattern=r"^--[a-z][a-z-]*(=[^\x00-\x1f\x7f]*)?$")]] = []
    """Further options of sbatch, such as --mem=0."""
    container: Container | None = None
    kubernetes: Kubernetes = Kubernetes()
    preflight: Preflight = Preflight()

    @model_validator(mode="after")
    def _nodes(self):
        if self.min_nodes and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes {self.min_nodes} is more than nodes {self.nodes}; lower it")
        return self

    @property
    def seconds(self) -> float | None:
        """The time limit in seconds, None where there is none. Slurm reads M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
        if self.time is None:
            return None
        days, _, clock = self.time.rpartition("-")
        parts = [int(part) for part in re.findall(r"\d+", clock)]
        units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)
        return int(days or 0) * 86400.0 + sum(part * unit for part, unit in zip(parts, units, strict=False))


class Restarts(Section):
    """What happens after a crash or a hang of ranks that bigtrain has started."""

    max: Count = 3
    """Restarts in all; each goes on from the newest checkpoint. A crash that repeats at the same step is not tried a third time."""
    backoff: Annotated[float, Field(ge=0)] = 1.0
    """Seconds before the first restart; twice as long before each further one, a minute at most."""
    node_failures: Positive = 2
    """Failures after which a machine is left out of further starts, where there are others."""
