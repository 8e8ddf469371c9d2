"""Hostfiles, the ssh command, and an ssh that says something else. The real one is in tests/cluster."""

import re
import shlex
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bigtrain.cli import app
from bigtrain.errors import UserError
from bigtrain_launch import hosts
from bigtrain_launch.cluster import Node
from bigtrain_launch.hosts import Hosts, read_hostfile


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_deepspeeds_format(tmp_path, ending):
    path = tmp_path / "hosts"
    path.write_bytes(ending.join(["# ours", "", "n9 slots=8", "user@n10.lab   slots=4  # the new one", " 10.0.0.7\tslots=1"]).encode())
    assert read_hostfile(path) == [Node("n9", 8), Node("user@n10.lab", 4), Node("10.0.0.7", 1)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n1 slots=8\nn2", r":2: expected NAME slots=N, as in `node1 slots=8`, found 'n2'"),
        ("n1 slots=0", ":1: expected NAME slots=N"),
        ("n1 slots=99999", ":1: expected NAME slots=N"),
        ("n1 slots=8 gpus=2", ":1: expected NAME slots=N"),
        ("-oProxyCommand=x slots=1", ":1: expected NAME slots=N"),
        ("n1;reboot slots=1", ":1: expected NAME slots=N"),
        ("n1 slots=1\n\nn1 slots=2", ":3: n1 is there twice"),
        ("# nothing", "names no machine"),
    ],
)
def test_a_hostfile_that_is_none(tmp_path, text, said):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError, match=f"{path}{said}" if said.startswith(":") else f"{path}: {said}"):
        read_hostfile(path)


def test_a_hostfile_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="hosts: cannot be read \\(No such file or directory\\)"):
        read_hostfile(tmp_path / "hosts")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary: cannot be read \\(it is no text\\)"):
        read_hostfile(tmp_path / "binary")


def test_the_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/a b:here")
    *ssh, remote = Hosts("/opt/my venv/bin/python").command("n1")
    assert ssh[0] == "ssh" and ssh[-2:] == ["--", "n1"] and {"BatchMode=yes", "ServerAliveInterval=3"} <= set(ssh)
    expected = ["cd", "/", "&&", "exec", "env", "BIGTRAIN_NODE=n1", f"PYTHONPATH=/a b:{tmp_path}/here", "/opt/my venv/bin/python", "-m"]
    assert shlex.split(remote) == [*expected, "bigtrain_launch.agent"]


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """Let a shell script be ssh: ssh(script) -> what became of a machine, as ("connected", name) or ("failed", why)."""
    monkeypatch.setattr(hosts, "CONNECT_SECONDS", 3.0)

    def connect(script: str) -> tuple[str, str]:
        program = tmp_path / "ssh"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(hosts, "SSH", (str(program),))
        transport = Hosts("/there/python")
        try:
            transport.start(["n1"])
            end = time.monotonic() + 20
            while time.monotonic() < end:
                if come := transport.connected():
                    return "connected", come[0][1]["node"]
                if failed := transport.failed():
                    return "failed", failed[0][1]
                time.sleep(0.02)
            raise AssertionError("waited in vain")
        finally:
            transport.close()

    return connect


def test_a_greeting_of_the_shell_is_passed_over(ssh):
    agent = f"exec {sys.executable} -m bigtrain_launch.agent"
    assert ssh(f"echo 'Welcome!'; printf 'no end of line'; export BIGTRAIN_NODE=n1; {agent}") == ("connected", "n1")


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo 'Permission denied (publickey).' >&2; exit 255", r"ssh does not get there: Permission denied \(publickey\)\."),
        ("exit 255", "ssh does not get there: it said nothing"),
        ("echo 'sh: 1: /there/python: not found' >&2; exit 127", "/there/python cannot be run there .*launch.venv"),
        ("echo \"python: No module named 'bigtrain_launch'\" >&2; exit 1", "bigtrain is not installed there, in /there/python"),
        ("echo 'This account is not available.'; exit 1", "the agent there ended at once, with exit code 1: This account is not available"),
        (
            "printf '\\033[2Jhello\\n'; exec sleep 60",
            r"no agent has answered over ssh for 3 s \(\?\[2Jhello\); does `.*ssh HOST true` work",
        ),
        ("head -c 100000 /dev/urandom; exit 3", "the agent there ended at once, with exit code 3: "),
        ("exec cat /dev/zero", "no agent has answered|the agent there ended at once"),
    ],
    ids=["denied", "silent", "no python", "no bigtrain", "no shell", "hanging", "random", "endless"],
)
def test_garbage_is_one_clear_line(ssh, script, why):
    state, said = ssh(script)
    assert state == "failed" and re.match(why, said) and said.isprintable() and len(said) < 400, said


# ---- The command line ----


def launch(tmp_path, lines: str, *arguments: str):
    (tmp_path / "hosts").write_text(lines)
    config = str(Path(__file__).parents[2] / "configs/quickstart.yaml")
    return CliRunner().invoke(app, ["launch", "hosts", config, "--hostfile", str(tmp_path / "hosts"), "--dry-run", *arguments])


def test_dry_run_shows_what_would_be_run_and_no_value_that_is_forwarded(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hush")
    asked = ["launch.spares=1", "launch.forward=[WANDB_API_KEY]", "launch.venv=/opt/venv/", "launch.environment={A: b c}"]
    shown = launch(tmp_path, "n1 slots=2\nn2 slots=1\nn3 slots=2", *asked)
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert [line for line in lines if line.startswith("# n")] == ["# n1: 2 ranks", "# n2: 1 rank", "# n3: spare"]
    assert lines[1] == shlex.join(Hosts("/opt/venv/bin/python").command("n1"))
    assert any(line.startswith("A='b c'") for line in lines) and any(line.startswith("WANDB_API_KEY=...") for line in lines)
    assert "hush" not in shown.stdout and list(tmp_path.iterdir()) == [tmp_path / "hosts"]


@pytest.mark.parametrize(
    ("lines", "override", "said"),
    [
        ("n1 slots=1", "launch.nodes=2", "hosts: names 1 machine, but launch.nodes 2 are asked for"),
        ("n1 slots=1\nn2 slots=1", "launch.spares=2", "hosts: names 2 machines, but launch.nodes 1 and launch.spares 2 are asked for"),
        ("n1 slots=4\nn2 slots=2", "launch.ranks_per_node=3", r"fewer slots than the 3 ranks that launch asks for on n2 \(2\)"),
        ("n1 slots=3", "train={global_batch: 8, micro_batch: 2, accumulation: 4}", r"train.global_batch: global_batch 8 is not .* 3 ranks"),
        ("n1 slots=1", "launch.forward=[NOT_HERE]", "launch.forward: NOT_HERE not set in this shell"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_done(tmp_path, lines, override, said):
    refused = launch(tmp_path, lines, override)
    assert refused.exit_code == 2 and re.search(said, refused.stderr), refused.stderr


def test_a_hostfile_must_be_named():
    refused = CliRunner().invoke(app, ["launch", "hosts", str(Path(__file__).parents[2] / "configs/quickstart.yaml"), "--dry-run"])
    assert refused.exit_code == 2 and "launch.hostfile: not set in" in refused.stderr and "or pass --hostfile" in refused.stderr
