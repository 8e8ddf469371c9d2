"""`bigtrain jobs` and `bigtrain cancel` where jobs really run: on hosts, and under a Slurm that would begin a job again."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from launching import ENVIRONMENT, Launches, until

from bigtrain.errors import STOPPED, USER_MISTAKE
from bigtrain_launch import jobs

SAVING = """
if rank == 0 and "SLURM_JOB_ID" in os.environ:  # as a real rank 0 records it
    begin = {"job": os.environ["SLURM_JOB_ID"], "token": os.environ["BIGTRAIN_ATTEMPT"]}
    json.dump(begin, open(f"{run}/attempts/{attempt}/attempt.json", "w"))
def save(number, frame):
    if rank == 0:
        time.sleep(1)
        os.makedirs(f"{run}/checkpoints/step-00000007", exist_ok=True)
        open(f"{run}/checkpoints/step-00000007/manifest.json", "w").write("{}")
    words(75, "stopped on request", False)
for number in (signal.SIGTERM, signal.SIGUSR1): signal.signal(number, save)
for_ever()
"""


class Shell(Launches):
    """And commands that are typed on a node."""

    def bigtrain(self, node: str, *argv: str, **environment: str) -> subprocess.CompletedProcess:
        command = ["env", f"--chdir={self.folder}", sys.executable, "-m", "bigtrain", *argv]
        options = {"env": {**ENVIRONMENT, **environment}, "text": True, "capture_output": True, "timeout": 120}
        return subprocess.run(self.nodes.command(node, command), **options)


def rows(shown: subprocess.CompletedProcess) -> list[list[str]]:
    """Kind, number of nodes and state of each job in the table."""
    assert shown.returncode == 0, shown.stderr
    return [re.split(r"  +", line.strip())[1::2][:1] + re.split(r"  +", line.strip())[3:5] for line in shown.stdout.splitlines()[1:]]


@pytest.fixture(scope="module")
def on_hosts(hosts, tmp_path_factory) -> Shell:
    return Shell(hosts.nodes, tmp_path_factory.mktemp("jobs"))


def test_on_hosts(on_hosts):
    config = on_hosts.story("hosts", SAVING)
    with on_hosts.launcher("n9", "hosts", config, "--hostfile", on_hosts.hostfile("n10 slots=1", "n11 slots=1")) as launcher:
        on_hosts.up("hosts", 1, 2, launcher)
        assert rows(on_hosts.bigtrain("n9", "jobs")) == [["hosts", "2", "running"]]
        elsewhere = on_hosts.bigtrain("n11", "cancel", "runs/hosts")
        assert elsewhere.returncode == USER_MISTAKE
        assert elsewhere.stderr.rstrip().endswith(f"on n9, run: bigtrain cancel {on_hosts.folder}/runs/hosts")
        asked = on_hosts.bigtrain("n9", "cancel", "runs/hosts")
        assert asked.returncode == 0 and asked.stderr.endswith("bigtrain: ended; the same command goes on from step-00000007\n"), (
            asked.stderr
        )
        screen = launcher.communicate(timeout=30)[0]
        assert launcher.returncode == STOPPED, screen
    assert rows(on_hosts.bigtrain("n11", "jobs")) == [["hosts", "2", "stopped"]]
    assert on_hosts.run("hosts").attempts() == [1]


@pytest.fixture(scope="module")
def in_slurm(slurm, tmp_path_factory) -> Shell:
    return Shell(slurm, tmp_path_factory.mktemp("jobs"))


def test_under_slurm(in_slurm, slurm):
    """A job and the one that is to go on after it: neither begins again."""
    config, run = in_slurm.story("slurm", SAVING, launch={"nodes": 2}), in_slurm.run("slurm")
    submitted = in_slurm.bigtrain("head", "launch", "slurm", str(config), "--chain", "2", **slurm.environment)
    assert submitted.returncode == 0, submitted.stderr
    numbers = re.findall(r"^job (\d+)", submitted.stdout, re.MULTILINE)
    until(lambda: (run.attempt(1) / "up-1").exists())

    def table() -> list[list[str]]:
        return rows(in_slurm.bigtrain("head", "jobs", "runs/slurm", **slurm.environment))

    assert table() == [["slurm", "2", "running"], ["slurm", "2", "waiting (Dependency)"]]
    asked = in_slurm.bigtrain("head", "cancel", "runs/slurm", **slurm.environment)
    told = asked.stderr.splitlines()
    assert asked.returncode == 0 and told[-1] == "bigtrain: ended; the same command goes on from step-00000007", asked.stderr
    assert told[0] == f"bigtrain: took Slurm job {numbers[1]} from the queue" and f"asked Slurm job {numbers[0]} to save" in told[1]
    assert table() == [["slurm", "2", "stopped"], ["slurm", "2", "cancelled"]]
    assert run.attempts() == [1] and all(jobs.find(run, "slurm", number).facts["cancelled"] for number in numbers)
    without = in_slurm.bigtrain("head", "jobs", "runs/slurm", **slurm.environment | {"SLURM_CONF": "/nowhere"})
    assert [row[-1].split()[0] for row in rows(without)] == ["unknown", "unknown"]
