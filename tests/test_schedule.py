"""Learning-rate schedules against their closed formulas, and what all of them share."""

import itertools
import math

import pytest

from bigtrain.config import Config
from bigtrain.schedule import learning_rate_share

NAMES = ("constant", "linear", "cosine", "wsd", "inverse_sqrt")


def config(steps: int = 100, **schedule) -> Config:
    return Config.model_validate(
        {
            "model": {"layers": 1, "width": 8, "heads": 1, "mlp_width": 8, "max_positions": 8},
            "data": {"sequence_length": 8},
            "train": {"steps": steps, "global_batch": 1, "micro_batch": 1},
            "optimizer": {"lr": 1.0},
            "schedule": schedule,
        }
    )


def shares(settings: Config) -> list[float]:
    return [learning_rate_share(settings, step) for step in range(settings.train.steps)]


# What each is after the warm-up, written for 100 steps of which 10 warm up: at `step` (0-based), falling to `low`.
FORMULAS = {
    "constant": lambda step, low: 1.0,
    "linear": lambda step, low: 1 - (1 - low) * (step - 10) / 89,
    "cosine": lambda step, low: low + (1 - low) * (1 + math.cos(math.pi * (step - 10) / 89)) / 2,
    "wsd": lambda step, low: 1.0 if step < 75 else 1 - (1 - low) * (step - 74) / 25,
    "inverse_sqrt": lambda step, low: math.sqrt(10 / (step + 1)),
}


@pytest.mark.parametrize("low", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_formula(name, low):
    expected = [(step + 1) / 10 for step in range(10)] + [FORMULAS[name](step, low) for step in range(10, 100)]
    assert shares(config(name=name, warmup_steps=10, min_ratio=low, decay_steps=25)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 2, 99])
@pytest.mark.parametrize("name", NAMES)
def test_rises_to_one_then_never_rises(name, warmup):
    decay = {"decay_steps": 1} if name == "wsd" else {}
    found = shares(config(name=name, warmup_steps=warmup, **decay))
    top = max(0, warmup - 1)
    assert found[top] == 1.0
    assert all(a < b for a, b in itertools.pairwise(found[: top + 1]))
    assert all(a >= b for a, b in itertools.pairwise(found[top:]))
    assert all(0 < share <= 1 for share in found)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("low", [0.0, 0.25, 1.0])
def test_last_step_is_at_the_minimum(name, low):
    assert shares(config(name=name, warmup_steps=7, min_ratio=low))[-1] == pytest.approx(low, abs=1e-15)


def test_warmup_of_one_step_is_no_warmup():
    assert shares(config(name="constant", warmup_steps=1)) == [1.0] * 100


def test_wsd_falls_over_a_fifth_unless_told():
    assert [s for s in shares(config(name="wsd", min_ratio=0.5)) if s == 1.0] == [1.0] * 80
    one = shares(config(name="wsd", decay_steps=1, min_ratio=0.5))
    assert one[98:] == [1.0, 0.5]  # a decay of one step: the last step alone is at the minimum
    whole = shares(config(name="wsd", decay_steps=100, min_ratio=0.0))
    assert whole[0] == 0.99 and whole[-1] == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_one_step(name):
    assert 0 < shares(config(steps=1, name=name))[0] <= 1


def test_depends_on_the_step_alone():
    settings = config(name="cosine", warmup_steps=10)
    assert [learning_rate_share(settings, step) for step in reversed(range(100))] == shares(settings)[::-1]
