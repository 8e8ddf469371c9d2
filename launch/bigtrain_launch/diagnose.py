"""What happened to a run, in plain words, from what its processes left in its folder. It reads only, also while the run trains."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bigtrain.errors import BAD_NODE, DONE, HANG, SAME_CRASH, STOPPED, USER_MISTAKE, UserError
from bigtrain.runfolder import RunFolder, read_json

SILENT_SECONDS = 10.0  # without a heartbeat, of which there is one a second: something is wrong with that rank
QUIET_SECONDS = 60.0  # without progress: worth a word
TAIL_BYTES = 1 << 18  # of a log: the end of a story is there
TRACE_LINES = 20
STORIES = 4  # logs that are quoted, at most


@dataclass(frozen=True)
class Diagnosis:
    """What `examine` found out about the newest attempt, and in a line each about those before it."""

    before: list[str]
    what: str
    advice: str
    ranks: list[dict[str, Any]] = field(default_factory=list)
    """Heartbeats, each with `state`."""
    stories: list[tuple[Path, str]] = field(default_factory=list)
    """Logs, and what in them tells most: the last traceback, or where the rank hung."""


def examine(path: Path) -> Diagnosis:
    """Read a run's folder. Raises UserError where nothing has been started there."""
    run = RunFolder(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run's folder, as in runs/NAME")
    numbers = run.attempts()
    if not numbers:
        raise UserError(f"{path}: nothing was started here (no attempts/1); give a run's folder, as in runs/NAME")
    now, number = time.time(), numbers[-1]
    record, beats, hang = read_json(run.record(number)), run.heartbeats(number, now), read_json(run.hang(number))
    alive = "ended" not in record and run.is_held(number, now)
    what, advice = _alive(run, number, record, beats) if alive else _ended(run, number, record, beats)
    ranks = [beat | {"state": _state(beat, alive, hang)} for beat in beats]
    return Diagnosis([_line(run, n) for n in numbers[:-1]], what, advice, ranks, _stories(run, number, beats, hang))


def show(found: Diagnosis, console: Console) -> None:
    """Print a diagnosis for a person; paths and messages stay whole, so that they can be copied."""

    def line(text: str, style: str = "") -> None:
        console.print(Text(_printable(text), style=style), soft_wrap=True)

    for text in found.before:
        line(text, "dim")
    line(found.what, "bold")
    if found.ranks:
        table = Table("rank", "host", "pid", "step", "phase", "last sign of life", "state")
        for r in found.ranks:
            cells = r["rank"], r["host"], r["pid"], r["step"], _phase(r), f"{_clock(r['time'])} ({_ago(r['age'])})", r["state"]
            table.add_row(*(Text(_printable(str(cell))) for cell in cells))
        console.print(table)
    for path, text in found.stories:
        line(f"{path}:")
        line("\n".join(f"  {each}" for each in text.splitlines()), "dim")
    line(f"What to do: {found.advice}")


def _alive(run: RunFolder, number: int, record: dict[str, Any], beats: list[dict[str, Any]]) -> tuple[str, str]:
    step = max((b["step"] for b in beats), default=0)
    what = f"{run.path}: attempt {number} is running since {_date(record['started'])}, in step {step}" if "started" in record else ""
    what = what or f"{run.path}: attempt {number} is starting"
    wrong = [b for b in beats if "exit_code" in b or b["age"] > SILENT_SECONDS]
    if wrong:
        names = "; ".join(f"rank {b['rank']} on {b['host']} {_state(b, True, {})}" for b in wrong)
        return f"{what}; but {names}", "wait for launch.timeout, after which the run ends itself and says more, or look at that machine now"
    still = {b["rank"]: b["age"] + b["time"] - b["since"] for b in beats}  # by one clock each
    quiet = [b for b in beats if still[b["rank"]] > QUIET_SECONDS]
    if quiet:
        names = "; ".join(f"rank {b['rank']} on {b['host']} in {_phase(b)} for {still[b['rank']]:.0f} s" for b in quiet)
        return f"{what}; without progress: {names}", "wait: launch.timeout ends a hang and names the rank; a large save may last"
    return what, "nothing; all ranks are well"


def _ended(run: RunFolder, number: int, record: dict[str, Any], beats: list[dict[str, Any]]) -> tuple[str, str]:
    step = max((b["step"] for b in beats), default=0)
    at = f" in step {step}" if step else " before its first step"
    go_on = _go_on(run)
    if "ended" not in record:
        who = f" (process {record['pid']} on {record['host']})" if "pid" in record else ""
        what = f"{run.path}: attempt {number} ended without a record{at}: rank 0{who} was killed, or its machine lost power"
        return what, f"look at that machine (uptime, dmesg: the kernel kills what takes too much memory); then {go_on}"
    code, reason = record.get("exit_code"), str(record.get("reason"))
    what = f"{run.path}: attempt {number} ended at {_date(record['ended'])} with exit code {code}{at}: {reason}"
    if code == DONE:
        return f"{run.path}: attempt {number} reached the end of the run at {_date(record['ended'])}", "nothing; the run is complete"
    if code == STOPPED:
        return what, go_on
    if code == USER_MISTAKE:
        return what, f"mend what the message names; then {go_on}"
    if code == HANG:
        hosts = sorted({b["host"] for b in beats if b["rank"] in read_json(run.hang(number)).get("late", [])})
        where = f"look at {', '.join(hosts)} (dmesg, its disk, its devices)" if hosts else "look at the network and the devices"
        return what, f"{where}; if a part of a step may take longer than that, raise launch.timeout; then {go_on}"
    if code == BAD_NODE:
        return what, f"take the machine out; then {go_on}"
    if code == SAME_CRASH:
        position = max((b["position"] for b in beats), default=0)
        return what, (
            f"it is no accident: read the traceback; the data of that step begins at sequence {position}. When the cause is gone, {go_on}"
        )
    if "SIGKILL" in reason:
        killed = re.search(r"rank (\d+)", reason)
        host = next((b["host"] for b in beats if killed and b["rank"] == int(killed[1])), record.get("host", "its machine"))
        return what, (
            f"look at dmesg on {host}: the kernel kills what takes too much memory. If so, lower train.micro_batch or the number of"
            f" ranks; then {go_on}"
        )
    if record.get("restart"):
        return what, f"read the traceback; then {go_on}"
    return what, f"do what the message says; then {go_on}"


def _go_on(run: RunFolder) -> str:
    saved = sorted(p.name for p in run.checkpoints.glob("step-*") if (p / "manifest.json").is_file()) if run.checkpoints.is_dir() else []
    return f"the same command goes on from {saved[-1]}" if saved else "the same command starts again; there is no checkpoint yet"


def _line(run: RunFolder, number: int) -> str:
    record = read_json(run.record(number))
    if "ended" not in record:
        return f"attempt {number}: ended without a record"
    return f"attempt {number}: {_date(record['ended'])}, exit code {record.get('exit_code')}: {_first_line(record.get('reason'))}"


def _state(beat: dict[str, Any], alive: bool, hang: dict[str, Any]) -> str:
    if "exit_code" in beat:
        return f"ended with exit code {beat['exit_code']}: {_first_line(beat['reason'])}"
    if hang:
        return "late" if beat["rank"] in hang.get("late", []) else "waited"
    if not alive:
        return "ended without a word"
    return f"silent for {beat['age']:.0f} s" if beat["age"] > SILENT_SECONDS else "alive"


def _phase(beat: dict[str, Any]) -> str:
    return beat["phase"] + (f", waiting ({beat['collective']})" if beat["waiting"] else "")


def _stories(run: RunFolder, number: int, beats: list[dict[str, Any]], hang: dict[str, Any]) -> list[tuple[Path, str]]:
    """From the logs: where ranks hung, else the tracebacks of those who did not only lose another rank."""

    def told(ranks: list[int], find: Callable[[str], str]) -> list[tuple[Path, str]]:
        logs = [run.log(number, rank) for rank in ranks[:STORIES]]
        return [(log, text) for log in logs if (text := find(_tail(log)))]

    if hang:  # a rank that was stopped or dead has no stack to show; where the others waited says something too
        return told(hang.get("late", []), _stack) or told([hang.get("found_by", 0)], _stack)
    crashed = [b["rank"] for b in beats if b.get("restart") and not b["lost"]]
    return told(crashed or [b["rank"] for b in beats if "exit_code" not in b], _traceback)


def _tail(log: Path) -> str:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _traceback(text: str) -> str:
    """The last traceback of Python's, or of a fatal signal, shortened to its end; empty where there is none."""
    start = max(text.rfind("Traceback (most recent call last)"), text.rfind("Fatal Python error"))
    if start < 0:
        return ""
    lines = text[start:].splitlines()
    end = next((n for n, line in enumerate(lines[1:], 1) if line and not line[0].isspace()), len(lines))
    return "\n".join(lines[:TRACE_LINES] if lines[0].startswith("Fatal") else lines[: end + 1][-TRACE_LINES:])


def _stack(text: str) -> str:
    """The newest stack of the training thread among those of all threads that the watchdog made the rank print."""
    threads = re.findall(r"^(?:Current thread|Thread) 0x.*\n((?:  .*\n)+)", text, re.MULTILINE)
    ours = [stack for stack in threads if "run_rank" in stack]
    return "\n".join(ours[-1].splitlines()[:TRACE_LINES]) if ours else ""


def _printable(text: str) -> str:
    """Logs hold anything; control characters must not reach the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text.replace("\t", "    "))


def _first_line(text: Any) -> str:
    return (str(text).splitlines() or [""])[0][:120]


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
