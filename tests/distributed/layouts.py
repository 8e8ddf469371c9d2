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


def layout(world, stage: int, optimizer: str = "adamw") -> str:
    return f"{optimizer}-{stage}-{world.size}"


def save(world, folder: Path, data: str, stages: list[int], optimizer: str = "adamw") -> dict[str, list]:
    """For each stage a whole run on these ranks, which leaves a checkpoint of step SAVED: its rows."""
    rows = {}
    for stage in stages:
        name = layout(world, stage, optimizer)
        t = trainer(settings(data, folder, name, stage, optimizer=optimizer), world)
        rows[name] = rows_of(t)
        t.train()
        close(t)
    return rows


def load(world, folder: Path, data: str, cases: list, optimizer: str = "adamw") -> dict[str, list]:
    """For each (stage, offload, layouts that saved): load each checkpoint, save it again at once, and go on: the rows."""
    result = {}
    for stage, offload, sources in cases:
        for source in sources:
            name = f"{source}-to-{layout(world, stage, optimizer)}{'-offload' * offload}"
            t = trainer(settings(data, folder, name, stage, offload, optimizer), world)
            t.resume(folder / "runs" / source / "checkpoints" / f"step-{SAVED:08d}")
            t.saved = None
            t.save()
            result[name] = rows_of(t)
            t.train()
            close(t)
    return result


def checkpoint(folder: Path, name: str) -> Path:
    return next(c for c in format.checkpoints(folder / "runs" / name / "checkpoints") if format.step_of(c) == SAVED)
