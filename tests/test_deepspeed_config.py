"""What DeepSpeed is told: whole dictionaries, and that DeepSpeed itself knows every key of them."""

import json
from dataclasses import replace

import pytest

from bigtrain import hardware
from bigtrain.cli import app
from bigtrain.config import Config, batch_arithmetic
from bigtrain.deepspeed_config import derive

BASE = {
    "model": {"layers": 1, "width": 8, "heads": 1, "mlp_width": 8, "max_positions": 8},
    "data": {"sequence_length": 8},
    "train": {"steps": 10, "global_batch": 7, "micro_batch": 2, "clip": 0.5},
    "optimizer": {"lr": 0.1},
    "zero": {"bucket_bytes": 4096},
}


def derived(precision: str, ranks: int = 1, **sections) -> dict:
    config = Config.model_validate({**BASE, **{name: {**BASE.get(name, {}), **values} for name, values in sections.items()}})
    return derive(config, batch_arithmetic(config.train, ranks), precision)


def golden(stage: int, bucket: int, **more) -> dict:
    zero = {
        "stage": stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        **more.pop("zero_optimization", {}),
    }
    return {
        "train_batch_size": 8,  # seven sequences in places for eight
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
        **more,
    }


FP16 = {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}}
BF16 = {"bf16": {"enabled": True}}
SUMMED = {"data_types": {"grad_accum_dtype": "fp32"}}
OFFLOADED = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}, "zero_force_ds_cpu_optimizer": False}
CASES = [
    ("fp32", {"zero": {"stage": 0}}, golden(0, 1024, gradient_clipping=0.0)),  # there the engine clips
    ("fp32", {"zero": {"stage": 1}}, golden(1, 1024)),
    ("fp32", {"zero": {"stage": 2}}, golden(2, 1024)),
    ("fp32", {"zero": {"stage": 3}}, golden(3, 1024)),
    ("bf16", {"zero": {"stage": 0}}, golden(0, 2048, **BF16)),
    ("bf16", {"zero": {"stage": 1}}, golden(1, 2048, **BF16, **SUMMED)),
    ("bf16", {"zero": {"stage": 3}}, golden(3, 2048, **BF16, **SUMMED)),
    (
        "bf16",
        {"zero": {"stage": 2}, "train": {"micro_batch": 8}},
        golden(2, 2048, **BF16) | dict(zip(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), (8, 1))),
    ),
    ("fp16", {"zero": {"stage": 2}}, golden(2, 2048, **FP16)),
    ("bf16", {"zero": {"stage": 2, "offload_optimizer": True}}, golden(2, 2048, **BF16, **SUMMED, **OFFLOADED)),
    ("fp32", {"train": {"clip": None}}, golden(2, 1024, gradient_clipping=0.0)),
    ("fp32", {"zero": {"stage": 3}, "optimizer": {"name": "muon"}}, golden(3, 1024, zero_optimization={"reduce_scatter": False})),
]
NAMES = ["-".join([precision, *(f"{k}={v}" for s in sections.values() for k, v in s.items())]) for precision, sections, _ in CASES]


@pytest.mark.parametrize(("precision", "sections", "expected"), CASES, ids=NAMES)
def test_whole_dictionary(precision, sections, expected):
    assert derived(precision, **sections) == expected


def test_ranks_share_the_batch():
    found = derived("fp32", ranks=3)
    assert (found["train_batch_size"], found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (12, 2, 2)


class Asked(dict):
    """Remembers which keys were looked at."""

    seen: set

    def get(self, key, *default):
        self.seen.add(key)
        return super().get(key, *default)

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)


@pytest.mark.parametrize(("precision", "sections", "expected"), CASES, ids=NAMES)
def test_deepspeed_accepts_every_key(precision, sections, expected):
    """Its nested sections refuse unknown keys; at the top it reads what it knows and passes over the rest in silence."""
    from deepspeed.runtime.config import DeepSpeedConfig

    Asked.seen = set()
    found = DeepSpeedConfig(Asked(expected))
    assert set(expected) <= Asked.seen
    assert found.train_batch_size == 8 and found.zero_config.stage == expected["zero_optimization"]["stage"]
    assert found.gradient_clipping == expected["gradient_clipping"]
    assert found.float16_config.enabled is (precision == "fp16") and found.bfloat16_config.enabled is (precision == "bf16")
    if precision == "fp16":
        scale = found.float16_config
        assert (scale.initial_scale_power, scale.hysteresis, scale.loss_scale_window, scale.loss_scale) == (16, 2, 1000, 0)


def test_that_check_can_fail():
    from deepspeed.runtime.config import DeepSpeedConfig

    Asked.seen = set()
    DeepSpeedConfig(Asked({**golden(2, 1024), "gradient_cliping": 1.0}))
    assert "gradient_cliping" not in Asked.seen
    with pytest.raises(Exception, match="reduce_buket_size"):
        DeepSpeedConfig(golden(2, 1024, zero_optimization={"reduce_buket_size": 1}))


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`bigtrain config deepspeed` on a CPU that multiplies bf16 fast."""
    from typer.testing import CliRunner

    cpu = replace(hardware.look(), kind="cpu", devices=0, name="a CPU", bf16=True, fp16=False, reason="a test")
    monkeypatch.setattr(hardware, "look", lambda: cpu)
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(BASE))
    return lambda *overrides: CliRunner().invoke(app, ["config", "deepspeed", str(path), *overrides])


def test_the_command_prints_it(command):
    result = command("precision=fp32", "launch.ranks_per_node=3")
    assert result.exit_code == 0 and json.loads(result.stdout) == derived("fp32", ranks=3)
    assert json.loads(command().stdout)["bf16"] == {"enabled": True}


def test_fp16_on_a_cpu_is_refused_first_and_in_one_line(command):
    result = command("precision=fp16")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr == "bigtrain: command line: precision: fp16 does not train on a CPU (a CPU); use bf16, fp32 or auto\n"
