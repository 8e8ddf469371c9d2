"""Every config that ships: it is read, fits the hardware that it is meant for, and trains for two steps, scaled down.

Run as a program this file is the one process that trains them all: python tests/test_configs.py FOLDER.
"""

import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bigtrain import configfile, hardware, opbuild
from bigtrain.config import Config, Model, batch_arithmetic
from bigtrain.deepspeed_config import derive
from bigtrain.hardware import Hardware

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
WHOLE = sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.yaml") if not {"models", "clusters"} & set(p.parts))
MODELS = sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.glob("models/*.yaml"))
CLUSTERS = sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.glob("clusters/*.yaml"))

LAPTOP = Hardware("cpu", 0, "CPU", False, False, "", 2, 8.0)
GPUS = Hardware("cuda", 8, "NVIDIA H100", True, True, "", 96, 1024.0)
NODES = {"pretrain/llama-70b.yaml": 4}
"""Machines of 8 GPUs that a config is meant for, where it is not one."""
SIZES = {
    "bert-base": (30522, 110e6),
    "gpt2-124m": (50257, 124e6),
    "llama-8b": (128256, 8.03e9),
    "llama-70b": (128256, 70.6e9),
    "llama-tiny": (4096, 6.9e6),
}
"""Vocabulary and parameters of each model, as published."""


def scaled_down(name: str, folder: Path) -> list[str]:
    """Overrides that keep what a config chooses (shape of the blocks, task, optimizer, schedule, ZeRO stage) and shrink it."""
    config = configfile.load(CONFIGS / name)
    return [
        *("model.layers=2", "model.width=32", "model.heads=4", "model.mlp_width=48", "model.max_positions=32"),
        *(["model.kv_heads=2"] if config.model.kv_heads else []),
        *("data.source=text", f"data.path={folder}/text", "data.tokenizer=bytes", f"data.folder={folder}/data"),
        *("data.sequence_length=32", "data.validation_fraction=0.2"),
        *("train.steps=2", "train.global_batch=4", "train.micro_batch=2", "schedule.warmup_steps=1", "precision=fp32"),
        *("evaluate.sequences=4", "generate.tokens=4", "tracking.tensorboard=false", f"run.folder={folder}/runs"),
        f"run.name={name.replace('/', '-').removesuffix('.yaml')}",
        *([f"init.checkpoint={folder}/runs/quickstart"] if config.init.checkpoint else []),
    ]


@pytest.mark.parametrize("name", WHOLE)
def test_fits_the_hardware_that_it_is_meant_for(name):
    config = configfile.load(CONFIGS / name)
    world = 8 * NODES.get(name, 1)
    here = LAPTOP if config.launch.cpu_ranks > 1 else GPUS
    world = config.launch.cpu_ranks if here is LAPTOP else world
    assert hardware.problems(config, here, world) == []
    batch = batch_arithmetic(config.train, world)
    assert batch.micro_batch * batch.accumulation * world == batch.global_batch, "sequences of weight zero in every step"
    precision, _ = hardware.choose_precision(config.precision, here)
    assert derive(config, batch, precision)["zero_optimization"]["stage"] == config.zero.stage


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_size_that_its_name_says(name):
    from bigtrain.model.transformer import parameter_shapes

    model = Model.model_validate(yaml.safe_load((CONFIGS / name).read_text())["model"])
    vocab_size, parameters = SIZES[Path(name).stem]
    count = sum(math.prod(shape) for shape in parameter_shapes(model, vocab_size).values())
    assert count == pytest.approx(parameters, rel=0.01)


def test_every_model_is_trained_by_a_config():
    included = {yaml.safe_load((CONFIGS / name).read_text())["include"] for name in WHOLE}
    assert {Path(name).name for name in MODELS} == {Path(name).name for name in included}


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_says_where_and_nothing_of_what(name, tmp_path):
    alone = yaml.safe_load((CONFIGS / name).read_text())
    assert alone.keys() <= {"launch", "restarts"}
    (tmp_path / "mine.yaml").write_text(f"include: [pretrain/llama-8b.yaml, {name}]\nlaunch: {{port: 29400}}\n")
    source = configfile.read(tmp_path / "mine.yaml", [])
    assert source.config.launch.port == 29400
    assert source.config.launch.model_dump() != configfile.load(CONFIGS / "pretrain/llama-8b.yaml").launch.model_dump() | {"port": 29400}
    world = source.config.launch.nodes * (source.config.launch.gpus_per_node or 8)
    assert hardware.problems(source.config, GPUS, world) == []
    # What its comment tells people to write is read.
    shown = re.search(r"^#   (include: .*)\n(?:#   (.*)\n)?", (CONFIGS / name).read_text(), re.MULTILINE)
    assert name in shown[1]
    (tmp_path / "shown.yaml").write_text("\n".join(filter(None, shown.groups())))
    assert configfile.load(tmp_path / "shown.yaml").model.layers == 32


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("configs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        **{"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        **opbuild.environment(),
        "PYTHONPATH": os.pathsep.join(str(p) for p in (ROOT, ROOT / "kernels", ROOT / "launch", ROOT / "tests/distributed")),
    }
    done = subprocess.run([sys.executable, __file__, folder], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("name", WHOLE)
def test_trains_for_two_steps(trained, name):
    result = trained[name]
    assert result["steps"] == [1, 2] and all(map(math.isfinite, result["losses"]))
    assert result["checkpoint"] == "step-00000002" and math.isfinite(result["validation_loss"])
    assert result["stage"] == configfile.load(CONFIGS / name, scaled_down(name, Path())).zero.stage


def test_fine_tuning_starts_from_the_checkpoint(trained):
    assert trained["finetune/quickstart.yaml"]["starts_as"] == trained["quickstart.yaml"]["ends_as"]
    assert trained["quickstart.yaml"]["starts_as"] != trained["quickstart.yaml"]["ends_as"]


def train(config: Config, world) -> dict:
    from training import close, trainer

    from bigtrain.checkpoint.load import find
    from bigtrain.start import with_data
    from bigtrain.train import Report

    class Rows(Report):
        rows: list
        validation_loss: float

        def step(self, row):
            self.rows.append(row)

        def evaluation(self, row, samples):
            self.validation_loss = row["validation_loss"]

    report = Rows()
    report.rows = []
    t = trainer(with_data(config), world, report)
    if config.init.checkpoint:
        t.start_from(Path(config.init.checkpoint), config.init.weights)
    result = {"stage": t.engine.deepspeed.zero_optimization_stage(), "starts_as": weights(t)}
    t.train()
    result |= {"steps": [row["step"] for row in report.rows], "losses": [row["loss"] for row in report.rows]}
    result |= {"validation_loss": report.validation_loss, "checkpoint": find(t.run.path).name, "ends_as": weights(t)}
    close(t)
    return result


def weights(trainer) -> float:
    """One number that any change of the float32 weights changes."""
    return sum(float((p.master.double() * p.master.double().cos()).sum()) for p in trainer.partitions)


if __name__ == "__main__":
    from training import write_text

    from bigtrain.data.prepare import prepare
    from bigtrain.world import World

    folder = Path(sys.argv[1])
    write_text(folder)
    world = World.join("cpu", 120)
    results = {}
    # Fine-tuning starts from what another config has trained.
    for name in sorted(WHOLE, key=lambda name: name.startswith("finetune")):
        settings = configfile.load(CONFIGS / name, scaled_down(name, folder))
        prepare(settings.data)
        results[name] = train(settings, world)
    (folder / "result.json").write_text(json.dumps(results))
    world.leave()
