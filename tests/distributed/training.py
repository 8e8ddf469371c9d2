"""What the distributed tests share: tiny configs, data, and a trainer on them."""

from __future__ import annotations

from pathlib import Path

import torch

from bigtrain import configfile
from bigtrain.checkpoint.load import Reader
from bigtrain.config import Config, batch_arithmetic
from bigtrain.runfolder import RunFolder

MODEL = {"vocab_size": 320, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "max_positions": 32}


def config(folder: Path, **changes: dict) -> Config:
    """A config of a tiny model; `changes` are merged into its sections."""
    base = {
        "run": {"name": "run", "folder": str(folder / "runs")},
        "model": MODEL,
        "data": {
            "source": "text",
            "path": str(folder / "text"),
            "tokenizer": "bytes",
            "folder": str(folder / "data"),
            "sequence_length": 32,
            "validation_fraction": 0.2,
        },
        "train": {"steps": 20, "global_batch": 8, "micro_batch": 2},
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 4},
        "precision": "fp32",
        "evaluate": {"sequences": 4},
        "tracking": {"tensorboard": False},
    }
    merged = {key: {**base.get(key, {}), **value} if isinstance(value, dict) else value for key, value in {**base, **changes}.items()}
    return Config.model_validate(merged)


def write_text(folder: Path) -> None:
    """Text enough for a few hundred sequences, of documents of very different lengths."""
    (folder / "text").mkdir(parents=True)
    for i in range(40):
        words = " ".join(f"{i} word{i * j % 17}" for j in range(3 + i * i % 90))
        (folder / "text" / f"{i:02d}.txt").write_text(f"document {i}: {words}\n")


def prepare_data(folder: Path) -> None:
    from bigtrain.data.prepare import prepare

    write_text(folder)
    prepare(config(folder).data)


def write_config(folder: Path, **changes: dict) -> None:
    """Prepared data, and c.yaml: a config of it with `changes`."""
    prepare_data(folder)
    (folder / "c.yaml").write_text(configfile.dump(config(folder, **changes)))


def trainer(settings: Config, world, report=None):
    """A Trainer of `settings` on this rank, in a process that may hold several, one after the other."""
    from bigtrain.train import Report, Trainer

    run = RunFolder(Path(settings.run.folder) / settings.run.name)
    batch = batch_arithmetic(settings.train, world.size)
    return Trainer(settings, batch, settings.precision, 1.0, world, run, report or Report())


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every parameter and state in a checkpoint, whole, by "parameter|kind"."""
    reader = Reader(checkpoint)
    return {f"{p}|{k}": reader.tensor(p, k) for p in reader.index.shapes for k in sorted(reader.index.kinds) if reader.holds(p, k)}


def close(trainer) -> None:
    """Free an engine, so that the next one of this process starts with clean hooks."""
    trainer.engine.deepspeed.destroy()
