"""Where a run is: all that a checkpoint needs besides tensors, and what decides which step is passed over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bigtrain.checkpoint.format import State

NORM_WINDOW = 50
"""Steps over which the usual norm of the gradient is averaged."""


@dataclass
class Progress:
    step: int = 0
    """Optimizer steps done, those that were passed over among them."""
    position: int = 0
    """Sequences consumed, over all epochs."""
    best_loss: float = math.inf
    """Lowest validation loss so far."""
    evaluations_since_best: int = 0
    skipped: int = 0
    """Steps passed over in a row, up to now."""
    norm_average: float = 0.0
    """Moving average of the gradient's norm, over the steps that were applied."""
    norm_count: int = 0

    def largest_norm(self, spike: float | None) -> float:
        """The gradient norm above which a step is passed over; it takes half a window to know what is usual."""
        return math.inf if spike is None or self.norm_count < NORM_WINDOW // 2 else spike * self.norm_average

    def applied(self, norm: float) -> None:
        """Take an applied step's gradient norm into the average."""
        self.skipped, self.norm_count = 0, self.norm_count + 1
        self.norm_average += (norm - self.norm_average) / min(self.norm_count, NORM_WINDOW)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "best_loss": self.best_loss if math.isfinite(self.best_loss) else None}

    @classmethod
    def of(cls, state: State) -> Progress:
        kept = {name: getattr(state, name) for name in vars(cls())}
        return cls(**kept | {"best_loss": math.inf if state.best_loss is None else state.best_loss})
