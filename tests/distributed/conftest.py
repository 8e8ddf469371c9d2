"""Starts ranks once per module: a worker function runs in every rank and leaves its results as JSON."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain import opbuild

ROOT = Path(__file__).parents[2]


def run_ranks(worker: str, world: int, folder: Path, seconds: float = 300, **arguments) -> list:
    """Run `worker` (module:function of this folder) as `world` ranks; returns what each rank's function returned.

    The function is called as function(folder, **arguments). A rank that fails makes the test fail with its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        **opbuild.environment(),
        "PYTHONPATH": os.pathsep.join(str(p) for p in (ROOT, ROOT / "kernels", ROOT / "launch", Path(__file__).parent)),
    }
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), worker, str(folder), json.dumps(arguments)]
    processes = []
    for rank in range(world):
        rank_environment = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(folder / f"rank-{rank}.log", "w") as log:
            processes.append(subprocess.Popen(command, env=rank_environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [p.wait(timeout=seconds) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for rank, code in enumerate(codes):
        if code:
            pytest.fail(f"rank {rank} ended with {code}:\n" + (folder / f"rank-{rank}.log").read_text()[-6000:])
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="session")
def ranks():
    return run_ranks
