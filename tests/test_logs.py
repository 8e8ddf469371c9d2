"""A rank's output: in the log from the first import on, in order, and nothing of it on the screen."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(script: str, folder: Path, errors: str = "strict") -> tuple[str, str]:
    """Run a process that has a RankOutput `output`; gives what the screen saw and what is in the log."""
    prelude = "import os, sys\nfrom pathlib import Path\nfrom bigtrain.logs import RankOutput\noutput = RankOutput()\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + script], cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    log = folder / "rank.log"
    return done.stdout, log.read_text(errors=errors) if log.exists() else ""


def test_chatter_lands_in_the_log_in_order(tmp_path):
    script = """
print("python 1"); os.write(1, b"c++ 2\\n"); print("python 3", file=sys.stderr); os.system("echo child 4")
output.attach(Path("rank.log"))
print("python 5"); sys.stdout.flush(); os.write(2, b"c++ 6\\n"); os.system("echo child 7 >&2")
output.screen.write("for the person\\n"); output.screen.flush()
"""
    screen, log = run(script, tmp_path)
    assert screen == "for the person\n"
    assert sorted(log.split("\n")) == sorted(["python 1", "c++ 2", "python 3", "child 4", "python 5", "c++ 6", "child 7", ""])
    assert log.index("c++ 2") < log.index("child 4") < log.index("python 5") < log.index("c++ 6") < log.index("child 7")
    assert max(log.index(f"python {n}") for n in (1, 3)) < log.index("python 5")


def test_a_second_attempt_is_appended(tmp_path):
    (tmp_path / "rank.log").write_text("before\n")
    assert run("print('now'); output.attach(Path('rank.log'))", tmp_path)[1] == "before\nnow\n"


def test_what_no_log_has_can_still_be_shown(tmp_path):
    script = """
print("warning"); os.write(2, b"error\\n")
first, second = output.unlogged(), output.unlogged()
assert first == second, (first, second)
output.screen.write(first)
print("later")
output.attach(Path("rank.log"))
output.screen.write(repr(output.unlogged()))
"""
    screen, log = run(script, tmp_path)
    assert sorted(screen.split("\n")) == ["''", "error", "warning"]
    assert "warning" in log and "later" in log


def test_a_log_that_cannot_be_opened_stops_nothing_and_loses_nothing(tmp_path):
    script = """
print("chatter")
output.attach(Path("no/such/folder/rank.log"), output.screen.write)
print("more")
output.screen.write("\\n" + output.unlogged())
"""
    warning, _, rest = run(script, tmp_path)[0].partition("\n")
    assert warning.startswith("this rank's log cannot be written (No such file or directory)") and "training goes on" in warning
    assert rest == "chatter\nmore\n"


def test_a_full_disk_is_warned_of_once_and_stops_nothing(tmp_path):
    script = """
print("early")
output.attach(Path("/dev/full"), lambda text: output.screen.write(text + "\\n"))
for i in range(100):
    print("x" * 10000, flush=True); sys.stderr.write("y"); sys.stderr.flush(); sys.stdout.buffer.write(b"z\\n")
print("end"); sys.stdout.flush()
"""
    screen, _ = run(script, tmp_path)
    assert screen.count("\n") == 1 and screen.startswith("this rank's log cannot be written (No space left on device)")


def test_no_secret_reaches_the_log(tmp_path):
    """However it is written by Python, in one piece or in several, before there is a log or after."""
    script = """
import logging
KEY, PEM = "hf_" + "aBcD" * 8, ["-----BEGIN PRIVATE KEY-----", "c2VjcmV0c2VjcmV0", "-----END PRIVATE KEY-----"]
def chatter():
    print("printed", KEY, os.environ["SERVICE_TOKEN"])
    for piece in ("hf_aB", KEY[5:], " in two pieces\\n"): sys.stderr.write(piece)
    logging.warning("logged %s", KEY)
    for line in PEM: print(line, flush=True)
    print(repr(os.environ["SERVICE_TOKEN"]), "\\ud800", flush=True)
    sys.stdout.buffer.write(KEY.encode() + b" as bytes \\xff\\n")
    print("begun", end="", flush=True); print(", ended")
os.environ["SERVICE_TOKEN"] = "c0rrect horse, \\u00e9"
chatter()
os.write(1, KEY.encode() + b" from C\\n")
assert "aBcD" not in output.unlogged()
output.attach(Path("rank.log"))
chatter()
"""
    log = run(script, tmp_path, errors="surrogateescape")[1]
    assert not [part for part in ("aBcD", "c2Vj", "horse") if part in log], log
    for line, times in {
        "printed [redacted: Hugging Face token] [redacted: SERVICE_TOKEN]": 2,
        "[redacted: Hugging Face token] in two pieces": 2,
        "logged [redacted: Hugging Face token]": 2,
        "[redacted: private key]": 2,
        "[redacted: Hugging Face token] as bytes \udcff": 2,
        "begun, ended": 2,
        "[redacted: Hugging Face token] from C": 1,
    }.items():
        assert log.count(line) == times, (line, log)


def test_a_crash_in_c_leaves_its_python_stack_in_the_log(tmp_path):
    script = "output.attach(Path('rank.log'))\nimport ctypes\ndef guilty(): ctypes.string_at(0)\nguilty()"
    log = run(script, tmp_path)[1]
    assert "Segmentation fault" in log and "guilty" in log
