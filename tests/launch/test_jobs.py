"""Which jobs a run has and how they stand, their logs, and how they are ended. Schedulers are stand-ins that answer anything."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigtrain import configfile
from bigtrain.errors import UserError
from bigtrain.runfolder import RunFolder, machine, process_start, write_record
from bigtrain_launch import cancel, jobs, queues, readlogs, tools
from bigtrain_launch.tools import Unanswered, ask

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "launch")))


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "runs/one")
    run.path.mkdir(parents=True)
    return run


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Put a command on the path: tool("squeue", "echo hello"). What it was called with is in `tool.calls`. Nothing else is found:
    this machine may have a Slurm."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("cat", "head", "sleep", "yes"):
        (folder / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(folder))

    def make(name: str, script: str) -> None:
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\n{script}\n')
        (folder / name).chmod(0o755)

    make.calls = lambda: (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    return make


@pytest.fixture
def process():
    """Start processes that are gone at the end."""
    started = []

    def start(code: str, *argv: str, **options) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": PATHS}
        started.append(subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], text=True, env=environment, **options))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.wait()


def attempt(run: RunFolder, number: int, log: str = "", **facts) -> None:
    (run.attempt(number) / "logs").mkdir(parents=True)
    run.log(number, 0).write_text(log)
    write_record(run.record(number), {"started": time.time(), **facts})


def put(run: RunFolder, kind: str, id: str, **facts) -> jobs.Job:
    """A record of a job on some other machine."""
    jobs.record(run, kind, id, **facts)
    return jobs.read(run)[-1]


# ---- Commands that answer anything ----


def test_a_command_is_asked(tool):
    tool("say", 'read x; echo "heard $x"')
    assert ask(["say"], "this\n") == "heard this\n"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo made/it; echo 'no\033[31m such job' >&2; exit 3", "say: no [31m such job"),
        ("exit 7", "say: exit code 7"),
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
def test_a_damaged_record_is_said_to_be_one(run, text):
    put(run, "local", "1")
    (run.jobs / "0002.json").write_text(text)
    attempt(run, 1, ended=1.0, exit_code=0)
    good, damaged = jobs.states(jobs.read(run))
    assert good.active and str(damaged) == "unknown (jobs/0002.json is damaged, or being written)"
    assert jobs.read(run)[0].attempts == (1,)  # what it may have done is not known: the attempt is the other's


def test_attempts_belong_to_the_job_before_them(run):
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
    ("code", "word"), [(0, "done"), (1, "failed"), (2, "mistake"), (75, "stopped"), (76, "hang"), (77, "bad node"), (78, "same crash twice"), ([], "failed")]
)  # fmt: skip
def test_a_launcher_that_has_ended(run, process, code, word):
    gone = process("pass")
    gone.wait()
    put(run, "local", "1", pid=gone.pid, start="1")
    assert str(jobs.states(jobs.read(run))[0]) == "failed (before the run was opened)"
    attempt(run, 1)
    assert str(jobs.states(jobs.read(run))[0]) == "killed"
    write_record(run.record(1), {"started": time.time(), **end(code)})
    (state,) = jobs.states(jobs.read(run))
    assert (str(state), state.active) == (word, False)


def test_a_launcher_that_lives_and_one_that_has_its_number(run):
    put(run, "hosts", "1")
    put(run, "hosts", "2", start="12345")  # the process of that number began at another time
    assert [state.active for state in jobs.states(jobs.read(run))] == [True, False]


def test_a_launcher_on_another_machine_is_known_by_its_lease(run):
    put(run, "hosts", "1", machine="elsewhere", host="login2", pid=77)
    assert str(jobs.states(jobs.read(run))[0]) == "unknown (its launcher is process 77 on login2)"
    attempt(run, 1)
    write_record(run.lease, {"attempt": 1, "seconds": 60.0, "machine": "elsewhere"})
    assert str(jobs.states(jobs.read(run))[0]) == "running (on login2)"
    os.utime(run.lease, (time.time() - 61,) * 2)
    assert str(jobs.states(jobs.read(run))[0]) == "killed"
    write_record(run.lease, {"attempt": 1})  # damaged
    assert str(jobs.states(jobs.read(run))[0]) == "killed"


def test_what_another_launcher_has_started_is_a_job_too(run):
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
    monkeypatch.setattr(queues.ask, "__defaults__", ("", 1.0))
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


def test_kubernetes_that_is_missing_refuses_or_has_no_such_name(tool, run, monkeypatch):
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


# ---- The table ----


def bigtrain(*argv: str, cwd: Path, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": PATHS, "COLUMNS": "200", **environment}
    return subprocess.run([sys.executable, "-m", "bigtrain", *argv], cwd=cwd, env=environment, text=True, capture_output=True, timeout=60)


def test_the_table_shows_what_is_there(run, tool):
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


# ---- Logs ----


def read(run, ranks=None, attempt=None, pattern=None, follow=False) -> list[str]:
    return list(readlogs.lines(run, ranks, attempt, pattern, follow, say=lambda text: None))


def test_logs(run):
    attempt(run, 1, "old\n")
    attempt(run, 2, "first\r\nsecond\n\xff\nthe end has none")
    run.log(2, 1).write_text("one\nsecond of one\n")
    run.log(2, 12).write_bytes(b"\xff\xfe second\n")
    assert read(run) == ["first", "second", "\xff", "the end has none"]
    assert read(run, attempt=1) == ["old"] and read(run, [1]) == ["one", "second of one"]
    assert read(run, [1, 0])[:3] == ["1: one", "1: second of one", "0: first"]
    assert read(run, pattern="^sec|of") == ["0: second", "1: second of one"]
    assert read(run, [1], pattern="on.$") == ["one"] and read(run, pattern="second$")[-1] == "12: \ufffd\ufffd second"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"attempt": 3}, "there is no attempt 3; its attempts: 1"),
        ({"ranks": [0, 5]}, r"rank-00005.log: there is no such log; attempt 1 has those of 1 ranks"),
        ({"pattern": "("}, r"--grep: '\(' is no regular expression: missing \), unterminated subpattern at position 0"),
    ],
)
def test_logs_that_are_not_there(run, asked, message):
    with pytest.raises(UserError, match="nothing has been trained here yet; -f waits for it"):
        read(run)
    attempt(run, 1)
    with pytest.raises(UserError, match=message):
        read(run, **asked)


def test_logs_are_followed_into_the_next_attempt_until_the_launcher_ends(run, process):
    launcher = process(
        "import sys; from bigtrain.runfolder import RunFolder; from bigtrain_launch import jobs\n"
        "jobs.record(RunFolder(sys.argv[1]), 'local', '1'); print(1, flush=True); sys.stdin.read()",
        run.path, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert launcher.stdout.readline() == "1\n"
    said = []
    lines = readlogs.lines(run, None, None, None, True, said.append)
    attempt(run, 1, "first\nbeg")
    write_record(run.lease, {"attempt": 1, "seconds": 60.0, "machine": "elsewhere"})
    assert next(lines) == "first" and said == ["attempt 1"]
    with open(run.log(1, 0), "a") as log:
        log.write("un\nhalf")
    assert next(lines) == "begun"
    write_record(run.record(1), {"started": time.time(), **end(1)})
    assert next(lines) == "half"  # the attempt is over: its last line gets no end
    attempt(run, 2, "again\n")
    assert next(lines) == "again" and said == ["attempt 1", "attempt 2"]
    with open(run.log(2, 0), "a") as log:
        log.write("last words")
    write_record(run.record(2), {"started": time.time(), **end(0)})
    launcher.stdin.close()
    launcher.wait()
    assert list(lines) == ["last words"] and said[2:] == ["the run has ended: done"]


def test_a_run_that_is_over_is_not_waited_for(run):
    attempt(run, 1, "it was\n", **end(0))
    assert read(run, follow=True) == ["it was"]


def test_logs_on_a_terminal_cannot_speak_to_it(run):
    attempt(run, 1, "\033]0;owned\a\033[2Jtext\tand\n" * 3, **end(0))
    master, terminal = os.openpty()
    environment = {**os.environ, "PYTHONPATH": PATHS}
    argv = [sys.executable, "-m", "bigtrain", "logs", str(run.path)]
    subprocess.run(argv, stdout=terminal, env=environment, check=True, timeout=60)
    os.close(terminal)
    shown = os.read(master, 9999).decode()
    os.close(master)
    assert shown.count("\ufffd]0;owned\ufffd\ufffd[2Jtext\tand") == 3 and "\033" not in shown
    assert subprocess.run(argv, stdout=subprocess.PIPE, env=environment, check=True, timeout=60).stdout.startswith(b"\033]0;owned")


def test_logs_into_a_pipe_that_closes(run):
    attempt(run, 1, "line\n" * 100000, **end(0))
    argv = [sys.executable, "-m", "bigtrain", "logs", str(run.path)]
    reader = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": PATHS})
    assert reader.stdout.readline() == b"line\n"
    reader.stdout.close()
    assert reader.stderr.read() == b"" and reader.wait() == -signal.SIGPIPE


# ---- Cancelling ----

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
def test_cancelling_a_launcher_waits_for_the_checkpoint(run, process, kind):
    launcher = process(LAUNCHER, run.path, kind, stdout=subprocess.PIPE)
    assert launcher.stdout.readline() == "1\n" and not jobs.is_cancelled(run, kind, "1")
    said = bigtrain("cancel", str(run.path), cwd=ROOT)
    assert (said.returncode, said.stdout, launcher.wait()) == (0, "", 75)
    assert said.stderr.splitlines() == [
        f"bigtrain: asked the launcher (process {launcher.pid}) to save and end; waiting for it. Ctrl-C stops the waiting only",
        "bigtrain: ended; the same command goes on from step-00000007",
    ]
    assert jobs.is_cancelled(run, kind, "1") and not jobs.is_cancelled(run, kind, "2")
    assert cancelled(run) == [f"nothing to cancel: {run.path}: stopped"]


def test_cancelling_tells_what_the_ranks_do(run, process, monkeypatch):
    monkeypatch.setattr(cancel, "PROGRESS_SECONDS", 0.0)
    launcher = process(LAUNCHER.replace("def stop(*_):", "def stop(*_):\n    time.sleep(1.5)"), run.path, "local", stdout=subprocess.PIPE)
    launcher.stdout.readline()
    assert "rank 0 is in step 7: save" in cancelled(run)


def test_cancelling_from_another_machine_says_where(run):
    put(run, "hosts", "1", machine="elsewhere", host="login2")
    with pytest.raises(UserError, match=f"{run.path}: unknown .*; on login2, run: bigtrain cancel {run.path}$"):
        cancelled(run)
    attempt(run, 1)
    write_record(run.lease, {"attempt": 1, "seconds": 60.0, "machine": "elsewhere"})
    with pytest.raises(
        UserError, match=f"its launcher runs on another machine or in another container; on login2, run: bigtrain cancel {run.path}$"
    ):
        cancelled(run)


def test_a_process_that_has_the_launchers_number_is_left_alone(run, process, monkeypatch):
    other = process("input()", stdin=subprocess.PIPE)
    job = put(run, "local", "1", pid=other.pid, start="1")
    cancel._end(job, queues.State("running", active=True), lambda text: None)
    assert other.poll() is None


def test_cancelling_what_another_launcher_has_started(run):
    attempt(run, 1)
    write_record(run.lease, {"attempt": 1, "seconds": 60.0, "machine": machine(), "pid": os.getpid(), "start": process_start(os.getpid())})
    with pytest.raises(UserError, match="not started by `bigtrain`; send SIGTERM to its launcher"):
        cancelled(run)


def test_cancelling_slurm_jobs(run, tool, tmp_path, monkeypatch):
    """A chain: what waits is taken from the queue first, what runs is asked to save; requeued at that moment it is taken too."""
    monkeypatch.setattr(cancel, "ASK_AGAIN_SECONDS", 0.01)
    queue = tmp_path / "queue"
    queue.write_text("8|RUNNING|None\n9|PENDING|Dependency\n")
    tool("squeue", f"cat {queue}")
    tool("sacct", "echo '9|CANCELLED by 0'")
    tool(
        "scancel",
        f"""case "$*" in
        9) echo '8|RUNNING|None' > {queue};;
        --batch*) echo '8|PENDING|BeginTime' > {queue};;
        8) echo '8|CANCELLED|None' > {queue};;
    esac""",
    )
    put(run, "slurm", "8")
    put(run, "slurm", "9")
    said = cancelled(run)
    assert [call for call in tool.calls() if "scancel" in call] == ["scancel 9", "scancel --batch --signal=TERM 8", "scancel 8"]
    assert said[0] == "took Slurm job 9 from the queue" and said[1].startswith("asked Slurm job 8 to save and end") and len(said) == 3
    assert jobs.is_cancelled(run, "slurm", "8") and cancelled(run) == [f"nothing to cancel: {run.path}: cancelled"]


@pytest.mark.parametrize(
    ("scancel", "squeue", "message"),
    [
        ("echo 'scancel: error: Kill job error: Access/permission denied' >&2; exit 1", "echo '8|RUNNING|None'",
         "scancel: scancel: error: Kill job error: Access/permission denied; it is not certain that the job ends"),
        ("", "if [ -e gone ]; then exit 1; fi; echo > gone; echo '8|RUNNING|None'", "was asked to end, but whether it has is not known: unknown"),
    ],
)  # fmt: skip
def test_slurm_that_does_not_cancel(run, tool, tmp_path, monkeypatch, scancel, squeue, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cancel, "ASK_AGAIN_SECONDS", 0.01)
    tool("squeue", squeue)
    tool("scancel", scancel)
    put(run, "slurm", "8")
    with pytest.raises(UserError, match=message):
        cancelled(run)


@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_cancelling_in_kubernetes(run, tool, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(cancel, "ASK_AGAIN_SECONDS", 0.01)
    tool("kubectl", f'[ "$1" = get ] && [ ! -e {tmp_path}/gone ] && echo {{}}; [ "$1" = get ] || : > {tmp_path}/gone')
    put(run, "kubernetes", f"team/{kind}/one-1")
    said = cancelled(run)
    deleted = [call for call in tool.calls() if "delete" in call]
    assert re.match(f"kubectl delete {kind}s.* one-1 --namespace=team --cascade=foreground --wait=false$", deleted[0])
    rest = "configmaps" + ",trainingruntimes.trainer.kubeflow.org" * (kind == "trainjob")
    assert deleted[1:] == [f"kubectl delete {rest} --namespace=team --ignore-not-found --selector=bigtrain/job=one-1"]
    assert said[0].startswith(f"deleted {kind} one-1 in namespace team; ") and said[-1].startswith("ended; there is no checkpoint")
