"""Which jobs a run has and how they stand. Schedulers are stand-ins that answer anything."""

import json
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bigtrain import cli_launch, configfile, opbuild
from bigtrain.cli import app
from bigtrain.errors import StopRequested, UserError
from bigtrain.runfolder import RunFolder, machine, process_start, write_record
from bigtrain_launch import jobs, queues, supervise, tools
from bigtrain_launch.tools import Unanswered, ask

ROOT = Path(__file__).parents[2]


def raising(error: BaseException):
    def go():
        raise error

    return go


# ---- Commands that answer anything ----


def test_a_command_is_asked(tool):
    tool("say", 'read x; echo "heard $x"')
    assert ask(["say"], "this\n") == "heard this\n"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo made/it; echo 'no\033[31m such job' >&2; exit 3", "say: no [31m such job"),
        ("exit 7", "say: exit code 7"),
        ("echo 'E1128 12:55:13.42 7580 memcache.go:265] Unhandled' >&2; echo 'refused' >&2; exit 1", "say: refused"),
        ("sleep 60 & sleep 60", "say: no answer in 0.5 s"),
        ("sleep 60 & exit 0", "say: no answer in 0.5 s"),  # its child holds the pipe
        ("exec >&- 2>&-; sleep 60", "say: no answer in 0.5 s"),
        ("yes", "say: answered with more than 0 MiB"),
        ("while :; do echo x; sleep 0.05; done", "say: no answer in 0.5 s"),
    ],
)
def test_a_command_without_an_answer(tool, monkeypatch, script, why):
    monkeypatch.setattr(tools, "LONGEST_ANSWER", 1 << 19)
    tool("say", script)
    before = time.monotonic()
    with pytest.raises(Unanswered, match=f"^{re.escape(why)}$") as refused:
        ask(["say"], seconds=0.5)
    assert time.monotonic() - before < 5 and (refused.value.told == "made/it\n") is ("made" in script)


def test_what_a_command_without_an_answer_has_started_is_ended_too(tool, tmp_path, until):
    tool("say", f"sleep 60 & echo $! > {tmp_path}/child; wait")
    with pytest.raises(Unanswered):
        ask(["say"], seconds=0.5)
    child = int((tmp_path / "child").read_text())
    until(lambda: process_start(child) is None)


def test_a_command_that_is_not_there_or_no_program(tool, tmp_path):
    with pytest.raises(Unanswered, match="^squeue: not installed on this machine$"):
        ask(["squeue"])
    tool("squeue", "")
    (tmp_path / "bin/squeue").chmod(0o644)
    with pytest.raises(Unanswered, match="^squeue: Permission denied$"):
        ask(["squeue"])


# ---- Records ----


def test_each_launch_has_a_record(run):
    jobs.record(run, "local", "1", nodes=1)
    jobs.record(run, "slurm", "4711", nodes=["n1", "n2"])
    first, second = jobs.read(run)
    assert (first.number, first.kind, first.id, first.nodes) == (1, "local", "1", "1")
    assert (second.number, second.nodes, second.path.name) == (2, "2", "0002.json") and "pid" not in second.facts
    assert (first.facts["pid"], first.facts["start"], first.facts["machine"]) == (os.getpid(), process_start(os.getpid()), machine())
    assert first.facts["command"] and abs(first.submitted - time.time()) < 60 and jobs.next_number(run) == 3


def test_two_launches_never_share_a_record(run, process):
    code = "import sys; from bigtrain.runfolder import RunFolder; from bigtrain_launch import jobs\n"
    code += "for n in range(20): jobs.record(RunFolder(sys.argv[1]), 'slurm', sys.argv[2])"
    assert [each.wait() for each in [process(code, run.path, n) for n in range(3)]] == [0, 0, 0]
    assert sorted(job.id for job in jobs.read(run)) == sorted("012" * 20) and [job.number for job in jobs.read(run)] == list(range(1, 61))


def test_a_record_holds_no_secret(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bigtrain", "launch", "local", "x=hf_" + "aBcD" * 8])
    jobs.record(run, "local", "1")
    assert "aBcD" not in jobs.read(run)[0].path.read_text() and "[redacted" in jobs.read(run)[0].facts["command"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"kind": "slurm"}', '{"kind": 1, "id": "2", "submitted": 3}', '{"kind": "slurm", "id": [], "submitted": 1}',
             '{"kind": "slurm", "id": "1", "submitted": "x"}', "\0\x1b[31m", '{"kind":"cloud","id":"1","submitted":1}'],
)  # fmt: skip
def test_a_damaged_record_is_said_to_be_one(run, text, attempt, put):
    put(run, "local", "1")
    (run.jobs / "0002.json").write_text(text)
    attempt(run, 1, ended=1.0, exit_code=0)
    good, damaged = jobs.states(jobs.read(run))
    assert good.active and str(damaged) == "unknown (jobs/0002.json is damaged, or being written)"
    assert jobs.read(run)[0].attempts == (1,)  # what it may have done is not known: the attempt is the other's


def test_attempts_belong_to_the_job_before_them(run, attempt):
    for number, since in enumerate((1000.0, 2000.0, 3000.0), 1):
        jobs.record(run, "slurm", str(number), submitted=since)
    for number, started in enumerate((1500.0, 1600.0, 2999.0, 3100.0), 1):
        attempt(run, number, started=started)
    (run.attempt(5) / "logs").mkdir(parents=True)  # has no record yet: it has just begun
    assert [job.attempts for job in jobs.read(run)] == [(1, 2), (), (3, 4, 5)]


# ---- States ----


def end(code: int) -> dict:
    return {"ended": time.time(), "exit_code": code}


@pytest.mark.parametrize(
    ("code", "word"),
    [(0, "done"), (1, "failed"), (2, "mistake"), (75, "stopped"), (76, "hang"), (77, "bad node"), (78, "same crash twice"), ([], "failed")],
)
def test_a_launcher_that_has_ended(run, process, code, word, attempt, put):
    gone = process("pass")
    gone.wait()
    put(run, "local", "1", pid=gone.pid, start="1")
    assert str(jobs.states(jobs.read(run))[0]) == "failed (before the run was opened)"
    attempt(run, 1)
    assert str(jobs.states(jobs.read(run))[0]) == "killed"
    write_record(run.record(1), {"started": time.time(), **end(code)})
    (state,) = jobs.states(jobs.read(run))
    assert (str(state), state.active) == (word, False)


def test_a_launcher_that_lives_and_one_that_has_its_number(run, put):
    put(run, "hosts", "1")
    put(run, "hosts", "2", start="12345")  # the process of that number began at another time
    assert [state.active for state in jobs.states(jobs.read(run))] == [True, False]


def test_a_launcher_on_another_machine_is_known_by_its_lease(run, attempt, put):
    def state() -> str:
        return str(jobs.states(jobs.read(run))[0])

    put(run, "hosts", "1", machine="elsewhere", host="login2", pid=77)
    unknown = "unknown (its launcher is process 77 on login2)"
    assert state() == unknown
    attempt(run, 1)
    write_record(run.lease, {"attempt": 1, "seconds": 60.0, "machine": "elsewhere"})
    assert state() == "running (on login2)"
    os.utime(run.lease, (time.time() - 61,) * 2)
    assert state() == unknown
    write_record(run.lease, {"attempt": 1})  # damaged
    assert state() == unknown
    write_record(run.record(1), {"started": time.time(), "restart": True, **end(1)})  # it may be about to start the next
    assert state() == unknown
    write_record(run.record(1), {"started": time.time(), "restart": False, **end(75)})
    assert state() == "stopped"
    jobs.launch(run, "hosts", "1", lambda: 78)
    assert state() == "same crash twice"


def test_what_another_launcher_has_started_is_a_job_too(run, attempt):
    attempt(run, 1)
    write_record(run.lease, {"attempt": 1, "seconds": 60.0, "machine": machine(), "pid": os.getpid(), "start": process_start(os.getpid())})
    ((job, state),) = jobs.of_runs([run.path])
    assert (job.kind, job.id, str(state)) == ("", "", "running")


QUEUE = r"""
printf '11|RUNNING|None\n12|PENDING|Resources\n13_1|RUNNING|None\n13_2|COMPLETED|None\n13_[3-4,7%%2]|PENDING|Priority\n15|COMPLETED|None\n'
printf '16|NODE_FAIL|None\n17|WONDERFUL|None\n19|PENDING|Dependency\n'
"""


def test_slurm_jobs(tool):
    tool("squeue", QUEUE)
    tool("sacct", r"printf '21|CANCELLED by 1000\n22_1|COMPLETED\n22_2|COMPLETED\n'")
    found = queues.slurm(["11", "12", "13", "13_2", "15", "16", "17", "19", "21", "22", "23", "1; rm x", "-u"])
    assert {id: str(state) for id, state in found.items()} == {
        "11": "running", "12": "waiting (Resources)", "13": "1 running, 1 done, 1 waiting", "13_2": "done", "15": "done", "16": "node fail",
        "17": "unknown (Slurm calls it 'WONDERFUL')", "19": "waiting (Dependency)", "21": "cancelled", "22": "done",
        "23": "ended (Slurm does not know it)", "1; rm x": "unknown ('1; rm x' is no number of a Slurm job)",
        "-u": "unknown ('-u' is no number of a Slurm job)",
    }  # fmt: skip
    assert [found[id].active for id in ("11", "12", "13", "15", "17", "21", "23")] == [True, True, True, False, None, False, False]
    assert (
        tool.calls()[0].startswith("squeue --noheader --states=all --jobs=11,12,13,13_2,15,16,17,19,21,22,23 ") and len(tool.calls()) == 2
    )


@pytest.mark.parametrize(("squeue", "state"), [("echo '7|FAILED|NonZeroExitCode'", "failed"), ("echo '8|RUNNING|None'", "ended")])
def test_what_slurm_calls_failed_or_forgets_has_a_better_name(run, tool, put, attempt, squeue, state):
    tool("squeue", squeue)
    put(run, "slurm", "7")
    assert str(jobs.states(jobs.read(run))[0]).startswith(state)
    attempt(run, 1, job="7", **end(75))
    assert str(jobs.states(jobs.read(run))[0]) == "stopped"


@pytest.mark.parametrize(
    ("squeue", "sacct", "state"),
    [
        (None, None, "unknown (squeue: not installed on this machine)"),
        ("sleep 60", None, "unknown (squeue: no answer in 1 s)"),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", None,
         "unknown (squeue: slurm_load_jobs error: Unable to contact slurm controller)"),
        ("printf 'Welcome!\\n\\033[2J'", None, "unknown (squeue: no table of jobs, but 'Welcome!')"),
        ("head -c 9999 /dev/urandom", "exit 1", "unknown"),
        ("echo '7|run'; echo '7|||||||'", "exit 1", "unknown (squeue: no table of jobs, but '7|run')"),
        ("echo '8|RUNNING|None'", "exit 1", "ended (squeue no longer knows it; sacct: exit code 1)"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", None,
         "ended (squeue no longer knows it; sacct: not installed on this machine)"),
        ("", "echo 'Slurm accounting storage is disabled' >&2; exit 1",
         "ended (squeue no longer knows it; sacct: Slurm accounting storage is disabled)"),
        ("", "echo '<html>'", "ended (squeue no longer knows it; sacct: no table of jobs, but '<html>')"),
        ("", "echo '7|FAILED'", "failed"),
    ],
)  # fmt: skip
def test_slurm_that_is_missing_or_mad(tool, monkeypatch, squeue, sacct, state):
    monkeypatch.setattr(queues, "ASK_SECONDS", 1.0)
    for name, script in (("squeue", squeue), ("sacct", sacct)):
        if script is not None:
            tool(name, script)
    assert str(queues.slurm(["7"])["7"]).startswith(state)


def status(*conditions: str, **more) -> str:
    return json.dumps({"status": {"conditions": [{"type": name, "status": "True", "message": "so it is"} for name in conditions], **more}})


@pytest.mark.parametrize(
    ("answer", "state", "active"),
    [
        (status("Completed"), "done", False),
        (status("Complete"), "done", False),
        (status("Failed"), "failed (so it is)", False),
        (status("Suspended"), "waiting (suspended, in a queue say)", True),
        (status(), "starting (its pods are not ready)", True),
        (status(replicatedJobsStatus=[{"name": "node", "ready": 1}], restarts=2), "running (restart 2)", True),
        (status(jobsStatus=[{"name": "node", "ready": 1}]), "running", True),
        ("{}", "starting (its pods are not ready)", True),
        ("", "ended (deleted from the cluster)", False),
        ("[]", "unknown (kubectl: no JSON of a job, but '[]')", None),
        ('{"status": {"conditions": [7]}}', "unknown (kubectl: no JSON", None),
        ('{"status": "fine"}', "unknown (kubectl: no JSON", None),
        ("<html>", "unknown (kubectl: no JSON of a job, but '<html>')", None),
        ("[" * 100000, "unknown (kubectl: no JSON", None),
    ],
)
def test_kubernetes_jobs(tool, tmp_path, answer, state, active):
    (tmp_path / "answer").write_text(answer)
    tool("kubectl", f"cat {tmp_path}/answer")
    found = queues.kubernetes("team/jobset/one-1")
    assert str(found).startswith(state) and found.active is active
    assert tool.calls()[0].startswith("kubectl get jobsets.jobset.x-k8s.io one-1 --namespace=team ")


def test_kubernetes_that_is_missing_refuses_or_has_no_such_name(tool, run, monkeypatch, put):
    assert str(queues.kubernetes("--all/jobset/x")) == "unknown ('--all/jobset/x' is no job in Kubernetes)"
    assert str(queues.kubernetes("team/jobset/x")) == "unknown (kubectl: not installed on this machine)"
    tool("kubectl", "echo 'The connection to the server localhost:8080 was refused' >&2; exit 1")
    assert str(queues.kubernetes("team/trainjob/x")) == "unknown (kubectl: The connection to the server localhost:8080 was refused)"
    monkeypatch.setattr(queues, "ASK_SECONDS", -4.5)
    tool("kubectl", "sleep 60")
    for number in range(5):  # one that hangs is asked once only
        put(run, "kubernetes", f"team/jobset/one-{number}")
    assert {str(state) for state in jobs.states(jobs.read(run))} == {"unknown (kubectl: no answer in 0.5 s)"}
    assert sum("one-" in call for call in tool.calls()) == 1
    jobs.launch(run, "kubernetes", "team/jobset/one-2", lambda: 0)
    jobs.launch(run, "kubernetes", "team/jobset/one-3", lambda: 77)
    assert [str(state).split()[0] for state in jobs.states(jobs.read(run))] == ["unknown", "unknown", "done", "unknown", "unknown"]


# ---- The table ----


def test_the_table_shows_what_is_there(run, tool, attempt, put, bigtrain):
    tool("squeue", QUEUE)
    put(run, "slurm", "15", nodes=4)
    put(run, "slurm", "11", nodes=4)
    two = RunFolder(run.path.parent / "two")
    put(two, "kubernetes", "team/jobset/\033[31mtwo", nodes=["a", "b"])
    attempt(two, 1)
    write_record(two.heartbeat(1, 0).parent.mkdir() or two.heartbeat(1, 0), {"rank": 0, "step": 7})
    (run.path.parent / "notes.txt").write_text("not a run")
    two.config.write_text(configfile.dump(configfile.load(ROOT / "configs/quickstart.yaml", ["train.steps=100"])))
    shown = bigtrain("jobs", cwd=run.path.parents[1])
    assert shown.returncode == 0 and shown.stderr == "" and "\033" not in shown.stdout
    rows = [line.split() for line in shown.stdout.splitlines()]
    assert rows[0] == ["run", "kind", "id", "nodes", "state", "step", "age"]
    assert rows[1][:5] == ["runs/one", "slurm", "11", "4", "running"]  # the one that is over is left out
    assert (
        rows[2][:4] == ["runs/two", "kubernetes", "team/jobset/", "[31mtwo"] and " 7 of 100 " in shown.stdout and "unknown" in shown.stdout
    )
    named = bigtrain("jobs", "runs/one", cwd=run.path.parents[1])
    assert [line.split()[2] for line in named.stdout.splitlines()[1:]] == ["15", "11"]
    refused = bigtrain("jobs", "runs", cwd=run.path.parents[1])
    assert refused.returncode == 2 and refused.stderr.startswith("bigtrain: runs: nothing was started here")
    assert bigtrain("jobs", cwd=run.path).stdout == "no runs under ./runs; give run folders\n"


# ---- What a launcher does ----


@pytest.mark.parametrize(
    ("go", "code"),
    [
        (lambda: 0, 0),
        (lambda: 75, 75),
        (raising(UserError("no such file")), 2),
        (raising(StopRequested("stopped")), 75),
        (raising(ZeroDivisionError()), 1),
        (raising(KeyboardInterrupt()), 1),
    ],
)
def test_a_launcher_leaves_its_exit_code(run, put, go, code):
    put(run, "kubernetes", "team/jobset/one-1")
    put(run, "kubernetes", "team/jobset/one-2")
    with suppress(UserError, StopRequested, ZeroDivisionError, KeyboardInterrupt):
        assert jobs.launch(run, "kubernetes", "team/jobset/one-1", go) == code
    assert jobs.find(run, "kubernetes", "team/jobset/one-1").facts["exit_code"] == code
    assert "exit_code" not in jobs.find(run, "kubernetes", "team/jobset/one-2").facts
    assert jobs.find(run, "kubernetes", "team/jobset/one-3") is None and jobs.find(run, "slurm", "team/jobset/one-1") is None


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "one").write_text("a file")
    with pytest.raises(UserError, match=r"run.folder: .*/one/jobs cannot be written \(Not a directory\): slurm job 7 is not recorded"):
        jobs.record(RunFolder(tmp_path / "one"), "slurm", "7")


def test_training_on_this_machine_is_a_job(tmp_path, monkeypatch):
    run = RunFolder("runs/quickstart")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # the command changes it for the ranks
    monkeypatch.setattr(opbuild, "build", lambda ops, say: None)
    monkeypatch.setattr(cli_launch, "settle", lambda source, *rest: cli_launch.Job(source.config, run, []))
    monkeypatch.setattr(supervise, "supervise", lambda *given: 75)
    assert CliRunner().invoke(app, ["train", "quickstart"]).exit_code == 75
    (job,) = jobs.read(run)
    assert (job.kind, job.id, job.nodes, job.facts["exit_code"]) == ("local", str(os.getpid()), "1", 75)
