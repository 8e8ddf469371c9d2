"""A run that trains in a second or two, in a folder that all nodes see, and what it comes to on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import yaml

from bigtrain import configfile, opbuild
from bigtrain.data.prepare import prepare
from bigtrain.runfolder import RunFolder, latest_rows

ROOT = Path(__file__).parents[2]
CONFIG = {
    "model": {"layers": 1, "width": 32, "heads": 2, "mlp_width": 48, "max_positions": 32},
    "data": {"sequence_length": 32, "source": "text", "path": "text", "folder": "data", "tokenizer": "bytes", "validation_fraction": 0.2},
    "train": {"steps": 8, "global_batch": 4, "micro_batch": 2},
    "optimizer": {"lr": 1e-2},
    "schedule": {"warmup_steps": 2},
    "zero": {"stage": 2},
    "precision": "fp32",
    "checkpoint": {"every": None},
    "evaluate": {"every": None, "sequences": 4},
    "generate": {"prompts": []},
    "tracking": {"tensorboard": False},
    "restarts": {"backoff": 0},
}


class Tiny:
    """`folder` with prepared data and c.yaml, for two ranks. Commands run in it, on any node."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "text").mkdir()
        for i in range(20):
            lines = "".join(f"def f{i}_{j}(self):\n    return {i * j}\n" for j in range(30))
            (folder / "text" / f"{i}.py").write_text(lines)
        (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")},
            **opbuild.environment(),
            "PYTHONPATH": os.pathsep.join(str(p) for p in (ROOT, ROOT / "kernels", ROOT / "launch")),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        here = os.getcwd()
        os.chdir(folder)
        try:
            prepare(configfile.load("c.yaml", []).data)
        finally:
            os.chdir(here)

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.folder / "runs" / name)

    def losses(self, name: str) -> list[float]:
        return [row["loss"] for row in latest_rows(self.run(name).metrics, "loss")]

    @cached_property
    def straight(self) -> list[float]:
        """The losses of `bigtrain train` with two ranks on one machine: everything else must come to the same."""
        command = [sys.executable, "-m", "bigtrain", "train", "c.yaml", "run.name=straight", "launch.ranks_per_node=2"]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        losses = self.losses("straight")
        assert len(losses) == CONFIG["train"]["steps"] and losses[-1] < losses[0]
        return losses
