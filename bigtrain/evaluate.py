"""Loss, perplexity and bits per byte on the held-out split: while training on all ranks, or of a saved run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from bigtrain.checkpoint.load import restore
from bigtrain.config import Batch, Config
from bigtrain.data.loader import evaluation_batches
from bigtrain.data.shards import TokenStore
from bigtrain.errors import UserError
from bigtrain.tasks import Task, make_task


def evaluate(
    model: Callable, task: Task, batches: Iterable[dict[str, Any]], device: torch.device, total: Callable[[list[float]], list[float]]
) -> dict[str, float]:
    """`task`'s metrics of `model` over `batches`, named as in metrics.jsonl (validation_loss, perplexity, ...).

    `total` sums the counts over ranks. Every rank must bring the same number of batches.
    """
    sums = [0.0, 0.0, 0.0]
    for batch in batches:
        with torch.no_grad():
            loss, _ = task.loss(model, to_device(batch, device))
        sums = [a + b for a, b in zip(sums, (float(loss), batch["count"], batch["byte_count"]), strict=True)]
    loss_sum, count, byte_count = total(sums)
    metrics = task.metrics(loss_sum, int(count), int(byte_count))
    return {"validation_loss": metrics.pop("loss"), **metrics}


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A micro-batch with its tensors on `device`."""
    if device.type == "cpu":
        return batch
    return {k: v.pin_memory().to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def evaluate_run(
    path: Path, kind: str, device: torch.device, dtype: torch.dtype, sequences: int | None, progress: Callable[[int], None]
) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run, or a checkpoint, on the data that it was trained with.

    `kind` is "model" or "ema"; `sequences` limits the held-out sequences, None: all. `progress` gets the number of sequences done.
    Raises UserError when the run has no checkpoint or its data is gone or has changed.
    """
    restored = restore(path, kind, device, dtype)
    config: Config = restored.config.model_copy(update={"evaluate": restored.config.evaluate.model_copy(update={"sequences": sequences})})
    store = TokenStore(config.data.folder, "validation")
    if store.manifest.fingerprint != restored.state.data:
        raise UserError(f"{config.data.folder}: not the data that {restored.path} was trained on; prepare that again, or set its folder")
    batch = Batch(global_batch=8, micro_batch=8, accumulation=1, ranks=1)
    task = make_task(config, store.manifest.tokenizer)

    def counted():
        for done, micro_batch in enumerate(evaluation_batches(store, task, config, batch, rank=0), 1):
            yield micro_batch
            progress(done * batch.micro_batch)

    metrics = evaluate(restored.model, task, counted(), device, total=lambda sums: sums)
    return {"step": restored.state.step, **metrics}
