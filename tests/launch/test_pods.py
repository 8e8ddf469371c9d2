"""Which pod this is, and how agents come to the launcher in pod 0."""

import pytest

from bigtrain.errors import BadNode, UserError
from bigtrain_launch import pods
from bigtrain_launch.channel import Channel
from bigtrain_launch.listener import ADDRESS, TOKEN, join
from bigtrain_launch.pods import Pod, Pods, serve

HERE = {"BIGTRAIN_JOB": "team/jobset/one-1", "JOB_COMPLETION_INDEX": "12", ADDRESS: "one-1-node-0-0.one-1:20700", TOKEN: "t"}


def test_a_pod_knows_who_it_is_and_keeps_what_ranks_need_not_know():
    environ = {**HERE, "HOME": "/root"}
    assert Pod.here(environ) == Pod("team/jobset/one-1", 12, "one-1-node-0-0.one-1:20700", "t")
    assert set(environ) == {"BIGTRAIN_JOB", "JOB_COMPLETION_INDEX", "HOME"} and Pod.here({**HERE}).name(3) == "one-1-node-0-3.one-1"


@pytest.mark.parametrize(
    "wrong",
    [
        {"JOB_COMPLETION_INDEX": "one"},
        {"BIGTRAIN_JOB": "x"},
        {"BIGTRAIN_JOB": "a/pod/b"},
        {TOKEN: ""},
        {ADDRESS: "host"},
        {ADDRESS: "host:x"},
    ],
)
def test_what_is_no_pod(wrong):
    with pytest.raises(UserError, match="this command is for the pods that `bigtrain launch kubernetes` makes"):
        Pod.here({**HERE, **wrong})


@pytest.fixture
def transport():
    made = Pods(Pod("team/jobset/one-1", 0, "127.0.0.1:0", "token"))
    yield made
    made.close()


def come(transport: Pods, name: str, token: str = "token") -> Channel:
    return join(f"127.0.0.1:{transport._listener.port}", token, {"kind": "hello", "node": name}, 0)


def test_agents_come_at_any_time_and_wait_until_they_are_wanted(transport, until):
    one, two = come(transport, "one"), come(transport, "two")
    assert transport.connected() == [] and transport.failed() == []
    transport.start(["two"])
    (found,) = until(transport.connected)
    assert found[0] == "two" and found[1]["node"] == "two"
    found[2].send("hello")
    assert two.next(10)["kind"] == "hello" and one.next(0.5) is None and not one.lost
    assert transport.connected() == []
    again = come(transport, "one")  # the pod was replaced: the newer agent is the one that lives
    until(lambda: one.next(0) or one.lost)
    transport.start(["one"])
    (found,) = until(transport.connected)
    found[2].send("hello")
    assert again.next(10)["kind"] == "hello"
    for channel in (one, two, again, found[2]):
        channel.close()


def test_an_agent_that_has_gone_again_is_not_given_out(transport, until):
    come(transport, "one").close()
    until(lambda: not transport._come)
    transport.start(["one"])
    assert transport.connected() == []
    back = come(transport, "one")
    assert [name for name, *_ in until(transport.connected)] == ["one"]
    back.close()


def test_an_agent_does_not_wait_for_its_launcher_for_ever(run, monkeypatch):
    monkeypatch.setattr(pods, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(pods, "JOIN_SECONDS", 0.0)
    with pytest.raises(BadNode, match="one-1-node-0-1.one-1: the launcher at 127.0.0.1:1 cannot be reached: .*, for 0 s"):
        serve(Pod("team/jobset/one-1", 1, "127.0.0.1:1", "token"), run)
