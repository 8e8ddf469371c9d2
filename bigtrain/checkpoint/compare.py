"""How two checkpoints differ, tensor by tensor, whatever stage and number of ranks wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bigtrain.checkpoint.load import Reader


@dataclass(frozen=True)
class Difference:
    parameter: str
    kind: str
    """"model", "ema", or the optimizer's name of the state."""
    elements: int
    """That differ in any bit; all of them where only one of the two has the tensor, or the shapes differ."""
    largest: float | None
    """Largest absolute difference of an element; None where they cannot be compared."""
    relative: float | None
    """L2 norm of the difference, divided by that of the first checkpoint's tensor."""


def differences(one: Path, other: Path) -> Iterator[Difference]:
    """What differs between two checkpoints, in the order of their parameters; nothing for tensors that are equal.

    Raises RunError when a file of either is damaged.
    """
    a, b = Reader(one), Reader(other)
    for parameter in {**a.index.shapes, **b.index.shapes}:
        for kind in sorted(a.index.kinds | b.index.kinds):
            held = [reader.holds(parameter, kind) for reader in (a, b)]
            if not any(held):
                continue
            shapes = [reader.index.shapes.get(parameter) for reader in (a, b)]
            if not all(held) or shapes[0] != shapes[1]:
                yield Difference(parameter, kind, max(torch.Size(s or []).numel() for s in shapes), None, None)
                continue
            x, y = a.tensor(parameter, kind), b.tensor(parameter, kind)
            count = int((x.view(torch.int32) != y.view(torch.int32)).sum())
            if count:
                apart = y.double() - x.double()
                norm = float(x.double().norm())
                relative = float(apart.norm()) / norm if norm else None
                yield Difference(parameter, kind, count, float(apart.abs().max()), relative)
