"""What hardware.py concludes from /proc, /dev, /sys, the environment and nvidia-smi, on machines made of files."""

import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain import hardware
from bigtrain.config import Config
from bigtrain.hardware import choose_precision, look, problems, ranks

XEON = "model name\t: Xeon\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16\n\nmodel name\t: Xeon\nflags\t: fpu\n"
H100 = ("NVIDIA H100", 9.0)
V100 = ("Tesla V100", 7.0)


@pytest.fixture
def machine(tmp_path):
    """Build the files of a machine and look at it: `machine(files, gpus=[...], **environment)`."""

    def build(files=None, gpus=(), torch="2.13.0", **environment):
        for path, text in {"proc/meminfo": "MemTotal:  4194304 kB\n", **(files or {})}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        for n in range(len(gpus)):
            (tmp_path / "dev").mkdir(exist_ok=True)
            (tmp_path / f"dev/nvidia{n}").touch()
            (tmp_path / "dev/nvidiactl").touch()
        return look(environment, tmp_path, lambda: list(gpus), lambda: torch)

    return build


def config(**sections) -> Config:
    base = {
        "model": {"layers": 1, "width": 8, "heads": 1, "mlp_width": 8, "max_positions": 8},
        "data": {"sequence_length": 8},
        "train": {"steps": 1, "micro_batch": 1, "accumulation": 1},
        "optimizer": {"lr": 1e-3},
    }
    return Config.model_validate({**base, **sections})


def test_cpu_with_and_without_bf16(machine):
    fast = machine({"proc/cpuinfo": XEON})
    assert (fast.kind, fast.devices, fast.name, fast.bf16, fast.fp16, fast.memory_gib) == ("cpu", 0, "Xeon", True, False, 4.0)
    assert "no GPU found" in fast.reason and "amx_bf16" in fast.reason
    slow = machine({"proc/cpuinfo": "model name : Old\nflags : fpu avx2\n"})
    assert slow.bf16 is False and "no bf16" in slow.reason
    assert machine({"proc/cpuinfo": "Features\t: fp asimd bf16\n"}).bf16 is True  # Arm says it so, and has no model name


def test_gpus_and_the_oldest_of_them_decides(machine):
    found = machine(gpus=[H100] * 4)
    assert (found.kind, found.devices, found.name, found.bf16, found.fp16) == ("cuda", 4, "NVIDIA H100", True, True)
    mixed = machine(gpus=[H100, V100])
    assert (mixed.name, mixed.bf16) == ("Tesla V100", False)


@pytest.mark.parametrize(
    ("shown", "devices"), [("0", 1), ("2,0", 2), ("0,-1,1", 1), ("0,9,1", 1), ("GPU-5f2a, GPU-77aa", 2), ("", 0), ("-1", 0)]
)
def test_visible_devices(machine, shown, devices):
    found = machine(gpus=[H100] * 4, CUDA_VISIBLE_DEVICES=shown)
    assert (found.devices, found.kind) == (devices, "cuda" if devices else "cpu")


def test_a_gpu_that_cannot_be_used_is_explained(machine):
    assert "DS_ACCELERATOR=cpu" in machine(gpus=[H100], DS_ACCELERATOR="cpu").reason
    assert "hides every GPU" in machine(gpus=[H100], CUDA_VISIBLE_DEVICES="").reason
    cpu_build = machine(gpus=[H100], torch="2.13.0+cpu")
    assert cpu_build.kind == "cpu" and "built for CPUs" in cpu_build.reason


def test_devices_without_nvidia_smi_are_counted(tmp_path):
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    found = look({}, tmp_path, list, str)
    assert (found.kind, found.devices, found.bf16) == ("cuda", 2, True) and "nvidia-smi does not answer" in found.reason


def test_amd_gpus(machine):
    nodes = {
        f"sys/class/kfd/kfd/topology/nodes/{n}/properties": f"simd_count 8\ngfx_target_version {v}\n"
        for n, v in enumerate((0, 90402, 90402))
    }
    assert (machine(nodes).kind, machine(nodes).devices, machine(nodes).bf16) == ("rocm", 2, True)
    assert machine(nodes, HIP_VISIBLE_DEVICES="1").devices == 1
    assert machine({list(nodes)[1]: "gfx_target_version 90006\n"}).bf16 is False


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/cpu.max": "250000 100000\n"}, 2),
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/job/step/cpu.max": "max 100000\n",
            },
            3,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/job\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
    ],
)
def test_cores_within_the_control_group(machine, monkeypatch, files, cores):
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert machine(files).cores == cores


def test_memory_within_the_control_group(machine):
    assert machine({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.max": f"{3 << 30}\n"}).memory_gib == 3.0
    unlimited = {"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    assert machine(unlimited).memory_gib == 4.0


def test_precision(machine):
    fast, slow = machine({"proc/cpuinfo": XEON}), machine(gpus=[V100])
    assert choose_precision("auto", fast)[0] == "bf16" and "amx_bf16" in choose_precision("auto", fast)[1]
    assert choose_precision("auto", slow)[0] == "fp32" and "7.0" in choose_precision("auto", slow)[1]
    assert choose_precision("fp16", slow) == ("fp16", "set in the config")
    assert [key for key, _ in problems(config(precision="fp16"), fast)] == ["precision"]
    assert [key for key, _ in problems(config(precision="bf16"), slow)] == ["precision"]
    for fits, where in (("bf16", fast), ("auto", fast), ("fp32", fast), ("fp16", slow), ("auto", slow)):
        assert problems(config(precision=fits), where) == []


def test_ranks(machine):
    cpu, gpus = machine({"proc/cpuinfo": XEON}), machine(gpus=[H100] * 4)
    three = config(launch={"ranks_per_node": 3})
    assert (ranks(config(), cpu), ranks(config(), gpus), ranks(three, cpu), ranks(three, gpus)) == (1, 4, 3, 3)
    (problem,) = problems(config(launch={"ranks_per_node": 8}), gpus)
    assert problem[0] == "launch.ranks_per_node" and "8 is more than the 4 GPUs" in problem[1]
    assert problems(config(launch={"ranks_per_node": 8}), cpu) == []


def test_batch_arithmetic_is_checked_for_the_ranks_there_will_be(machine):
    gpus = machine(gpus=[H100] * 4)
    eight = config(train={"steps": 1, "global_batch": 64, "micro_batch": 4, "accumulation": 2})
    assert problems(eight, gpus, world=8) == []
    (problem,) = problems(eight, gpus)
    assert problem[0] == "train.global_batch" and "4 ranks" in problem[1]


def test_this_machine():
    found = look()
    assert found.cores >= 1 and found.name
    assert found.memory_gib > 0 or not Path("/proc/meminfo").exists()


def test_no_torch_on_a_login_node():
    heavy = "{'torch', 'deepspeed', 'transformers'}"
    code = f"import sys, bigtrain.hardware, bigtrain.configfile; sys.exit(not {heavy}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
