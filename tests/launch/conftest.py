"""A run's folder, commands that are stand-ins for those of a scheduler, and processes that are gone at the end."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigtrain.runfolder import RunFolder, write_record
from bigtrain_launch import jobs

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "launch")))


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "runs/one")
    run.path.mkdir(parents=True)
    return run


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Put a command on the path: tool("squeue", "echo hello"). What it was called with is in `tool.calls`. Nothing else is found:
    this machine may have a Slurm."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("cat", "head", "sleep", "yes"):
        (folder / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(folder))

    def make(name: str, script: str) -> None:
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\n{script}\n')
        (folder / name).chmod(0o755)

    make.calls = lambda: (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    return make


@pytest.fixture
def process():
    """Start processes that are gone at the end."""
    started = []

    def start(code: str, *argv: str, **options) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": PATHS}
        started.append(subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], text=True, env=environment, **options))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.wait()


@pytest.fixture
def attempt():
    """Leave behind what an attempt of a run would: attempt(run, 1, "its log", exit_code=0)."""

    def make(run: RunFolder, number: int, log: str = "", **facts) -> None:
        (run.attempt(number) / "logs").mkdir(parents=True)
        run.log(number, 0).write_text(log)
        write_record(run.record(number), {"started": time.time(), **facts})

    return make


@pytest.fixture
def put():
    """Record a job of a run: put(run, "slurm", "4711")."""

    def make(run: RunFolder, kind: str, id: str, **facts) -> jobs.Job:
        jobs.record(run, kind, id, **facts)
        return jobs.read(run)[-1]

    return make


@pytest.fixture
def bigtrain():
    """Run `bigtrain` with these arguments."""

    def run(*argv: str, **options) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": PATHS, "COLUMNS": "200"}
        options = {"env": environment, "text": True, "capture_output": True, "timeout": 60, "cwd": ROOT} | options
        return subprocess.run([sys.executable, "-m", "bigtrain", *argv], **options)

    return run
