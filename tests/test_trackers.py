"""Trackers: the files are complete and strict JSON, and nothing that goes wrong elsewhere reaches the run."""

import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import bigtrain
from bigtrain import trackers
from bigtrain.config import Tracking
from bigtrain.runfolder import RunFolder, latest_rows, read_rows
from bigtrain.trackers import Trackers, tagged

FILES_ONLY = Tracking(tensorboard=False)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "small").mkdir()
    return RunFolder(tmp_path / "small")


class Warnings(list):
    def __call__(self, text):
        assert threading.current_thread() is threading.main_thread()
        self.append(text)


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def strict(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().split("\n") if line]


def test_rows_are_on_disk_at_once(run):
    log = Trackers(FILES_ONLY, run, 2, {}, Warnings())
    log.log({"step": 1, "loss": 3.5, "lr": 1e-5})
    (row,) = strict(run.metrics)
    assert row["attempt"] == 2 and abs(row["time"] - time.time()) < 60
    assert (row["step"], row["loss"], row["lr"]) == (1, 3.5, 1e-5)
    log.log_samples([{"step": 1, "prompt": "def ", "text": "f():\u2028\ud800 pass"}])
    assert read_rows(run.samples) == [{"attempt": 2, "step": 1, "prompt": "def ", "text": "f():\u2028\ud800 pass"}]
    log.close()


def test_numbers_that_are_not_finite_are_strings(run):
    log = Trackers(FILES_ONLY, run, 1, {}, Warnings())
    log.log({"step": 1, "loss": math.nan, "grad_norm": math.inf, "per_layer": [1.0, -math.inf]})
    log.close()
    (row,) = strict(run.metrics)
    assert (row["loss"], row["grad_norm"], row["per_layer"]) == ("NaN", "Infinity", [1.0, "-Infinity"])
    assert math.isnan(float(row["loss"])) and float(row["grad_norm"]) == math.inf


def test_a_line_cut_short_by_a_crash_costs_no_other_row(run):
    run.metrics.write_text('{"attempt": 1, "step": 1, "loss": 4.0}\n{"attempt": 1, "step": 2, "lo')
    log = Trackers(FILES_ONLY, run, 2, {}, Warnings())
    log.log({"step": 2, "loss": 3.0})
    log.close()
    assert [(row["step"], row["loss"]) for row in latest_rows(run.metrics, "loss")] == [(1, 4.0), (2, 3.0)]


def test_a_full_disk_warns_once_and_later_rows_are_whole(run, monkeypatch):
    warnings = Warnings()
    log = Trackers(FILES_ONLY, run, 1, {}, warnings)
    log.log({"step": 1, "loss": 1.0})
    file = log._metrics._file

    class Full:
        def write(self, data):
            return file.write(data[: len(data) // 2])  # what write(2) does when the last blocks fill up

    log._metrics._file = Full()
    log.log({"step": 2, "loss": 2.0})
    log.log({"step": 3, "loss": 3.0})
    log._metrics._file = file
    log.log({"step": 4, "loss": 4.0})
    log.close()
    assert len(warnings) == 1 and "metrics.jsonl" in warnings[0] and "No space left" in warnings[0]
    assert [row["step"] for row in read_rows(run.metrics)] == [1, 4]


def test_a_folder_that_cannot_be_written_does_not_stop_the_run(tmp_path):
    warnings = Warnings()
    log = Trackers(FILES_ONLY, RunFolder(tmp_path / "gone"), 1, {}, warnings)
    log.log({"step": 1, "loss": 1.0})
    log.log({"step": 2, "loss": 1.0})
    log.close()
    assert len(warnings) == 1 and "No such file" in warnings[0]


def test_tags():
    assert tagged({"attempt": 1, "step": 3, "time": 9.0, "loss": 2.0, "mfu": 0.4, "note": "x"}) == {"train/loss": 2.0, "train/mfu": 0.4}
    row = {"step": 3, "validation_loss": 2.0, "perplexity": 7.4, "bits_per_byte": 1.0}
    assert tagged(row) == {"validation/loss": 2.0, "validation/perplexity": 7.4, "validation/bits_per_byte": 1.0}


def test_tensorboard_gets_scalars_and_text(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for attempt, steps in ((1, range(1, 8)), (2, range(5, 10))):
        log = Trackers(Tracking(), run, attempt, {"model": {"layers": 2}}, Warnings())
        for step in steps:
            log.log({"step": step, "loss": float(attempt)})
        log.log({"step": step, "validation_loss": math.nan})
        log.log_samples([{"step": step, "prompt": "def ", "text": "f(): [x](y)"}])
        log.close()
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(s, 1.0) for s in range(1, 5)] + [(s, 2.0) for s in range(5, 10)]
    assert math.isnan(events.Scalars("validation/loss")[-1].value)
    assert {"config/text_summary", "samples/0/text_summary"} <= set(events.Tags()["tensors"])


def test_nothing_heavy_is_imported_before_the_first_row(run):
    code = f"""
import sys
from bigtrain.config import Tracking
from bigtrain.runfolder import RunFolder
from bigtrain.trackers import Trackers
log = Trackers(Tracking(wandb="offline"), RunFolder({str(run.path)!r}), 1, {{}}, print)
print([m for m in ("torch", "tensorboard", "wandb") if m in sys.modules])
log.close()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(bigtrain.__file__).parents[1], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


class Recorder:
    def __init__(self, rows):
        self.rows = rows

    def log(self, row):
        self.rows.append(row["step"])

    def close(self):
        self.rows.append("closed")


def test_a_tracker_that_fails_is_switched_off_and_the_others_go_on(run, monkeypatch):
    seen, warnings = [], Warnings()

    class Failing(Recorder):
        def log(self, row):
            if row["step"] == 2:
                raise RuntimeError("server said\n  502")

    monkeypatch.setattr(trackers, "_TensorBoard", lambda *a: Recorder(seen))
    monkeypatch.setattr(trackers, "_Wandb", lambda *a: Failing([]))
    log = Trackers(Tracking(wandb="online"), run, 1, {}, warnings)
    log.log({"step": 1, "loss": 1.0})
    log.log({"step": 2, "loss": 1.0})
    wait_for(lambda: log._others[-1].problem)
    for step in range(3, 6):
        log.log({"step": step, "loss": 1.0})
    log.close()
    assert warnings == ["wandb was switched off: server said 502; metrics.jsonl has every row"]
    assert seen == [1, 2, 3, 4, 5, "closed"]
    assert [row["step"] for row in read_rows(run.metrics)] == [1, 2, 3, 4, 5]


def test_a_tracker_that_hangs_costs_neither_steps_nor_the_end(run, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(trackers, "QUEUED_ROWS", 50)
    forever = threading.Event()
    seen, warnings = [], Warnings()
    monkeypatch.setattr(trackers, "_TensorBoard", lambda *a: Recorder(seen))
    monkeypatch.setattr(trackers, "_Wandb", lambda *a: forever.wait())
    log = Trackers(Tracking(wandb="online"), run, 1, {}, warnings)
    began = time.monotonic()
    for step in range(40):
        log.log({"step": step, "loss": 1.0})
    assert time.monotonic() - began < 1 and not warnings
    for step in range(40, 80):
        wait_for(lambda logged=step: len(seen) == logged)
        log.log({"step": step, "loss": 1.0})
    assert len(warnings) == 1 and "50 rows behind" in warnings[0]
    log.close()
    assert len(warnings) == 1 and seen[-1] == "closed"

    log = Trackers(Tracking(tensorboard=False, wandb="online"), run, 1, {}, warnings)
    log.log({"step": 1, "loss": 1.0})
    began = time.monotonic()
    log.close()
    assert time.monotonic() - began < 2 and "did not finish" in warnings[1]
    forever.set()


def test_an_end_that_waits_gives_signs_of_life(run, monkeypatch):
    """Or the watchdog would take it for a hang where launch.timeout is short; it gives them while it may wait, and no longer."""
    gate, signs = threading.Event(), []

    class Slow(Recorder):
        def close(self):
            gate.wait(60)

    def alive():
        signs.append(None)
        if len(signs) == 5:
            gate.set()

    monkeypatch.setattr(trackers, "_TensorBoard", lambda *a: Slow([]))
    log = Trackers(Tracking(), run, 1, {}, Warnings())
    log.log({"step": 1, "loss": 1.0})
    log.close(alive)
    assert len(signs) >= 5

    gate.clear()
    signs.clear()
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.5)
    warnings = Warnings()
    log = Trackers(Tracking(), run, 1, {}, warnings)
    log.log({"step": 1, "loss": 1.0})
    log.close(lambda: signs.append(None))
    assert 1 <= len(signs) <= 6 and "did not finish" in warnings[0]
    gate.set()


WANDB = """
import os, sys, time
from bigtrain.config import Tracking
from bigtrain.runfolder import RunFolder
from bigtrain.trackers import Trackers
import bigtrain.trackers
bigtrain.trackers.INIT_SECONDS = 2
tracking = Tracking(tensorboard=False, wandb=sys.argv[1])
log = Trackers(tracking, RunFolder(sys.argv[2]), 1, {"optimizer": {"lr": 0.000123}}, lambda text: print("WARNED", text))
log.log({"step": 0, "loss": 3.25})
if sys.argv[1] == "offline":
    while not os.path.exists(sys.argv[2] + "/wandb/latest-run"):
        time.sleep(0.05)
    time.sleep(0.5)
print("said-on-the-terminal")
for step in (1, 2):
    log.log({"step": step, "loss": 3.25})
log.log_samples([{"step": 2, "prompt": "def ", "text": "f()"}])
log.close()
"""


def in_wandb(mode, run, tmp_path, **environment):
    """Run WANDB in a process without account or stored settings, with a secret among its arguments."""
    home = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "WANDB_CONFIG_DIR": str(tmp_path / "c"), "WANDB_CACHE_DIR": str(tmp_path / "k")}
    command = [sys.executable, "-c", WANDB, mode, str(run.path), "--token=secret-in-argv"]
    root = Path(bigtrain.__file__).parents[1]
    return subprocess.run(command, cwd=root, env=home | environment, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def test_wandb_offline_keeps_the_metrics_and_no_secrets(run, tmp_path):
    done = in_wandb("offline", run, tmp_path, MY_TOKEN="secret-in-environment")
    assert done.returncode == 0 and done.stdout == "said-on-the-terminal\n", done.stdout + done.stderr
    (file,) = run.path.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"train/loss" in content and b"3.25" in content and b"0.000123" in content
    everything = b"".join(p.read_bytes() for p in (run.path / "wandb").rglob("*") if p.is_file())
    for secret in (b"secret-in-argv", b"secret-in-environment", b"said-on-the-terminal"):
        assert secret not in everything
    assert not list(run.path.rglob("wandb-metadata.json")) and not list(run.path.rglob("requirements.txt"))


UNREACHABLE = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_HTTP_TIMEOUT": "1"}


@pytest.mark.parametrize("environment", [{}, UNREACHABLE], ids=["no account", "unreachable"])
def test_wandb_that_cannot_be_reached_is_one_warning(run, tmp_path, environment):
    done = in_wandb("online", run, tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("WARNED") == 1 and "wandb was switched off" in done.stdout
    if not environment:
        assert "set tracking.wandb: offline" in done.stdout
    assert [row["step"] for row in read_rows(run.metrics)] == [0, 1, 2]
