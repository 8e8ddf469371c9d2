"""Is this machine fit to train? What `bigtrain doctor` looks at: a line each, with what to do where something is amiss."""

from __future__ import annotations

import platform
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from statistics import median_high
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bigtrain import opbuild
from bigtrain.configlaunch import Launch
from bigtrain.errors import RunError, UserError
from bigtrain.hardware import Hardware
from bigtrain_launch import facts
from bigtrain_launch.devices import Driver, measure
from bigtrain_launch.local import checked_port, free_port
from bigtrain_launch.verdict import SHARED_MEMORY_GIB, files_needed

OLDEST_PYTHON, TESTED_PYTHON = (3, 10), (3, 11)
LEAST_MEMORY_GIB = 2.0
SLOW_DISK_MIB_S = 50.0
PEAK_SHARE = 0.4  # of the data sheet; a large product reaches 0.6 to 0.8 of it
DEVICE_SECONDS = 60.0  # a cold disk needs 20 of them to import torch; warm the whole takes 5
STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Line:
    """One thing that was looked at."""

    what: str
    state: Literal["ok", "warning", "problem"]
    found: str
    advice: str = ""


def examine(launch: Launch, folder: Path, ops: Sequence[str], here: Hardware, ranks: int) -> Iterator[Line]:
    """Look at this machine, as `ranks` ranks that write in `folder` and need `ops` will use it. Each line comes when it is known."""
    yield python(sys.version_info[:3])
    yield packages(required(), tested(), facts.version)
    yield triton(metadata.requires("torch") or [] if facts.version("torch") else [], facts.version)
    yield from gpus(here, _driver_version)
    yield deepspeed_ops(ops)
    for place in dict.fromkeys((existing(folder), Path(tempfile.gettempdir()))):
        yield disk(place, facts.space(place), launch.preflight.free_gib)
    yield shared_memory(facts.size_gib(Path("/dev/shm")))
    yield open_files(facts.open_files(), ranks * launch.nodes)
    yield clock(facts.clock_synchronised())
    yield ports(launch.port)
    yield host_name(socket.gethostname())
    yield memory(here.memory_gib, Path("/proc/meminfo"))
    yield from _devices(here, launch)


def for_config(problems: Sequence[tuple[str, str]]) -> list[Line]:
    """What a config asks of this machine in vain: (key, what is wrong and what to do)."""
    lines = [Line("config", "problem", *_parted(f"{key}: {text}")) for key, text in problems]
    return lines or [Line("config", "ok", "fits this machine")]


def show(lines: Sequence[Line], console: Console) -> None:
    """Print all lines for a person, and how many of them ask for something."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for line in lines:
        text = Text(line.found) if line.state == "ok" else Text.assemble(line.found, "\n", (line.advice, "bold"))
        table.add_row(Text(line.what), Text(line.state, style=STYLES[line.state]), text)
    console.print(table)
    problems, warnings = (sum(line.state == state for line in lines) for state in ("problem", "warning"))
    counted = [f"{n} {word}{'s' * (n > 1)}" for n, word in ((problems, "problem"), (warnings, "warning")) if n]
    console.print(Text(", ".join(counted) or "all is well", style="bold"))


def required() -> list[tuple[str, str]]:
    """Packages that bigtrain needs here, each with the oldest version that is meant to work ("" where none is said)."""
    try:
        asked = metadata.requires("bigtrain") or []
    except metadata.PackageNotFoundError:  # run from a checkout
        return [(name, "") for name in facts.COMPARED]
    found = []
    for text in asked:
        requirement, _, marker = text.partition(";")
        name = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
        oldest = re.search(r">=\s*([0-9.]+)", requirement)
        if name and "extra" not in marker and ("platform_system" not in marker or platform.system() in marker):
            found.append((name[0], oldest[1] if oldest else ""))
    return found


def tested(constraints: Path = Path(__file__).parents[2] / "constraints.txt") -> dict[str, str]:
    """The versions that are tested, where this is a checkout, by name in small letters."""
    lines = constraints.read_text().splitlines() if constraints.is_file() else []
    return {name.lower(): version for name, sign, version in (line.partition("==") for line in lines) if sign}


def python(version: Sequence[int]) -> Line:
    text = f"{'.'.join(map(str, version))} ({sys.executable})"
    if tuple(version[:2]) < OLDEST_PYTHON:
        return Line("Python", "problem", text, f"install {'.'.join(map(str, OLDEST_PYTHON))} or newer")
    return Line("Python", "ok", text if tuple(version[:2]) == TESTED_PYTHON else f"{text}; tested with {'.'.join(map(str, TESTED_PYTHON))}")


def packages(needed: Sequence[tuple[str, str]], known: Mapping[str, str], installed: Callable[[str], str | None]) -> Line:
    there = {name: installed(name) for name, _ in needed}
    wrong = [f"{name} is missing" for name, version in there.items() if version is None]
    wrong += [
        f"{name} {there[name]} is older than {oldest}" for name, oldest in needed if there[name] and _number(there[name]) < _number(oldest)
    ]
    if wrong:
        return Line("packages", "problem", ", ".join(wrong), "install bigtrain with its requirements: pip install -c constraints.txt .")
    other = [
        f"{n} {v} (tested: {known[n.lower()]})"
        for n, v in there.items()
        if v.partition("+")[0] != known.get(n.lower(), v.partition("+")[0])
    ]
    if other:
        return Line("packages", "warning", ", ".join(other), "pip install -c constraints.txt . brings the tested versions")
    return Line(
        "packages",
        "ok",
        f"{len(there)} {'as tested' if known else 'new enough'}; torch {there.get('torch')}, deepspeed {there.get('deepspeed')}",
    )


def triton(asked: Sequence[str], installed: Callable[[str], str | None]) -> Line:
    """torch's CUDA builds ask for exactly one version of Triton."""
    pair = f"torch {installed('torch') or 'is missing'}, triton {installed('triton') or 'is missing'}"
    for text in asked:
        wanted = re.match(r"((?:pytorch-)?triton(?:-\w+)?)\s*==\s*([^\s;]+)", text)
        if wanted and installed(wanted[1]) != wanted[2]:
            return Line(
                "Triton", "problem", f"{pair}; this torch is made for {wanted[1]} {wanted[2]}", f"pip install {wanted[1]}=={wanted[2]}"
            )
    if installed("triton") is None and not any("triton" in text for text in asked):
        return Line("Triton", "warning", pair, "pip install triton; without it kernels.backend: triton does not work")
    return Line("Triton", "ok", pair)


def gpus(here: Hardware, driver: Callable[[], str]) -> Iterator[Line]:
    if here.kind == "cpu":
        hidden = "there is a GPU" in here.reason or "hides every GPU" in here.reason
        advice = "install a build of torch for GPUs, or unset the variable" if hidden else ""
        yield Line("GPU", "warning" if hidden else "ok", f"ranks compute on the CPU, {here.name}: {here.reason}", advice)
        return
    text = f"{here.devices} x {here.name} ({here.reason})"
    if "does not answer" in here.reason:
        yield Line("GPU", "problem", text, "look at nvidia-smi and dmesg; the driver may have to be loaded again")
    elif not here.bf16:
        yield Line("GPU", "warning", f"{text}; no bf16", "precision: auto takes fp32 here; fp16 is faster")
    else:
        yield Line("GPU", "ok", text)
    if here.kind == "cuda":
        version = driver()
        yield Line(
            "driver", "ok" if version else "problem", version or "nvidia-smi tells none", "" if version else "install NVIDIA's driver"
        )


def deepspeed_ops(needed: Sequence[str]) -> Line:
    try:
        opbuild.check_locks(list(needed))
    except UserError as error:
        return Line("DeepSpeed ops", "problem", *_parted(str(error)))
    missing = opbuild.missing(list(needed))
    if not missing:
        return Line("DeepSpeed ops", "ok", f"{', '.join(needed)} built in {opbuild.folder()}" if needed else "none needed")
    path = opbuild.environment()["PATH"]
    lacking = [] if shutil.which("c++") or shutil.which("g++") else ["C++ compiler (g++)"]
    lacking += [] if shutil.which("ninja", path=path) or util.find_spec("ninja") else ["ninja"]
    lacking += [] if (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file() else ["Python's headers (python3-dev)"]
    if lacking:
        return Line(
            "DeepSpeed ops", "problem", f"{', '.join(missing)} cannot be built: no {', no '.join(lacking)}", "install what is missing"
        )
    return Line(
        "DeepSpeed ops", "ok", f"{', '.join(missing)} not built yet; the first start builds them in about a minute (bigtrain ops build)"
    )


def existing(folder: Path) -> Path:
    """The folder, or the nearest one around it that is there already."""
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())


def disk(place: Path, space: Mapping[str, Any], least_gib: float) -> Line:
    what = f"disk of {place}"
    if space["error"]:
        return Line(what, "problem", f"cannot be written: {space['error']}", "make room, or mend its permissions")
    text = f"{space['free_gib']:,.1f} GiB free, writes {space['write_mib_s']:,.0f} MiB/s"
    if space["free_gib"] < least_gib:
        return Line(what, "problem", text, f"make room: launch.preflight.free_gib asks for {least_gib:g} GiB")
    if space["write_mib_s"] < SLOW_DISK_MIB_S:
        return Line(what, "warning", text, "checkpoints will take long; set run.folder to a faster disk")
    return Line(what, "ok", text)


def shared_memory(gib: float | None) -> Line:
    if (gib or 0.0) < SHARED_MEMORY_GIB:
        advice = "give the container more: docker run --shm-size=16g, or launch.kubernetes.shared_memory"
        return Line("shared memory", "warning", f"/dev/shm has {gib or 0.0:.2f} GiB; ranks exchange data there", advice)
    return Line("shared memory", "ok", f"/dev/shm has {gib:,.1f} GiB")


def open_files(allowed: int, world: int) -> Line:
    need = files_needed(world)
    text = "without limit" if allowed == sys.maxsize else f"{allowed:,} allowed"
    if allowed < need:
        return Line("open files", "warning", f"{text}; {world} ranks may need {need:,}", "raise it: ulimit -n, LimitNOFILE, limits.conf")
    return Line("open files", "ok", text)


def clock(synchronised: bool | None) -> Line:
    if synchronised is None:
        return Line("clock", "ok", "the system does not tell whether it is synchronised")
    if synchronised:
        return Line("clock", "ok", "synchronised")
    return Line("clock", "warning", "not synchronised", "start a time service (chrony, systemd-timesyncd) before a run on several machines")


def ports(port: int | None) -> Line:
    try:
        return Line("ports", "ok", f"{checked_port(port)} is free" if port else f"{free_port()} is free, for one")
    except UserError as error:
        return Line("ports", "problem", *_parted(str(error)))


def host_name(name: str) -> Line:
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
    except OSError as error:
        return Line("host name", "warning", f"{name} has no address ({error.strerror})", "add it to /etc/hosts: libraries look it up")
    return Line("host name", "ok", f"{name} is {address}")


def memory(usable_gib: float, meminfo: Path) -> Line:
    available = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text() if meminfo.is_file() else "", re.MULTILINE)
    free = int(available[1]) / 2**20 if available else usable_gib
    text = f"{usable_gib:,.1f} GiB, {min(free, usable_gib):,.1f} GiB of them free"
    if min(free, usable_gib) < LEAST_MEMORY_GIB:
        return Line("memory", "warning", text, "end what takes it, or use a larger machine")
    return Line("memory", "ok", text)


def products(answers: Sequence[Mapping[str, Any]], share: float) -> Iterator[Line]:
    """What the probe has measured on each device. `share`: of the usual, below which one is slow."""
    for number, answer in enumerate(answers):
        if "error" in answer:
            yield Line("matrix product", "problem", f"device {number}: {answer['error']}", "do what the message says; see dmesg for a GPU")
    speeds = {number: answer["tflops"] for number, answer in enumerate(answers) if "tflops" in answer and "error" not in answer}
    if not speeds:
        return
    usual = median_high(speeds.values())
    slow = {number: speed for number, speed in speeds.items() if speed < share * usual}
    for number, speed in slow.items():
        text = f"device {number}: {speed:,.3g} TFLOP/s; usual here: {usual:,.3g}"
        yield Line("matrix product", "problem", text, "look for other processes, heat and power limits")
    peak = next((answer["peak_tflops"] for answer in answers if answer.get("peak_tflops")), None)
    text = f"{usual:,.3g} TFLOP/s" + (f", {usual / peak:.0%} of the data sheet's {peak:,.0f}" if peak else "")
    if peak and usual < PEAK_SHARE * peak:
        yield Line("matrix product", "warning", text, "look for other processes, heat and power limits")
    elif not slow:
        yield Line("matrix product", "ok", text + (" on one core" if answers[0]["device"] == "CPU" else ""))
    if "nccl" in answers[0]:
        yield Line("NCCL", "ok", f"{answers[0]['nccl']}, CUDA {answers[0]['cuda']}")


def _devices(here: Hardware, launch: Launch) -> Iterator[Line]:
    """All devices at once, as in training: a GPU that gets too hot shows it then."""
    driver, complaint = None, None
    if here.kind == "cuda":
        try:
            driver = Driver()
        except RunError as error:
            complaint = Line("GPU health", "warning", f"ECC and throttling not looked at: {error}", "pip install nvidia-ml-py")
    environment = {"DS_ACCELERATOR": "cpu"} if here.kind == "cpu" else {}
    answers = measure(max(1, here.devices), environment, DEVICE_SECONDS, driver.look if driver else lambda: None)
    yield from products(answers, launch.preflight.slow_device)
    if complaint:
        yield complaint
    if driver:
        yield from health(driver.complaints())


def health(complaints: Sequence[str]) -> Iterator[Line]:
    for text in complaints:
        yield Line("GPU health", "problem", text, "cool it, reset it, or have it replaced; until then leave this machine out")
    if not complaints:
        yield Line("GPU health", "ok", "no uncorrected memory errors, no throttling in the matrix product")


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"[0-9.]*", version)[0].split(".") if part)


def _parted(message: str) -> tuple[str, str]:
    """What is wrong, and what to do: a message of ours says both."""
    found, _, advice = message.partition("; ")
    return found, advice or "see the message"
