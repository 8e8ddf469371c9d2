"""The screen: calm lines in a log, one bar on a terminal, and no way to harm the run or the terminal."""

import io
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import bigtrain
from bigtrain import screen
from bigtrain.logs import Unbreakable
from bigtrain.screen import Screen, duration, numbers

ROW = {"step": 9, "loss": 3.14159, "lr": 3e-4, "grad_norm": 1.234, "tokens_per_s": 12345.6, "mfu": 0.4321, "memory_gib": 61.25}
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(screen, "time", clock)
    return clock


@pytest.fixture(params=["plain", "terminal"])
def stream(request, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return Stream(request.param == "terminal")


def shown(stream):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_a_log_gets_the_first_step_the_last_and_few_between(clock):
    stream = Stream(terminal=False)
    shows = Screen(stream)
    for step in range(1, 1001):
        clock.now += 0.125
        shows.update(step, 1000, ROW | {"step": step - 1})
    shows.close()
    lines = stream.getvalue().splitlines()
    assert [int(re.match(r"step ([\d,]+)/1,000", line)[1].replace(",", "")) for line in lines] == [*range(1, 1000, 80), 1000]
    assert lines[1] == "step 81/1,000  loss 3.1416  lr 3.00e-04  grad 1.23  12,346 tokens/s  MFU 43.2%  61.2 GiB  1m 55s left"


def test_a_run_that_stops_early_shows_its_last_step(clock):
    stream = Stream(terminal=False)
    shows = Screen(stream)
    for step in range(1, 6):
        shows.update(step, 1000, None)
    shows.close()
    assert stream.getvalue().splitlines() == ["step 1/1,000", "step 5/1,000"]


def test_everything_appears(stream):
    shows = Screen(stream)
    shows.header({"Model": "124M parameters", "Run folder": "runs/[small]"})
    shows.update(9, 1000, ROW)
    shows.evaluation({"step": 9, "validation_loss": 3.2, "perplexity": 24.5325, "bits_per_byte": 1.1})
    shows.sample("def quicksort(", "items[0]):  # [bold]not markup[/bold] :smile: [link=x]y")
    shows.message("saved [red]step-9[/red]")
    shows.close()
    text = shown(stream)
    for expected in (
        "124M parameters", "runs/[small]", "9/1,000", "loss 3.1416", "12,346 tokens/s", "MFU 43.2%",
        "step 9  validation loss 3.2000  perplexity 24.53",
        "def quicksort(items[0]):  # [bold]not markup[/bold] :smile: [link=x]y", "saved [red]step-9[/red]",
    ):  # fmt: skip
        assert expected in text, expected


def test_a_warning_is_shown_once(stream):
    shows = Screen(stream)
    for _ in range(3):
        shows.warn("disk is full")
    shows.warn("something else")
    shows.close()
    assert shown(stream).count("disk is full") == 1 and "something else" in shown(stream)


def test_no_control_character_of_a_sample_reaches_the_stream(stream):
    shows = Screen(stream)
    shows.sample("a\x1b]0;title\x07", "\x1b[2J\r\x08\x9b31m\u202e\x00text\ttab")
    shows.message("\x1b[5mblink")
    shows.close()
    left = shown(stream)
    assert not set(left) & set("\x00\x07\x08\r\x1b\x9b\u202e")
    assert "\x1b[2J" not in stream.getvalue() and "text" in left and "blink" in left


def test_a_log_has_no_control_characters():
    stream = Stream(terminal=False)
    shows = Screen(stream)
    shows.header({"Model": "small"})
    shows.update(1, 2, ROW)
    shows.warn("careful")
    shows.sample("a", "b\nc")
    shows.close()
    assert all(c == "\n" or c.isprintable() for c in stream.getvalue())


def test_the_bar_is_repainted_four_times_a_second_and_leaves_the_cursor(clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Stream(terminal=True)
    threads = threading.active_count()
    shows = Screen(stream)
    paints = []
    for step in range(1, 1001):
        clock.now += 0.01
        before = stream.tell()
        shows.update(step, 100_000, ROW)
        paints.append(stream.tell() > before)
    assert threading.active_count() == threads
    assert 38 <= sum(paints) <= 41
    shows.close()
    out = stream.getvalue()
    assert out.rfind(SHOW_CURSOR) > out.rfind(HIDE_CURSOR) >= 0
    assert "1,000/100,000" in shown(stream)


def rank_stream(descriptor, terminal, encoding="utf-8"):
    """What a rank's screen writes to, on a file descriptor that is taken for a terminal or not."""
    raw = Unbreakable(descriptor)
    raw.isatty = lambda: terminal
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors="replace")


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("kind", ["closed pipe", "full disk"])
def test_a_stream_that_breaks_does_not_stop_the_run(terminal, kind, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    reading, broken = os.pipe() if kind == "closed pipe" else (os.open(os.devnull, os.O_RDONLY), os.open("/dev/full", os.O_WRONLY))
    os.close(reading)
    with pytest.raises(OSError):
        os.write(broken, b"x")
    stream = rank_stream(broken, terminal)
    shows = Screen(stream)
    for step in range(1, 101):
        shows.update(step, 100, ROW)
    shows.header({"Model": "small"})
    shows.sample("a", "b")
    shows.warn("careful")
    shows.close()
    stream.flush()
    os.close(broken)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_stream_that_knows_only_ascii(terminal, monkeypatch, tmp_path):
    monkeypatch.setenv("TERM", "xterm")
    with open(tmp_path / "out", "wb") as file:
        stream = rank_stream(file.fileno(), terminal, "ascii")
        shows = Screen(stream)
        shows.header({"Model": "größer"})
        shows.update(1, 10, ROW)
        shows.sample("naïve ", "\u4e16\u754c \ud800")
        shows.close()
        stream.flush()
    raw = (tmp_path / "out").read_bytes()
    assert b"gr??er" in raw and b"na?ve" in raw


def test_a_log_needs_no_rich():
    code = "import sys; from bigtrain.screen import Screen; Screen(sys.stdout).update(1, 1, {}); print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(bigtrain.__file__).parents[1], capture_output=True, text=True)
    assert done.stdout == "step 1/1\nFalse\n", done.stderr


def test_numbers_that_a_row_lacks_are_left_out():
    assert numbers({"loss": float("nan"), "mfu": None}) == ["loss nan"]
    assert numbers(ROW, brief=True) == ["loss 3.1416", "12,346 tokens/s", "MFU 43.2%"]


DURATIONS = [(0.2, "0s"), (59.6, "1m 00s"), (185, "3m 05s"), (3599.9, "1h 00m"), (7620, "2h 07m"), (273600, "3d 04h")]


@pytest.mark.parametrize("seconds, text", DURATIONS)
def test_durations(seconds, text):
    assert duration(seconds) == text
