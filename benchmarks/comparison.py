"""From measurements of bigtrain and its peers to ratios, goals and tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

FIGURES = {"tokens_per_s": "tokens/s", "memory_gib": "peak memory", "first_step_s": "command to first step"}
UNDISTURBED = 0.1
"""CPU time of other processes, in cores, up to which a measurement counts as undisturbed."""


@dataclass(frozen=True)
class Measurement:
    variant: str
    ranks: int
    dtype: str
    round: int
    tokens_per_s: float
    """Of all ranks together, from the median step."""
    memory_gib: float
    """Most that the largest rank has held: resident memory, or its GPU's where there is one."""
    first_step_s: float
    """From the command to the end of the first step."""
    loss: float
    """The last one read: says that the variant trained."""
    step_s: list[float]
    cores_elsewhere: float | None
    """CPU time that other processes took meanwhile, in cores; None where the system does not say."""


@dataclass(frozen=True)
class Goal:
    """bigtrain / `peer` in `figure` is to be at least (`>=`) or at most (`<=`) `bound`, on these ranks (one, several, any) and dtypes."""

    figure: str
    peer: str
    sign: str
    bound: float
    ranks: str = "any"
    dtype: str = "any"

    def applies(self, ranks: int, dtype: str) -> bool:
        return self.ranks in ("any", "one" if ranks == 1 else "several") and self.dtype in ("any", dtype)

    def met(self, ratio: float) -> bool:
        return ratio >= self.bound if self.sign == ">=" else ratio <= self.bound

    def __str__(self) -> str:
        return f"{FIGURES[self.figure]} {self.sign} {self.bound:g} x {self.peer}"


GOALS = (
    Goal("tokens_per_s", "deepspeed-ours", ">=", 0.97),
    Goal("tokens_per_s", "trainer-deepspeed", ">=", 1.2, "several", "bf16"),
    Goal("tokens_per_s", "deepspeed-llama", ">=", 1.1, "several", "bf16"),
    Goal("tokens_per_s", "trainer", ">=", 1.1, "one", "bf16"),
    Goal("memory_gib", "trainer", "<=", 0.75, "one"),
    Goal("memory_gib", "trainer-deepspeed", "<=", 0.75, "several"),
    Goal("first_step_s", "trainer", "<=", 1.0),
)


def summaries(measured: list[Measurement]) -> list[dict[str, Any]]:
    """A summary for each layout and dtype, in the order in which they were measured."""
    cells = dict.fromkeys((m.ranks, m.dtype) for m in measured)
    return [summary([m for m in measured if (m.ranks, m.dtype) == cell]) for cell in cells]


def summary(cell: list[Measurement]) -> dict[str, Any]:
    """Of one layout and dtype: each variant's medians over the rounds, ratios bigtrain / variant, and the goals that apply."""
    ranks, dtype = cell[0].ranks, cell[0].dtype
    variants: dict[str, Any] = {}
    for variant in dict.fromkeys(m.variant for m in cell):
        own = [m for m in cell if m.variant == variant]
        variants[variant] = {figure: statistics.median(getattr(m, figure) for m in own) for figure in FIGURES}
        variants[variant]["ratios"] = {figure: ratio(cell, figure, variant) for figure in FIGURES}
    goals = []
    for goal in GOALS:
        if goal.applies(ranks, dtype) and goal.peer in variants and (found := variants[goal.peer]["ratios"][goal.figure]):
            goals.append({"goal": str(goal), "ratio": found, "met": goal.met(found["median"])})
    return {
        "ranks": ranks,
        "dtype": dtype,
        "rounds": len({m.round for m in cell}),
        "steps": len(cell[0].step_s),
        "cores_elsewhere": max(m.cores_elsewhere or 0.0 for m in cell),
        "variants": variants,
        "goals": goals,
    }


def ratio(cell: list[Measurement], figure: str, peer: str) -> dict[str, float] | None:
    """bigtrain / `peer` within each round that has both: median, min and max. None when no round has."""
    value = {(m.variant, m.round): getattr(m, figure) for m in cell}
    ratios = [value["bigtrain", n] / value[peer, n] for variant, n in value if variant == peer and ("bigtrain", n) in value]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)} if ratios else None


def tables(found: list[dict[str, Any]], place: str, work: str) -> Iterator[RenderableType]:
    """What to print of each summary. `place` says what the ranks share, `work` what every variant did."""
    for cell in found:
        ranks = f"{cell['ranks']} rank{'s' if cell['ranks'] > 1 else ''}"
        table = Table(title=f"{cell['dtype']}, {ranks} on {place}", title_justify="left", caption_justify="left")
        table.add_column("variant", no_wrap=True)
        for title in ("tokens/s", "peak GiB of a rank", "s to first step"):
            table.add_column(title, justify="right", no_wrap=True)
        for variant, row in cell["variants"].items():
            forms = {"tokens_per_s": "{:,.0f}", "memory_gib": "{:.2f}", "first_step_s": "{:.1f}"}
            below = {name: "" if variant == "bigtrain" else "\n" + spread(row["ratios"][name]) for name in forms}
            table.add_row(variant, *(form.format(row[name]) + below[name] for name, form in forms.items()))
        quotable = "." if cell["cores_elsewhere"] <= UNDISTURBED else ": these numbers are not to be quoted."
        table.caption = (
            f"Measured: {work}. Medians of {cell['steps']} steps, then of the rounds ({cell['rounds']}). Below a figure: bigtrain's divided"
            f" by it, median (and range) of the rounds. Other processes took up to {cell['cores_elsewhere']:.2f} cores{quotable}"
        )
        goals = Table.grid(padding=(0, 2))
        for goal in cell["goals"]:
            verdict = Text("met", "green") if goal["met"] else Text("not met", "red")
            goals.add_row(verdict, goal["goal"], spread(goal["ratio"]))
        yield Group(table, goals, "")


def spread(found: dict[str, float] | None) -> str:
    return "{median:.3f} ({min:.2f}–{max:.2f})".format(**found) if found else ""
