"""A run's small files: rows whatever is in them, attempts without collisions, and replacing a file whole."""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from bigtrain.runfolder import RunFolder, latest_rows, process_start, read_json, read_rows, write_atomically


def test_rows_end_at_newlines_only(tmp_path):
    """Text that a model wrote may hold any of Unicode's other line ends."""
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh"
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps({"step": n, "text": text}, ensure_ascii=False) + "\n" for n in (1, 2)))
    assert [row["text"] for row in read_rows(tmp_path / "samples.jsonl")] == [text, text]


def test_what_is_no_row_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n\n[1]\n{"loss": 3}\n{"step": null}\nnot json\n\xff\xfe\n{"step": 2, "lo')
    assert read_rows(path) == [{"step": 1, "loss": 2.0}]
    path.write_text("")
    assert read_rows(path) == [] and latest_rows(path, "loss") == []


def test_the_latest_attempt_of_a_step_counts(tmp_path):
    rows = [(1, 1, 9.0), (1, 2, 8.0), (1, 3, 7.0), (2, 2, 8.5), (2, 10, 1.0)]
    lines = [json.dumps({"attempt": a, "step": s, "loss": loss}) for a, s, loss in rows] + [
        '{"step": 2, "attempt": 2, "validation_loss": 5}'
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines) + "\n")
    assert [(r["step"], r["loss"]) for r in latest_rows(tmp_path / "m.jsonl", "loss")] == [(1, 9.0), (2, 8.5), (3, 7.0), (10, 1.0)]


def test_attempts_never_share_a_number(tmp_path):
    run = RunFolder(tmp_path / "r")
    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(lambda _: run.start_attempt(), range(16))) == list(range(1, 17))
    (run.path / "attempts" / "²").mkdir()
    (run.path / "attempts" / "notes").mkdir()
    assert run.attempts() == list(range(1, 17)) and run.start_attempt() == 17
    assert run.log(17, 3) == run.path / "attempts/17/logs/rank-00003.log" and run.log(17, 3).parent.is_dir()


def test_the_record_of_an_attempt_is_completed_once(tmp_path):
    run = RunFolder(tmp_path / "r")
    run.start_attempt()
    run.record(1).write_text('{"host": "node0"}')
    run.end_attempt(1, 76, "a hang", restart=True, facts={"peak": 1})
    run.end_attempt(1, 1, "lost another rank", restart=False, facts={})
    known = read_json(run.record(1))
    ended = known.pop("ended")
    assert known == {"host": "node0", "peak": 1, "exit_code": 76, "reason": "a hang", "restart": True}
    run.end_attempt(1, 78, "twice", restart=True, facts={}, replace=True)
    assert read_json(run.record(1)) == known | {"exit_code": 78, "reason": "twice", "ended": ended}


def test_processes_are_told_apart():
    assert process_start(os.getpid()) == process_start(os.getpid()) != process_start(1)
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_start(child.pid) is None  # a zombie has ended
    child.wait()
    assert process_start(child.pid) is None


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomically(path, "old é")
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old é" and list(tmp_path.iterdir()) == [path]
