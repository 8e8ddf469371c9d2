"""The machines that the other tests here run on are separate, and a test that could not run says so."""

import nodes
import pytest


def test_each_node_is_a_machine_of_its_own(four):
    assert [four.run(name, "hostname").stdout.strip() for name in four.names] == four.names
    sleeping = four.popen("n9", ["sleep", "77"])
    try:
        assert four.processes("n9", "sleep 77") and not four.processes("n10", "sleep 77")
    finally:
        sleeping.kill()
        sleeping.wait()


def test_nodes_reach_each_other_by_name_until_the_cable_is_pulled(four):
    # Refused means reached: nobody listens there.
    refused = "timeout 1 bash -c '</dev/tcp/n10/9' 2>&1 | grep -cm1 refused"
    assert four.run("n9", refused).stdout == "1\n"
    four.cable("n10", False)
    try:
        assert four.run("n9", refused, check=False).stdout == "0\n"
    finally:
        four.cable("n10", True)


def test_a_node_without_power_is_gone_and_comes_back(require, tmp_path):
    """A node of its own: services that other tests want would not be there again."""
    require()
    one = nodes.Nodes(["n1"], tmp_path, nodes.tag("bigone"))
    try:
        sleeping = one.up().popen("n1", ["sleep", "77"])
        one.power_off("n1")
        assert sleeping.wait(timeout=10) != 0
        one.boot("n1")
        one.cable("n1", True)
        assert one.processes("n1", "sleep 77") == []
    finally:
        one.down()


def test_a_missing_program_is_a_failure_where_all_should_be_there(require, monkeypatch, tmp_path):
    monkeypatch.setattr(nodes, "MARK", tmp_path / "mark")
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match="^(needs root|no-such-program not installed); `make cluster-tools`"):
        require("no-such-program")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"^cluster tests must run here \(CI=true\), but: .*; run make cluster-tools$"):
        require("no-such-program")
    monkeypatch.delenv("CI")
    (tmp_path / "mark").touch()
    with pytest.raises(pytest.fail.Exception, match="has run"):
        require("no-such-program")
