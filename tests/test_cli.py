"""The commands: quick to answer, usage errors with exit code 2, and errors of ours in one line."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bigtrain import cli
from bigtrain.errors import RunError, UserError

ROOT = Path(__file__).parents[1]
COMMANDS = [
    [],
    ["train"],
    ["evaluate"],
    ["generate"],
    ["report"],
    ["diagnose"],
    ["config"],
    ["config", "show"],
    ["config", "schema"],
    ["config", "deepspeed"],
    ["data"],
    ["data", "prepare"],
    ["checkpoint"],
    ["checkpoint", "list"],
    ["checkpoint", "verify"],
    ["ops"],
    ["ops", "build"],
]


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command):
    result = invoke(*command, "--help")
    assert result.exit_code == 0 and "Usage" in result.stdout and len(result.stdout.splitlines()) > 3


def test_the_list_above_is_whole():
    def walk(group, prefix=()):
        for name, command in group.commands.items():
            if not command.hidden:
                yield [*prefix, name]
                if hasattr(command, "commands"):
                    yield from walk(command, (*prefix, name))

    import typer

    known = {tuple(c) for c in COMMANDS}
    found = {tuple(c) for c in walk(typer.main.get_command(cli.app))}
    assert {c for c in known if c} <= found
    for command in found - known:  # another part of the project adds commands: they need help texts too
        assert invoke(*command, "--help").exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian", "x.yaml"],
        ["train"],
        ["train", "x.yaml", "--nwe"],
        ["generate", "runs/x"],
        ["generate", "runs/x", "--prompt", "a", "--tokens", "0"],
        ["generate", "runs/x", "--prompt", "a", "--temperature", "-1"],
        ["generate", "runs/x", "--prompt", "a", "--top-p", "0"],
        ["evaluate", "runs/x", "--weights", "exp_avg"],
        ["evaluate", "runs/x", "--sequences", "0"],
        ["config", "shwo", "x.yaml"],
        ["report"],
    ],
    ids=" ".join,
)
def test_usage_errors(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.stderr and result.stderr


def test_no_arguments_show_the_help():
    assert "Usage" in invoke().output and "Usage" in invoke("config").output


@pytest.mark.parametrize(("error", "code"), [(UserError("mend this"), 2), (RunError("broke"), 1)])
def test_our_errors_are_one_line(monkeypatch, error, code):
    def read(*arguments):
        raise error

    monkeypatch.setattr("bigtrain.configfile.read", read)
    result = invoke("config", "show", "x.yaml")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", f"bigtrain: {error}\n")
    monkeypatch.setenv("RANK", "3")  # of many ranks that find the same, the first says it
    assert (invoke("config", "show", "x.yaml").exit_code, invoke("config", "show", "x.yaml").stderr) == (code, "")


def test_a_config_is_shown_with_its_origins(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "model: {layers: 1, width: 8, heads: 1, mlp_width: 8, max_positions: 8}\ndata: {sequence_length: 8}\n"
        "train: {steps: 1, global_batch: 1, micro_batch: 1}\noptimizer: {lr: 1}\n"
    )
    result = invoke("config", "show", str(tmp_path / "c.yaml"), "optimizer.lr=3e-4")
    assert result.exit_code == 0 and re.search(r"lr: 0\.0003 +# command line", result.stdout)
    assert re.search(r"layers: 1 +# .*c\.yaml:1", result.stdout)


def seconds(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *command], check=True, capture_output=True, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'launch'}"}
    )
    return time.perf_counter() - start


def test_help_answers_at_once():
    """In less than a quarter of the time that importing torch takes; interleaved, so that a busy machine is busy for both."""
    pairs = [(seconds("-m", "bigtrain", "--help"), seconds("-c", "import torch")) for _ in range(3)]
    ours, torch = (min(times) for times in zip(*pairs))
    assert ours < torch / 4, pairs


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"},
    ],
)
def test_ranks_on_fewer_machines_than_asked_for_are_refused(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = invoke("train", str(ROOT / "configs/quickstart.yaml"), "launch.nodes=2")
    assert result.exit_code == 2
    assert "command line: launch.nodes: 2 machines are asked for, but ranks were started on 1" in result.stderr


def test_one_machine_is_not_taken_for_many(monkeypatch):
    for command in (["train"], ["launch", "local"]):
        result = invoke(*command, str(ROOT / "configs/quickstart.yaml"), "launch.nodes=4")
        assert result.exit_code == 2 and "command line: launch.nodes: 4 machines, but this trains on one; use launch hosts" in result.stderr
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    result = invoke("launch", "local", str(ROOT / "configs/quickstart.yaml"), "--dry-run")
    assert result.exit_code == 0 and "warning: this Slurm job has 2 machines, and one trains" in result.stderr
    assert "OMP_NUM_THREADS=" in result.stdout
