"""Before a run on several machines: are they alike, do they share the run's folder, and is one of them, or a link, slow?

Every machine is asked what it can tell without torch (facts.py); when that is in order, bigtrain.probe runs on all of them as the
ranks of the run will. What the figures mean is verdict.py's business.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bigtrain.config import Config
from bigtrain.errors import RunError
from bigtrain.runfolder import RunFolder
from bigtrain_launch.cluster import Cluster, Node
from bigtrain_launch.facts import LAUNCHER_WORD
from bigtrain_launch.verdict import Finding, judge_answers, judge_facts, measured_links, rank_nodes

FACT_SECONDS = 20.0  # of the time for all; a machine that takes longer to look at itself is not well
KILL_SHARE = 0.9  # of the time that is left, for the ranks to end by themselves
ROWS = 16
Facts = dict[str, dict[str, Any]]
Answers = dict[int, dict[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """What a preflight found."""

    nodes: Sequence[Node]
    findings: list[Finding]
    facts: Facts = field(default_factory=dict)
    answers: Answers = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return any(finding.problem for finding in self.findings)

    @property
    def problems(self) -> dict[str, list[str]]:
        """What is wrong, by the node to do without."""
        found: dict[str, list[str]] = {}
        for finding in self.findings:
            if finding.problem and finding.node:
                found.setdefault(finding.node, []).append(finding.text)
        return found


def check(
    cluster: Cluster,
    nodes: Sequence[Node],
    config: Config,
    run: RunFolder,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    say: Callable[[str], None],
) -> Verdict:
    """Look at connected machines before ranks start on them, for launch.preflight.seconds at most.

    arguments: the config file and the overrides that the ranks will read; environment: their variables. Raises RunError when the
    run's folder cannot be written.
    """
    settings, start = config.launch.preflight, time.monotonic()

    def left() -> float:
        return settings.seconds - (time.monotonic() - start)

    told, findings = _ask(cluster, nodes, config, run, min(FACT_SECONDS, settings.seconds / 3))
    if not any(finding.problem for finding in findings):
        advice = "look at its routes and firewalls; /etc/hosts may name an address that only the machine itself reaches"
        findings += [Finding(name, why, advice) for name, why in cluster.apart(nodes).items()]
    if any(finding.problem for finding in findings):
        return Verdict(nodes, findings, told, seconds=time.monotonic() - start)

    def measure() -> Answers:
        command = ["--seconds", f"{KILL_SHARE * left():.1f}", *arguments]
        return cluster.gather(nodes, "bigtrain.probe", command, environment, left())

    say(f"preflight: measuring {len(nodes)} machines, for {left():.0f} s at most")
    before = left()
    answers = measure()
    measured = judge_answers(nodes, answers, settings)
    if any(f.speed and f.problem for f in measured) and left() > 1.2 * (before - left()):
        say("preflight: something is slow; measuring again, so that no passing load is blamed")
        answers = best_of(answers, measure())
        measured = judge_answers(nodes, answers, settings)
    return Verdict(nodes, findings + measured, told, answers, time.monotonic() - start)


def _ask(cluster: Cluster, nodes: Sequence[Node], config: Config, run: RunFolder, seconds: float) -> tuple[Facts, list[Finding]]:
    """Facts of all nodes, and what is wrong with them. Words are exchanged in a folder that is new: a network file system may remember
    that a file was not there."""
    word, token = secrets.token_hex(8), f".preflight-{secrets.token_hex(4)}"
    path = run.path.absolute()  # an agent answers from wherever ssh has put it
    folder = path / token
    try:
        folder.mkdir()
        (folder / LAUNCHER_WORD).write_text(word)
        told = cluster.facts(nodes, {"folder": str(path), "token": token}, seconds)
        seen = {}
        for name, facts in told.items():
            wrote = facts["shared"]["wrote"]
            seen[name] = bool(wrote) and (folder / wrote).is_file()
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror}); make room, or set another run.folder") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return told, judge_facts(nodes, told, word, seen, str(path), config.launch.preflight)


def best_of(first: Answers, second: Answers) -> Answers:
    """Two measurements as one that blames nobody whom either of them clears."""
    merged = {}
    for rank in first.keys() | second.keys():
        one, two = first.get(rank, {}), second.get(rank, {})
        merged[rank] = one | two
        if "tflops" in one and "tflops" in two:
            merged[rank]["tflops"] = max(one["tflops"], two["tflops"])
        links = {peer: measured for peer, *measured in one.get("pairs", ())}
        for peer, best, usual, why in two.get("pairs", ()):
            other_best, other_usual, other_why = links.get(peer, (best, usual, why))
            links[peer] = [max(best, other_best), min(usual, other_usual), why and other_why]
        if links:
            merged[rank]["pairs"] = [[peer, *measured] for peer, measured in links.items()]
    return merged


def show(verdict: Verdict, console: Console, whole: bool = True) -> None:
    """Print what was found for a person: a table of the machines, those with problems first, and a line for each finding. Without
    any the table is left out, unless the `whole` is asked for."""
    if verdict.facts and (whole or verdict.findings):
        console.print(_table(verdict))
    if summary := _summary(verdict):
        console.print(Text(summary), soft_wrap=True)
    grouped: dict[tuple[str, str, bool], list[str | None]] = {}
    for finding in sorted(verdict.findings, key=lambda finding: not finding.problem):
        grouped.setdefault((finding.text, finding.advice, finding.problem), []).append(finding.node)
    for (text, advice, problem), names in grouped.items():
        style = "red" if problem else "yellow"
        console.print(Text(f"{'problem' if problem else 'warning'}: {_names(names)}{text}; {advice}", style=style), soft_wrap=True)
    state = "failed" if verdict.failed else "passed"
    machines = f"{len(verdict.nodes)} machine{'s' * (len(verdict.nodes) > 1)}"
    console.print(Text(f"preflight of {machines} {state} in {verdict.seconds:.1f} s", style="bold"), soft_wrap=True)


def _names(names: Sequence[str | None]) -> str:
    known = [name for name in names if name]
    shown = ", ".join(known[:ROWS]) + (f" and {len(known) - ROWS} more" if len(known) > ROWS else "")
    return f"{shown}: " if shown else ""


def _summary(verdict: Verdict) -> str:
    first = verdict.answers.get(0, {})
    if "all_reduce" not in first:
        return ""
    return (
        f"all ranks together: all_reduce {first['all_reduce']:.3g} GB/s, all_to_all {first['all_to_all']:.3g} GB/s a rank,"
        f" latency {first['latency_us']:,.0f} µs"
    )


def _table(verdict: Verdict) -> Table:
    table = Table("machine", "device")
    for column in ("TFLOP/s", "sends Gbit/s", "receives Gbit/s", "free GiB", "clock s"):
        table.add_column(column, justify="right")
    table.add_column("")
    where, links = rank_nodes(verdict.nodes), measured_links(verdict.nodes, verdict.answers)
    bad, doubtful = verdict.problems, {f.node for f in verdict.findings}
    rows = sorted(verdict.nodes, key=lambda node: (node.name not in bad, node.name not in doubtful))
    for node in rows[:ROWS]:
        facts = verdict.facts.get(node.name, {})
        ranks = [verdict.answers.get(rank, {}) for rank, name in enumerate(where) if name == node.name]
        speeds = [answer["tflops"] for answer in ranks if "tflops" in answer]
        free = next(iter(facts.get("space", {}).values()), {}).get("free_gib")
        cells = (
            node.name,
            next((answer["device"] for answer in ranks if "device" in answer), ""),
            f"{min(speeds):,.3g}" if speeds else "",
            *(
                f"{8 * median(rates):.3g}" if (rates := [link.usual for pair, link in links.items() if pair[end] == node.name]) else ""
                for end in (0, 1)
            ),
            f"{free:,.0f}" if free is not None else "",
            f"{facts['clock']:+.2f}" if facts.get("clock") is not None else "",
            "problem" if node.name in bad else "warning" if node.name in doubtful else "ok" if facts else "silent",
        )
        table.add_row(*map(Text, cells))
    if len(rows) > ROWS:
        well = sum(node.name not in doubtful for node in rows[ROWS:])
        table.add_row(Text(f"and {len(rows) - ROWS} more, {well} of them well"))
    return table
