"""Inside a Slurm job: where it is, agents by srun, and when the job is begun again. Slurm's commands are scripts here, which keep the
state of a job in files; tests/cluster has the real ones."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bigtrain import cli, cli_launch, cli_slurm, configfile
from bigtrain.configlaunch import Launch
from bigtrain.errors import BAD_NODE, DONE, FAILURE, STOPPED, UserError
from bigtrain.runfolder import RunFolder, write_record
from bigtrain_launch import jobs, requeue, slurmjob
from bigtrain_launch.slurmjob import Here, Srun, checkpoints, earlier, finish, here
from bigtrain_launch.supervise import Ended

ROOT = Path(__file__).parents[2]
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[9-10],m", "SLURM_JOB_NUM_NODES": "3", "SLURM_STEP_ID": "batch"}
PLACE = Here("7", "7", ("n9", "n10", "m"), 0)


def test_here():
    assert here(JOB, Launch(nodes=3)) == PLACE
    again = {**JOB, "SLURM_RESTART_COUNT": "2", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    assert here(again, Launch(nodes=2, spares=1)) == Here("7", "5_3", ("n9", "n10", "m"), 2)
    assert here(JOB, Launch(nodes=9, min_nodes=3)) == PLACE


@pytest.mark.parametrize(
    ("changed", "settings", "said"),
    [
        ({"SLURM_JOB_ID": ""}, {}, "SLURM_JOB_ID: not set, so this is no Slurm job; `bigtrain launch slurm CONFIG` submits one"),
        ({"SLURM_STEP_ID": "0"}, {}, "SLURM_STEP_ID: srun has started this"),
        ({"SLURM_JOB_NUM_NODES": "2"}, {}, "SLURM_JOB_NUM_NODES: 2, but SLURM_JOB_NODELIST names 3"),
        ({"SLURM_JOB_NODELIST": "(null)"}, {}, "host list '(null)'"),
        ({}, {"nodes": 4}, "job 7 has 3 nodes (n[9-10],m), but launch.nodes 4; change one"),
        ({}, {"nodes": 9, "min_nodes": 4}, "but launch.min_nodes 4"),
    ],
)
def test_a_smaller_world_than_believed_is_refused(changed, settings, said):
    with pytest.raises(UserError) as error:
        here({**JOB, **changed}, Launch(**settings))
    assert said in str(error.value)


# ---- Agents by srun ----


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Commands that do what scripts say: `tools(scontrol="...", ...)`; what they were asked is in the list it returns."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(requeue, "POLL_SECONDS", 0.01)

    def make(**scripts: str):
        for name, script in scripts.items():
            path = tmp_path / "bin" / name
            path.write_text(f'#!/bin/bash\ncd {tmp_path}\necho "{name} $*" >> asked\n{script}\n')
            path.chmod(0o755)
        return lambda: (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []

    yield make
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # requeue ignores it


def test_agents_come_from_one_srun(tools, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / part) for part in ("", "launch")))
    asked = tools(srun='shift 3; for node in n9 n10; do BIGTRAIN_NODE=$node "$@" & done; wait')
    transport = Srun(["srun", sys.executable, "-m", "bigtrain_launch.slurmtask"], [])
    try:
        transport.start(["n9", "n10"])
        come, until = [], time.monotonic() + 30
        while len(come) < 2 and time.monotonic() < until:
            come += transport.connected()
            assert transport.failed() == []
            time.sleep(0.05)
        assert sorted(name for name, *_ in come) == ["n10", "n9"]
        words = f"srun --nodes=2 --ntasks=2 --nodelist=n[9-10] {sys.executable} -m bigtrain_launch.slurmtask"
        assert asked() == [words]  # no address and no token among them
        for _, _, channel in come:
            channel.close()
    finally:
        transport.close()
    assert all(step.process.poll() is not None for step in transport._steps)


def test_srun_that_fails_is_told_for_each_node_once(tools):
    tools(srun="echo 'srun: error: Unable to create step' >&2; exit 3")
    transport = Srun(["srun", "x"], [])
    transport.start(["n9", "n10"])
    transport._steps[0].process.wait()
    why = "srun ended with exit code 3: srun: error: Unable to create step"
    assert (transport.failed(), transport.failed()) == ([("n10", why), ("n9", why)], [])
    transport.close()


def test_srun_that_waits_for_a_lost_node_is_made_to_end(tools, monkeypatch):
    monkeypatch.setattr(slurmjob, "STOP_SECONDS", 0.1)
    tools(srun="trap '' TERM; while true; do sleep 0.05; done")
    transport = Srun(["srun", "x"], [])
    transport.start(["n9"])
    transport.close()
    assert transport._steps[0].process.returncode == -signal.SIGKILL


def test_no_srun(tools):
    with pytest.raises(UserError, match="no-srun: cannot be run"):
        Srun(["no-srun", "x"], []).start(["n9"])


# ---- The job again ----

SHOW = (
    'echo "JobId=7 JobName=x JobState=$(cat state) Reason=None Restarts=$(cat restarts) PreemptTime=${PREEMPT:-None}'
    ' ExcNodeList=$(cat excluded) BatchHost=n9 Comment=JobState=PENDING Restarts=99"'
)
REQUEUE = "requeue) echo 1 > restarts; echo COMPLETING > state;;"
SCONTROL = f"case $1 in --oneliner) {SHOW};; {REQUEUE} update) echo ${{3#*=}} > excluded;; esac"


@pytest.fixture
def scontrol(tools, tmp_path):
    """`scontrol(script, state, excluded)`: what it was asked besides to show the job."""

    def make(script: str = SCONTROL, state: str = "RUNNING", excluded: str = "(null)"):
        for name, text in (("state", state), ("restarts", "0"), ("excluded", excluded)):
            (tmp_path / name).write_text(f"{text}\n")
        asked = tools(scontrol=script)
        return lambda: [line.removeprefix("scontrol ") for line in asked() if "--oneliner" not in line]

    return make


def test_requeue(scontrol, capsys):
    asked = scontrol()
    assert requeue.requeue("7", 0)
    assert asked() == ["requeue 7"] and capsys.readouterr().err == "bigtrain: job 7 is requeued\n"
    assert requeue.requeue("7", 0)  # somebody asks again: it is going to begin again, once
    assert asked() == ["requeue 7"]


def test_requeue_without_suspects(scontrol, tmp_path, capsys):
    asked = scontrol(excluded="n[3,7]")
    assert requeue.requeue("7", 0, ["n9", "n3"])
    assert asked() == ["requeue 7", "update JobId=7 ExcNodeList=n[3,7,9]"]
    assert "requeued without n[9,3]" in capsys.readouterr().err


def test_exclusion_is_tried_again_while_the_job_ends(scontrol, tmp_path):
    busy = "update) [ -e once ] && echo ${3#*=} > excluded || { touch once; echo 'DB index is being set' >&2; exit 1; };;"
    scontrol(SCONTROL.replace("update) echo ${3#*=} > excluded;;", busy))
    assert requeue.requeue("7", 0, ["n9"])
    assert (tmp_path / "excluded").read_text() == "n9\n"


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "TIMEOUT", "PENDING"])
def test_a_job_that_is_ending_is_left_alone(scontrol, state, capsys):
    asked = scontrol(state=state)
    assert not requeue.requeue("7", 0)
    assert asked() == [] and f"job 7 is ending ({state}), so it is not requeued" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (f"[ $1 = requeue ] && {{ echo 'Requested operation is presently disabled' >&2; exit 1; }}; {SHOW}", "presently disabled"),
        (SHOW, "scontrol: requeued nothing, and did not say why"),
        ("echo '<html>\033[2J'; echo more", "scontrol: expected JobState= and Restarts= of job 7, found '<html>"),
        ("", "scontrol: expected JobState= and Restarts= of job 7, found ''"),
        ("exit 1", "scontrol: exit code 1"),
        ("echo JobState=RUNNING Restarts=many", "expected JobState="),
    ],
)
def test_garbage_of_scontrol_is_one_line(scontrol, script, said, capsys):
    scontrol(script)
    assert not requeue.requeue("7", 0)
    told = capsys.readouterr().err
    assert told.startswith("bigtrain: job 7 is not requeued: ") and said in told and told.count("\n") == 1 and "\033" not in told


def test_no_scontrol(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not requeue.requeue("7", 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert "job 7 is not requeued: scontrol: not installed on this machine" in capsys.readouterr().err


def test_the_others_have_the_job_begun_again_when_its_first_node_is_gone(scontrol, tools, tmp_path):
    asked = scontrol()
    (tmp_path / "node").write_text("allocated\n")
    tools(sinfo="cat node; echo 'allocated*' > node")
    requeue.watch_over("7", 0, 0.01)
    assert [line for line in asked() if not line.startswith("sinfo")] == ["requeue 7"]
    assert asked().count("sinfo --noheader --nodes=n9 --format=%T") == 2


@pytest.mark.parametrize(("state", "restarts"), [("COMPLETED", 0), ("COMPLETING", 0), ("RUNNING", 1)])
def test_a_job_that_has_ended_is_watched_no_more(scontrol, tools, state, restarts):
    asked = scontrol(state=state)
    tools(sinfo="echo down")
    requeue.watch_over("7", restarts, 0.01)
    assert asked() == []


def test_a_watch_without_scontrol_says_so(scontrol, capsys):
    scontrol("exit 1")
    requeue.watch_over("7", 0, 0.01)
    assert "if job 7 stays, `scancel 7` ends it" in capsys.readouterr().err


# ---- What the end of a job's processes means ----


@pytest.fixture
def run(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path / "runs/x")
    run.path.mkdir(parents=True)
    jobs.record(run, "slurm", "7", nodes=3)
    return run


@pytest.mark.parametrize(
    ("preempt", "progress", "again"), [("None", True, True), ("None", False, False), ("2026-11-28T12:00:00", False, True)]
)
def test_a_stop_is_a_requeue_when_it_leads_anywhere(scontrol, run, monkeypatch, capsys, preempt, progress, again):
    monkeypatch.setenv("PREEMPT", preempt)
    asked = scontrol()
    finish(run, PLACE, STOPPED, progress=progress, out=["n9"], restarts=0)
    assert asked() == (["requeue 7", "update JobId=7 ExcNodeList=n9"] if again else [])
    assert ("no new checkpoint, so it is not requeued; allow more launch.time" in capsys.readouterr().err) is not again


def test_who_was_cancelled_is_not_requeued(scontrol, run):
    asked = scontrol()
    jobs.mark_cancelled(jobs.find(run, "slurm", "7"))
    finish(run, PLACE, STOPPED, progress=True, out=[], restarts=3)
    assert asked() == []


@pytest.mark.parametrize("code", [DONE, FAILURE, 2, 76, 78])
def test_other_ends_are_final(scontrol, run, code):
    asked = scontrol()
    finish(run, PLACE, code, progress=True, out=["n9"], restarts=3)
    assert asked() == []


def test_bad_nodes_are_a_requeue_without_them_a_few_times(scontrol, run, tmp_path):
    asked = scontrol()
    for _ in range(3):
        (tmp_path / "restarts").write_text("0\n")
        (tmp_path / "state").write_text("RUNNING\n")
        finish(run, PLACE, BAD_NODE, progress=False, out=["n9"], restarts=2)
    assert asked() == ["requeue 7", "update JobId=7 ExcNodeList=n9"] * 2
    finish(run, PLACE, BAD_NODE, progress=False, out=[], restarts=9)  # nobody to leave out: the same would come again
    assert len(asked()) == 4


def test_failures_before_a_requeue_count(run):
    def attempt(number: int, **facts) -> None:
        (run.attempt(number) / "heartbeat").mkdir(parents=True)
        write_record(run.record(number), facts)
        write_record(run.heartbeat(number, 0), {"step": number, "position": 10 * number})

    ended = {"ended": 1.0, "exit_code": 1, "reason": "bug"}
    attempt(1, job="7", **ended, restart=True)
    attempt(2, job="7", ended=1.0, exit_code=75, reason="stopped", restart=False)
    attempt(3, job="6", **ended, restart=True)
    attempt(4, job="7", **ended, restart=True, lost=True)
    attempt(5, job="7")
    assert earlier(run, PLACE) == [
        Ended(1, "bug", True, 1, 10),
        Ended(1, "bug", True, 4, 40, lost=True),
        Ended(1, "attempt 5 ended without a record", True, 5, 50, lost=True),
    ]


def test_checkpoints(run):
    assert checkpoints(run) == set()
    for name in ("step-00000001", "step-00000002"):
        (run.checkpoints / name).mkdir(parents=True)
    (run.checkpoints / "step-00000001/manifest.json").write_text(json.dumps({}))
    assert checkpoints(run) == {"step-00000001"}


def test_the_budget_of_restarts_holds_over_requeues(run, monkeypatch, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(f"include: {ROOT / 'configs/quickstart.yaml'}\nrun: {{folder: {tmp_path / 'runs'}, name: x}}\nlaunch: {{nodes: 3}}\n")
    outside = CliRunner().invoke(cli.app, ["launch", "slurm-job", str(config), "--", "srun"])
    assert outside.exit_code == 2 and "SLURM_JOB_ID: not set, so this is no Slurm job" in outside.stderr
    for name, value in {**JOB, "SLURM_RESTART_COUNT": "4"}.items():
        monkeypatch.setenv(name, value)
    settings = configfile.load(config)
    monkeypatch.setattr(cli_slurm, "settle", lambda *args, **options: cli_launch.Job(settings, run, []))
    for number in range(1, 5):
        run.attempt(number).mkdir(parents=True)
        write_record(run.record(number), {"job": "7"})
    given_up = CliRunner().invoke(cli.app, ["launch", "slurm-job", str(config), "--", "srun"])
    assert given_up.exit_code == FAILURE
    assert given_up.stderr == "bigtrain: giving up after 4 requeues: attempt 4 ended without a record\n"
