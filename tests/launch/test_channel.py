"""Messages both ways: in pieces, in floods, after a greeting, from nobody. And who may talk at all."""

import json
import os
import select
import socket
import threading
import time

import pytest

from bigtrain.errors import RunError, UserError
from bigtrain_launch import channel as channels
from bigtrain_launch import listener as listeners
from bigtrain_launch.channel import Channel, last_lines
from bigtrain_launch.listener import Listener, join


@pytest.fixture
def pair():
    """Two ends of a conversation."""
    ends = [Channel.over(end) for end in socket.socketpair()]
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def raw():
    """A channel, and the bare socket at the other end."""
    ours, theirs = socket.socketpair()
    channel = Channel.over(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


def test_messages_arrive_in_order_and_whole(pair):
    for number in range(3):
        pair[0].send("count", number=number, text="ä\udc80\n")
    received = [pair[1].next(5) for _ in range(3)]
    assert received == [{"kind": "count", "number": number, "text": "ä\udc80\n"} for number in range(3)]
    assert pair[1].next(0) is None and pair[1].lost is None


def test_a_message_larger_than_any_buffer_is_sent_as_there_is_room(pair):
    pair[0].send("large", text="x" * 3_000_000)
    assert pair[0].backlog > 1_000_000
    end = time.monotonic() + 20
    while not (messages := pair[1].receive()):
        pair[0].flush()
        assert time.monotonic() < end
    assert len(messages[0]["text"]) == 3_000_000 and pair[0].backlog == 0


def test_a_message_in_pieces(raw):
    channel, other = raw
    for byte in b'{"kind": "piece"}':
        other.send(bytes([byte]))
        assert channel.receive() == []
    other.send(b"\n")
    assert channel.receive() == [{"kind": "piece"}]


def test_what_a_shell_says_first_is_no_message(raw):
    channel, other = raw
    other.send(b'Welcome to \xff n7!\n[1, 2]\n"hello"\n\n{"kind": "hello"}\n')
    assert channel.receive() == [{"kind": "hello"}] and channel.lost is None
    assert channel.noise == 'Welcome to \ufffd n7!\n[1, 2]\n"hello"\n'
    other.send(b"Segmentation fault\n")
    assert channel.receive() == [] and channel.lost == "what it sends is no message: Segmentation fault"


def test_garbage_without_end_is_not_kept_for_ever(raw, monkeypatch):
    monkeypatch.setattr(channels, "LONGEST", 1000)
    channel, other = raw
    other.send(b"x" * 2000)
    assert channel.receive() == [] and channel.lost == "what it sends is no message"
    channel.send("anything")  # to nobody


def test_last_words_are_heard(pair):
    pair[0].send("last")
    pair[0].close()
    assert pair[1].receive() == [{"kind": "last"}] and pair[1].lost == "the connection ended"
    pair[1].send("anything")
    pair[1].close()
    assert pair[1].receive() == [] and pair[1].lost == "the connection ended"


def test_silence_is_death_and_signs_of_life_are_not_shown(raw, monkeypatch):
    monkeypatch.setattr(channels, "SILENCE", 0.3)
    channel, other = raw
    end = time.monotonic() + 1
    while time.monotonic() < end:
        other.send(b"{}\n")
        assert channel.receive() == [] and channel.lost is None
        time.sleep(0.05)
    time.sleep(0.4)
    assert channel.receive() == [] and channel.lost == "no sign of life for 0 s"


def test_who_was_busy_takes_nobody_for_dead(raw, monkeypatch):
    """The time since the last word counts from when it came to be read."""
    monkeypatch.setattr(channels, "SILENCE", 0.2)
    channel, other = raw
    other.send(b"{}\n")
    time.sleep(0.4)
    channel.receive()
    assert channel.lost is None


def test_every_channel_says_that_it_lives(raw):
    _, other = raw
    other.settimeout(3 * channels.INTERVAL)
    for _ in range(2):
        assert json.loads(other.makefile().readline()) == {}


def test_a_closed_reader_does_not_hide_what_was_said(raw):
    """A pipe breaks for writing before what came the other way has been read."""
    reading, theirs = os.pipe()
    theirs_reading, writing = os.pipe()
    channel = Channel(reading, writing)
    os.write(theirs, b'{"kind": "last"}\n')
    os.close(theirs)
    os.close(theirs_reading)
    channel.send("anything")
    assert channel.receive() == [{"kind": "last"}] and channel.lost == "the connection ended"
    channel.close()


def test_last_lines():
    assert last_lines("a\n\n  b\x1b[31m\nc\nd\n") == "b?[31m / c / d"
    assert len(last_lines("x" * 999)) == 203 and last_lines("") == ""


# ---- Over TCP, with a token ----

GREETING = {"kind": "hello", "node": "n7", "protocol": 1}


@pytest.fixture
def listener():
    made = Listener("the token")
    yield made
    made.close()


def accept(listener: Listener, seconds: float = 10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if come := listener.accepted():
            return come
        time.sleep(0.01)
    return []


def test_who_knows_the_token_is_let_in(listener):
    joined = []
    thread = threading.Thread(target=lambda: joined.append(join(f"127.0.0.1:{listener.port}", "the token", GREETING, 10)))
    thread.start()
    [(greeting, channel)] = accept(listener)
    channel.send("start")
    thread.join()
    assert greeting["node"] == "n7" and joined[0].next(5) == {"kind": "start"}
    assert listener.accepted() == []
    for end in (channel, joined[0]):
        end.close()


def test_who_does_not_know_the_token_is_not(listener, monkeypatch):
    monkeypatch.setattr(listeners, "RETRY_SECONDS", 0.05)
    problems = []

    def intrude():
        try:
            join(f"127.0.0.1:{listener.port}", "a guess", GREETING, 0.2)
        except RunError as error:
            problems.append(str(error))

    thread = threading.Thread(target=intrude)
    thread.start()
    while thread.is_alive():
        assert listener.accepted() == []
        time.sleep(0.01)
    assert problems[0].startswith(f"the launcher at 127.0.0.1:{listener.port} cannot be reached: ")


def test_what_is_overheard_lets_nobody_in(listener):
    """An answer to an earlier question is none to this one."""
    seen = []
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", listener.port)) as intruder:
            intruder.settimeout(5)
            listener.accepted()
            stream = intruder.makefile()
            question = next(m for line in stream if (m := json.loads(line)))
            proof = seen[0] if seen else listeners._proof("the token", "agent", question["nonce"], "mine")
            seen.append(proof)
            intruder.send(json.dumps({**GREETING, "nonce": "mine", "proof": proof}).encode() + b"\n")
            select.select([], [], [], 0.1)
            assert len(listener.accepted()) == (len(seen) == 1)


def test_a_launcher_that_does_not_know_the_token_is_not_obeyed(monkeypatch):
    monkeypatch.setattr(listeners, "RETRY_SECONDS", 0.05)
    false = Listener("another")
    monkeypatch.setattr(listeners, "_same", lambda given, expected: given == expected)

    def serve():
        end = time.monotonic() + 2
        while time.monotonic() < end and not done:
            false.accepted()
            time.sleep(0.01)

    done = []
    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(RunError, match="is not the launcher of this run, or has another token"):
        join(f"127.0.0.1:{false.port}", "the token", GREETING, 0.1)
    done.append(True)
    thread.join()
    false.close()


def test_a_port_that_is_taken(listener):
    with pytest.raises(UserError, match=f"port {listener.port}, on which agents are awaited, cannot be had"):
        Listener("x", listener.port)


def test_an_address_that_is_none():
    with pytest.raises(RunError, match="the launcher at nowhere cannot be reached"):
        join("nowhere", "x", GREETING, 0)
