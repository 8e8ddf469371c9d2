"""What each launcher tells a process, and what is no launcher."""

import pytest

from bigtrain.errors import UserError
from bigtrain.ranks import launched, machine_number, machines, ranks_here

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {**TORCHRUN, "CROSS_RANK": "1", "CROSS_SIZE": "2"}
BATCH = {"SLURM_JOB_ID": "41234", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SRUN = {
    **BATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "n[9-10],m1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
}


def test_torchrun_and_deepspeed():
    expected = dict(zip(NAMES, ("5", "8", "1", "10.0.0.1", "29501")))
    assert launched(TORCHRUN) == launched(DEEPSPEED) == expected
    assert launched({**TORCHRUN, **SRUN}) == expected  # torchrun under srun: the inner launcher counts


def test_srun():
    assert launched(SRUN) == dict(zip(NAMES, ("5", "8", "1", "n9", "21234")))
    set_by_user = launched({**SRUN, "MASTER_ADDR": "node7", "MASTER_PORT": "23456"})
    assert (set_by_user["MASTER_ADDR"], set_by_user["MASTER_PORT"]) == ("node7", "23456")
    assert launched({**SRUN, "SLURM_JOB_ID": "99999999"})["MASTER_PORT"] == "29999"  # always below the ephemeral ports


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n9", "n9"), ("n[09-10]", "n09"), ("m,n[1-2]", "m"), ("r[2,1]n[3-4],x", "r2n3"), ("n[1", "n"), ("(null)", "(null)"), (",", "")],
)
def test_srun_puts_rank_0_on_the_first_node(nodes, first):
    assert launched({**SRUN, "SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


@pytest.mark.parametrize("environment", [{}, BATCH, {**BATCH, "SLURM_STEP_ID": "batch"}, {"RANK": "0"}, {"WORLD_SIZE": "2"}])
def test_nothing_launched_this(environment):
    assert launched(environment) is None


def test_a_missing_address_is_left_empty_for_the_world_to_refuse():
    assert launched({"RANK": "0", "WORLD_SIZE": "2"})["MASTER_ADDR"] == ""


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"RANK": "${SLURM_PROCID}"}, "RANK"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK"),
        ({"RANK": "8"}, "RANK: 8"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT: 0 is no port"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: 70000"),
    ],
)
def test_what_is_no_rank_is_named(changed, named):
    with pytest.raises(UserError, match=named):
        launched({**TORCHRUN, **changed})


def test_how_many_machines():
    assert [machines(e) for e in (TORCHRUN, DEEPSPEED, {**DEEPSPEED, "LOCAL_WORLD_SIZE": ""})] == [2, 2, 2]
    assert machines({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}) == 1
    assert machines({**TORCHRUN, "WORLD_SIZE": "9"}) == 3
    assert machines({**SRUN, "SLURM_STEP_NUM_NODES": "2"}) == 2
    assert machines({**SRUN, "SLURM_STEP_NUM_NODES": "2", "RANK": "0", "WORLD_SIZE": "1"}) is None  # by hand, inside a step
    assert machines({}) is None


def test_which_machine():
    assert [machine_number(e) for e in ({}, TORCHRUN, DEEPSPEED, {**TORCHRUN, "GROUP_RANK": "3"})] == [None, None, 1, 3]
    assert machine_number({**SRUN, "SLURM_NODEID": "2"}) == 2
    assert machine_number({**SRUN, **TORCHRUN, "SLURM_NODEID": "2"}) is None  # by hand, inside a step


def test_how_many_ranks_on_this_machine():
    assert [ranks_here(e) for e in (TORCHRUN, {**DEEPSPEED, "LOCAL_WORLD_SIZE": "", "LOCAL_SIZE": "2"}, {}, SRUN)] == [4, 2, None, None]
    assert [ranks_here({**SRUN, "SLURM_STEP_TASKS_PER_NODE": tasks}) for tasks in ("8(x2)", "2(x3),1", "12", "x")] == [8, 2, 12, None]
