"""Tasks: what differs between kinds of training. A task makes batches of samples, asks the model for the loss, and names
the metrics; the loop, the loader and the engine know nothing else of it. A new kind of training is a new file here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from bigtrain.config import Config
from bigtrain.data.pack import Sample
from bigtrain.data.shards import TokenizerInfo
from bigtrain.tasks.causal import Causal
from bigtrain.tasks.masked import Masked

Batch = dict[str, Any]
"""Tensors and plain values of one micro-batch. Every task gives:

count       int, targets that are counted; 0 if all rows are of weight zero
byte_count  int, UTF-8 bytes of text behind them, or 0 if the task does not predict all of it

The rest is the task's own; the loop moves tensors to the device and hands the batch back to `loss`.
"""


class Task(Protocol):
    def batch(self, samples: Sequence[Sample], positions: Sequence[int]) -> Batch:
        """Stack samples; `positions` (global, over epochs) key whatever is random, so that it is the same on any rank.

        A sample whose targets are all IGNORE has weight zero and must stay so.
        """

    def loss(self, model: Callable[..., tuple[torch.Tensor, torch.Tensor]], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss and the number of targets in it, both scalars. `model` is called as `Transformer.forward` is."""

    def metrics(self, loss_sum: float, count: int, byte_count: int) -> dict[str, float]:
        """What to report, from sums over any number of batches and ranks. Raises ValueError for a count of 0."""


def make_task(config: Config, tokenizer: TokenizerInfo) -> Task:
    """The task of `train.task`. Raises UserError if the tokenizer lacks a token that it needs."""
    if config.train.task == "masked":
        return Masked(config, tokenizer)
    return Causal(config)
