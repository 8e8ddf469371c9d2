"""The logs of a run's ranks, as they are or as they are written, over all its attempts."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bigtrain.errors import UserError
from bigtrain.runfolder import RunFolder, read_json
from bigtrain_launch import jobs
from bigtrain_launch.jobs import Job
from bigtrain_launch.kubernetes import JOB_LABEL, RUN
from bigtrain_launch.queues import KUBERNETES_ID
from bigtrain_launch.tools import Unanswered, ask, one_line

POLL_SECONDS = 0.2
ASK_AGAIN_SECONDS = 5.0  # between questions to a scheduler whether the run goes on
UNSURE_SECONDS = 90.0  # longer than the longest back-off
LOGS = ("-m", "bigtrain", "logs")
LONGEST_LINE = 1 << 20  # bytes that are waited for to be a line


def lines(
    run: RunFolder, ranks: Sequence[int] | None, attempt: int | None, pattern: str | None, follow: bool, say: Callable[[str], None]
) -> Iterator[str]:
    """Lines of the ranks' logs, those of several ranks with the rank before them.

    ranks: None: rank 0's, or with a `pattern` those of all. attempt: None: the newest. pattern: only lines in which it is found.
    follow: go on as lines are written, into each further attempt, until the run ends; `say` gets a line about every attempt.
    Raises UserError for what is not there.
    """
    wanted = _pattern(pattern)
    if attempt is None and run.attempts():
        attempt = run.attempts()[-1]
    if attempt is None and not follow:
        raise UserError(f"{run.path}: nothing has been trained here yet; -f waits for it")
    if attempt is not None and attempt not in run.attempts():
        there = ", ".join(map(str, run.attempts())) or "none so far"
        raise UserError(f"{run.path}: there is no attempt {attempt}; its attempts: {there}")
    reading = _Attempt(run, attempt, ranks, wanted) if attempt is not None else None
    if reading and not follow:
        reading.check()
        yield from reading.lines(last=True)
        return
    going = _Going(run)
    while True:
        over = reading is None or reading.is_over()
        if reading:
            yield from reading.lines(last=over)
        if over:
            later = [number for number in run.attempts() if reading is None or number > reading.number]
            if later:
                reading = _Attempt(run, later[0], ranks, wanted)
                say(f"attempt {reading.number}")
                continue
            if why := going.end():
                if reading:  # a rank's last words may be later than the record
                    yield from reading.lines(last=True)
                say(why)
                return
        time.sleep(POLL_SECONDS)


def from_pods(job: Job, options: Sequence[str]) -> Iterator[str]:
    """The same from pod 0 of a job in Kubernetes, whose run's folder is not here: what `bigtrain logs` with these options says there
    or, where that pod has ended, what it printed. Raises UserError where there is neither."""
    if not (parts := KUBERNETES_ID.fullmatch(job.id)):
        raise UserError(f"{job.path}: is damaged: {job.id!r} is no job in Kubernetes")
    namespace = f"--namespace={parts[1]}"
    chosen = f"--selector={JOB_LABEL}={parts[3]},batch.kubernetes.io/job-completion-index=0"
    try:
        told = ask(["kubectl", "get", "pods", namespace, chosen, "--field-selector=status.phase=Running", "--output=json"])
        # How to ask there is the pod's own word: a record in a folder may be anybody's.
        there = [(pod["metadata"], pod["spec"]["containers"][0]["command"][0]) for pod in json.loads(told)["items"]]
        argv = [["kubectl", "exec", namespace, f"pod/{m['name']}", "--", python, *LOGS, m["annotations"][RUN]] for m, python in there]
    except Unanswered as error:
        raise UserError(f"the run's folder is in Kubernetes, and {error}") from None
    except (ValueError, RecursionError, TypeError, KeyError, IndexError):
        raise UserError(f"the run's folder is in Kubernetes, and kubectl does not tell of its pods, but {one_line(told)[:60]!r}") from None
    if argv:
        command = [*argv[-1], *options]
    elif set(options) <= {"--follow"}:
        command = ["kubectl", "logs", namespace, chosen, "--tail=-1"]
    else:
        raise UserError("pod 0 does not run: what it has printed is left (`bigtrain logs` without options); the logs are on the claim")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        yield from (line.rstrip("\n") for line in process.stdout)
    if process.returncode:
        raise UserError(f"`{shlex.join(command)}` ended with exit code {process.returncode}")


def _pattern(text: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(text) if text is not None else None
    except re.error as error:
        raise UserError(f"--grep: {text!r} is no regular expression: {error}") from None


class _Attempt:
    """The logs of one attempt, read on from where they were read to."""

    def __init__(self, run: RunFolder, number: int, ranks: Sequence[int] | None, pattern: re.Pattern[str] | None):
        self.run, self.number, self._ranks, self._pattern = run, number, ranks, pattern
        self._read: dict[int, tuple[int, bytes]] = {}

    def logs(self) -> dict[int, Path]:
        if self._ranks is None and self._pattern is None:
            return {0: self.run.log(self.number, 0)}
        if self._ranks is not None:
            return {rank: self.run.log(self.number, rank) for rank in self._ranks}
        found = sorted(self.run.log(self.number, 0).parent.glob("rank-*.log"))
        return {int(path.stem[5:]): path for path in found if path.stem[5:].isdecimal()}

    def check(self) -> None:
        """Raises UserError where a log is not there."""
        missing = [path for path in self.logs().values() if not path.is_file()]
        if missing:
            there = len(list(self.run.log(self.number, 0).parent.glob("rank-*.log")))
            raise UserError(f"{missing[0]}: there is no such log; attempt {self.number} has those of {there} ranks")

    def is_over(self) -> bool:
        return "ended" in read_json(self.run.record(self.number)) or not self.run.is_held(self.number, time.time())

    def lines(self, last: bool) -> Iterator[str]:
        """What has been written since the last call; `last`: also a line that has no end yet."""
        logs = self.logs()
        several = len(self._ranks) > 1 if self._ranks is not None else self._pattern is not None
        for rank, path in logs.items():
            for line in self._new(rank, path, last):
                if self._pattern is None or self._pattern.search(line):
                    yield f"{rank}: {line}" if several else line

    def _new(self, rank: int, path: Path, last: bool) -> Iterator[str]:
        position, begun = self._read.get(rank, (0, b""))
        try:
            with open(path, "rb") as file:
                file.seek(position)
                while piece := file.read(LONGEST_LINE):
                    position += len(piece)
                    *whole, begun = (begun + piece).split(b"\n")
                    if len(begun) > LONGEST_LINE:
                        whole, begun = [*whole, begun], b""
                    yield from (line.decode(errors="replace").rstrip("\r") for line in whole)
        except OSError:  # not there yet
            return
        if last and begun:
            yield begun.decode(errors="replace")
            begun = b""
        self._read[rank] = position, begun


class _Going:
    """Whether another attempt may still come."""

    def __init__(self, run: RunFolder):
        self._run, self._next, self._unsure = run, 0.0, 0.0

    def end(self) -> str | None:
        """Why none will, in a line; None as long as one may."""
        now = time.monotonic()
        if now < self._next:
            return None
        self._next = now + ASK_AGAIN_SECONDS
        found = jobs.states(jobs.read(self._run))
        if any(state.active for state in found):
            self._unsure = 0.0
            return None
        if found and found[-1].active is None:  # a launcher elsewhere, between two attempts say
            self._unsure = self._unsure or now
            return f"whether it goes on cannot be told from here: {found[-1]}" if now - self._unsure > UNSURE_SECONDS else None
        return f"the run has ended: {found[-1]}" if found else "the run has not begun"
