"""Slurm from the login node: scripts compared with golden files, what is refused, and what becomes of sbatch's answers.

After a change that is meant: `python tests/launch/test_slurm.py` writes the golden files; read their difference.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from bigtrain import cli, configfile
from bigtrain.configlaunch import Container, Launch
from bigtrain.errors import UserError
from bigtrain.runfolder import RunFolder
from bigtrain_launch import jobs, slurm
from bigtrain_launch.slurm import Job, dependency, environment, notice, render, submit

GOLDEN = Path(__file__).with_name("golden")
PYXIS = Container(image="nvcr.io#nvidia/pytorch:25.10-py3", mounts=["/data:/data:ro"])
JOBS = {
    "two": Job(Launch(nodes=2, venv="/opt/bigtrain"), "tiny", "runs", 1, "/home/me/work"),
    "64": Job(
        Launch(
            nodes=64,
            spares=2,
            gpus_per_node=8,
            time="1-00:00:00",
            grace=300,
            partition="h100",
            account="lab",
            qos="high",
            constraint="ib&h100",
            exclude="gpu[007,031-033]",
            forward=["WANDB_API_KEY", "HF_TOKEN"],
            venv="/opt/bigtrain",
            sbatch=["--mem=0", "--comment=a b # c", "--hold"],
        ),
        "llama-8b",
        "/scratch/my runs",
        12,
        "/home/me/my work",
    ),
    "1024": Job(
        Launch(nodes=1024, min_nodes=1000, gpus_per_node=4, time="90", container=PYXIS, sbatch=["--cpus-per-task=72", "--no-requeue"]),
        "llama-70b",
        "runs",
        3,
        "/lustre/work",
    ),
    "sweep": Job(
        Launch(
            gpus_per_node=1,
            venv="/opt/env",
            container=Container(image="/images/big.sif", runtime="apptainer", mounts=["/data:/data:ro"]),
        ),
        "lr",
        "runs",
        1,
        "/home/me",
        ("optimizer.lr=1e-3", "optimizer.lr=3e-4"),
    ),
}


def script(name: str) -> str:
    return render(JOBS[name])


@pytest.mark.parametrize("name", JOBS)
def test_golden(name, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    assert script(name) == (GOLDEN / f"slurm-{name}.sbatch").read_text()


@pytest.mark.parametrize("name", JOBS)
def test_bash_can_read_it(name):
    subprocess.run(["bash", "-n"], input=script(name), text=True, check=True)


def test_the_command_survives_names_that_a_shell_would_change(tmp_path):
    """Run the script with `exec` put out of action, to see what words the launcher would get."""
    job = Job(Launch(venv="/a b/$HOME"), "x", "ru\"ns/`id`$(id)\\ '", 1, "/w")
    text = render(job).replace("exec ", f"exec {shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' ")
    words = json.loads(subprocess.run(["bash", "-c", text], text=True, check=True, capture_output=True).stdout)
    assert words[:6] == ["/a b/$HOME/bin/python", "-m", "bigtrain", "launch", "slurm-job", "ru\"ns/`id`$(id)\\ '/x/jobs/0001.yaml"]
    assert words[6:8] == ["--", "srun"] and words[-3:] == ["/a b/$HOME/bin/python", "-m", "bigtrain_launch.slurmtask"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sbatch": ["--nodes=3"]}, r"launch.sbatch: --nodes=3: launch.nodes decides this; set that, and remove it here"),
        ({"sbatch": ["--partition=x"]}, "launch.partition decides this"),
        ({"exclude": "n[3"}, r"launch.exclude: host list 'n\[3': expected a comma"),
        ({"time": "1", "grace": 50}, "launch.time: 1 is 60 s, but the run saves 60 s before its end"),
        ({"time": "0:30", "grace": 600}, "allow more time, or lower launch.grace"),
    ],
)
def test_refused(settings, said):
    with pytest.raises(UserError, match=said):
        render(Job(Launch(**settings), "x", "runs", 1, "/w"))


@pytest.mark.parametrize("job", [Job(Launch(), "x", "ru\nns", 1, "/w"), Job(Launch(), "x", "runs", 1, "/w\n#SBATCH --nodes=9")])
def test_a_folder_cannot_write_lines_of_the_script(job):
    with pytest.raises(UserError, match="cannot stand in a script; name the folder otherwise"):
        render(job)


def test_a_container_needs_a_folder_that_its_option_can_name():
    with pytest.raises(UserError, match="launch.container: /a:b cannot be shown inside"):
        render(Job(Launch(container=PYXIS), "x", "runs", 1, "/a:b"))


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [({}, 130), ({"time": "1-0"}, 130), ({"time": "4"}, 70), ({"grace": 30}, 40), ({"time": "60", "grace": 900}, 910)],
)
def test_when_to_be_told_of_the_time_limit(settings, seconds):
    assert notice(Launch(**settings)) == seconds


def test_environment_of_the_job():
    shell = {
        **{"PATH": "/bin", "HOME": "/root", "LC_ALL": "C", "PYTHONPATH": "/src", "SLURM_CONF": "/etc/s", "SBATCH_ACCOUNT": "lab"},
        **{"SBATCH_EXPORT": "NONE", "RANK": "3", "SLURM_NTASKS": "4", "CUDA_VISIBLE_DEVICES": "", "SECRET": "s", "PATHS": "x"},
    }
    kept = {name: shell[name] for name in ("PATH", "HOME", "LC_ALL", "PYTHONPATH", "SLURM_CONF", "SBATCH_ACCOUNT")}
    assert environment(shell, {"SECRET": "s"}) == {**kept, "SECRET": "s"}


@pytest.mark.parametrize(("after", "meant"), [("12", "afterany:12"), ("12_3", "afterany:12_3"), ("afterok:1:2_3", "afterok:1:2_3")])
def test_dependency(after, meant):
    assert dependency(after) == meant


@pytest.mark.parametrize("after", ["", "x", "12;rm", "after", "singleton", "-1", "12\n"])
def test_what_is_no_dependency(after):
    with pytest.raises(UserError, match="--after: expected a job's number"):
        dependency(after)


@pytest.fixture
def sbatch(tmp_path):
    """An sbatch that does what a shell script says: `sbatch(script)` -> a function that submits `links` jobs through it."""

    def make(script: str):
        (tmp_path / "sbatch").write_text(f'#!/bin/sh\ncd {tmp_path}\necho "$*" >> asked\n{script}\n')
        (tmp_path / "sbatch").chmod(0o755)
        path = f"{tmp_path}:{os.environ['PATH']}"

        def run(after: str | None = None, links: int = 1) -> list[str]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PATH", path)
                return list(submit("x.sbatch", after, links, {"PATH": path, "GIVEN": "1"}))

        return run

    return make


def test_a_chain(sbatch, tmp_path):
    assert sbatch("echo notes of the site; wc -l < asked; env > environment")("afterok:9", 3) == ["1", "2", "3"]
    asked = (tmp_path / "asked").read_text().splitlines()
    dependencies = ["afterok:9", "afterany:1", "afterany:2"]
    assert asked == [f"--parsable --dependency={each} x.sbatch" for each in dependencies]
    assert "GIVEN=1" in (tmp_path / "environment").read_text().splitlines() and "HOME=" not in (tmp_path / "environment").read_text()


def test_the_name_of_the_cluster_is_no_part_of_a_number(sbatch):
    assert sbatch("echo '41;north'")() == ["41"]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1",
            "^not submitted: sbatch: sbatch: error: invalid partition specified: x; ",
        ),
        ("exit 3", "^not submitted: sbatch: exit code 3; "),
        ("", "^sbatch: expected the number of a job, found ''; "),
        ("echo Submitted; echo '<html>\033[31m'", "^sbatch: expected the number of a job, found 'Submitted"),
        ("echo 12x", "found '12x'"),
    ],
)
def test_garbage_of_sbatch_is_one_line(sbatch, script, said):
    with pytest.raises(UserError, match=said) as error:
        sbatch(script)()
    assert "\n" not in str(error.value) and "\033" not in str(error.value)


def test_no_sbatch(tmp_path):
    with pytest.raises(UserError, match="not submitted: sbatch: not installed on this machine"):
        list(submit("x", None, 1, {"PATH": str(tmp_path)}))


def test_every_option_of_the_config_is_in_a_golden_file():
    text = "".join(path.read_text() for path in GOLDEN.glob("*.sbatch"))
    for option in (*slurm.LIMITS, "signal", "requeue", "no-kill", "exclusive", "array", "gpus-per-node", "export", "hold"):
        assert f"#SBATCH --{option}" in text


# ---- The command ----


@pytest.fixture
def launch(tmp_path, monkeypatch, sbatch):
    """`launch(*arguments)` runs `bigtrain launch slurm c.yaml ARGUMENTS` in an empty folder; sbatch counts its jobs from 1."""
    sbatch("[ ! -e refuse ] || exit 1; wc -l < asked")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    shipped = Path(__file__).parents[2] / "configs/quickstart.yaml"
    Path("c.yaml").write_text(f"include: {shipped}\nrun: {{name: tiny}}\ndata: {{folder: none}}\nlaunch: {{nodes: 2}}\n")

    def invoke(*arguments: str):
        return CliRunner().invoke(cli.app, ["launch", "slurm", "c.yaml", *arguments])

    return invoke


def files() -> list[str]:
    return sorted(str(path) for path in Path("runs").rglob("*") if path.is_file()) if Path("runs").exists() else []


def test_what_is_submitted_is_what_a_dry_run_prints(launch, tmp_path):
    planned = launch("--dry-run", "--chain", "2", "launch.environment.NCCL_DEBUG=INFO")
    assert planned.exit_code == 0 and planned.stdout.startswith("#!/bin/bash\n") and files() == []
    commands = [line for line in planned.stderr.splitlines() if line.startswith("# submitted by:")]
    file = "runs/tiny/jobs/0001.sbatch"
    assert commands == [
        f"# submitted by: sbatch --parsable {file}",
        f"# submitted by: sbatch --parsable --dependency=afterany:JOB-BEFORE {file}",
    ]
    assert "NCCL_DEBUG=INFO" in planned.stderr and "OMP_NUM_THREADS=" in planned.stderr

    done = launch("--chain", "2", "launch.environment.NCCL_DEBUG=INFO")
    assert done.exit_code == 0 and done.stdout.startswith(f"job 1: {file}; see bigtrain jobs") and "\njob 2: " in done.stdout
    assert Path(file).read_text() == planned.stdout
    assert (tmp_path / "asked").read_text() == f"--parsable {file}\n--parsable --dependency=afterany:1 {file}\n"
    assert files() == [f"runs/tiny/jobs/{name}" for name in ("0001.json", "0001.sbatch", "0001.yaml", "0002.json")]
    assert [(job.kind, job.id, job.nodes) for job in jobs.read(RunFolder("runs/tiny"))] == [("slurm", "1", "2"), ("slurm", "2", "2")]

    frozen = configfile.load_saved("runs/tiny/jobs/0001.yaml")
    assert frozen == configfile.load("c.yaml", ["launch.environment.NCCL_DEBUG=INFO"])
    assert launch("--new").stdout.startswith("job 3: runs/tiny-2/jobs/0001.sbatch")
    assert launch().stdout.startswith("job 4: runs/tiny/jobs/0003.sbatch")


def test_what_sbatch_refuses_leaves_nothing(launch, tmp_path):
    (tmp_path / "refuse").touch()
    refused = launch("--sweep", "optimizer.lr=1e-3,1e-4")
    assert refused.exit_code == 2 and refused.stderr.startswith("bigtrain: not submitted: sbatch: exit code 1")
    assert not Path("runs").exists() or list(Path("runs").iterdir()) == []


def test_a_sweep(launch):
    done = launch("--sweep", "optimizer.betas=[0.9,0.95],[0.8,0.9]", "--sweep", "optimizer.lr=1e-3,2e-3,3e-3")
    assert done.exit_code == 0, done.stderr
    script = Path("runs/tiny-1/jobs/0001.sbatch").read_text()
    assert "#SBATCH --array=1-6" in script and "# 5: optimizer.betas=[0.8,0.9] optimizer.lr=2e-3" in script
    found = [configfile.load_saved(f"runs/tiny-{n}/jobs/0001.yaml") for n in range(1, 7)]
    assert [(c.run.name, c.optimizer.betas[0], c.optimizer.lr) for c in found[3:5]] == [("tiny-4", 0.8, 1e-3), ("tiny-5", 0.8, 2e-3)]
    assert [job.id for job in jobs.read(RunFolder("runs/tiny-6"))] == ["1_6"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sweep", "optimizer.lr"], "--sweep: expected SECTION.KEY=V1,V2,... with values as in YAML, found 'optimizer.lr'"),
        (["--sweep", "optimizer.lr="], "--sweep: expected"),
        (["--sweep", "optimizer.lr=[1"], "--sweep: expected"),
        (["--sweep", "optimizer.lr=1,\n2"], "--sweep: expected"),
        (["--sweep", "launch.nodes=1,2"], "--sweep: launch.nodes is the same for all jobs of an array"),
        (["--sweep", "optimizer.lr=1,x"], "command line: optimizer.lr: "),
        (["--sweep", "optimizer.lr=1,2", "--new"], "--new: a sweep makes a run for each value"),
        (["--after", "yesterday"], "--after: expected a job's number"),
        (["launch.forward=[NO_SUCH_SECRET]"], "launch.forward: NO_SUCH_SECRET not set in this shell"),
        (["launch.ranks_per_node=3", "train.global_batch=4", "train.accumulation=3"], "train.global_batch"),
        (["launch.sbatch=[--nodes=9]"], "launch.sbatch: --nodes=9: launch.nodes decides this"),
    ],
)
def test_mistakes_are_one_message_and_write_nothing(launch, arguments, said):
    result = launch(*arguments)
    assert result.exit_code == 2 and said in result.stderr and files() == [], result.stderr


def test_a_run_that_is_there_is_looked_at(launch, monkeypatch):
    """Where the data is prepared, a login node sees that there is nothing to do, or that the run has another config."""
    from bigtrain import start

    Path("none").mkdir()
    Path("none/manifest.json").touch()
    monkeypatch.setattr(start, "with_data", lambda config: config)
    monkeypatch.setattr(start, "open_run", lambda config: SimpleNamespace(done=config.run.name != "tiny-2"))
    monkeypatch.setattr(start, "complete", lambda begun: "is complete")
    assert (launch().stdout, files()) == ("is complete\n", [])
    assert launch("--sweep", "optimizer.lr=1,2").stdout.startswith("is complete\njob 1: ")


if __name__ == "__main__":
    sys.executable = "/usr/bin/python3"
    GOLDEN.mkdir(exist_ok=True)
    for name in JOBS:
        (GOLDEN / f"slurm-{name}.sbatch").write_text(script(name))
