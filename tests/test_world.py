"""Ranks that meet, agree, and say in one line when they cannot."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigtrain.errors import RunError, UserError
from bigtrain.world import World

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def rank(monkeypatch):
    """Make this process rank `n` of `size`, launched by torchrun; gives the port."""

    def launched(n: int, size: int, port: int | None = None) -> int:
        port = port or free_port()
        values = {"RANK": n, "WORLD_SIZE": size, "LOCAL_RANK": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
        return port

    return launched


WORKER = """
import json, os
from bigtrain.world import World
world = World.join("cpu", 60)
n = world.rank
found = {
    "sum": world.sum([n + 0.5, 2.0**53 - 1 if n else 0.0, float("nan") if n else 0.0]),
    "gather": world.gather({"rank": n, "text": "ä" * (1 + 5000 * n), "none": None}),
    "from_first": world.from_first({"x": [1, "é"]} if n == 0 else None),
    "empty": world.gather([]),
}
world.barrier()
print(json.dumps(found))
world.leave()
"""


def test_two_ranks_agree():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, "-c", WORKER], env={**environment, "RANK": str(n)}, **pipes) for n in (0, 1)]
    outputs = [process.communicate(timeout=90) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    first, second = (json.loads(out) for out, _ in outputs)
    assert str(first) == str(second)  # as text: NaN differs from itself
    assert first["sum"][:2] == [2.0, 2.0**53 - 1] and str(first["sum"][2]) == "nan"
    assert first["gather"] == [{"rank": n, "text": "ä" * (1 + 5000 * n), "none": None} for n in (0, 1)]
    assert first["from_first"] == {"x": [1, "é"]} and first["empty"] == [[], []]


def test_a_world_of_one(rank):
    rank(0, 1)
    world = World.join("cpu", 30)
    try:
        assert (world.rank, world.size, world.first, world.device.type) == (0, 1, True, "cpu")
        assert world.sum([1.5]) == [1.5] and world.gather("x") == ["x"] and world.from_first([None]) == [None]
    finally:
        world.leave()
    world.leave()  # twice does no harm


def test_a_port_in_use(rank):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = rank(0, 1, taken.getsockname()[1])
        with pytest.raises(UserError, match=rf"^port {port} is in use on this machine: set another MASTER_PORT or launch.port$"):
            World.join("cpu", 5)


@pytest.mark.parametrize("missing_rank", [0, 1])
def test_ranks_that_stay_away(rank, missing_rank):
    here = 1 - missing_rank
    port, start = rank(here, 2), time.monotonic()
    with pytest.raises(RunError, match=rf"^rank {here} of 2 did not meet the others at 127.0.0.1:{port} within 1 s: .+$"):
        World.join("cpu", 1)
    assert time.monotonic() - start < 10


def test_no_launcher_and_no_address(rank, monkeypatch):
    rank(0, 1)
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        World.join("cpu", 5)
    monkeypatch.delenv("RANK")
    with pytest.raises(UserError, match="no rank variables"):
        World.join("cpu", 5)
