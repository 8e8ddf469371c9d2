"""What the doctor says of machines that are made up, and of this one."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from bigtrain import opbuild
from bigtrain.errors import RunError
from bigtrain.hardware import Hardware
from bigtrain_launch import devices, doctor
from bigtrain_launch.devices import Driver, measure
from bigtrain_launch.doctor import Line

ROOT = Path(__file__).parents[2]
CPU = Hardware("cpu", 0, "Xeon", True, False, "no GPU found; the CPU has amx_bf16", 8, 64.0)
H100 = Hardware("cuda", 8, "NVIDIA H100", True, True, "compute capability 9.0", 96, 900.0)


def state(line: Line) -> str:
    assert line.found and bool(line.advice) == (line.state != "ok"), "what is amiss comes with what to do"
    return line.state


def test_python():
    assert state(doctor.python((3, 11, 7))) == "ok" and state(doctor.python((3, 9, 1))) == "problem"
    assert "tested with 3.11" in doctor.python((3, 13, 0)).found


NEEDED = [("torch", "2.6"), ("deepspeed", "0.19"), ("PyYAML", "6")]
TESTED = {"torch": "2.13.0", "deepspeed": "0.19.8", "pyyaml": "6.0.3"}
INSTALLED = {"torch": "2.13.0+cpu", "deepspeed": "0.19.8", "PyYAML": "6.0.3"}


@pytest.mark.parametrize(
    ("change", "known", "expected", "says"),
    [
        ({}, TESTED, "ok", "3 as tested"),
        ({}, {}, "ok", "3 new enough"),
        ({"deepspeed": "0.20.1"}, TESTED, "warning", "deepspeed 0.20.1 (tested: 0.19.8)"),
        ({"deepspeed": None}, TESTED, "problem", "deepspeed is missing"),
        ({"torch": "2.5.1+cu121"}, TESTED, "problem", "torch 2.5.1+cu121 is older than 2.6"),
        ({"torch": "2.10.0"}, {}, "ok", "3 new enough"),  # no text comparison
    ],
)
def test_packages(change, known, expected, says):
    line = doctor.packages(NEEDED, known, (INSTALLED | change).get)
    assert state(line) == expected and says in line.found


def test_what_is_asked_for_is_what_setup_py_says():
    needed = dict(doctor.required())
    assert {"torch", "deepspeed", "triton", "pydantic"} <= needed.keys() and "pytest" not in needed
    assert doctor.tested()["torch"] == "2.13.0"


@pytest.mark.parametrize(
    ("asked", "installed", "expected"),
    [
        (["triton==3.7.1; platform_system == 'Linux'"], {"torch": "2.13.0", "triton": "3.7.1"}, "ok"),
        (["triton==3.7.1; platform_system == 'Linux'"], {"torch": "2.13.0", "triton": "3.9.0"}, "problem"),
        (["triton==3.7.1; platform_system == 'Linux'"], {"torch": "2.13.0"}, "problem"),
        (["pytorch-triton-rocm==3.7.1"], {"torch": "2.13.0+rocm", "pytorch-triton-rocm": "3.7.1"}, "ok"),
        (["numpy"], {"torch": "2.13.0+cpu", "triton": "3.9.0"}, "ok"),
        (["numpy"], {"torch": "2.13.0+cpu"}, "warning"),
    ],
)
def test_the_pair_of_torch_and_triton(asked, installed, expected):
    assert state(doctor.triton(asked, installed.get)) == expected


@pytest.mark.parametrize(
    ("hardware", "version", "states"),
    [
        (CPU, "", ["ok"]),
        (H100, "590.44", ["ok", "ok"]),
        (H100, "", ["ok", "problem"]),
        (Hardware("cuda", 1, "Tesla V100", False, True, "compute capability 7.0", 8, 64.0), "590.44", ["warning", "ok"]),
        (
            Hardware("cuda", 1, "NVIDIA GPU", True, True, "nvidia-smi does not answer; taken to have bf16", 8, 64.0),
            "",
            ["problem", "problem"],
        ),
        (Hardware("cpu", 0, "Xeon", True, False, "there is a GPU, but torch 2.13.0+cpu is built for CPUs", 8, 64.0), "", ["warning"]),
        (Hardware("rocm", 8, "AMD GPU", True, True, "gfx target 90402", 96, 900.0), "", ["ok"]),
    ],
)
def test_gpus(hardware, version, states):
    assert [state(line) for line in doctor.gpus(hardware, lambda: version)] == states


def test_deepspeed_ops(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert doctor.deepspeed_ops([]).found == "none needed"
    line = doctor.deepspeed_ops(["cpu_adam"])
    assert state(line) == "ok" and "not built yet" in line.found
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam/cpu_adam.so").touch()
    assert doctor.deepspeed_ops(["cpu_adam"]).found == f"cpu_adam built in {tmp_path}"


def test_deepspeed_ops_that_cannot_be_built(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    line = doctor.deepspeed_ops(["cpu_adam"])
    assert state(line) == "problem"
    assert line.found == "cpu_adam cannot be built: no C++ compiler (g++), no ninja, no Python's headers (python3-dev)"


def test_a_lock_that_a_dead_build_has_left(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam/lock").touch()
    os.utime(tmp_path / "cpu_adam/lock", (0, time.time() - 2 * opbuild.YOUNG_SECONDS))
    line = doctor.deepspeed_ops(["cpu_adam"])
    assert state(line) == "problem" and "cpu_adam that died" in line.found and f"rm {tmp_path}/cpu_adam/lock" in line.advice


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ({"free_gib": 50.0, "write_mib_s": 900.0, "error": None}, "ok"),
        ({"free_gib": 0.5, "write_mib_s": 900.0, "error": None}, "problem"),
        ({"free_gib": 50.0, "write_mib_s": 9.0, "error": None}, "warning"),
        ({"free_gib": 50.0, "write_mib_s": None, "error": "Disk quota exceeded"}, "problem"),
        ({"free_gib": None, "write_mib_s": None, "error": "Permission denied"}, "problem"),
    ],
)
def test_disks(space, expected):
    assert state(doctor.disk(Path("runs"), space, 1.0)) == expected


def test_the_folder_that_is_there_already(tmp_path):
    assert doctor.existing(tmp_path / "a/b/c") == tmp_path and doctor.existing(tmp_path) == tmp_path


def test_limits():
    assert [state(doctor.shared_memory(gib)) for gib in (16.0, 0.0625, None)] == ["ok", "warning", "warning"]
    assert [state(doctor.open_files(n, 8)) for n in (sys.maxsize, 1024, 128)] == ["ok", "ok", "warning"]
    assert state(doctor.open_files(1024, 1024)) == "warning"
    assert [state(doctor.clock(known)) for known in (True, False, None)] == ["ok", "warning", "ok"]


def test_ports():
    assert state(doctor.ports(None)) == "ok"
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        line = doctor.ports(taken.getsockname()[1])
        assert state(line) == "problem" and "in use" in line.found


def test_host_names():
    assert state(doctor.host_name("localhost")) == "ok"
    assert state(doctor.host_name("no-such-host.invalid")) == "warning"


def test_memory(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  99 kB\nMemAvailable:  1048576 kB\n")
    assert state(doctor.memory(64.0, tmp_path / "meminfo")) == "warning"
    assert state(doctor.memory(64.0, tmp_path / "absent")) == "ok"


def product(tflops: float, peak: float | None = 989.0, **more) -> dict:
    return {"stage": "done", "device": "NVIDIA H100", "tflops": tflops, "peak_tflops": peak, "nccl": "2.27.5", "cuda": "13.0"} | more


def test_matrix_products():
    def states(*answers):
        return [state(line) for line in doctor.products(answers, 0.7)]

    assert states(product(700.0), product(690.0)) == ["ok", "ok"]  # the second is NCCL
    assert states(product(300.0), product(300.0)) == ["warning", "ok"]  # alike, but far from what an H100 can
    assert states(product(700.0), product(300.0), product(710.0)) == ["problem", "ok"]
    assert states({"stage": "starting", "error": "CUDA error: out of memory"}) == ["problem"]
    assert [state(line) for line in doctor.products([{"stage": "done", "device": "CPU", "tflops": 0.1, "peak_tflops": None}], 0.7)] == [
        "ok"
    ]
    line = next(doctor.products([product(700.0)], 0.7))
    assert line.found == "700 TFLOP/s, 71% of the data sheet's 989"


class FakeNvml(SimpleNamespace):
    """nvidia-ml-py on a machine of two GPUs; `ecc`, `rows` and `reasons` by GPU."""

    NVMLError = type("NVMLError", (Exception,), {})
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC, NVML_TEMPERATURE_GPU = 1, 0, 0

    def __init__(self, ecc=(0, 0), rows=((0, 0, 0, 0), (0, 0, 0, 0)), reasons=(0, 0)):
        super().__init__(
            nvmlInit=lambda: None,
            nvmlDeviceGetCount=lambda: 2,
            nvmlDeviceGetHandleByIndex=lambda n: n,
            nvmlDeviceGetTotalEccErrors=lambda n, kind, counter: self.known(ecc[n]),
            nvmlDeviceGetRemappedRows=lambda n: self.known(rows[n]),
            nvmlDeviceGetCurrentClocksThrottleReasons=lambda n: self.known(reasons[n]),
            nvmlDeviceGetTemperature=lambda n, sensor: 91,
        )

    def known(self, value):
        if value is None:
            raise self.NVMLError("Not Supported")
        return value


def complaints(**counters) -> list[str]:
    driver = Driver(lambda name: FakeNvml(**counters))
    driver.look()
    return driver.complaints()


def test_the_health_of_gpus():
    assert complaints() == [] and complaints(ecc=(None, None), rows=(None, None), reasons=(None, None)) == []
    assert complaints(ecc=(0, 3)) == ["GPU 1: 3 memory errors that ECC could not correct, since the driver was loaded"]
    assert complaints(rows=((0, 1, 1, 0), (0, 9, 0, 1))) == [
        "GPU 0: a row of its memory waits to be replaced",
        "GPU 1: a row of its memory could not be replaced",
    ]
    assert complaints(reasons=(0x04, 0x48)) == [
        "GPU 1: clocks held down by hardware slowdown, heat (hardware) at 91 °C"
    ]  # 0x04: the power cap
    assert [state(line) for line in doctor.health(["GPU 1: hot"])] == ["problem"] and [state(line) for line in doctor.health([])] == ["ok"]


def test_a_driver_that_cannot_be_asked():
    def absent(name):
        raise ImportError(name)

    with pytest.raises(RunError, match="nvidia-ml-py is not installed"):
        Driver(absent)
    broken = FakeNvml()
    broken.nvmlInit = lambda: broken.known(None)
    with pytest.raises(RunError, match="driver does not answer: Not Supported"):
        Driver(lambda name: broken)


@pytest.mark.parametrize(
    ("printed", "errors", "expected"),
    [
        ('{"stage": "starting"}\n{"stage": "done", "tflops": 1}\n', "", {"stage": "done", "tflops": 1}),
        ("", "Traceback\nImportError: no torch\n", {"stage": "starting", "error": "got no further than starting: ImportError: no torch"}),
        (
            '{"stage": "matrix product"}\n',
            "",
            {"stage": "matrix product", "error": "got no further than matrix product: it said nothing"},
        ),
        ('{"stage": "starting", "error": "needs GPU 9"}\n', "", {"stage": "starting", "error": "needs GPU 9"}),
    ],
)
def test_what_a_probe_has_said(printed, errors, expected):
    assert devices._last(printed, errors) == expected


def test_a_probe_that_hangs_is_ended(monkeypatch, tmp_path):
    """A stand-in for Python that tells where it is and then nothing more."""
    (tmp_path / "python").write_text('#!/bin/sh\necho \'{"stage": "matrix product"}\'\nexec sleep 600\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(devices.sys, "executable", str(tmp_path / "python"))
    looks = []
    answers = measure(2, {}, 1.0, lambda: looks.append(1))
    assert [answer["error"] for answer in answers] == ["got no further than matrix product: it said nothing"] * 2 and looks


def test_what_a_person_sees():
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        doctor.show([Line("Python", "ok", "3.11.7"), Line("disk of runs", "problem", "0.1 GiB free", "make room")], console)
    assert [line.split() for line in capture.get().splitlines()] == [
        ["Python", "ok", "3.11.7"],
        ["disk", "of", "runs", "problem", "0.1", "GiB", "free"],
        ["make", "room"],
        ["1", "problem"],
    ]


CONFIG = """
model: {layers: 1, width: 8, heads: 1, mlp_width: 8, max_positions: 8}
data: {sequence_length: 8}
train: {steps: 1, micro_batch: 1, accumulation: 1}
optimizer: {lr: 1e-3}
launch: {preflight: {free_gib: 0.01}}
"""


def run(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(str(p) for p in (ROOT, ROOT / "kernels", ROOT / "launch"))
    environment = {**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", **variables}
    return subprocess.run(
        [sys.executable, "-m", "bigtrain", "doctor", *arguments], env=environment, cwd=folder, capture_output=True, text=True
    )


def test_this_machine(tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG)
    done = run("c.yaml", "--json", folder=tmp_path)
    found = {line["what"]: line for line in json.loads(done.stdout)["here"]}
    assert done.returncode == int(any(line["state"] == "problem" for line in found.values()))
    assert found["config"]["state"] == found["packages"]["state"] == found["matrix product"]["state"] == "ok", found
    assert found[f"disk of {tmp_path}"]["state"] != "problem" and json.loads(done.stdout)["machines"] is None


def test_a_problem_is_the_exit_code(tmp_path):
    """A config that does not fit, a disk with too little room, and no torch that the probe could import."""
    (tmp_path / "c.yaml").write_text(CONFIG)
    (tmp_path / "broken/torch").mkdir(parents=True)
    (tmp_path / "broken/torch/__init__.py").write_text("raise ImportError('broken on purpose')")
    path = os.pathsep.join(str(p) for p in (tmp_path / "broken", ROOT, ROOT / "kernels", ROOT / "launch"))
    done = run("c.yaml", "precision=fp16", "launch.preflight.free_gib=1e9", folder=tmp_path, PYTHONPATH=path)
    assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith("4 problems"), (
        done.stdout
    )  # the disks of runs and of temporary files
    for text in ("fp16 does not train on a CPU", "make room: launch.preflight.free_gib", "ImportError: broken on purpose"):
        assert text in " ".join(done.stdout.split())


def test_machines_without_a_config(tmp_path):
    done = run("--launch", "hosts", folder=tmp_path)
    assert done.returncode == 2 and "--launch hosts: give a CONFIG too" in done.stderr
