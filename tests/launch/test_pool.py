"""Which machines a start gets."""

import pytest

from bigtrain.config import Config
from bigtrain.configlaunch import Restarts
from bigtrain.errors import BAD_NODE, HANG, SAME_CRASH, BadNode
from bigtrain.runfolder import RunFolder
from bigtrain_launch import local
from bigtrain_launch.cluster import Node
from bigtrain_launch.pool import Pool, start_on
from bigtrain_launch.supervise import supervise

CONFIG = Config.model_validate(
    {
        "model": {"layers": 1, "width": 8, "heads": 1, "mlp_width": 8, "max_positions": 8},
        "data": {"sequence_length": 8},
        "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
        "optimizer": {"lr": 1.0},
    }
)


def pool(count: int = 3, wanted: int = 2, least: int = 2, failures: int = 2) -> Pool:
    return Pool([Node(f"n{number}", 1) for number in range(1, count + 1)], wanted, least, failures)


def take(pool: Pool, dead: dict[str, str] | None = None, bad: dict[str, str] | None = None) -> list[str]:
    def those(problems, names):
        return {name: why for name, why in (problems or {}).items() if name in names}

    taken = pool.take(lambda names: those(dead, names), lambda nodes: those(bad, [node.name for node in nodes]))
    return [node.name for node in taken]


def test_the_first_ones_in_their_order():
    assert take(pool()) == ["n1", "n2"]


def test_a_spare_for_one_that_cannot_be_had(capsys):
    assert take(pool(), dead={"n1": "no route"}) == ["n2", "n3"]
    assert capsys.readouterr().err == "bigtrain: n1 is left out: no route\n"


def test_a_spare_for_one_that_fails_its_checks():
    assert take(pool(), bad={"n2": "slow"}) == ["n1", "n3"]


def test_the_spare_is_checked_too():
    with pytest.raises(BadNode, match="2 machines are needed and 1 left: look at n2, n3; or add launch.spares"):
        take(pool(), bad={"n2": "slow", "n3": "slower"})


def test_fewer_where_that_is_allowed(capsys):
    assert take(pool(least=1), dead={"n2": "x", "n3": "y"}) == ["n1"]
    assert "going on with 1 of 2 machines" in capsys.readouterr().err
    with pytest.raises(BadNode, match="1 machine is needed and none left: look at n1, n2, n3"):
        take(pool(least=1), dead={"n1": "z", "n2": "x", "n3": "y"})


def test_one_that_failed_too_often_is_left_out(capsys):
    machines = pool()
    machines.blame(["n1"], [], "ECC error")
    assert take(machines) == ["n1", "n2"]
    machines.blame(["n1"], [], "ECC error")
    assert take(machines) == ["n2", "n3"]
    assert "n1 is left out: it has failed 2 times, the last time: ECC error" in capsys.readouterr().err


def test_one_that_was_lost_comes_last_and_may_come_back():
    machines = pool()
    machines.blame(["n1"], ["n1"], "gone")
    assert take(machines) == ["n2", "n3"]
    assert take(machines, dead={"n3": "x"}) == ["n1", "n2"]


def test_the_only_one_is_not_left_out():
    machines = pool(count=1, wanted=1, least=1)
    for _ in range(5):
        machines.blame(["n1"], [], "ValueError")
    assert take(machines) == ["n1"]


# ---- With agents and ranks ----

RANK = """
import json, os, sys
rank, run, node = int(os.environ["RANK"]), os.environ["BIGTRAIN_RUN"], os.environ["BIGTRAIN_NODE"]
if rank == 0:
    tries = 1 + len(os.listdir(f"{run}/attempts"))
    os.makedirs(f"{run}/attempts/{tries}/heartbeat")
print(node, file=open(f"{run}/ranks", "a"), flush=True)
"""


@pytest.fixture
def supervised(cluster, tmp_path, monkeypatch):
    """Let the ranks on two of three machines run a script, as often as supervise wants: (exit code, their machines in order)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.4)
    (tmp_path / "bigtrain").mkdir()
    (tmp_path / "bigtrain/__init__.py").touch()
    run = RunFolder(tmp_path / "r")
    (run.path / "attempts").mkdir(parents=True)

    def start(script: str, **checks) -> tuple[int, list[str]]:
        (tmp_path / "bigtrain/__main__.py").write_text(RANK + script)
        config = CONFIG.model_copy(update={"restarts": Restarts(backoff=0.01)})
        code = supervise(start_on(cluster, pool(), run, ["train"], {}, port=None, **checks), run, config, cluster.signals)
        return code, (run.path / "ranks").read_text().split() if (run.path / "ranks").exists() else []

    return start


def test_a_machine_that_kills_its_ranks_is_left_out(supervised, capfd):
    """Three kills at the same place: were it not for the machines, the second would be called a bug."""
    code, machines = supervised("import time\nif node == 'n2': time.sleep(0.3); os.kill(os.getpid(), 9)\nif tries < 3: time.sleep(60)")
    assert code == SAME_CRASH and sorted(machines) == ["n1", "n1", "n2", "n2"]
    assert "n2 is left out: it has failed 2 times, the last time: rank 1 ended with exit code 1" in capfd.readouterr().err


def test_who_is_late_in_a_hang_is_to_blame(supervised, capfd):
    hang = "json.dump({'late': [1], 'reason': f'rank 1 is late {os.getppid()}'}, open(f'{run}/attempts/{tries}/hang.json', 'w'))"
    beat = "json.dump({'step': tries, 'position': 0}, open(f'{run}/attempts/{tries}/heartbeat/rank-00000.json', 'w'))"
    code, machines = supervised(f"if rank == 0 and tries < 3: {hang}; {beat}; sys.exit({HANG})\nif rank and node == 'n2': sys.exit({HANG})")
    assert code == 0 and sorted(machines[-2:]) == ["n1", "n3"]
    assert "n2 is left out: it has failed 2 times" in capfd.readouterr().err


LOST = """
import time
here = f"{run}/{os.environ['BIGTRAIN_ATTEMPT']}"
def beat(rank): return f"{here}/heartbeat/rank-0000{rank}.json"
def wait(path):
    while not os.path.exists(path): time.sleep(0.01)
if rank == 0: os.symlink(f"attempts/{tries}", here)
wait(here)
if node == "n3": sys.exit()
if rank == 0 and tries == 3: sys.exit()
if rank == 0: wait(beat(1))
facts = dict(rank=rank, step=len(os.listdir(f"{run}/attempts")), position=0, exit_code=1, reason="x", restart=True, lost=rank == 0)
json.dump(facts, open(beat(rank), "w"))
if rank == 1: time.sleep(0.2)
sys.exit(1)
"""


def test_who_only_lost_another_is_not_to_blame(supervised, capfd):
    """Though it was the first to be seen to end."""
    code, machines = supervised(LOST)
    said = capfd.readouterr().err
    assert code == 0 and sorted(machines[-2:]) == ["n1", "n3"], said
    assert "n2 is left out: it has failed 2 times" in said


def test_no_rank_starts_on_too_few_machines(supervised, pipes, capfd):
    pipes.dead = {"n2": "no route", "n3": "no route"}
    assert supervised("") == (BAD_NODE, [])
    assert "bigtrain: 2 machines are needed and 1 left: look at n2, n3" in capfd.readouterr().err
