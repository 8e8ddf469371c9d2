"""Whole runs of `bigtrain train`: what they leave, how they stop, and how they go on.

Most runs here are forks of one warm process (see warm.py); those about launchers start real processes.
"""

import hashlib
import json
import math
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from training import tensors, write_config

from bigtrain import configfile, opbuild
from bigtrain.checkpoint import format
from bigtrain.cli import app
from bigtrain.data.shards import Manifest
from bigtrain.runfolder import RunFolder, latest_rows, read_json, read_rows

ROOT = Path(__file__).parents[2]
STEPS = 30
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    **opbuild.environment(),
    "PYTHONPATH": os.pathsep.join(str(p) for p in (ROOT, ROOT / "kernels", ROOT / "launch")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Prepared data and c.yaml, a run of 30 steps on two ranks with a checkpoint every 10 and an evaluation every 15."""
    folder = tmp_path_factory.mktemp("runs")
    write_config(
        folder,
        train={"steps": STEPS, "ema_decay": 0.5},
        schedule={"warmup_steps": 2},
        checkpoint={"every": 10},
        evaluate={"every": 15, "sequences": 8},
        generate={"prompts": ["document"], "tokens": 4},
        launch={"ranks_per_node": 2},
    )
    return folder


@pytest.fixture(scope="module")
def warm():
    """Run one command line as `n` ranks: warm(folder, n, *arguments, **environment) -> (exit codes, what rank 0 showed)."""
    environment = {**ENVIRONMENT, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(Path(__file__).with_name("warm.py"))]
    process = subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, stderr=subprocess.PIPE, text=True)
    threading.Thread(target=process.stderr.read, daemon=True).start()
    assert process.stdout.readline() == "ready\n"

    def run(folder: Path, n: int, *arguments: str, **variables: str) -> tuple[list[int], str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            shared = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), **variables}
        argv = ["train", str(folder / "c.yaml"), *arguments]
        outputs = [folder / f"rank-{rank}.out" for rank in range(n)]
        each = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]
        ranks = [{"argv": argv, "environment": e, "output": str(o)} for e, o in zip(each, outputs)]
        process.stdin.write(json.dumps({"ranks": ranks}) + "\n")
        process.stdin.flush()
        assert select.select([process.stdout], [], [], 120)[0], "no answer"
        assert all(output.read_text() == "" for output in outputs[1:])  # one rank speaks for all
        return json.loads(process.stdout.readline()), outputs[0].read_text()

    yield run
    process.stdin.close()
    process.wait(20)


@pytest.fixture
def start():
    """A real process: start(folder, *arguments, command=what comes before the config, **environment)."""
    started = []

    def run(folder: Path, *arguments: str, command=("-m", "bigtrain", "train"), **variables: str) -> subprocess.Popen:
        whole = [sys.executable, *command, str(folder / "c.yaml"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(whole, env={**ENVIRONMENT, **variables}, cwd=folder, start_new_session=True, **pipes))
        return started[-1]

    yield run
    for process in started:
        process.terminate()  # a launcher ends its ranks; killed, it might leave them behind
        process.wait(40)


def run_of(folder: Path, name: str) -> RunFolder:
    return RunFolder(folder / "runs" / name)


def attempt_of(run: RunFolder, number: int) -> dict:
    return json.loads((run.attempt(number) / "attempt.json").read_text())


def losses(run: RunFolder) -> list[float]:
    return [row["loss"] for row in latest_rows(run.metrics, "loss")]


@pytest.fixture(scope="module")
def straight(folder, warm) -> RunFolder:
    """An undisturbed run on two ranks."""
    codes, screen = warm(folder, 2, "run.name=straight")
    assert codes == [0, 0], screen
    return run_of(folder, "straight")


# ---- What a run leaves ----


def test_the_folder_is_as_promised(straight):
    found = {p.name for p in straight.path.iterdir()}
    assert found == {".lock", "config.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints", "attempts", "report.html"}
    assert [p.name for p in format.checkpoints(straight.checkpoints)] == ["step-00000020", "step-00000030"]
    assert straight.attempts() == [1]
    assert {p.name for p in straight.attempt(1).iterdir()} == {"attempt.json", "environment.json", "heartbeat", "logs"}
    assert sorted(p.name for p in (straight.attempt(1) / "logs").iterdir()) == ["rank-00000.log", "rank-00001.log"]
    for checkpoint in format.checkpoints(straight.checkpoints):
        format.verify(checkpoint)
    assert configfile.load(straight.config).model.vocab_size == 320
    assert "<html" in straight.report.read_text()


def test_its_rows(straight):
    rows = read_rows(straight.metrics)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1)) and {row["attempt"] for row in rows} == {1}
    assert [row["lr"] for row in steps[:3]] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert [row["tokens"] for row in steps] == [8 * 32 * n for n in range(1, STEPS + 1)]
    for row in steps:
        assert 3 < row["loss"] < 6 and row["grad_norm"] > 0 and row["tokens_per_s"] > 0 and 0 < row["mfu"] < 1.5 and row["step_s"] > 0
    assert steps[-1]["loss"] < steps[0]["loss"]
    evaluations = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in evaluations] == [15, 30]
    assert all(row["perplexity"] == pytest.approx(math.exp(row["validation_loss"])) for row in evaluations)
    assert [(row["step"], row["prompt"]) for row in read_rows(straight.samples)] == [(15, "document"), (30, "document")]


def test_its_record(straight):
    ended = attempt_of(straight, 1)
    assert (ended["exit_code"], ended["reason"], ended["ranks"], ended["restart"]) == (0, "done", 2, False)
    assert ended["started"] < ended["ended"] and ended["host"] and ended["pid"] and ended["peak_memory_gib"] > 0.05
    for rank in (0, 1):
        last = read_json(straight.heartbeat(1, rank))
        assert (last["step"], last["position"], last["collective"], last["exit_code"]) == (30, 232, "gather", 0)
    environment = json.loads((straight.attempt(1) / "environment.json").read_text())
    assert environment["batch"] == {"global_batch": 8, "micro_batch": 2, "accumulation": 2, "ranks": 2}
    assert environment["deepspeed_config"]["train_batch_size"] == 8 and environment["precision"] == "fp32"
    assert {"torch", "deepspeed", "bigtrain", "parameters", "hardware", "peak_tflops", "git_commit"} <= environment.keys()


def test_a_second_start_says_that_it_is_complete(folder, straight, warm):
    codes, screen = warm(folder, 2, "run.name=straight")
    assert codes == [0, 0] and screen.startswith(f"bigtrain: {straight.path} is complete at step 30; ") and screen.count("\n") == 1
    assert straight.attempts() == [1]


def test_new_starts_beside_it(folder, straight, warm):
    codes, screen = warm(folder, 1, "run.name=straight", "--new", "train.steps=2", "schedule.warmup_steps=0", "evaluate.every=null")
    assert codes == [0], screen
    assert len(losses(run_of(folder, "straight-2"))) == 2 and straight.attempts() == [1]


def test_evaluate_and_generate(straight):
    invoke = CliRunner().invoke
    last = latest_rows(straight.metrics, "validation_loss")[-1]
    result = invoke(app, ["evaluate", str(straight.path), "--sequences", "8"])
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["step"] == 30 and found["validation_loss"] == pytest.approx(last["validation_loss"], rel=1e-5)
    average = json.loads(invoke(app, ["evaluate", str(straight.path), "--sequences", "8", "--weights", "ema"]).stdout)
    assert average["validation_loss"] != found["validation_loss"]
    # The samples of a run and the command draw alike.
    sample = read_rows(straight.samples)[-1]
    written = invoke(app, ["generate", str(straight.path), "--prompt", "document", "--tokens", "4"])
    assert written.exit_code == 0 and written.stdout == f"document{sample['text']}\n"


# ---- Stopped, killed, started twice ----


def wait_for_step(run: RunFolder, step: int, process: subprocess.Popen, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not any(row["step"] >= step for row in read_rows(run.metrics)):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_stopped_on_request_and_gone_on_with(folder, straight, warm, start):
    """The launcher passes SIGTERM on, the run saves and ends with 75, and the same command ends where `straight` ended."""
    run, first = run_of(folder, "stopped"), start(folder, "run.name=stopped")
    wait_for_step(run, 1, first)
    first.send_signal(signal.SIGTERM)
    screen = first.communicate(timeout=60)[0]
    assert first.returncode == 75, screen
    stopped = int(re.search(r"^bigtrain: stopped on request after step (\d+); the same command goes on", screen, re.MULTILINE)[1])
    assert 1 <= stopped < STEPS, "too late to be stopped: give the run more steps"
    ended = attempt_of(run, 1)
    assert ended["exit_code"] == 75 and ended["reason"].startswith(f"stopped on request after step {stopped}")
    newest = format.checkpoints(run.checkpoints)[-1]
    assert format.step_of(newest) == stopped
    format.verify(newest)

    codes, screen = warm(folder, 2, "run.name=stopped")
    assert codes == [0, 0] and f"attempt 2, resuming step-{stopped:08d}" in screen
    assert attempt_of(run, 2)["exit_code"] == 0
    assert losses(run) == losses(straight)
    ours, theirs = (tensors(format.checkpoints(r.checkpoints)[-1]) for r in (run, straight))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_two_starts_at_once(folder, warm):
    run = run_of(folder, "busy")
    run.path.mkdir(parents=True)
    with run.lock():
        codes, screen = warm(folder, 2, "run.name=busy")
    assert codes == [2, 2] and f"{run.path}: another process is training this run; wait for it, stop it, or pass --new" in screen
    assert run.attempts() == []


def test_another_config_is_refused(folder, straight, warm):
    codes, screen = warm(folder, 2, "run.name=straight", "optimizer.lr=0.5")
    assert codes == [2, 2] and "  optimizer.lr: 0.001 -> 0.5\n" in screen and "--new" in screen and straight.attempts() == [1]


# ---- Failing ----


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_loss_that_is_not_finite(folder, warm, stage):
    name = f"nan-{stage}"
    diverging = ["optimizer.lr=1e30", "schedule.warmup_steps=0", "model.norm=layernorm", "checkpoint.every=1", "evaluate.every=null"]
    codes, screen = warm(folder, 2, f"run.name={name}", f"zero.stage={stage}", "train.skip_limit=2", *diverging)
    run = run_of(folder, name)
    assert codes == [1, 1], screen
    [message] = [line for line in screen.splitlines() if line.startswith("bigtrain:")]
    good = run.checkpoints / "step-00000001"

    def where(step: int) -> str:  # step 2 is sequences 8 to 15: of each pass of four, rank 0 has the first two
        first = 8 * (step - 1)
        parts = [
            f"rank {rank}, sequences {f} to {f + 1}" for rank, at in ((0, (0, 4)), (1, (2, 6))) for f in (first + at[0], first + at[1])
        ]
        what = f"step {step}: the loss is not finite on {'; '.join(parts)}"
        return f"{what}. The step was not applied: {step - 1} in a row, train.skip_limit is 2"

    for step in (2, 3):
        assert f"warning: {where(step)}\n" in screen
    assert message == f"bigtrain: {where(4)}; the newest checkpoint is {good}"
    rows = {row["step"]: row for row in latest_rows(run.metrics, "loss")}
    assert "skipped" not in rows[1] and rows[3]["loss"] == "NaN" and rows[3]["skipped"][3] == "rank 1, sequences 22 to 23"
    assert format.checkpoints(run.checkpoints) == [good]
    format.verify(good)
    assert all(value.isfinite().all() for key, value in tensors(good).items() if key.endswith(("model", "ema")))
    assert attempt_of(run, 1)["exit_code"] == 1 and attempt_of(run, 1)["reason"] == message.removeprefix("bigtrain: ")


@pytest.mark.parametrize("token, says", [(65, "has changed since it was prepared"), (60000, "is 60000, beyond the vocabulary of 320")])
def test_damaged_data(folder, warm, token, says):
    """One rank finds it, in the share of the files that it compares or in a sequence that it reads; all of them end with what it says."""
    damaged = folder / f"damaged-{token}"
    shutil.copytree(folder / "data", damaged)
    tokens = np.fromfile(damaged / "train-00000.tokens", "<u2")
    tokens[:] = token
    tokens.tofile(damaged / "train-00000.tokens")
    codes, screen = warm(folder, 2, f"run.name=damaged-{token}", f"data.folder={damaged}")
    assert codes == [2, 2], screen
    [message] = [line for line in screen.splitlines() if line.startswith("bigtrain:")]
    assert message.startswith(f"bigtrain: {damaged}/train-00000.tokens: ") and says in message and "prepare the data again" in message
    ended = attempt_of(run_of(folder, f"damaged-{token}"), 1)
    assert ended["exit_code"] == 2 and says in ended["reason"]


def test_damaged_held_out_data(folder, warm):
    """Rank 1 finds it in an evaluation, where at stage 3 the others need it for every batch; the checksums know nothing of it."""
    damaged = folder / "damaged-held-out"
    shutil.copytree(folder / "data", damaged)
    tokens = np.fromfile(damaged / "validation-00000.tokens", "<u2")
    tokens[70] = 60000  # of sequence 2: the first two are rank 0's
    tokens.tofile(damaged / "validation-00000.tokens")
    manifest = json.loads((damaged / "manifest.json").read_text())
    del manifest["fingerprint"]
    manifest["splits"]["validation"]["shards"][0]["tokens_sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
    (damaged / "manifest.json").write_text(Manifest.model_validate(manifest).text())
    codes, screen = warm(folder, 2, "run.name=held-out", f"data.folder={damaged}", "zero.stage=3", "evaluate.every=2")
    said = (
        f"{damaged}/validation-00000.tokens: token 70 is 60000, beyond the vocabulary of 320: the file is damaged; prepare the data again"
    )
    assert codes == [2, 2] and [line for line in screen.splitlines() if line.startswith("bigtrain:")] == [f"bigtrain: {said}"], screen
    run = run_of(folder, "held-out")
    assert attempt_of(run, 1)["reason"] == said and len(losses(run)) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_full_disk_under_the_log_stops_nothing(folder, warm):
    attempts = run_of(folder, "full").path / "attempts"
    attempts.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", attempts], capture_output=True).returncode:
        pytest.skip("may not mount here")
    try:
        codes, screen = warm(folder, 2, "run.name=full", "train.steps=3", "evaluate.every=null")
        assert codes == [0, 0], screen
        assert screen.count("warning: this rank's log cannot be written (No space left on device)") == 1
        assert len(losses(run_of(folder, "full"))) == 3 and (run_of(folder, "full").log(1, 0)).stat().st_size < 4096
    finally:
        subprocess.run(["umount", attempts], check=True)


# ---- Other kinds of run ----


def test_fine_tuning(folder, straight, warm):
    """A learning rate too small to move a weight shows what the run began from."""
    still = ["optimizer.lr=1e-30", "train.steps=1", "schedule.warmup_steps=0", "train.ema_decay=null", f"init.checkpoint={straight.path}"]
    there = tensors(format.checkpoints(straight.checkpoints)[-1])
    for weights in ("model", "ema"):
        codes, screen = warm(folder, 1, f"run.name=tuned-{weights}", f"init.weights={weights}", *still)
        assert codes == [0], screen
        here = tensors(format.checkpoints(run_of(folder, f"tuned-{weights}").checkpoints)[-1])
        names = [key.split("|")[0] for key in here if key.endswith("|model")]
        assert names and all(torch.equal(here[f"{name}|model"], there[f"{name}|{weights}"]) for name in names)


def test_fine_tuning_from_another_model_is_refused(folder, straight, warm):
    encoder = ["model.causal=false", "train.task=masked", "generate.prompts=[]"]
    codes, screen = warm(folder, 2, "run.name=refused", f"init.checkpoint={straight.path}", *encoder)
    assert codes == [2, 2] and screen.count("\n") == 1 and "holds another model (model.causal: True -> False)" in screen
    assert not run_of(folder, "refused").path.exists()


def test_early_stopping(folder, warm):
    stopping = ["train.early_stopping={patience: 2, min_delta: 100}", "evaluate.every=1", "checkpoint.every=null"]
    codes, screen = warm(folder, 1, "run.name=early", *stopping)
    run = run_of(folder, "early")
    assert codes == [0] and "stopping early at step 3: no better than 5." in screen
    assert len(losses(run)) == 3 and [format.step_of(c) for c in format.checkpoints(run.checkpoints)] == [3]
    codes, screen = warm(folder, 1, "run.name=early", *stopping)
    assert codes == [0] and "is complete at step 3" in screen


def test_masked_language_model(folder, warm):
    encoder = ["model.causal=false", "train.task=masked", "generate.prompts=[]", "model.norm_position=post", "model.positions=learned"]
    codes, screen = warm(folder, 2, "run.name=masked", *encoder, "optimizer.lr=1e-2")
    assert codes == [0, 0], screen
    run = run_of(folder, "masked")
    assert losses(run)[-1] < losses(run)[0] and "bits_per_byte" not in latest_rows(run.metrics, "validation_loss")[-1]
    result = CliRunner().invoke(app, ["generate", str(run.path), "--prompt", "x"])
    assert result.exit_code == 2 and result.stderr.startswith("bigtrain: generate: this model is an encoder")


# ---- Trackers and the network ----


def test_wandb_offline_keeps_off_the_network(folder, warm):
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            while True:
                try:
                    calls.append(server.accept())
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        codes, screen = warm(folder, 1, "run.name=offline", "train.steps=4", "tracking.wandb=offline", WANDB_BASE_URL=url, HTTPS_PROXY=url)
    assert codes == [0] and "wandb was switched off" not in screen and calls == []
    assert list((run_of(folder, "offline").path / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_out_of_reach_does_not_stop_training(folder, warm):
    variables = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    # Waiting for it at the end takes longer than the time-out, and is no hang.
    more = ["train.steps=4", "tracking.wandb=online", "launch.timeout=5"]
    codes, screen = warm(folder, 1, "run.name=online", *more, **variables)
    assert codes == [0] and "wandb" in screen and "metrics.jsonl has every row" in screen
    assert len(losses(run_of(folder, "online"))) == 4


# ---- Other launchers ----


def test_torchrun_gives_the_same(folder, straight, start):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "bigtrain", "train")
    process = start(folder, "run.name=torchrun", command=torchrun, DS_ACCELERATOR="cpu")
    screen = process.communicate(timeout=120)[0]
    assert process.returncode == 0, screen
    assert losses(run_of(folder, "torchrun")) == losses(straight)
