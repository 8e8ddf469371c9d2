"""The launchers that many people know, across two machines: the same losses as `bigtrain train` with two ranks on one.

What they do about faults is theirs; what bigtrain can see is refused in a line.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from launching import ENVIRONMENT, Launches, losses

from bigtrain.errors import BAD_NODE, USER_MISTAKE

BIN = Path(sys.executable).parent
TORCHRUN = (BIN / "torchrun", "--nnodes=2", "--nproc-per-node=1", "--master-port=29511")
TRAIN = ("-m", "bigtrain", "train")
MACHINES = (("n9", "--node-rank=0"), ("n10", "--node-rank=1"))
"""n9 is the first although n10 sorts before it."""


@pytest.fixture(scope="module")
def launches(require, hosts, tmp_path_factory) -> Launches:
    require("pdsh")
    launches = Launches(hosts.nodes, tmp_path_factory.mktemp("ways"))
    launches.config("straight", launch={"ranks_per_node": 2})
    (launches.folder / "hostfile").write_text("n9 slots=1\nn10 slots=1\n")
    return launches


@pytest.fixture(scope="module")
def straight(launches) -> dict[int, float]:
    """The losses of `bigtrain train` on one machine."""
    command = [sys.executable, "-m", "bigtrain", "train", str(launches.folder / "straight.yaml")]
    done = subprocess.run(command, cwd=launches.folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = losses(launches.run("straight"))
    assert len(found) > 3 and found[max(found)] < found[1]
    return found


@pytest.fixture
def start(launches):
    """`start(node, command, **variables)` in the folder of the runs. What is left at the end is killed."""
    started = []

    def run(node: str, *command: str | Path, **variables: str) -> subprocess.Popen:
        given = [f"{name}={value}" for name, value in variables.items()]
        argv = ["env", f"--chdir={launches.folder}", "-u", "OMP_NUM_THREADS", "-u", "TORCH_EXTENSIONS_DIR", *given, *map(str, command)]
        started.append(launches.nodes.popen(node, argv, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()
    for node in ("n9", "n10"):
        launches.nodes.run(node, "pkill -9 python; true")
    launches.all_gone(15)


def ends(*processes: subprocess.Popen) -> tuple[set[int], str]:
    """The exit codes of processes, and all that they have said."""
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return {process.returncode for process in processes}, "".join(outputs)


def test_torchrun(start, launches, straight):
    launches.config("torchrun")
    codes, screen = ends(*(start(node, *TORCHRUN, rank, "--master-addr=n9", *TRAIN, "torchrun.yaml") for node, rank in MACHINES))
    assert codes == {0}, screen
    assert losses(launches.run("torchrun")) == straight


def test_deepspeed(start, launches, straight):
    launches.config("deepspeed")
    deepspeed = (BIN / "deepspeed", "--hostfile=hostfile", "--no_local_rank", "--module", "bigtrain", "train", "deepspeed.yaml")
    codes, screen = ends(start("n9", *deepspeed))
    assert codes == {0} and "n9: step 1/" in screen, screen
    assert losses(launches.run("deepspeed")) == straight


def test_torchrun_with_rank_0_elsewhere_than_the_master_address(start, launches):
    """torchrun itself waits there, for ten minutes unless it is told otherwise, and says where."""
    launches.config("elsewhere")
    wrong = ("--master-addr=n10", "--rdzv-conf=timeout=2", *TRAIN, "elsewhere.yaml")
    codes, screen = ends(*(start(node, *TORCHRUN, rank, *wrong) for node, rank in MACHINES))
    assert codes == {1} and "timed out after 2000ms while trying to connect to (n10, 29511)" in screen, screen


@pytest.mark.parametrize(
    ("address", "rank", "said"),
    [
        ("n10", 0, "bigtrain: MASTER_ADDR: n10 is another machine, but rank 0 runs on this one (n9)"),
        ("n9", 1, ""),  # who has rank 0 says it
        ("localhost", 0, "bigtrain: MASTER_ADDR: localhost is 127.0.0.1 on this machine, which no other reaches (see /etc/hosts)"),
        ("203.0.113.1", 1, "bigtrain: 203.0.113.1: no route leads there from this machine (n9)"),
        ("", 0, "bigtrain: MASTER_ADDR is not set"),
    ],
)
def test_a_wrong_master_addr_is_no_silent_wait(start, launches, address, rank, said):
    """As the deepspeed launcher would set it."""
    launches.config("wrong")
    ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "CROSS_RANK": str(rank), "CROSS_SIZE": "2", "MASTER_PORT": "29511"}
    codes, screen = ends(start("n9", sys.executable, "-m", "bigtrain", "train", "wrong.yaml", MASTER_ADDR=address, **ranks))
    assert codes <= {USER_MISTAKE, BAD_NODE} and screen.startswith(said), screen
