"""A whole run among libraries that print secrets, with every tracker on: no byte of its folder holds one."""

import gzip
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from training import write_config

from bigtrain import opbuild
from bigtrain.runfolder import RunFolder, read_rows
from bigtrain_launch import local

ROOT = Path(__file__).parents[2]

# Built here, so that no file of this repository looks like a leak.
SECRETS = {
    "SERVICE_TOKEN": 'c0rrect "horse" \\ b\u00e4ttery',
    "DB_PASSWORD": "hunter2-hunter2",
    "PLAIN_HF": "hf_" + "aBcD" * 8,
    "PLAIN_OPENAI": "sk-" + "proj-" + "a1b2c3d4" * 4,
    "PLAIN_GITHUB": "github_pat_" + "A1b2C3d4" * 4,
    "PLAIN_AWS": "AKIA" + "ABCDEFGH12345678",
    "PLAIN_SLACK": "xoxb-" + "123456789012-abcdefgh",
    "PLAIN_URL": "https://me:" + "pa55word@host/repository",
    "PLAIN_PEM": "-----BEGIN " + "PRIVATE KEY-----\nTUlJRXNlY3JldA==\n-----END PRIVATE KEY-----",
    "PLAIN_BEARER": "Authorization: Bearer " + "abcdefghijklmnopqrst123",
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "89abcdef",
}
MARKS = [
    *("horse", "hunter2", "aBcDaBcD", "a1b2c3d4", "A1b2C3d4", "ABCDEFGH1234", "123456789012-abc", "pa55word", "TUlJRXNlY3JldA"),
    *("abcdefghijklmnopqrst", "0123456789abcdef"),
]
"""A piece of each secret that survives any escaping."""


def contents(file: Path) -> list[bytes]:
    """A file's bytes, and what is compressed in it."""
    raw = file.read_bytes()
    found = [raw]
    for start in re.finditer(rb"\x78[\x01\x5e\x9c\xda]|\x1f\x8b\x08", raw):
        try:
            found.append(zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(raw[start.start() :]))
        except zlib.error:
            continue
    return found


def leaks(folder: Path) -> list[str]:
    marks = [mark.encode() for mark in MARKS] + [mark.encode("utf-16-le") for mark in MARKS]
    return [
        f"{file.relative_to(folder)}: {mark!r}"
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        for content in contents(file)
        for mark in marks
        if mark in content
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[RunFolder, str]:
    folder = tmp_path_factory.mktemp("leaky")
    write_config(
        folder,
        train={"steps": 2},
        schedule={"warmup_steps": 0},
        checkpoint={"every": 1},
        evaluate={"every": 1, "sequences": 2},
        generate={"prompts": ["document"], "tokens": 2},
        tracking={"tensorboard": True, "wandb": "offline"},
    )
    environment = {
        **os.environ,
        **SECRETS,
        **opbuild.environment(),
        "LEAKED": " ".join(SECRETS),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join(str(p) for p in (ROOT, ROOT / "kernels", ROOT / "launch")),
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(local.free_port())},
    }
    command = [sys.executable, str(Path(__file__).with_name("leaky.py")), "train", str(folder / "c.yaml")]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return RunFolder(folder / "runs/run"), done.stdout + done.stderr


def test_everything_that_could_leak_was_written(run):
    folder, screen = run
    assert "switched off" not in screen
    for pattern in (
        "tensorboard/events*",
        "wandb/offline-run-*/run-*.wandb",
        "report.html",
        "checkpoints/*/config.yaml",
        "attempts/1/*.json",
    ):
        assert list(folder.path.glob(pattern)), pattern
    log = folder.log(1, 0).read_text()
    for kind in ("stdout: ", "stderr: ", "bytes: ", "logged: ", "warned: ", "ValueError: "):
        assert log.count(f"{kind}[redacted: SERVICE_TOKEN]") >= 2, kind
    assert {row["note"] for row in read_rows(folder.metrics)} == {"[redacted: SERVICE_TOKEN]"}
    assert "say [redacted: SERVICE_TOKEN]" in {row["prompt"] for row in read_rows(folder.samples)}
    assert "measured with [redacted: SERVICE_TOKEN]" in (folder.attempt(1) / "environment.json").read_text()
    assert "[redacted: SERVICE_TOKEN]" in folder.report.read_text()


def test_no_byte_of_the_folder_holds_a_secret(run):
    folder, screen = run
    assert leaks(folder.path) == []
    assert not [mark for mark in MARKS if mark in screen]


def test_a_leak_is_found(tmp_path):
    (tmp_path / "plain").write_bytes(b"x hunter2 y")
    (tmp_path / "packed").write_bytes(b"head" + zlib.compress(b"x hunter2 y") + b"tail")
    (tmp_path / "gzip").write_bytes(gzip.compress(b"pa55word"))
    assert leaks(tmp_path) == ["gzip: b'pa55word'", "packed: b'hunter2'", "plain: b'hunter2'"]
