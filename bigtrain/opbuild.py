"""DeepSpeed's C++ ops: which ones a run needs, where they are built, and a build that died. Standard library only.

torch compiles an op when it is first loaded, behind a lock file that nobody removes when the process dies: every later
start would wait on it for ever. So ops are built before ranks start, and a lock without a compiler is named.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from bigtrain.errors import RunError, UserError
from bigtrain.runfolder import lock_file

if TYPE_CHECKING:
    from bigtrain.config import Config

ALL = ("deepspeed_shm_comm", "cpu_adam", "cpu_lion")
"""Ops that this machine can build without a GPU: collectives through shared memory, AdamW and Lion in host memory."""
YOUNG_SECONDS = 10  # a lock this fresh may belong to a build that has not started its compiler yet
POLL_SECONDS = 0.2


def needed(config: Config, accelerator: str) -> list[str]:
    """Ops that `config` makes DeepSpeed load on `accelerator` ("cpu", "cuda", "rocm")."""
    ops = ["deepspeed_shm_comm"] if accelerator == "cpu" else []
    if config.optimizer.name == "adamw" and config.zero.offload_optimizer:
        ops.append("cpu_adam")
    if config.optimizer.name == "lion" and (config.zero.offload_optimizer or accelerator == "cpu"):
        ops.append("cpu_lion")
    return ops


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where ops are built: TORCH_EXTENSIONS_DIR, else inside this Python's environment, so that two environments with
    different versions of torch never rebuild, or lock, each other's."""
    return Path(environ.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix) / "torch_extensions")


def environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables with which torch finds the built ops again, for every process that loads them.

    Beside the folder, this Python's own ninja comes first on PATH: another version takes every op for changed, since it
    hashes commands differently, and compiles it anew.
    """
    return {"TORCH_EXTENSIONS_DIR": str(folder(environ)), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environ.get('PATH', '')}"}


def missing(ops: list[str]) -> list[str]:
    return [op for op in ops if not (folder() / op / f"{op}.so").is_file()]


def check_locks(ops: list[str], root: Path = Path("/proc")) -> None:
    """Raise UserError for a lock that a dead build left behind: no compiler works in its folder, and no process holds the right
    to build there."""
    dead = _dead_locks(ops, root)
    if not dead or (right := _right()) is None:
        return
    right.close()
    raise UserError("\nbigtrain: ".join(dead))


def build(ops: list[str], say: Callable[[str], None]) -> None:
    """Compile what is missing of `ops`, each in a process of its own, as many at once as there are. One process at a time builds
    in a folder, also when several machines share it; the others wait for it.

    Raises UserError without a compiler, without a folder or where a dead build bars the way, RunError with the end of the
    compiler's output when a build fails.
    """
    check_locks(ops)
    if not missing(ops):
        return
    if (right := _right()) is None:
        say("waiting for another process, which is building DeepSpeed's ops")
        while (right := _right()) is None:
            time.sleep(POLL_SECONDS)
    with right:
        if dead := _dead_locks(ops):
            raise UserError("\nbigtrain: ".join(dead))
        _build(missing(ops), say, right)


def _build(todo: list[str], say: Callable[[str], None], right: TextIO) -> None:
    if not todo:
        return
    if not (shutil.which("c++") or shutil.which("g++")):
        raise UserError(f"DeepSpeed needs a C++ compiler to build {', '.join(todo)}; install g++ (Debian: apt-get install g++)")
    say(f"building DeepSpeed's {', '.join(todo)}: about a minute, once")
    command = [sys.executable, "-m", "bigtrain", "ops", "load"]
    # Who outlives this process keeps the right until it is done.
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace", "pass_fds": [right.fileno()]}
    started = [(op, subprocess.Popen([*command, op], env={**os.environ, **environment()}, **options)) for op in todo]
    failed = []
    for op, process in started:
        output, _ = process.communicate()
        if process.returncode or missing([op]):
            failed.append(f"{op}:\n" + "\n".join(output.splitlines()[-15:]))
    if failed:
        raise RunError("DeepSpeed's ops did not build.\n" + "\n".join(failed))


def _right() -> TextIO | None:
    """The right to build in the folder, until it is closed; None while another process has it. Where a file system knows no locks,
    everybody has it: there is torch's own lock then. Raises UserError."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        return lock_file(folder() / ".building")
    except OSError as error:
        raise UserError(
            f"{folder()}: DeepSpeed's ops are to be built there: {error.strerror}; set TORCH_EXTENSIONS_DIR to another folder"
        ) from None


def _dead_locks(ops: list[str], root: Path = Path("/proc")) -> list[str]:
    """What to say of locks without a compiler."""
    found = []
    for op in ops:
        lock = folder() / op / "lock"
        try:
            age = time.time() - lock.stat().st_mtime
        except OSError:
            continue
        if age > YOUNG_SECONDS and not _compiling(lock.parent, root):
            found.append(
                f"{lock}: left {age / 60:.0f} minutes ago by a build of DeepSpeed's {op} that died; every start would wait for it. "
                f"If no other machine is building there, remove it: rm {lock}"
            )
    return found


def _compiling(place: Path, root: Path) -> bool:
    for process in root.glob("[0-9]*/cwd"):
        try:
            if Path(os.readlink(process)) == place.resolve():
                return True
        except OSError:
            continue
    return False
