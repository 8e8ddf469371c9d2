"""The launchers that many people know, across two machines: the same losses as `bigtrain train` with two ranks on one.

Their own ways to fail stay theirs; what bigtrain can see is refused in a line.
"""

import subprocess
import sys

import pytest

TORCHRUN = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--master-port=29511")
TRAIN = ("-m", "bigtrain", "train", "c.yaml")


@pytest.fixture
def start(four, tiny, monkeypatch):
    """`start(node, arguments of Python, **variables)` in the folder of the tiny run; what is left at the end is killed."""
    monkeypatch.chdir(tiny.folder)
    started = []

    def run(node: str, *argv: str, **variables: str) -> subprocess.Popen:
        environment = {**tiny.environment, **variables}
        process = four.popen(node, [sys.executable, *argv], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
    for node in ("n9", "n10"):
        four.run(node, "pkill -9 -f 'bigtrai[n]|torch.distribute[d]' ; true")


def test_torchrun(start, tiny):
    """n9 is the first machine although n10 sorts before it: the order is what --node-rank says."""
    machines = (("n9", "--node-rank=0"), ("n10", "--node-rank=1"))
    nodes = [start(node, *TORCHRUN, number, "--master-addr=n9", *TRAIN, "run.name=torchrun") for node, number in machines]
    outputs = [process.communicate(timeout=120)[0] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], outputs
    assert tiny.losses("torchrun") == tiny.straight
