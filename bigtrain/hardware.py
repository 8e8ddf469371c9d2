"""What this machine has, found without torch: GPUs, cores, memory, and which precision is fast. Standard library only.

A login node can ask it in milliseconds, and so can the launcher before it starts ranks.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bigtrain.config import Config

HOST_MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""For ranks that compute in host memory: large buffers come and go every step, and in huge pages (where the system gives
them on request, its usual setting) a step of benchmarks/throughput.yaml in float32 has 1,300 page faults instead of 50,000."""


@dataclass(frozen=True)
class Hardware:
    kind: str
    """cuda, rocm or cpu: where the ranks compute."""
    devices: int
    """GPUs that a process here may use; 0 for cpu."""
    name: str
    """Name of the GPU, or of the CPU."""
    bf16: bool
    """The hardware multiplies bfloat16 faster than float32."""
    fp16: bool
    """float16 can be trained in."""
    reason: str
    """How `kind` and `bf16` were found."""
    cores: int
    """CPU cores that this process may use."""
    memory_gib: float
    """Host memory that this process may use."""


def nvidia_smi() -> list[tuple[str, float]]:
    """(name, compute capability) of every GPU that the driver shows; empty where nvidia-smi is missing or fails."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        rows = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
        return [(name.strip(), float(capability)) for name, capability in (row.rsplit(",", 1) for row in rows)]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def torch_version() -> str:
    """Version of the installed torch without importing it (two seconds), or an empty string."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def look(
    environ: Mapping[str, str] = os.environ,
    root: Path = Path("/"),
    gpus: Callable[[], list[tuple[str, float]]] = nvidia_smi,
    torch: Callable[[], str] = torch_version,
) -> Hardware:
    """Look at this machine. `root` holds proc/, dev/ and sys/; the arguments are there for tests."""
    cores, memory_gib = usable_cores(root), usable_memory_gib(root)
    nvidia = len([p for p in (root / "dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)])
    amd = _amd_targets(root)
    note = "no GPU found"
    if environ.get("DS_ACCELERATOR") == "cpu":
        nvidia, amd, note = 0, [], "DS_ACCELERATOR=cpu"
    elif (nvidia or amd) and torch().endswith("+cpu"):
        nvidia, amd, note = 0, [], f"there is a GPU, but torch {torch()} is built for CPUs"
    if nvidia:
        listed = gpus()
        devices = _visible(environ.get("CUDA_VISIBLE_DEVICES"), len(listed) or nvidia)
        if devices:
            name, capability = min(listed, key=lambda gpu: gpu[1]) if listed else ("NVIDIA GPU", 8.0)
            reason = f"compute capability {capability}" if listed else "nvidia-smi does not answer; taken to have bf16"
            return Hardware("cuda", devices, name, capability >= 8.0, True, reason, cores, memory_gib)
        note = "CUDA_VISIBLE_DEVICES hides every GPU"
    if amd:
        shown = next((environ[v] for v in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES") if v in environ), None)
        devices = _visible(shown, len(amd))
        if devices:
            # gfx908 (MI100) brought bf16 matrix instructions; the target is written major*10000 + minor*100 + step.
            return Hardware("rocm", devices, "AMD GPU", min(amd) >= 90008, True, f"gfx target {min(amd)}", cores, memory_gib)
        note = f"{shown!r} hides every GPU"
    name, flags = _cpu(root)
    fast = sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    reason = f"{note}; the CPU has {', '.join(fast)}" if fast else f"{note}; the CPU has no bf16 instructions"
    return Hardware("cpu", 0, name, bool(fast), False, reason, cores, memory_gib)


def choose_precision(asked: str, hardware: Hardware) -> tuple[str, str]:
    """(bf16, fp16 or fp32; why). `asked` is config.precision: auto takes bf16 where it is fast, else fp32."""
    if asked != "auto":
        return asked, "set in the config"
    return ("bf16" if hardware.bf16 else "fp32"), f"{hardware.name}: {hardware.reason}"


def ranks(config: Config, hardware: Hardware) -> int:
    """Processes to start on this machine: launch.ranks_per_node, else one per GPU, or launch.cpu_ranks without a GPU."""
    return config.launch.ranks_per_node or hardware.devices or config.launch.cpu_ranks


def problems(config: Config, hardware: Hardware, world: int | None = None) -> list[tuple[str, str]]:
    """What this config cannot do on this hardware: (key, what is wrong and what to do), empty when all is well.

    `world` is the number of ranks of the whole run; left out, this machine runs all of them.
    """
    from bigtrain.config import batch_arithmetic  # here, so that who only looks at a machine needs no pydantic

    found = []
    if config.precision == "fp16" and not hardware.fp16:
        found.append(("precision", f"fp16 does not train on a CPU ({hardware.name}); use bf16, fp32 or auto"))
    if config.precision == "bf16" and hardware.kind != "cpu" and not hardware.bf16:
        found.append(("precision", f"bf16 needs a newer GPU ({hardware.name}: {hardware.reason}); use fp16, fp32 or auto"))
    asked = config.launch.ranks_per_node or 0
    if hardware.devices and asked > hardware.devices:
        found.append(("launch.ranks_per_node", f"{asked} is more than the {hardware.devices} GPUs here; lower it, or leave it out"))
    try:
        batch_arithmetic(config.train, world or ranks(config, hardware))
    except ValueError as error:
        found.append(("train.global_batch", str(error)))
    return found


def usable_cores(root: Path = Path("/")) -> int:
    """Cores of this process's affinity mask, within the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _control_groups(root, "cpu"):
        quota = _words(group / "cpu.max") or [*_words(group / "cpu.cfs_quota_us"), *_words(group / "cpu.cfs_period_us")]
        if len(quota) == 2 and quota[0].isdigit():  # else "max" (version 2) or -1 (version 1): no limit
            cores = min(cores, int(quota[0]) // int(quota[1]))
    return max(1, cores)


def usable_memory_gib(root: Path = Path("/")) -> float:
    """Memory of this machine, within the limit of this process's control group; 0 where nothing says."""
    total = re.search(r"^MemTotal:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    limits = [int(total[1]) * 1024] if total else []
    for group in _control_groups(root, "memory"):
        limits += [int(w) for name in ("memory.max", "memory.limit_in_bytes") for w in _words(group / name) if w.isdigit()]
    return min(limits, default=0) / 2**30


def _control_groups(root: Path, controller: str) -> list[Path]:
    """Folders of this process's control group and of those around it: version 2, or version 1 of a controller."""
    mount = root / "sys/fs/cgroup"
    groups = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            folder = mount / controller if controllers else mount
            own = folder / path.lstrip("/")
            groups += [folder, *(p for p in [own, *own.parents] if folder in p.parents)]
    return groups


def _amd_targets(root: Path) -> list[int]:
    """gfx target version of every AMD GPU that the kernel driver lists (CPUs are nodes of target 0)."""
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties")
    targets = [re.search(r"^gfx_target_version (\d+)$", _text(node), re.MULTILINE) for node in nodes]
    return [int(t[1]) for t in targets if t and int(t[1])]


def _visible(listed: str | None, devices: int) -> int:
    """How many of the devices a *_VISIBLE_DEVICES list leaves: as in CUDA, the first entry that is no device ends it."""
    if listed is None:
        return devices
    count = 0
    for entry in listed.replace(" ", "").split(","):
        if not entry or (entry.lstrip("-").isdigit() and not 0 <= int(entry) < devices):
            break
        count += 1
    return count


def _cpu(root: Path) -> tuple[str, set[str]]:
    """(model name, instruction set flags) of the first core."""
    text = _text(root / "proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1].strip() if name else platform.machine() or "CPU", set(flags[1].split()) if flags else set()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _words(path: Path) -> list[str]:
    return _text(path).split()
