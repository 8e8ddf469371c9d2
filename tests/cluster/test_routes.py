"""The interface is the one of the route, on machines that have several and call them as they like."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nodes import sh

ROOT = Path(__file__).parents[2]
ASK = """
import json, sys
from bigtrain.errors import BadNode
from bigtrain_launch.network import interface, is_here, own_address
try:
    address = own_address(sys.argv[1])
    print(json.dumps([interface(address), address, is_here(sys.argv[1])]))
except BadNode as error:
    print(json.dumps([str(error)]))
"""


@pytest.fixture(scope="module")
def way(four) -> Iterator[Callable[[str, str], list]]:
    """`way(node, host)`: interface, own address, and whether the host is the node itself. n9 and n10 share a second network."""
    sh(
        f"ip -n {four.tag}-n9 link add wan type veth peer name fast.7 netns {four.tag}-n10"
        f" && ip -n {four.tag}-n9 addr add 192.168.44.9/24 dev wan && ip -n {four.tag}-n9 link set wan up"
        f" && ip -n {four.tag}-n10 addr add 192.168.44.10/24 dev fast.7 && ip -n {four.tag}-n10 link set fast.7 up"
        f" && ip -n {four.tag}-n10 addr add 192.168.45.10/24 dev fast.7"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "launch")))}

    def ask(node: str, host: str) -> list:
        return json.loads(four.popen(node, [sys.executable, "-c", ASK, host], env=environment, stdout=-1).communicate(timeout=60)[0])

    try:
        yield ask
    finally:
        sh(f"ip -n {four.tag}-n9 link del wan")


def test_the_way_to_another_machine(way, four):
    assert way("n11", "n9") == ["eth0", four.ip["n11"], False]
    assert way("n9", "192.168.44.10") == ["wan", "192.168.44.9", False]
    assert way("n10", "192.168.44.9") == ["fast.7", "192.168.44.10", False]


def test_the_way_to_an_own_address_is_the_interface_that_has_it(way, four):
    assert way("n9", "n9") == ["eth0", four.ip["n9"], True]
    assert way("n10", "192.168.44.10") == ["fast.7", "192.168.44.10", True]
    assert way("n10", "192.168.45.10") == ["fast.7", "192.168.45.10", True]  # its second address


def test_no_way(way):
    [message] = way("n11", "203.0.113.1")
    assert message.startswith("203.0.113.1: no route leads there from this machine (n11): ")
