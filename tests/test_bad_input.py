"""What a user can get wrong: one message that names the place and the way out, no traceback, and nothing half-written.

All of it is found before any rank starts. What needs ranks is in distributed/test_runs.py and checkpoint/test_save_load.py.
"""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from bigtrain import configfile, opbuild
from bigtrain.cli import app
from bigtrain.config import Config
from bigtrain.runfolder import RunFolder
from bigtrain_launch import local

CONFIG = """\
run: {name: r, folder: FOLDER/runs}
model: {layers: 1, width: 8, heads: 2, mlp_width: 8, max_positions: 32}
data: {source: text, path: FOLDER/text, tokenizer: bytes, folder: FOLDER/data, sequence_length: 16, validation_fraction: 0.2}
train: {steps: 10, global_batch: 4, micro_batch: 2}
optimizer: {lr: 0.1}
launch: {ranks_per_node: 2}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """c.yaml and its text, in a world where ops are built and starting ranks is what no test may get to."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ops"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PATH", os.environ["PATH"])  # the command changes it for the ranks; restored when the test ends
    for op in opbuild.ALL:
        (tmp_path / "ops" / op).mkdir(parents=True)
        (tmp_path / "ops" / op / f"{op}.so").touch()
    starts_nothing = SimpleNamespace(Popen=lambda *arguments, **named: pytest.fail("a rank was started"), DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(local, "subprocess", starts_nothing)
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document {i} " * (1 + i))
    (tmp_path / "c.yaml").write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    return tmp_path


def refused(folder: Path, *overrides: str, code: int = 2, lines: int = 1, command=("train",)) -> str:
    """Run the command and give its message, of so many lines."""
    before = {p for p in folder.rglob("*") if "ops" not in p.parts}
    result = CliRunner().invoke(app, [*command, str(folder / "c.yaml"), *overrides])
    shown = [line for line in result.stderr.splitlines() if line.startswith("bigtrain: ") or line.startswith("  ")]
    assert result.exit_code == code, (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert len(shown) == lines and shown[0].startswith("bigtrain: ") and "Traceback" not in result.output, result.output
    left = {p for p in folder.rglob("*") if "ops" not in p.parts} - before
    assert not [p for p in left if "partial" in p.name or "spool" in p.name or (p.name.startswith(".") and p.name != ".lock")], left
    return "\n".join(shown).removeprefix("bigtrain: ")


def test_the_config_itself_is_fine(folder, monkeypatch):
    """Everything below differs from this one in what its name says."""
    launched = []
    monkeypatch.setattr(local, "launch", lambda *arguments, **named: launched.append((arguments, named)) or local.End(0))
    assert CliRunner().invoke(app, ["train", str(folder / "c.yaml"), "--new", "optimizer.lr=0.2"]).exit_code == 0
    [((argv, ranks), named)] = launched
    assert argv == ["train", str(folder / "c.yaml"), "optimizer.lr=0.2", "run.name=r"] and ranks == 2 and named["port"] is None


def test_missing_config_file(folder):
    (folder / "c.yaml").unlink()
    assert refused(folder).startswith(f"{folder}/c.yaml: there is no such file")


def test_missing_include(folder):
    (folder / "c.yaml").write_text("include: nothere.yaml\n" + (folder / "c.yaml").read_text())
    assert refused(folder).startswith(f"{folder}/c.yaml:1: include: {folder}/nothere.yaml: there is no such file")


def test_unknown_key(folder):
    assert refused(folder, "train.stpes=5").startswith("command line: train.stpes: ")
    text = (folder / "c.yaml").read_text()
    (folder / "c.yaml").write_text(text.replace("lr: 0.1", "lr: 0.1, weight_dacay: 0.1"))
    message = refused(folder)
    assert message.startswith(f"{folder}/c.yaml:5: optimizer.weight_dacay: ") and "weight_decay" in message


def test_several_mistakes_are_one_list(folder):
    message = refused(folder, "train.steps=0", "optimizer.lr=fast", "model.head=3", lines=4)
    assert message.startswith(f"{folder}/c.yaml: 3 problems") and all(
        key in message for key in ("train.steps", "optimizer.lr", "model.head")
    )


@pytest.mark.parametrize("command", [("train",), ("data", "prepare")], ids=" ".join)
def test_no_text(folder, command):
    for file in (folder / "text").iterdir():
        file.unlink()
    message = refused(folder, command=command)
    assert f"{folder}/text" in message and not (folder / "data").exists()
    (folder / "text").rmdir()
    assert f"{folder}/text" in refused(folder, command=command)


def test_a_vocabulary_too_small(folder):
    assert refused(folder, "model.vocab_size=100").startswith(
        f"model.vocab_size: 100 is too small for {folder}/data, whose largest token is 256; set it to 258"
    )


def test_sequences_too_long(folder):
    assert "data.sequence_length: 33 is longer than model.max_positions 32; lower it or raise that" in refused(
        folder, "data.sequence_length=33"
    )
    long = ["data.sequence_length=5000", "model.max_positions=5000"]
    assert re.match(
        rf"{folder}/data: the train split has \d+ tokens, not one sequence of 5000 and its target; lower", refused(folder, *long)
    )
    long = ["data.sequence_length=1500", "model.max_positions=1500"]
    assert re.match(rf"{folder}/data: the validation split has \d+ tokens, .* or a larger data.validation_fraction", refused(folder, *long))


def test_a_disk_that_is_full_while_data_is_prepared(folder):
    (folder / "text" / "large.txt").write_text("x" * 1_000_000)
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        message = refused(folder, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert (
        message.startswith(f"data.folder: {folder}/data cannot be written (File too large); make room") and not (folder / "data").exists()
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_disk_that_is_really_full(folder):
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True).returncode:
        pytest.skip("may not mount here")
    (folder / "text" / "large.txt").write_text("x" * 100_000)
    try:
        message = refused(folder, f"data.folder={disk}/data", code=1)
        assert message.startswith(f"data.folder: {disk}/data cannot be written (No space left on device)") and list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def other_run(folder: Path, **model) -> Path:
    """A checkpoint of a model with these changes, as far as a start looks at it."""
    config = configfile.load(folder / "c.yaml", [f"model.{key}={json.dumps(value)}" for key, value in {"vocab_size": 320, **model}.items()])
    path = folder / "other/checkpoints/step-00000005"
    path.mkdir(parents=True)
    for name in ("index.json", "manifest.json"):
        (path / name).write_text("{}")
    (path / "config.yaml").write_text(configfile.dump(config))
    assert isinstance(config, Config)
    return path


def test_weights_of_another_model(folder):
    path = other_run(folder, layers=2)
    message = refused(folder, f"init.checkpoint={folder}/other")
    assert message == f"init.checkpoint: {path} holds another model (model.layers: 2 -> 1); use its config.yaml's model section"
    assert refused(folder, f"init.checkpoint={folder}/text").startswith(f"init.checkpoint: {folder}/text: no checkpoint here")


def test_a_port_in_use(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refused(folder, f"launch.port={port}").startswith(f"launch.port: {port} is in use on this machine; choose another")


def test_a_stale_lock_of_an_op_build(folder, monkeypatch):
    lock = folder / "ops/deepspeed_shm_comm/lock"
    lock.touch()
    os.utime(lock, (time.time() - 600,) * 2)
    assert refused(folder).startswith(f"{lock}: left 10 minutes ago by a build of DeepSpeed's deepspeed_shm_comm that died")


def test_a_run_that_is_being_trained(folder):
    run = RunFolder(folder / "runs/r")
    run.path.mkdir(parents=True)
    with run.lock():
        assert refused(folder).startswith(f"{folder}/runs/r: another process is training this run; wait for it, stop it, or pass --new")


def test_a_run_folder_that_cannot_be_written(folder):
    (folder / "runs").write_text("a file")
    assert refused(folder).startswith(f"run.folder: {folder}/runs/r cannot be written (")


def test_more_ranks_than_the_batch_allows(folder):
    assert "global_batch 4 is not micro_batch 2 x accumulation 2 x 2 ranks = 8" in refused(folder, "train.accumulation=2")


def test_prompts_that_no_model_could_continue(folder):
    assert refused(folder, f"generate.prompts=[{'x' * 40}]").startswith("generate.prompts: 'xxx")


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.width=100000000000000000000", "model.heads=1"],
        ["train.seed=99999999999999999999"],
        ["optimizer.lr=1e308", "optimizer.eps=1e-320"],
        ["launch.timeout=1e300"],
        ["train.steps=9223372036854775807"],
    ],
    ids=" ".join,
)
def test_extremes_are_refused_or_run(folder, overrides, monkeypatch):
    """No value that the schema lets through may end in a traceback before the ranks start."""
    monkeypatch.setattr(local, "launch", lambda *arguments, **named: local.End(0))
    result = CliRunner().invoke(app, ["train", str(folder / "c.yaml"), *overrides])
    assert result.exit_code in (0, 2) and "Traceback" not in result.output, result.output
