"""Which machines a start of a run gets: those that work, in the order in which they were given, spares where others fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from bigtrain.errors import HANG, BadNode
from bigtrain.runfolder import RunFolder, read_json
from bigtrain_launch.cluster import Cluster, Node
from bigtrain_launch.local import End, say

Check = Callable[[Sequence[Node]], Mapping[str, str]]
"""Looks at connected machines, and returns those that must not be used, and why, in a line each."""


class Pool:
    """`nodes`, of which a start gets the first `wanted`; `least` must be left. One that has failed `failures` times is left out."""

    def __init__(self, nodes: Sequence[Node], wanted: int, least: int, failures: int):
        self._nodes, self._wanted, self._least, self._limit = list(nodes), wanted, least, failures
        self._failures: Counter[str] = Counter()
        self._lost: set[str] = set()  # at least once: they may come back, but whoever was never lost is asked first
        self._out: dict[str, str] = {}

    def take(self, connect: Callable[[Sequence[str]], Mapping[str, str]], check: Check) -> list[Node]:
        """Machines for the next start, with an agent on each. Raises BadNode when too few are left."""
        while True:
            able = [node for node in self._nodes if node.name not in self._out]
            chosen = sorted(able, key=lambda node: node.name in self._lost)[: self._wanted]
            if len(chosen) < self._least:
                raise BadNode(self._too_few(len(chosen)))
            problems = connect([node.name for node in chosen]) or check(chosen)
            if not problems:
                if len(chosen) < self._wanted:
                    say(f"going on with {len(chosen)} of {self._wanted} machines; train.global_batch stays what it is")
                return [node for node in self._nodes if node in chosen]
            for name, why in problems.items():
                self._leave_out(name, why)

    @property
    def out(self) -> list[str]:
        """Machines that are left out of further starts."""
        return list(self._out)

    def blame(self, suspects: Iterable[str], lost: Iterable[str], why: str) -> None:
        """Machines that a start has failed on, `lost` the ones that were lost to it."""
        self._lost.update(lost)
        for name in suspects:
            self._failures[name] += 1
            if self._failures[name] >= self._limit and len(self._nodes) > 1:
                self._leave_out(name, f"it has failed {self._failures[name]} times, the last time: {why}")

    def _leave_out(self, name: str, why: str) -> None:
        self._out[name] = why
        say(f"{name} is left out: {why}")

    def _too_few(self, left: int) -> str:
        needed = f"{self._least} machine{'s' * (self._least > 1)} {'is' if self._least == 1 else 'are'} needed and {left or 'none'} left"
        named = ", ".join(self._out)
        return f"{needed}: look at {named}; or add launch.spares, or lower launch.min_nodes; the same command goes on"


def start_on(
    cluster: Cluster,
    pool: Pool,
    run: RunFolder,
    argv: Sequence[str],
    environment: Mapping[str, str],
    *,
    port: int | None,
    check: Check = lambda nodes: {},
) -> Callable[[Mapping[str, str]], End]:
    """A function for `supervise` that starts `bigtrain *argv`, which trains `run`, on machines of the pool. For `environment` and
    `port` see Cluster.attempt. `check` is asked before each start."""

    def start(own: Mapping[str, str]) -> End:
        try:
            nodes = pool.take(cluster.connect, check)
        except BadNode as error:
            say(str(error))
            return End(error.code, reason=str(error))
        before = run.attempts()
        end = cluster.attempt(nodes, argv, {**environment, **own}, run=str(run.path.absolute()), port=port)
        suspects = end.suspects
        if new := [number for number in run.attempts() if number not in before]:
            hosts = [node.name for node in nodes for _ in range(node.ranks)]
            suspects = tuple(dict.fromkeys(hosts[rank] for rank in _blamed(run, new[-1], end))) or suspects
        if not end.asked:
            pool.blame(suspects, end.gone, end.reason or f"rank {end.rank} ended with exit code {end.code}")
        return end

    return start


def _blamed(run: RunFolder, attempt: int, end: End) -> list[int]:
    """Ranks that are to blame by what they have left: who was late in a hang, and who failed by itself where the first to end had
    only lost another. Empty where the end itself says more."""
    if end.code == HANG:
        return read_json(run.hang(attempt)).get("late", [])
    if end.gone or end.killed_by:
        return []
    failed = [beat for beat in run.heartbeats(attempt, now=0.0) if beat.get("exit_code") == end.code]
    if not any(beat["lost"] for beat in failed if beat["rank"] == end.rank):
        return []
    return [beat["rank"] for beat in failed if not beat["lost"]]
