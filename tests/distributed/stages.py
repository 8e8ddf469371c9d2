"""Workers for test_resume.py and test_optimizers.py: every ZeRO stage and optimizer, saved, loaded and gone on from."""

from __future__ import annotations

from pathlib import Path

import torch
from training import close, config, trainer

from bigtrain.checkpoint import format
from bigtrain.checkpoint.state import link, partitions
from bigtrain.errors import StopRequested


def rows_of(t) -> list[list[float]]:
    """Makes the trainer's report collect [step, loss, gradient norm]."""
    rows: list[list[float]] = []
    t.report.step = lambda row: rows.append([row["step"], row["loss"], row["grad_norm"]])
    return rows


def resume(world, folder: Path, data: str, cases: list) -> dict[str, dict]:
    """For each (stage, precision): rows of a straight run, of one stopped after ten steps, and of its resumption."""
    result = {}
    for stage, precision in cases:
        name = f"{stage}-{precision}"
        # Everything that carries state: dropout, accumulation that does not divide, a moving average, tied embeddings.
        changes = {
            "precision": precision,
            "zero": {"stage": stage},
            "train": {"steps": 20, "global_batch": 7, "micro_batch": 2, "ema_decay": 0.9},
            "checkpoint": {"every": 5},
        }
        model = {"dropout": 0.1, "tied_embeddings": stage % 2 == 0}

        def settings(kind: str, model=model, changes=changes, name=name):
            return config(Path(data), run={"name": f"{name}-{kind}", "folder": str(folder / "runs")}, model=model, **changes)

        straight = trainer(settings("straight"), world)
        result[name] = {"straight": rows_of(straight)}
        straight.train()
        close(straight)

        first = trainer(settings("resumed"), world)
        result[name]["first"] = rows = rows_of(first)

        def stop_after_ten(row, rows=rows, first=first):
            rows.append([row["step"], row["loss"], row["grad_norm"]])
            if row["step"] == 9 and world.rank == 1:  # seen at step 10's start, agreed on at step 11's
                first.stop = 15

        first.report.step = stop_after_ten
        try:
            first.train()
        except StopRequested:
            result[name]["stopped"] = first.progress.step
        close(first)

        second = trainer(settings("resumed"), world)
        second.resume(format.checkpoints(second.run.checkpoints)[-1])
        result[name]["second"] = rows_of(second)
        second.train()
        close(second)
    return result


def optimizers(world, folder: Path, data: str, cases: list) -> dict[str, dict]:
    """For each (optimizer, stage, offload, precision): three steps, a checkpoint, and two more steps after loading it.

    "cross" are the two steps after loading what stage 0 had saved instead.
    """
    result: dict[str, dict] = {}
    for optimizer, stage, offload, precision in cases:
        name = f"{optimizer}-{stage}-{offload}-{precision}"
        changes = {
            "precision": precision,
            "zero": {"stage": stage, "offload_optimizer": offload},
            "optimizer": {"name": optimizer, "lr": 0.01, "eps": 1e-4},
            "schedule": {"name": "constant", "warmup_steps": 0},
            "train": {"steps": 5, "global_batch": 8, "micro_batch": 2, "clip": None},
        }
        settings = config(Path(data), run={"name": name, "folder": str(folder / "runs")}, **changes)

        def go_on(checkpoint, settings=settings):
            t = trainer(settings, world)
            t.resume(checkpoint)
            rows = rows_of(t)
            t.train()
            close(t)
            return rows

        t = trainer(settings.model_copy(update={"checkpoint": settings.checkpoint.model_copy(update={"every": 3})}), world)
        rows = rows_of(t)
        t.train()
        problems = _compare_with_deepspeed(t) if stage else []
        close(t)
        saved = folder / "runs" / name / "checkpoints" / "step-00000003"
        base = folder / "runs" / f"{optimizer}-0-False-{precision}" / "checkpoints" / "step-00000003"
        result[name] = {"straight": rows, "resumed": go_on(saved), "cross": go_on(base), "problems": problems}
    return result


def _compare_with_deepspeed(t) -> list[str]:
    """Differences between our views of DeepSpeed's flat state and its own accessors, which gather whole tensors."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    link(t.engine.deepspeed)  # DeepSpeed links states when its first group has stepped: those of later groups are not there yet
    found = []
    whole: dict[tuple[str, str], torch.Tensor] = {}
    # With Muon each parameter keeps other states, and the accessors, which are collective, hang where one rank has none.
    kinds = ["model"] if t.config.optimizer.name == "muon" else sorted({kind for p in t.partitions for kind in p.tensors()})
    for name, parameter in t.engine.module.named_parameters():
        for kind in kinds:
            full = safe_get_full_fp32_param(parameter) if kind == "model" else safe_get_full_optimizer_state(parameter, kind)
            whole[name, kind] = full.detach().clone().flatten()
    for partition in partitions(t.engine.deepspeed):
        for kind, (tensor, pieces) in partition.tensors().items():
            for piece in pieces:
                if (piece.name, kind) in whole:
                    mine = tensor[piece.start : piece.start + piece.length]
                    if not torch.equal(whole[piece.name, kind][piece.offset : piece.offset + piece.length], mine):
                        found.append(f"{kind} of {piece.name} at {piece.offset}")
    return found
