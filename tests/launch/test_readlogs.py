"""The logs of a run's ranks, as they are and as they are written."""

import json
import os
import re
import signal
import subprocess
import time

import pytest

from bigtrain.errors import UserError
from bigtrain.runfolder import write_record
from bigtrain_launch import readlogs

END = {"ended": 1.0, "exit_code": 0}


def read(run, ranks=None, attempt=None, pattern=None, follow=False) -> list[str]:
    return list(readlogs.lines(run, ranks, attempt, pattern, follow, say=lambda text: None))


def test_logs(run, attempt):
    attempt(run, 1, "old\n")
    attempt(run, 2, "first\r\nsecond\n\xff\nthe end has none")
    run.log(2, 1).write_text("one\nsecond of one\n")
    run.log(2, 12).write_bytes(b"\xff\xfe second\n")
    assert read(run) == ["first", "second", "\xff", "the end has none"]
    assert read(run, attempt=1) == ["old"] and read(run, [1]) == ["one", "second of one"]
    assert read(run, [1, 0])[:3] == ["1: one", "1: second of one", "0: first"]
    assert read(run, pattern="^sec|of") == ["0: second", "1: second of one"]
    assert read(run, [1], pattern="^on.$") == ["one"] and read(run, pattern="second$")[-1] == "12: \ufffd\ufffd second"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"attempt": 3}, "there is no attempt 3; its attempts: 1"),
        ({"ranks": [0, 5]}, r"rank-00005.log: there is no such log; attempt 1 has those of 1 ranks"),
        ({"pattern": "("}, r"--grep: '\(' is no regular expression: missing \), unterminated subpattern at position 0"),
    ],
)
def test_logs_that_are_not_there(run, asked, message, attempt):
    with pytest.raises(UserError, match="nothing has been trained here yet; -f waits for it"):
        read(run)
    attempt(run, 1)
    with pytest.raises(UserError, match=message):
        read(run, **asked)


def test_logs_are_followed_into_the_next_attempt_until_the_launcher_ends(run, process, attempt):
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
    assert next(lines) == "first" and said == []
    with open(run.log(1, 0), "a") as log:
        log.write("un\nhalf")
    assert next(lines) == "begun"
    write_record(run.record(1), {"started": time.time(), "ended": 1.0, "exit_code": 1})
    assert next(lines) == "half"  # the attempt is over: its last line gets no end
    attempt(run, 2, "again\n")
    assert next(lines) == "again" and said == ["attempt 2"]
    with open(run.log(2, 0), "a") as log:
        log.write("last words")
    write_record(run.record(2), {"started": time.time(), **END})
    launcher.stdin.close()
    launcher.wait()
    assert list(lines) == ["last words"] and said[1:] == ["the run has ended: done"]


def test_a_run_that_is_over_is_not_waited_for(run, attempt):
    attempt(run, 1, "it was\n", **END)
    assert read(run, follow=True) == ["it was"]


def test_logs_on_a_terminal_cannot_speak_to_it(run, attempt, bigtrain):
    attempt(run, 1, "\033]0;owned\a\033[2Jtext\tand\n" * 3, **END)
    master, terminal = os.openpty()
    bigtrain("logs", str(run.path), capture_output=False, stdout=terminal, check=True)
    os.close(terminal)
    shown = os.read(master, 9999).decode()
    os.close(master)
    assert shown.count("\ufffd]0;owned\ufffd\ufffd[2Jtext\tand") == 3 and "\033" not in shown
    assert bigtrain("logs", str(run.path)).stdout.startswith("\033]0;owned")


def test_logs_into_a_pipe_that_closes(run, attempt, process):
    attempt(run, 1, "line\n" * 100000, **END)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    reader = process("from bigtrain.cli import main; main()", "logs", run.path, **pipes)
    assert reader.stdout.readline() == "line\n"
    reader.stdout.close()
    assert reader.stderr.read() == "" and reader.wait() == -signal.SIGPIPE


def test_logs_that_are_in_kubernetes(run, put, tool, tmp_path, bigtrain):
    """Where the run's folder is not here, pod 0 is asked, or what it has printed."""
    tool("kubectl", f'case "$1" in get) cat {tmp_path}/pods;; *) printf "loss 1.0\\n\\033[2J"; [ ! -e {tmp_path}/broken ];; esac')
    put(run, "kubernetes", "team/jobset/one-1")
    metadata = {"name": "one-1-node-0-0-x7k2p", "annotations": {"bigtrain/run": "runs/one"}}
    pod = {"metadata": metadata, "spec": {"containers": [{"command": ["/opt/venv/bin/python", "-m", "bigtrain"]}]}}
    (tmp_path / "pods").write_text(json.dumps({"items": [pod]}))
    shown = bigtrain("logs", str(run.path), "-f", "--rank", "3", "--grep", "a b")
    assert (shown.returncode, shown.stdout) == (0, "loss 1.0\n\033[2J\n"), shown.stderr
    there = "--namespace=team pod/one-1-node-0-0-x7k2p -- /opt/venv/bin/python -m bigtrain logs runs/one"
    assert tool.calls()[-1] == f"kubectl exec {there} --rank=3 --grep=a b --follow"
    (tmp_path / "pods").write_text('{"items": []}')
    assert bigtrain("logs", str(run.path)).stdout.startswith("loss 1.0\n")
    selector = "--selector=bigtrain/job=one-1,batch.kubernetes.io/job-completion-index=0"
    assert tool.calls()[-1] == f"kubectl logs --namespace=team {selector} --tail=-1"


def test_logs_that_kubernetes_does_not_give(run, put, tool, tmp_path):
    job = put(run, "kubernetes", "team/jobset/one-1")

    def refused(*options: str) -> str:
        with pytest.raises(UserError) as error:
            list(readlogs.from_pods(job, options))
        return str(error.value)

    assert refused() == "the run's folder is in Kubernetes, and kubectl: not installed on this machine"
    tool("kubectl", f'[ "$1" = get ] && cat {tmp_path}/pods')
    for answer in ("<html>", "[]", '{"items": [{}]}', '{"items": 7}', "[" * 100000):
        (tmp_path / "pods").write_text(answer)
        assert refused().startswith("the run's folder is in Kubernetes, and kubectl does not tell of its pods, but '")
    (tmp_path / "pods").write_text('{"items": []}')
    assert refused("--rank=1").startswith("pod 0 does not run: what it has printed is left")
    assert re.match("`kubectl logs .*` ended with exit code 1$", refused())
    job = put(run, "kubernetes", "--all/x")
    assert refused().endswith("0002.json: is damaged: '--all/x' is no job in Kubernetes")


def test_what_cannot_be_told_is_waited_for_a_while(run, put, attempt, monkeypatch):
    """A launcher on another machine that may be about to start the run again."""
    monkeypatch.setattr(readlogs, "ASK_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(readlogs, "UNSURE_SECONDS", 1.0)
    put(run, "hosts", "1", machine="elsewhere", host="login2", pid=7)
    attempt(run, 1, "first\n", ended=1.0, exit_code=1, restart=True)
    said = []
    lines = readlogs.lines(run, None, None, None, True, said.append)
    assert next(lines) == "first"
    attempt(run, 2, "second\n", ended=1.0, exit_code=1, restart=True)
    assert list(lines) == ["second"]
    assert said == ["attempt 2", "whether it goes on cannot be told from here: unknown (its launcher is process 7 on login2)"]
