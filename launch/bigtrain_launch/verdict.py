"""What is wrong with the machines of a run, judged from what they told and what was measured: pure functions, no process, no file.

A figure is compared with those of the other machines, never with what a machine of its kind should reach: where all are slow nobody
is blamed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median, median_high
from typing import Any, NamedTuple

from bigtrain.configlaunch import Preflight
from bigtrain_launch.cluster import Node

MUST_EQUAL = ("torch", "deepspeed", "triton", "bigtrain")  # other packages may differ, with a warning
SHARED_MEMORY_GIB = 1.0
SLOW_DISK = 0.1  # of the usual speed; shared disks are noisy


@dataclass(frozen=True)
class Finding:
    """Something wrong with a node, or with none in particular."""

    node: str | None
    text: str
    advice: str
    problem: bool = True
    """Else a warning."""
    speed: bool = False
    """A measured figure, which another measurement may not confirm."""


def judge_facts(
    nodes: Sequence[Node], told: Mapping[str, dict[str, Any]], word: str, seen: Mapping[str, bool], folder: str, settings: Preflight
) -> list[Finding]:
    """What `facts` of all nodes say. `word`: what the launcher wrote into the run's folder; `seen`: by node, whether it has read there
    what the node wrote."""
    silent = [Finding(n.name, "did not answer", "look whether it is up, and at its ssh or scheduler") for n in nodes if n.name not in told]
    told = {node.name: told[node.name] for node in nodes if node.name in told}
    world = sum(node.ranks for node in nodes)
    return [
        *silent,
        *_software(told),
        *_sharing(told, word, seen, folder),
        *_room(told, folder, world, settings),
        *_clocks(told, settings),
    ]


def judge_answers(nodes: Sequence[Node], answers: Mapping[int, dict[str, Any]], settings: Preflight) -> list[Finding]:
    """What the ranks of `bigtrain.probe` say, by rank."""
    where = rank_nodes(nodes)
    found = [*_stuck(where, answers), *_inputs(where, answers)]
    return [*found, *_devices(where, answers, settings), *_network(nodes, answers, settings)]


def rank_nodes(nodes: Sequence[Node]) -> list[str]:
    """The node of every rank."""
    return [node.name for node in nodes for _ in range(node.ranks)]


def odd_ones(values: Mapping[str, Hashable]) -> tuple[Any, dict[str, Any]]:
    """The value that most have (of equally many, the one that comes first), and those that have another."""
    usual = Counter(values.values()).most_common(1)[0][0] if values else None
    return usual, {name: value for name, value in values.items() if value != usual}


def _software(told: Mapping[str, dict[str, Any]]) -> Iterator[Finding]:
    for package in next(iter(told.values()), {}).get("versions", {}):
        usual, odd = odd_ones({name: facts["versions"].get(package) for name, facts in told.items()})
        for name, version in odd.items():
            text = f"{package} {version or 'is not installed'}; the others have {usual or 'none'}"
            yield Finding(name, text, f"install the same there ({told[name]['executable']})", package in MUST_EQUAL or not version)
    usual, odd = odd_ones({name: facts["code"] for name, facts in told.items()})
    commits = {name: facts["commit"] or "no git checkout" for name, facts in told.items()}
    for name in odd:
        others = Counter(commits[n] for n in told if n not in odd).most_common(1)[0][0]
        yield Finding(name, f"another source of bigtrain ({commits[name]}; the others: {others})", "check out the same commit on all nodes")
    usual, odd = odd_ones({name: facts["gpus"] for name, facts in told.items()})
    for name, count in odd.items():
        yield Finding(name, f"{count} GPUs; the others have {usual}", "look at nvidia-smi and dmesg there")


def _sharing(told: Mapping[str, dict[str, Any]], word: str, seen: Mapping[str, bool], folder: str) -> Iterator[Finding]:
    advice = "set run.folder to a folder that all nodes share, at the same path"
    for name, facts in told.items():
        shared = facts["shared"]
        if shared["read"] != word:
            yield Finding(name, f"does not see what the launcher writes in {folder}: it is not shared", advice)
        elif shared["wrote"] and not seen.get(name):
            yield Finding(name, f"what it writes in {folder} is not seen elsewhere: it is not shared", advice)


def _room(told: Mapping[str, dict[str, Any]], folder: str, world: int, settings: Preflight) -> Iterator[Finding]:
    for name, facts in told.items():
        for place, space in facts["space"].items():
            if space["error"] and facts["shared"]["read"] is None and place == folder:
                continue  # that it is not shared says it
            if space["error"]:
                yield Finding(name, f"cannot write in {place}: {space['error']}", "make room, or mend its permissions")
            elif place == folder and space["free_gib"] < settings.free_gib:
                text = f"{space['free_gib']:.2f} GiB are free in {place}, less than launch.preflight.free_gib: {settings.free_gib:g}"
                yield Finding(name, text, "make room, or set another run.folder")
        if (facts["shared_memory_gib"] or 0.0) < SHARED_MEMORY_GIB:
            text = f"/dev/shm has {facts['shared_memory_gib'] or 0.0:.2f} GiB; ranks of a node exchange data there"
            yield Finding(name, text, "give the container more: docker run --shm-size, launch.kubernetes.shared_memory", problem=False)
        if facts["open_files"] < (need := files_needed(world)):
            text = f"{facts['open_files']} open files are allowed; {world} ranks may need {need:,}"
            yield Finding(name, text, "raise it (ulimit -n, LimitNOFILE, limits.conf)", problem=False)
    speeds = {name: facts["space"].get(folder, {}).get("write_mib_s") for name, facts in told.items()}
    usual = median([s for s in speeds.values() if s] or [0.0])
    for name, speed in speeds.items():
        if speed and speed < SLOW_DISK * usual:
            text = f"writes {speed:,.1f} MiB/s in {folder}; usual here: {usual:,.0f}"
            yield Finding(name, text, "look at its mount and its disk", problem=False)


def files_needed(world: int) -> int:
    """Open files of a rank: a connection to every other rank in each of a few groups, and its own files."""
    return 256 + 4 * world


def _clocks(told: Mapping[str, dict[str, Any]], settings: Preflight) -> Iterator[Finding]:
    offsets = {name: facts["clock"] for name, facts in told.items() if facts.get("clock") is not None}
    usual = median_high(offsets.values()) if offsets else 0.0
    for name, offset in offsets.items():
        if abs(off := offset - usual) > settings.clock_seconds:
            text = f"its clock is {abs(off):,.1f} s {'ahead of' if off > 0 else 'behind'} the others'"
            yield Finding(name, text, "start a time service there (chrony, systemd-timesyncd)", problem=False)


STAGES = ("starting", "meeting the others", "matrix product", "collectives")
"""What a rank of bigtrain.probe must have behind it, in order; after these come the pairs, which time may cut short."""


def _stuck(where: Sequence[str], answers: Mapping[int, dict[str, Any]]) -> Iterator[Finding]:
    """Ranks that said nothing, failed, or got less far than others. Who only lost such a rank, or waited for it, is not named."""
    alone = {rank for rank, answer in answers.items() if answer["world"] != len(where)}
    for name, ranks in _by_node(where, alone).items():
        text = f"{_ranks(ranks)} took part in a run of {answers[ranks[0]]['world']} ranks, not {len(where)}"
        yield Finding(name, text, "look for variables like RANK and WORLD_SIZE that the node sets itself")
    reached = {rank: STAGES.index(a["stage"]) for rank, a in answers.items() if a["stage"] in STAGES}
    reached |= {rank: 0 for rank in range(len(where)) if rank not in answers}
    if alone or not reached:
        return
    stage = min(reached.values())
    suspects = _suspects(where, answers, {rank for rank, at in reached.items() if at == stage}, stage)
    errors = {rank: answers[rank]["error"] for rank in suspects if answers.get(rank, {}).get("error")}
    if {where[rank] for rank in suspects} == set(where) and len(set(where)) > 1:
        text = f"no rank got further than {STAGES[stage]}" + (f": {next(iter(errors.values()))}" if errors else " in time")
        advice = "do what the message says" if errors else "look at the network between the nodes, or raise launch.preflight.seconds"
        yield Finding(None, text, advice, problem=bool(stage or errors))  # a cold disk from which all import torch is no fault
        return
    for name, ranks in _by_node(where, suspects).items():
        error = next((errors[rank] for rank in ranks if rank in errors), None)
        text = f"{_ranks(ranks)} got no further than {STAGES[stage]}" if ranks[0] in answers else f"{_ranks(ranks)} did not answer"
        advice = "do what the message says" if error else "run `python -m bigtrain.probe` there and read what it prints"
        yield Finding(name, text + (f": {error}" if error else ""), advice)


def _suspects(where: Sequence[str], answers: Mapping[int, dict[str, Any]], late: set[int], stage: int) -> set[int]:
    """Those of the ranks that got no further than `stage` to which it is due."""
    if STAGES[stage] == "meeting the others":
        if answers.get(0, {}).get("error"):
            return {0}  # the others meet on it
        absent = {gone for rank in late for gone in answers[rank].get("absent", ())}
        apart = {rank for rank in range(len(where)) if where[rank] != where[0]}
        return {0} if absent and absent == apart and len({where[rank] for rank in apart}) > 1 else absent or late
    quiet = {rank for rank in late if not answers.get(rank, {}).get("error")}  # who died says nothing, who lost it complains
    return quiet if stage and quiet and len({where[r] for r in quiet}) * 2 <= len(set(where)) else late


def _inputs(where: Sequence[str], answers: Mapping[int, dict[str, Any]]) -> Iterator[Finding]:
    by_rank = {str(rank): answer for rank, answer in answers.items()}
    for key, what in (("config", "the config"), ("data", "the prepared data"), ("cuda", "CUDA"), ("nccl", "NCCL")):
        usual, odd = odd_ones({rank: a.get(key) for rank, a in by_rank.items() if key in a})
        for name, ranks in _by_node(where, set(map(int, odd))).items():
            value = answers[ranks[0]][key]
            if key in ("cuda", "nccl"):
                yield Finding(name, f"{what} {value}; the others have {usual}", "install the same build of torch on all nodes")
            else:
                text = f"{what} {'differs from that of the others' if value else 'is not there'}"
                yield Finding(name, text, "keep configs and data in a folder that all nodes share, at the same path")


def _devices(where: Sequence[str], answers: Mapping[int, dict[str, Any]], settings: Preflight) -> Iterator[Finding]:
    measured = {rank: answer for rank, answer in answers.items() if "tflops" in answer}
    usual, odd = odd_ones({str(rank): answer["device"] for rank, answer in measured.items()})
    for name, ranks in _by_node(where, set(map(int, odd))).items():
        text = f"its device is {measured[ranks[0]]['device']}, others have {usual}"
        yield Finding(name, text, "a step takes as long as on the slowest device", problem=False)
    for device in {answer["device"] for answer in measured.values()}:
        alike = {rank: answer["tflops"] for rank, answer in measured.items() if answer["device"] == device}
        middle = median_high(alike.values())
        slow = {rank for rank, tflops in alike.items() if tflops < settings.slow_device * middle}
        for name, ranks in _by_node(where, slow).items():
            who = f"{_ranks(ranks)}{'' if device == 'CPU' else f' ({device})'}"
            text = f"{who}: {min(alike[r] for r in ranks):,.3g} TFLOP/s in a matrix product; usual here: {middle:,.3g}"
            yield Finding(name, text, "look for other processes, heat and power limits there (bigtrain doctor)", speed=True)


def _network(nodes: Sequence[Node], answers: Mapping[int, dict[str, Any]], settings: Preflight) -> Iterator[Finding]:
    links = measured_links(nodes, answers)
    slow_nodes, slow_links, uneven = slow_places(links, settings.slow_link)
    for name, (way, best, usual) in slow_nodes.items():
        text = f"{way} no faster than {_rate(best)} {'to' if way == 'sends' else 'from'} any other node; usual here: {_rate(usual)}"
        yield Finding(name, text, "look at its cable, its port of the switch and ethtool", speed=True)
    for blamed, (one, other), usual in slow_links:
        there = [(f"{a} to {b} {_rate(links[a, b].best)}", links[a, b].why) for a, b in ((one, other), (other, one)) if (a, b) in links]
        why = next((f" ({why})" for _, why in there if why), "")
        text = f"the link between {one} and {other} is slow: {', '.join(rate for rate, _ in there)}{why}; usual here: {_rate(usual)}"
        yield Finding(blamed, text, "look at the cables and switches between the two", speed=True)
    if uneven:
        yield Finding(None, uneven, "give the scheduler's topology options, so that nodes are close together", problem=False, speed=True)


Pair = tuple[str, str]


class Link(NamedTuple):
    """What passed from one node to another, in GB/s."""

    best: float
    usual: float
    why: str | None = None
    """Why nothing passed where nothing did."""


def measured_links(nodes: Sequence[Node], answers: Mapping[int, dict[str, Any]]) -> dict[Pair, Link]:
    """Links by (from, to)."""
    names = [node.name for node in nodes]
    first = list(accumulate((node.ranks for node in nodes[:-1]), initial=0))
    leaders = [answers.get(rank, {}) for rank in first]
    links = {}
    for index, (name, answer) in enumerate(zip(names, leaders)):
        for peer, *measured in answer.get("pairs", ()):
            links[name, names[peer]] = Link(*measured)
        peer = answer.get("peer")
        if peer is not None and leaders[peer].get("peer") == index:  # both hung, in each other
            links[name, names[peer]] = Link(0.0, 0.0, "no answer")
    return links


def slow_places(
    links: Mapping[Pair, Link], share: float
) -> tuple[dict[str, tuple[str, float, float]], list[tuple[str, Pair, float]], str | None]:
    """Nodes that are slow with every other, as (which way, their best, the usual); links that are slow between others, as (the node to do
    without, the two, the usual); and a word where so many are slow that it is how the network is built.

    What a link did at best is compared with what is usual: on busy machines the best is a matter of luck. A node is judged by its
    fastest link: one bad cable drags all links of its node down, half of all links where there are four nodes.
    """
    slow: dict[str, tuple[str, float, float]] = {}
    for way, end in (("sends", 0), ("receives", 1)):
        best: dict[str, float] = {}
        common: dict[str, float] = {}
        for pair, link in links.items():
            best[pair[end]] = max(link.best, best.get(pair[end], 0.0))
            common[pair[end]] = max(link.usual, common.get(pair[end], 0.0))
        usual = median(common.values()) if len(common) > 2 else 0.0
        slow |= {name: (way, rate, usual) for name, rate in best.items() if rate < share * usual and name not in slow}
    rest = {pair: link for pair, link in links.items() if not slow.keys() & set(pair)}
    usual = median_high(link.usual for link in rest.values()) if rest else 0.0
    found = {tuple(sorted(pair)) for pair, link in rest.items() if link.best < share * usual}
    if len(found) > max(2, len(rest) // 8):  # rest has two ways of each pair: a quarter of the pairs
        text = f"{len(found)} of {len(rest) // 2} links are below {share:.0%} of the median, {_rate(usual)}: the network is not even"
        return slow, [], text
    touched = Counter(name for pair in found for name in pair)
    worst = {name: min(link.best for pair, link in rest.items() if pair[0] == name) for name in touched}
    blamed = [(max(pair, key=lambda n: (touched[n], -worst[n])), pair, usual) for pair in sorted(found)]
    return slow, blamed, None


def _by_node(where: Sequence[str], ranks: Iterable[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        found.setdefault(where[rank], []).append(rank)
    return found


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _rate(gigabytes: float) -> str:
    bits = gigabytes * 8
    return f"{bits:,.3g} Gbit/s" if bits >= 1 else f"{bits * 1000:,.0f} Mbit/s"
