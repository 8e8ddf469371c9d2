"""How jobs are ended, wherever they run. Schedulers are stand-ins."""

import os
import subprocess

import pytest

from bigtrain.errors import UserError
from bigtrain.runfolder import machine, process_start, write_record
from bigtrain_launch import cancel, jobs, queues

LAUNCHER = """
import os, signal, sys, time
from bigtrain.runfolder import RunFolder, write_record
from bigtrain_launch import jobs
run = RunFolder(sys.argv[1])
def stop(*_):
    (run.checkpoints / 'step-00000007').mkdir(parents=True)
    write_record(run.record(1), {'started': time.time(), 'ended': time.time(), 'exit_code': 75})
    os._exit(75)
signal.signal(signal.SIGTERM, stop)
jobs.record(run, sys.argv[2], '1')
run.heartbeat(1, 0).parent.mkdir(parents=True)
write_record(run.heartbeat(1, 0), {'rank': 0, 'step': 7, 'phase': 'save'})
write_record(run.record(1), {'started': time.time()})
print(1, flush=True)
while True: time.sleep(1)
"""


def cancelled(run) -> list[str]:
    said: list[str] = []
    cancel.cancel(run, said.append)
    return said


@pytest.mark.parametrize("kind", ["local", "hosts"])
def test_cancelling_a_launcher_waits_for_the_checkpoint(run, process, kind, bigtrain):
    launcher = process(LAUNCHER, run.path, kind, stdout=subprocess.PIPE)
    assert launcher.stdout.readline() == "1\n" and "cancelled" not in jobs.find(run, kind, "1").facts
    said = bigtrain("cancel", str(run.path))
    assert (said.returncode, said.stdout, launcher.wait()) == (0, "", 75)
    assert said.stderr.splitlines() == [
        f"bigtrain: asked the launcher (process {launcher.pid}) to save and end; waiting for it. Ctrl-C stops the waiting only",
        "bigtrain: ended; the same command goes on from step-00000007",
    ]
    assert jobs.find(run, kind, "1").facts["cancelled"]
    assert cancelled(run) == [f"nothing to cancel: {run.path}: stopped"]


def test_cancelling_tells_what_the_ranks_do(run, process, monkeypatch):
    monkeypatch.setattr(cancel, "PROGRESS_SECONDS", 0.0)
    launcher = process(LAUNCHER.replace("def stop(*_):", "def stop(*_):\n    time.sleep(1.5)"), run.path, "local", stdout=subprocess.PIPE)
    launcher.stdout.readline()
    assert "rank 0 is in step 7: save" in cancelled(run)


def test_cancelling_from_another_machine_says_where(run, attempt, put):
    put(run, "hosts", "1", machine="elsewhere", host="login2")
    with pytest.raises(UserError, match=f"{run.path}: unknown .*; on login2, run: bigtrain cancel {run.path}$"):
        cancelled(run)
    attempt(run, 1)
    write_record(run.lease, {"attempt": 1, "seconds": 60.0, "machine": "elsewhere"})
    with pytest.raises(
        UserError, match=f"its launcher runs on another machine or in another container; on login2, run: bigtrain cancel {run.path}$"
    ):
        cancelled(run)


def test_a_process_that_has_the_launchers_number_is_left_alone(run, process, monkeypatch, put):
    other = process("input()", stdin=subprocess.PIPE)
    job = put(run, "local", "1", pid=other.pid, start="1")
    cancel._end(job, queues.State("running", active=True), lambda text: None)
    assert other.poll() is None


def test_cancelling_what_another_launcher_has_started(run, attempt):
    attempt(run, 1)
    write_record(run.lease, {"attempt": 1, "seconds": 60.0, "machine": machine(), "pid": os.getpid(), "start": process_start(os.getpid())})
    with pytest.raises(UserError, match="not started by `bigtrain`; send SIGTERM to its launcher"):
        cancelled(run)


def test_cancelling_slurm_jobs(run, tool, tmp_path, monkeypatch, put):
    """A chain: what waits is taken from the queue first, what runs is asked to save; requeued at that moment it is taken too."""
    monkeypatch.setattr(cancel, "ASK_AGAIN_SECONDS", 0.01)
    queue = tmp_path / "queue"
    queue.write_text("8|RUNNING|None\n9|PENDING|Dependency\n")
    tool("squeue", f"cat {queue}")
    tool("sacct", "echo '9|CANCELLED by 0'")
    tool(
        "scancel",
        f"""case "$*" in
        --state*9) echo '8|RUNNING|None' > {queue};;
        --batch*) echo '8|PENDING|BeginTime' > {queue};;
        --state*8) echo '8|CANCELLED|None' > {queue};;
    esac""",
    )
    put(run, "slurm", "8")
    put(run, "slurm", "9")
    said = cancelled(run)
    assert [call for call in tool.calls() if "scancel" in call] == [
        "scancel --state=PENDING 9", "scancel --batch --signal=TERM 8", "scancel --state=PENDING 8",
    ]  # fmt: skip
    assert said[0] == "took Slurm job 9 from the queue" and said[1].startswith("asked Slurm job 8 to save and end") and len(said) == 3
    assert jobs.find(run, "slurm", "8").facts["cancelled"] and cancelled(run) == [f"nothing to cancel: {run.path}: cancelled"]


def test_cancelling_an_array(run, tool, tmp_path, monkeypatch, put):
    """What of it runs is asked to save, what of it waits is taken from the queue."""
    monkeypatch.setattr(cancel, "ASK_AGAIN_SECONDS", 0.01)
    queue = tmp_path / "queue"
    queue.write_text("8_1|RUNNING|None\n8_[2-4]|PENDING|Resources\n")
    tool("squeue", f"cat {queue}")
    tool(
        "scancel",
        f"""case "$*" in
        --state*) echo '8_1|RUNNING|None' > {queue};;
        --batch*) echo '8_1|FAILED|None' > {queue};;
    esac""",
    )
    put(run, "slurm", "8")
    cancelled(run)
    assert [call for call in tool.calls() if "scancel" in call] == ["scancel --state=PENDING 8", "scancel --batch --signal=TERM 8"]


@pytest.mark.parametrize(
    ("scancel", "squeue", "message"),
    [
        ("echo 'scancel: error: Kill job error: Access/permission denied' >&2; exit 1", "echo '8|RUNNING|None'",
         "scancel: scancel: error: Kill job error: Access/permission denied; it is not certain that the job ends"),
        ("", "if [ -e gone ]; then exit 1; fi; echo > gone; echo '8|RUNNING|None'",
         "was asked to end, but whether it has is not known: unknown"),
    ],
)  # fmt: skip
def test_slurm_that_does_not_cancel(run, tool, tmp_path, monkeypatch, scancel, squeue, message, put):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cancel, "ASK_AGAIN_SECONDS", 0.01)
    tool("squeue", squeue)
    tool("scancel", scancel)
    put(run, "slurm", "8")
    with pytest.raises(UserError, match=message):
        cancelled(run)


@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_cancelling_in_kubernetes(run, tool, tmp_path, monkeypatch, kind, put):
    monkeypatch.setattr(cancel, "ASK_AGAIN_SECONDS", 0.01)
    tool("kubectl", f'[ "$1" = get ] && [ ! -e {tmp_path}/gone ] && echo {{}}; [ "$1" = get ] || : > {tmp_path}/gone')
    put(run, "kubernetes", f"team/{kind}/one-1")
    said = cancelled(run)
    (deleted,) = [call for call in tool.calls() if "delete" in call]
    kinds = {"jobset": "jobsets.jobset.x-k8s.io", "trainjob": "trainjobs.trainer.kubeflow.org,trainingruntimes.trainer.kubeflow.org"}
    chosen = "--namespace=team --selector=bigtrain/job=one-1"
    assert deleted == f"kubectl delete {kinds[kind]},configmaps {chosen} --cascade=foreground --wait=false"
    assert said[0].startswith(f"deleted {kind} one-1 in namespace team; ")
    assert said[-1].startswith("ended; what it has saved is on its claim")
