"""Learning-rate schedules: pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math

from bigtrain.config import Config, wsd_decay_steps


def learning_rate_share(config: Config, step: int) -> float:
    """Share of `optimizer.lr` for optimizer step `step` (0-based).

    Linear warm-up to 1 over `warmup_steps` (the first step is 1/warmup_steps, not 0), then by name:
    constant; linear and cosine fall to `min_ratio` at the last step (Loshchilov & Hutter 2017, eq. 5);
    wsd holds 1 and falls linearly over the last `decay_steps` (Hu et al. 2024, MiniCPM);
    inverse_sqrt falls as sqrt(warmup/step) (Vaswani et al. 2017, section 5.3).
    """
    schedule, steps = config.schedule, config.train.steps
    warmup = schedule.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "inverse_sqrt":
        return math.sqrt(max(1, warmup) / (step + 1))
    if schedule.name == "wsd":
        decay = wsd_decay_steps(config)
        progress = max(0, step + 1 - (steps - decay)) / decay
    else:
        progress = (step - warmup) / max(1, steps - 1 - warmup)
    progress = min(1.0, progress)
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return schedule.min_ratio + (1 - schedule.min_ratio) * fall
