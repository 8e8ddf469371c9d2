"""Which machines a start gets."""

import pytest

from bigtrain.errors import BadNode
from bigtrain_launch.cluster import Node
from bigtrain_launch.pool import Pool


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
