"""What a machine can tell of itself without torch, in about a second. The standard library only: an agent asks it on every node."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import re
import resource
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import bigtrain

COMPARED = ("torch", "deepspeed", "triton", "transformers", "numpy")
LAUNCHER_WORD = "launcher"
CHUNK, CHUNKS, WRITE_SECONDS = 1 << 20, 16, 0.5
UNSYNCHRONISED_US = 16_000_000  # the kernel's own estimate of its clock's error; systemd draws the line here too


def collect(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What this machine tells of itself, in JSON types. Raises nothing: what cannot be known is None, or the reason in words.

    `asked`: `folder`, where the run writes, and `token`, the name of a folder in it, made by the launcher with its own word in the
    file `launcher`; a word of this machine is left there too.
    """
    folder, token = str(asked["folder"]), str(asked["token"])
    return {
        "executable": sys.executable,
        "versions": {"python": platform.python_version(), "bigtrain": bigtrain.__version__} | {n: version(n) for n in COMPARED},
        "code": code(),
        "commit": commit(),
        "shared": exchange_words(Path(folder) / token),
        "space": {place: space(Path(place)) for place in dict.fromkeys((folder, tempfile.gettempdir()))},
        "shared_memory_gib": size_gib(Path("/dev/shm")),
        "open_files": open_files(),
        "gpus": len([p for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)]),
    }


def version(name: str) -> str | None:
    """Version of an installed package, without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def code() -> str:
    """Digest of bigtrain's source files as this Python would import them: it sees what differs under the same commit."""
    found = hashlib.sha256()
    for name in ("bigtrain", "bigtrain_kernels", "bigtrain_launch"):
        spec = importlib.util.find_spec(name)
        for root in map(Path, (spec and spec.submodule_search_locations) or ()):
            for file in sorted(root.rglob("*.py")):
                found.update(file.relative_to(root).as_posix().encode())
                found.update(file.read_bytes())
    return found.hexdigest()[:16]


def commit() -> str | None:
    """The git commit of the checkout that bigtrain is run from, with -dirty where files differ from it."""
    described = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=16", "--exclude=*"]
    checkout = Path(bigtrain.__file__).parents[1]
    if not (checkout / ".git").exists():  # a folder around an installation may be a checkout of something else
        return None
    try:
        return subprocess.run(described, cwd=checkout, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def exchange_words(folder: Path) -> dict[str, str | None]:
    """Read the launcher's word, and leave one: `read`, and the name and content of the file that was `wrote`."""
    try:
        read = (folder / LAUNCHER_WORD).read_text()
    except (OSError, ValueError):
        read = None
    word = secrets.token_hex(8)
    try:
        (folder / word).write_text(word)
    except OSError:
        word = None
    return {"read": read, "wrote": word}


def space(folder: Path) -> dict[str, Any]:
    """Free space, and MiB/s of a write that has reached the disk; `error` in words where nothing can be written."""
    try:
        free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        return {"free_gib": None, "write_mib_s": None, "error": error.strerror}
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".bigtrain-", buffering=0) as file:
            block, start, written = os.urandom(CHUNK), time.perf_counter(), 0
            while written < CHUNK * CHUNKS and time.perf_counter() - start < WRITE_SECONDS:
                written += file.write(block)
            os.fsync(file.fileno())
            return {"free_gib": free, "write_mib_s": written / 2**20 / (time.perf_counter() - start), "error": None}
    except OSError as error:
        return {"free_gib": free, "write_mib_s": None, "error": error.strerror}


def size_gib(folder: Path) -> float | None:
    """Size of the file system that holds a folder."""
    try:
        return shutil.disk_usage(folder).total / 2**30
    except OSError:
        return None


def open_files() -> int:
    """How many files and connections a process here may have open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def clock_synchronised() -> bool | None:
    """Whether the kernel believes its clock, as ntpd, chrony or systemd-timesyncd tell it to; None where it cannot be asked."""
    timex = ctypes.create_string_buffer(512)  # modes = 0: only read
    if not sys.platform.startswith("linux") or ctypes.sizeof(ctypes.c_long) != 8 or ctypes.CDLL(None).adjtimex(timex) < 0:
        return None
    return ctypes.c_long.from_buffer(timex, 24).value < UNSYNCHRONISED_US  # struct timex: maxerror, the fourth field
