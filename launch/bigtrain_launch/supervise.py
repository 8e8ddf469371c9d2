"""Keep a run going: start its ranks, and start them again after a crash or a hang, as `restarts` of the config allows.

What to do after which end is `decide`, a pure function. How an attempt ended is put together from what its ranks left:
their exit codes, their last heartbeats, hang.json and attempt.json.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigtrain.config import Config
from bigtrain.configlaunch import Restarts
from bigtrain.errors import DONE, HANG, SAME_CRASH, STOPPED, USER_MISTAKE
from bigtrain.runfolder import OWNER, RunFolder, read_json
from bigtrain_launch.local import POLL_SECONDS, End, Signals, killed_by, say

LONGEST_BACKOFF = 60.0


@dataclass(frozen=True)
class Ended:
    """How one attempt ended."""

    code: int
    reason: str
    again: bool
    """Starting again may help: it crashed or hung, and neither the run nor a person has decided on this end."""
    step: int = 0
    position: int = 0
    lost: bool = False
    """A machine was lost: that is no crash of the run's own."""

    def same(self, other: Ended) -> bool:
        """The same crash at the same place; numbers in the reason (times, addresses, ports) do not count."""
        return not self.lost and self._place() == other._place()

    def _place(self) -> tuple[Any, ...]:
        return self.step, self.position, self.code, re.sub(r"0x[0-9a-fA-F]+|\d+", "#", self.reason)


@dataclass(frozen=True)
class Decision:
    """What to do next: end with `code`, or start again in `wait` seconds where `code` is None."""

    code: int | None
    why: str
    wait: float = 0.0


def decide(ends: Sequence[Ended], settings: Restarts) -> Decision:
    """What to do after the last of `ends`, the ends of all starts so far."""
    *before, last = ends
    if not last.again:
        return Decision(last.code, last.reason)
    if any(last.same(earlier) for earlier in before):
        where = f"at step {last.step}" if last.step else "before the first step"
        return Decision(SAME_CRASH, f"the same crash twice {where}: {last.reason}")
    if len(before) >= settings.max:
        return Decision(last.code, last.reason)
    return Decision(None, last.reason, min(LONGEST_BACKOFF, settings.backoff * 2.0 ** min(len(before), 32)))


def supervise(
    start: Callable[[Mapping[str, str]], End], run: RunFolder, config: Config, signals: Signals, earlier: Sequence[Ended] = ()
) -> int:
    """Let `start` run the ranks that train `run` until there is nothing more to try, and return the exit code.

    `start` gets variables that the ranks must have, returns how they ended, and has said so on the screen. What it raises
    passes through. One of `signals` between two starts ends it. `earlier`: ends that count as if they had been here.
    """
    own = {OWNER: secrets.token_hex(8)}
    ends = list(earlier)
    while True:
        before = run.attempts()
        end = start(own)
        attempt = next(iter(reversed([n for n in run.attempts() if n not in before])), None)
        ends.append(judge(run, attempt, end))
        decision = decide(ends, config.restarts)
        if attempt:
            _complete(run, attempt, ends[-1], decision)
        if decision.code is None:
            tries = f"restart {len(ends)} of {config.restarts.max} in {decision.wait:g} s"
            say(f"{_line(decision.why)}; starting again from the newest checkpoint ({tries})")
            if _wait(decision.wait, signals):
                say("stopped on request between two attempts; the same command goes on")
                return STOPPED
            continue
        if decision.code == SAME_CRASH:
            say(f"{_line(decision.why)}; starting again would not help")
        elif ends[-1].again and len(ends) > 1:
            say(f"giving up after {len(ends) - 1} restart{'s' * (len(ends) > 2)}: {_line(decision.why)}")
        if decision.code not in (DONE, STOPPED, USER_MISTAKE) and run.attempts():
            say(f"`bigtrain diagnose {run.path}` tells more")
        return decision.code


def judge(run: RunFolder, attempt: int | None, end: End) -> Ended:
    """How an attempt ended, None where its ranks ended before they had one."""
    beats = run.heartbeats(attempt, now=time.time()) if attempt else []
    step, position = max(((b["step"], b["position"]) for b in beats), default=(0, 0))
    reason, may_help = _reason(run, attempt, end, [b for b in beats if "exit_code" in b])
    again = may_help and not end.asked and end.code not in (DONE, STOPPED, USER_MISTAKE)
    return Ended(end.code, reason, again, step, position, bool(end.gone))


def _reason(run: RunFolder, attempt: int | None, end: End, last_words: list[dict[str, Any]]) -> tuple[str, bool]:
    """Why the attempt ended, and whether starting again may help. Who lost another rank is asked last."""
    if end.reason:
        return end.reason, bool(end.suspects)
    if end.killed_by:
        return f"rank {end.rank}{f' on {end.host}' if end.host else ''} {killed_by(end.killed_by)}", True
    if attempt is None:
        return "the ranks failed before the run was opened", False
    if end.code == HANG:
        return read_json(run.hang(attempt)).get("reason", "the ranks made no progress"), True
    failed = [b for b in last_words if b["exit_code"] == end.code]
    for words in sorted(failed, key=lambda b: (b["lost"], b["restart"])):
        blamed = f"rank {words['rank']}: " if words["restart"] and not words["lost"] else ""
        return blamed + words["reason"], words["restart"]
    record = read_json(run.record(attempt))
    return record.get("reason", f"the ranks ended with exit code {end.code}"), record.get("restart", False)


def _complete(run: RunFolder, attempt: int, ended: Ended, decision: Decision) -> None:
    """Write down the end of an attempt where its rank 0 could not, or knew less than all ranks together."""
    record = read_json(run.record(attempt))
    code = SAME_CRASH if decision.code == SAME_CRASH else ended.code
    if (record.get("exit_code"), record.get("reason")) == (code, ended.reason):
        return
    facts = {"lost": True} if ended.lost else {}
    try:
        run.end_attempt(attempt, code, decision.why if code == SAME_CRASH else ended.reason, ended.again, facts, replace=True)
    except OSError as error:
        say(f"warning: {run.record(attempt)} not written: {error}")


def _wait(seconds: float, signals: Signals) -> bool:
    """Wait; whether a signal came meanwhile."""
    until = time.monotonic() + seconds
    while True:
        if any(True for _ in signals.take()):
            return True
        if (left := until - time.monotonic()) <= 0:
            return False
        time.sleep(min(left, POLL_SECONDS))


def _line(reason: str) -> str:
    return (reason.splitlines() or [""])[0][:300]
