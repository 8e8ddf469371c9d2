"""Predict the next token. B: batch, T: sequence length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from bigtrain.config import Config
from bigtrain.data.pack import IGNORE, Sample


class Causal:
    """See `Task` for the interface.

    A batch holds `token`, `target`, `position` (B, T) int64 and `document` (B, T) int32, or None for it without
    `data.document_mask`: then attention needs no mask but the causal one, and can take its fast path.
    """

    def __init__(self, config: Config):
        self.document_mask = config.data.document_mask

    def batch(self, samples: Sequence[Sample], positions: Sequence[int]) -> dict[str, Any]:
        target_BT = _stack([s.target_T for s in samples])
        counted_BT = target_BT != IGNORE
        return {
            "token": _stack([s.token_T for s in samples]),
            "target": target_BT,
            "position": _stack([s.position_T for s in samples]),
            "document": _stack([s.document_T for s in samples]) if self.document_mask else None,
            "count": int(counted_BT.sum()),
            "byte_count": int((_stack([s.target_bytes_T for s in samples]) * counted_BT).sum()),
        }

    def loss(self, model: Callable[..., tuple[torch.Tensor, torch.Tensor]], batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return model(batch["token"], position_BT=batch["position"], document_BT=batch["document"], target_BT=batch["target"])

    def metrics(self, loss_sum: float, count: int, byte_count: int) -> dict[str, float]:
        """loss in nats a token, perplexity, and bits_per_byte of text, which compares across tokenizers."""
        if not count:
            raise ValueError("metrics of no targets")
        loss = loss_sum / count
        metrics = {"loss": loss, "perplexity": math.inf if loss > 700 else math.exp(loss)}
        if byte_count:
            metrics["bits_per_byte"] = loss_sum / math.log(2) / byte_count
        return metrics


def _stack(rows: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(rows))
