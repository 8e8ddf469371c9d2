"""Workers for test_layouts.py: a run saved in one layout (ZeRO stage, ranks) and gone on with in another."""

from __future__ import annotations

from pathlib import Path

from stages import rows_of
from training import close, config, trainer

from bigtrain.checkpoint import format

SAVED, GONE_ON = 3, 10
"""Steps before the checkpoint, and after it."""


def settings(data: str, folder: Path, name: str, stage: int, offload: bool = False, optimizer: str = "adamw"):
    """Whatever a checkpoint must carry: tied embeddings, two groups, a moving average, frozen parameters."""
    return config(
        Path(data),
        run={"name": name, "folder": str(folder / "runs")},
        model={"tied_embeddings": True},
        zero={"stage": stage, "offload_optimizer": offload},
        optimizer={"name": optimizer, "lr": 1e-3, "eps": 1e-4},
        train={
            "steps": SAVED + GONE_ON,
            "global_batch": 8,
            "micro_batch": 2,
            "ema_decay": 0.9,
            "clip": None if optimizer == "muon" else 1.0,
            "frozen": ["layers.0.mlp.*", "layers.1.attention_norm.weight"],
        },
        checkpoint={"every": SAVED, "keep": 9},
    )


def save(world, folder: Path, data: str, cases: list) -> dict[str, list]:
    """For each (optimizer, stage) a whole run on these ranks, which leaves a checkpoint of step SAVED: its rows."""
    rows = {}
    for optimizer, stage in cases:
        name = f"{optimizer}-{stage}-{world.size}"
        t = trainer(settings(data, folder, name, stage, optimizer=optimizer), world)
        rows[name] = rows_of(t)
        t.train()
        close(t)
    return rows


def load(world, folder: Path, data: str, cases: list) -> dict[str, list]:
    """For each (optimizer, who saved, stage, offload): load the checkpoint, save it again at once, and go on: the rows."""
    result = {}
    for optimizer, source, stage, offload in cases:
        name = f"{optimizer}-{source}-to-{stage}-{world.size}"
        t = trainer(settings(data, folder, name, stage, offload, optimizer), world)
        t.progress = t.saving.resume(checkpoint(folder, f"{optimizer}-{source}"))
        t.saving.saved = None
        t.saving.save(t.progress, {})
        result[name] = rows_of(t)
        t.train()
        close(t)
    return result


def checkpoint(folder: Path, name: str) -> Path:
    return next(c for c in format.checkpoints(folder / "runs" / name / "checkpoints") if format.step_of(c) == SAVED)
