"""Our config -> DeepSpeed's: a pure function, so that what DeepSpeed will be told can be printed and tested anywhere.

DeepSpeed accepts misspelt keys in silence (`gradient_cliping`, a clip of -1); nothing a user writes reaches it but through
this function.
"""

from __future__ import annotations

from typing import Any

from bigtrain.config import Batch, Config


def derive(config: Config, batch: Batch, precision: str) -> dict[str, Any]:
    """DeepSpeed's configuration for `config` on `batch.ranks` ranks in the resolved `precision` (bf16, fp16, fp32).

    The optimizer and the learning-rate schedule are absent on purpose: the engine builds the one and sets the other.
    """
    zero = config.zero
    bytes_per_gradient = 4 if precision == "fp32" else 2
    derived: dict[str, Any] = {
        "train_batch_size": batch.micro_batch * batch.accumulation * batch.ranks,  # places, weight-zero sequences included
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        # At stage 0 in float32 DeepSpeed clips but keeps the norm to itself: there the engine does both.
        "gradient_clipping": 0.0 if _plain(zero.stage, precision) else config.train.clip or 0.0,
        "zero_optimization": {
            "stage": zero.stage,
            "overlap_comm": zero.overlap_comm,
            "contiguous_gradients": True,
            "reduce_bucket_size": zero.bucket_bytes // bytes_per_gradient,
            "allgather_bucket_size": zero.bucket_bytes // bytes_per_gradient,
        },
        "zero_allow_untested_optimizer": True,  # "tested" is a list of class names; ours stands in docs/optimizers.md
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }
    if zero.offload_optimizer:
        derived["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        derived["zero_force_ds_cpu_optimizer"] = False  # torch's own optimizers step in host memory too
    if config.optimizer.name == "muon" and zero.stage == 3:
        derived["zero_optimization"]["reduce_scatter"] = False  # Muon needs whole gradients; DeepSpeed refuses otherwise
    if precision == "bf16":
        derived["bf16"] = {"enabled": True}
        if batch.accumulation > 1 and zero.stage > 0:
            # Sums of micro-batch gradients keep float32's bits; stage 0 has no such buffer and adds in bf16.
            derived["data_types"] = {"grad_accum_dtype": "fp32"}
    if precision == "fp16":
        derived["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}
    return derived


def _plain(stage: int, precision: str) -> bool:
    """True where DeepSpeed steps the optimizer on the model's own parameters, without a wrapper that knows the norm."""
    return stage == 0 and precision == "fp32"
