"""Ranks as threads and partitions as plain tensors: saving and loading without DeepSpeed or processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bigtrain.checkpoint import save
from bigtrain.watchdog import Pulse


@dataclass
class Piece:
    name: str
    offset: int
    length: int
    start: int


@dataclass
class Partition:
    """What `checkpoint.state.Partition` promises to saving and loading, over tensors of its own."""

    pieces: list[Piece]
    flat: dict[str, torch.Tensor]
    replicated: bool = False
    own_layout: dict[str, list[Piece]] = field(default_factory=dict)
    scalars_set: dict[str, float] = field(default_factory=dict)

    def tensors(self) -> dict[str, tuple[torch.Tensor, list[Piece]]]:
        return {kind: (tensor, self.own_layout.get(kind, self.pieces)) for kind, tensor in self.flat.items()}

    def create(self, kind: str) -> None:
        if kind not in self.flat:
            self.flat[kind] = torch.full_like(self.flat["model"], torch.nan)

    def set_scalars(self, values: dict[str, float]) -> None:
        self.scalars_set = dict(values)


class World:
    """One of `size` ranks that are threads of this process."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, table: list[Any]):
        self.rank, self.size, self.first, self.pulse = rank, size, rank == 0, Pulse()
        self._barrier, self._table = barrier, table

    def gather(self, value: Any) -> list[Any]:
        self._table[self.rank] = value
        self._barrier.wait()
        gathered = list(self._table)
        self._barrier.wait()
        return gathered


def on_ranks(size: int, function: Callable[[World], Any]) -> list[Any]:
    """What `function` returns, or raises, on each of `size` ranks."""
    barrier, table = threading.Barrier(size, timeout=30), [None] * size

    def one(rank: int) -> Any:
        try:
            return function(World(rank, size, barrier, table))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def partitions(values: dict[str, dict[str, torch.Tensor]], layout: list[list[tuple[str, int, int]]], gap: int = 0) -> list[Partition]:
    """Partitions of the pieces (parameter, offset, length) in `layout`, filled from `values` (kind -> parameter -> tensor).

    Between and around pieces lie `gap` elements that belong to no parameter.
    """
    made = []
    for rows in layout:
        pieces, start = [], gap
        for name, offset, length in rows:
            pieces.append(Piece(name, offset, length, start))
            start += length + gap
        flat = {}
        for kind, tensors in values.items():
            flat[kind] = torch.full((start,), -7.0)
            for piece in pieces:
                flat[kind][piece.start : piece.start + piece.length] = tensors[piece.name].flatten()[
                    piece.offset : piece.offset + piece.length
                ]
        made.append(Partition(pieces, flat))
    return made


SHAPES = {"a.weight": [5, 3], "b": [7]}


def values(shapes: dict[str, list[int]], kinds=("model", "exp_avg", "ema"), seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {kind: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for kind in kinds}


def halves(shapes: dict[str, list[int]], rank: int, size: int) -> list[list[tuple[str, int, int]]]:
    """Every parameter cut evenly over the ranks, in one partition."""
    rows = []
    for name, shape in shapes.items():
        n = torch.Size(shape).numel()
        low, high = n * rank // size, n * (rank + 1) // size
        rows.append((name, low, high - low))
    return [rows]


STATE = {
    "position": 0,
    "global_batch": 4,
    "data": "d",
    "done": False,
    "best_loss": None,
    "evaluations_since_best": 0,
    "skipped": 0,
    "norm_average": 0.0,
    "norm_count": 0,
    "optimizer": {},
    "loss_scaler": {},
    "metrics": {},
}
"""state.json, but for the step."""


FILES = {"config.yaml": "x: 1\n"}


def saved(folder: Path, step: int, shapes, mine: list[Partition], world: World, rules=None, files=FILES, **state) -> Path:
    """Save `mine` as this rank's part of a checkpoint."""
    content = save.Content(step, shapes, save.fragments(mine, world), {**STATE, "step": step, **state}, files)
    return save.save(folder, content, world, rules)


def write(
    folder: Path,
    step: int,
    size: int = 2,
    shapes=SHAPES,
    seed: int = 0,
    kinds=("model", "exp_avg", "ema"),
    rules=None,
    files=FILES,
    **state,
) -> list:
    """Save a checkpoint from `size` ranks; gives what each rank's save returned or raised."""
    whole = values(shapes, kinds, seed)

    def one(world):
        mine = partitions(whole, halves(shapes, world.rank, size))
        return saved(folder, step, shapes, mine, world, rules, files, **state)

    return on_ranks(size, one)
