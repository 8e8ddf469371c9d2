"""What a rank finds in its environment, who wins, and the way to the other machines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.errors import BadNode, UserError
from bigtrain.hardware import Hardware
from bigtrain_launch import environment, network
from bigtrain_launch.environment import Place, joining, planned, rank_environment, show

ROOT = Path(__file__).parents[2]
CPU = Hardware("cpu", 0, "CPU", False, False, "", 7, 8.0)
GPU = Hardware("cuda", 8, "NVIDIA H100", True, True, "", 96, 1024.0)
ALONE = Place(CPU, 2, 1, None)


def values(place: Place, given: dict[str, str] | None = None) -> dict[str, str]:
    return {setting.name: setting.value for setting in rank_environment(place, given or {})}


@pytest.fixture
def eth7(monkeypatch):
    """This machine has the address 10.0.0.3 on eth7, and every host but localhost lies there."""
    monkeypatch.setattr(environment, "own_address", lambda host: "127.0.0.1" if host == "localhost" else "10.0.0.3")
    monkeypatch.setattr(environment, "interface", lambda address: "lo" if address == "127.0.0.1" else "eth7")


def test_one_machine_without_a_gpu():
    found = values(ALONE)
    assert found["OMP_NUM_THREADS"] == "3" and found["DS_ACCELERATOR"] == "cpu"
    assert found["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1" and found["TORCH_EXTENSIONS_DIR"]
    assert not any(name.startswith("NCCL") for name in found)


def test_several_machines_with_gpus(eth7):
    found = values(Place(GPU, 8, 4, "n1"))
    assert (found["OMP_NUM_THREADS"], found["GLOO_SOCKET_IFNAME"], found["NCCL_SOCKET_IFNAME"]) == ("12", "eth7", "=eth7")
    assert found["NCCL_DEBUG"] == "WARN" and not {"DS_ACCELERATOR", "GLIBC_TUNABLES"} & found.keys()


def test_more_ranks_than_cores_still_have_a_thread():
    assert values(Place(CPU, 9, 1, None))["OMP_NUM_THREADS"] == "1"


def test_cores_are_shared_out_once(monkeypatch):
    """srun may have bound each rank to some of them."""
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: range(7), raising=False)
    monkeypatch.setattr(environment.os, "cpu_count", lambda: 14)
    assert joining(variables, variables, CPU)["OMP_NUM_THREADS"] == "7"
    monkeypatch.setattr(environment.os, "cpu_count", lambda: 13)
    assert joining(variables, variables, CPU)["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in joining({**variables, "OMP_NUM_THREADS": "1"}, variables, CPU)  # as torchrun does
    assert "OMP_NUM_THREADS" not in values(Place(CPU, None, 1, None))


def test_what_is_set_already_stays(eth7):
    given = {setting.name: "mine" for setting in planned({})}
    assert rank_environment(Place(GPU, 8, 4, "n1"), given) == rank_environment(Place(CPU, 2, 4, "n1"), given) == planned(given) == []


def test_ranks_of_several_machines_never_talk_to_themselves_only(eth7):
    with pytest.raises(UserError, match=r"MASTER_ADDR: localhost is 127.0.0.1 on this machine, which no other reaches \(see /etc/hosts\)"):
        values(Place(CPU, 2, 2, "localhost"))
    assert "GLOO_SOCKET_IFNAME" not in values(Place(CPU, None, None, "localhost"))  # who knows whether there are others?
    assert values(Place(CPU, 2, 1, "localhost"))["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_rank_that_another_launcher_has_started(eth7, monkeypatch):
    monkeypatch.setattr(environment, "is_here", lambda host: host == "n1")
    variables = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "n1"}
    assert joining({**variables, "LOCAL_WORLD_SIZE": "2"}, variables, CPU)["GLOO_SOCKET_IFNAME"] == "eth7"
    assert "GLOO_SOCKET_IFNAME" not in joining({"GLOO_SOCKET_IFNAME": "ib0"}, variables, CPU)
    assert joining({**variables, "LOCAL_WORLD_SIZE": "4"}, variables, CPU)["GLOO_SOCKET_IFNAME"] == "lo"
    assert "GLOO_SOCKET_IFNAME" not in joining({}, {**variables, "MASTER_ADDR": ""}, CPU)


def test_rank_0_is_where_the_others_look_for_it(eth7, monkeypatch):
    monkeypatch.setattr(environment, "is_here", lambda host: host == "n1")
    variables = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "n2"}
    with pytest.raises(UserError, match=r"^MASTER_ADDR: n2 is another machine, but rank 0 runs on this one \(.+\), and"):
        joining({}, variables, CPU)
    second = {**variables, "RANK": "2", "MASTER_ADDR": "n1"}
    with pytest.raises(UserError, match=r"^MASTER_ADDR: n1 is this machine, but rank 0 runs on another"):
        joining({**second, "CROSS_RANK": "1"}, second, CPU)
    assert joining(second, second, CPU)  # it may be a rank of the first machine
    assert joining({**second, "CROSS_RANK": "0"}, second, CPU)
    assert joining({**variables, "CROSS_RANK": "0"}, {**variables, "MASTER_ADDR": "n1"}, CPU)


def test_where_torchrun_or_an_agent_has_tried_the_way_it_is_not_doubted(eth7, monkeypatch):
    monkeypatch.setattr(environment, "is_here", lambda host: False)
    variables = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "LOCAL_WORLD_SIZE": "2"}
    for mark in ({"TORCHELASTIC_USE_AGENT_STORE": "True"}, {"BIGTRAIN_AGENT": "7"}):
        assert joining({**variables, **mark}, {**variables, "MASTER_ADDR": "n2"}, CPU)["GLOO_SOCKET_IFNAME"] == "eth7"
        assert joining({**variables, **mark}, variables, CPU)["GLOO_SOCKET_IFNAME"] == "lo"  # two torchruns on one machine
    with pytest.raises(UserError, match="which no other reaches"):
        joining(variables, variables, CPU)


def test_every_setting_of_a_machine_is_planned(eth7):
    set_somewhere = values(Place(GPU, 8, 4, "n1")).keys() | values(Place(CPU, 2, 4, "n1")).keys()
    assert set_somewhere == {setting.name for setting in planned({})}
    assert all(setting.value[0] == "<" and setting.why for setting in planned({}))


def test_how_a_dry_run_shows_them(monkeypatch):
    lines = show(rank_environment(ALONE, {"A": "1"}), {"A": "b c"}, ["WANDB_API_KEY", "A"])
    assert lines[0].split("  # ") == [f"{'OMP_NUM_THREADS=3':<{lines[0].index('  # ')}}", "every rank would take all cores"]
    assert [line.split("  # ")[0].strip() for line in lines[-2:]] == ["A='b c'", "WANDB_API_KEY=..."]
    assert len({line.index("  # ") for line in lines}) == 1


def test_the_way_to_this_machine_and_to_nowhere(monkeypatch):
    assert network.own_address("127.0.0.1") == "127.0.0.1" and network.is_here("127.0.0.1") and network.is_here("localhost")
    assert not network.is_here("203.0.113.1")  # RFC 5737: nobody's
    assert network.is_loopback("127.0.1.1") and network.is_loopback("::1") and not network.is_loopback("fe80::1%eth0")
    monkeypatch.setattr(network, "RESOLVE_SECONDS", 0)
    for call in (network.own_address, network.is_here):
        with pytest.raises(BadNode, match=r"^no-such-host.invalid: this machine \(.+\) knows no host of that name"):
            call("no-such-host.invalid")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says which interface has an address")
def test_which_interface_has_an_address(tmp_path):
    assert network.interface("127.0.0.1") == network.interface("127.0.1.1") == "lo"
    assert network.interface("203.0.113.1") is None
    (tmp_path / "proc/net").mkdir(parents=True)
    rows = "00000000000000000000000000000001 01 80 10 80 lo\nfe80000000000000004222fffe000002 02 40 20 80 ib0\n"
    (tmp_path / "proc/net/if_inet6").write_text(rows)
    assert network.interface("fe80::42:22ff:fe00:2%ib0", tmp_path) == "ib0" and network.interface("::1", tmp_path) == "lo"


def test_an_agent_needs_no_pydantic():
    code = "import sys, bigtrain_launch.environment as e; sys.exit('pydantic' in sys.modules or 'torch' in sys.modules)"
    paths = os.pathsep.join(str(p) for p in (ROOT, ROOT / "launch"))
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}).returncode == 0
