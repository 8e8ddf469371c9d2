"""How a rank ends: its exit code, what the screen says, and the record in attempt.json. Training is a stand-in here."""

import io
import json
import os
import signal
import time
from types import SimpleNamespace

import pytest

from bigtrain import runfolder, session
from bigtrain.config import Config
from bigtrain.errors import RunError, StopRequested, UserError
from bigtrain.runfolder import RunFolder

CONFIG = Config.model_validate(
    {
        "model": {"layers": 1, "width": 8, "heads": 1, "mlp_width": 8, "max_positions": 8},
        "data": {"sequence_length": 8},
        "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
        "optimizer": {"lr": 1.0},
    }
)


class Output:
    """A RankOutput that takes over nothing."""

    def __init__(self):
        self.screen, self.attached = io.StringIO(), None

    def attach(self, log, warn=None):
        self.attached = log

    def unlogged(self):
        return "" if self.attached else "early chatter\n"


@pytest.fixture
def ended(tmp_path, monkeypatch):
    """Let rank `n`'s training be `train()`: ended(train, n) -> (exit code, screen, attempt.json or None)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def run(train, rank: int = 0, decide=None, join=None, **environment):
        folder = RunFolder(tmp_path / "r")
        attempt = session.Attempt(folder, folder.start_attempt())
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, **environment}.items():
            monkeypatch.setenv(name, str(value)) if value is not None else monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(session.World, "join", join or (lambda accelerator, timeout, pulse: SimpleNamespace(rank=rank, size=2)))
        monkeypatch.setattr(session, "_decide", decide or (lambda config, world, new, screen: (config, attempt, None)))
        monkeypatch.setattr(session, "_train", lambda *arguments: train())
        monkeypatch.setattr(session, "_report", lambda run, screen: screen.write("report\n"))
        output, record = Output(), folder.attempt(attempt.number) / "attempt.json"
        code = session.run_rank(CONFIG, SimpleNamespace(kind="cpu"), output, new=False)
        return code, output.screen.getvalue(), json.loads(record.read_text()) if record.exists() else None

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def fails(error):
    def train(*arguments):
        raise error

    return train


def test_done(ended):
    code, screen, record = ended(lambda: None)
    assert (code, screen, record["exit_code"], record["reason"]) == (0, "report\n", 0, "done") and record["ended"] <= time.time()
    assert ended(lambda: None, rank=1) == (0, "", None)  # the record and the screen are rank 0's


@pytest.mark.parametrize(("error", "code"), [(UserError("mend"), 2), (RunError("broke"), 1), (StopRequested("stopped"), 75)])
def test_errors_of_ours(ended, error, code):
    found, screen, record = ended(fails(error))
    assert (found, screen, record["exit_code"], record["reason"]) == (code, f"bigtrain: {error}\n", code, str(error))
    assert record["restart"] is False  # it would end so again
    assert ended(fails(error), rank=1) == (code, "", None)


def test_a_bug_is_one_line_that_names_the_log(ended, capfd):
    code, screen, record = ended(fails(ZeroDivisionError("first line\nsecond line")))
    assert code == 1 and screen.splitlines()[0] == "bigtrain: rank 0 failed: ZeroDivisionError: first line"
    assert screen.splitlines()[1].startswith("bigtrain: the whole story: ") and screen.endswith("attempts/1/logs/rank-00000.log\n")
    assert record["restart"] and record["reason"] == "ZeroDivisionError: first line\nsecond line" and "Traceback" in capfd.readouterr().err
    assert ended(fails(ZeroDivisionError("x")), rank=1)[1].startswith("bigtrain: rank 1 failed: ")


def test_a_rank_that_lost_another_does_not_blame_itself(ended):
    text = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:20890: Connection reset by peer."
    code, screen, record = ended(fails(RuntimeError(text)))
    assert code == 1 and "rank 0 failed: the connection to another rank broke" in screen and "gloo" not in screen + record["reason"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_trainer_answers(ended, number):
    def train():
        os.kill(os.getpid(), number)
        time.sleep(5)

    code, screen, record = ended(train)
    assert (code, record["exit_code"]) == (75, 75) and screen == f"bigtrain: {record['reason']}\n"
    assert record["reason"].startswith("stopped on request before the first step")


def test_failing_to_meet_is_said_by_every_rank(ended):
    """There is no log yet, and no two ranks miss the same ones; a user's mistake is the same on all."""
    for rank in (0, 1):
        assert ended(None, rank, join=fails(RunError("did not meet")))[:2] == (1, "bigtrain: did not meet\n")
    assert ended(None, 1, join=fails(UserError("no address")))[:2] == (2, "")
    assert ended(None, 0, join=fails(UserError("no address")))[:2] == (2, "bigtrain: no address\n")


def test_failing_to_meet_under_srun(ended):
    """srun sets no RANK: that comes when the ranks have met."""
    srun = {"RANK": None, "WORLD_SIZE": None, "SLURM_STEP_ID": 0, "SLURM_NTASKS": 2}
    for rank, says in ((0, "bigtrain: no address\n"), (1, "")):
        assert ended(None, join=fails(UserError("no address")), SLURM_PROCID=rank, **srun)[:2] == (2, says)


def test_what_is_refused_leaves_no_attempt(ended):
    assert ended(None, decide=fails(UserError("another config"))) == (2, "bigtrain: another config\n", None)


def test_a_bug_before_there_is_a_log_is_shown_whole(ended):
    code, screen, _ = ended(None, decide=fails(KeyError("x")))
    assert code == 1 and screen.startswith("early chatter\n") and screen.endswith("the whole story: above\n")


def test_a_record_that_cannot_be_written_does_not_end_the_run(ended, monkeypatch, capfd):
    monkeypatch.setattr(runfolder, "write_atomically", fails(OSError(28, "No space left on device")))
    assert ended(lambda: None) == (0, "report\n", None) and "a record of the attempt was not written" in capfd.readouterr().err


def test_steps_that_were_passed_over_are_logged_whatever_log_every():
    logged, nobody = [], SimpleNamespace(update=lambda *row: None)
    report = session.OnScreen(nobody, SimpleNamespace(log=lambda row: logged.append(row["step"])), steps=12, log_every=5)
    for step in range(1, 13):
        report.step({"step": step} | ({"skipped": ["rank 0, sequences 8 to 9"]} if step == 8 else {}))
    assert logged == [5, 8, 10, 12]
