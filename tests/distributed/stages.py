"""Workers for test_resume.py and test_optimizers.py: every ZeRO stage and optimizer, saved, loaded and gone on from."""

from __future__ import annotations

from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from training import close, config, trainer

from bigtrain.checkpoint import format
from bigtrain.checkpoint.state import link, partitions
from bigtrain.errors import StopRequested

CROSSED = [(1, True), (2, False), (3, False)]
"""(stage, offload) that also load stage 0's checkpoint: one place for each kind of layout."""


def rows_of(t) -> list[list[float]]:
    """Makes the trainer's report collect [step, loss, gradient norm]."""
    rows: list[list[float]] = []
    t.report.step = lambda row: rows.append([row["step"], row["loss"], row["grad_norm"]])
    return rows


def resume(world, folder: Path, data: str, cases: list) -> dict[str, dict]:
    """For each (stage, precision): rows of a straight run, of one stopped after ten steps, and of its resumption."""
    # DeepSpeed refuses fp16 on a CPU for want of fast kernels; torch has slow ones, enough to try the path.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    result = {}
    for stage, precision in cases:
        name = f"{stage}-{precision}"
        # Everything that carries state: dropout, accumulation that does not divide, a moving average, tied embeddings.
        changes = {
            "precision": precision,
            "zero": {"stage": stage},
            "train": {"steps": 20, "global_batch": 7, "micro_batch": 2, "ema_decay": 0.9},
            "checkpoint": {"every": 5},
            "evaluate": {"every": 6, "sequences": 4},  # between steps, with the model's own forward outside of the engine's
            "generate": {"prompts": ["word"], "tokens": 3},
        }
        model = {"dropout": 0.1, "tied_embeddings": stage % 2 == 0, "activation_checkpointing": "full" if stage in (1, 3) else "none"}

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
        second.progress = second.saving.resume(format.checkpoints(second.saving.folder)[-1])
        result[name]["second"] = rows_of(second)
        second.train()
        result[name]["loss_scale"] = second.engine.loss_scale
        close(second)
    return result


def optimizers(world, folder: Path, data: str, cases: list) -> dict[str, dict]:
    """For each (optimizer, stage, offload): five steps, and the last two again after loading stage 0's checkpoint of step 3.

    "resumed" are those two after loading its own checkpoint, where that differs most from the others: Muon's momentum.
    """
    result: dict[str, dict] = {}
    for optimizer, stage, offload in cases:
        name = f"{optimizer}-{stage}-{offload}"
        settings = config(
            Path(data),
            run={"name": name, "folder": str(folder / "runs")},
            zero={"stage": stage, "offload_optimizer": offload},
            optimizer={"name": optimizer, "lr": 0.01, "eps": 1e-4},
            schedule={"name": "constant", "warmup_steps": 0},
            train={"steps": 5, "global_batch": 8, "micro_batch": 2, "clip": None},
            checkpoint={"every": 3},
        )

        def train(checkpoint: Path | None = None, settings=settings) -> tuple[list, list]:
            t = trainer(settings, world)
            if checkpoint:
                t.progress = t.saving.resume(checkpoint)
            rows = rows_of(t)
            t.train()
            problems = _compare_with_deepspeed(t) if settings.zero.stage else []
            close(t)
            return rows, problems

        rows, problems = train()
        result[name] = {"straight": rows, "problems": problems}
        saved = [folder / "runs" / run / "checkpoints" / "step-00000003" for run in (f"{optimizer}-0-False", name)]
        if (stage, offload) in CROSSED:
            result[name]["cross"] = train(saved[0])[0]
        if optimizer == "muon":
            result[name]["resumed"] = train(saved[1])[0]
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
