"""Worker for test_skipping.py: gradients that are not finite, or far too large, on one rank at one step."""

from __future__ import annotations

from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from stages import rows_of
from training import close, config, trainer

BAD_STEPS = {4: float("nan"), 6: float("inf"), 33: 1e6, 34: 1e6}
"""What the gradient of one parameter is multiplied by, on rank 1, at these steps."""
STEPS = 36


def train(world, folder: Path, data: str, cases: list) -> dict[str, dict]:
    """For each (stage, precision): the rows, the warnings, and whether the weights and states of this rank stayed as they were
    in exactly the steps that were passed over."""
    type(get_accelerator()).is_fp16_supported = lambda self: True  # see stages.py
    result = {}
    for stage, precision in cases:
        name = f"{stage}-{precision}"
        settings = config(
            Path(data),
            run={"name": name, "folder": str(folder / "runs")},
            precision=precision,
            zero={"stage": stage},
            train={"steps": STEPS, "global_batch": 4, "micro_batch": 2, "spike": 100.0, "ema_decay": 0.9, "skip_limit": 2},
            schedule={"name": "constant", "warmup_steps": 0},
        )
        t = trainer(settings, world)
        rows, warnings, same = rows_of(t), [], []
        t.report.warn = warnings.append
        factor = [1.0]
        backward = t.engine.backward

        # The loss is left alone: what goes wrong on one rank only, and is seen by nothing but the agreed norm, is the gradient.
        def poisoned(loss, backward=backward, factor=factor):
            backward(loss * factor[0] if world.rank == 1 else loss)

        t.engine.backward = poisoned
        step = t.engine.step

        def watched(share, largest, step=step, t=t, same=same):
            before = _state(t)
            outcome = step(share, largest)
            same.append(all(torch.equal(a, b) for a, b in zip(before, _state(t))) if before else None)
            return outcome

        t.engine.step = watched
        agree = t.agree

        def at_step(tokens, agree=agree, t=t, factor=factor):
            total = agree(tokens)
            factor[0] = BAD_STEPS.get(t.progress.step + 1, 1.0)
            return total

        t.agree = at_step
        t.train()
        finite = all(tensor.isfinite().all() for tensor in _state(t))
        result[name] = {"rows": rows, "warnings": warnings, "same": same, "finite": bool(finite), "norms": t.progress.norm_count}
        close(t)
    return result


def _state(t) -> list[torch.Tensor]:
    return [tensor.clone() for partition in t.partitions for tensor, _ in partition.tensors().values()]
