"""The quick start's config on Triton kernels in the interpreter: a real run of two ranks, beside plain torch."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_two_steps_of_the_quick_start(tmp_path):
    """The same losses with Triton under ZeRO-3, and with torch under ZeRO-2. Two of the six layers, and short sequences, for time."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(30):
        (text / f"{i}.txt").write_text(f"document {i}: " + " ".join(str(i * j) for j in range(60)))
    losses = {}
    for backend, stage in (("torch", 2), ("triton", 3)):
        overrides = {
            "data.source": "text", "data.path": text, "data.tokenizer": "bytes", "data.folder": tmp_path / "data",
            "data.validation_fraction": 0.1, "data.sequence_length": 32, "model.layers": 2, "train.steps": 2, "train.global_batch": 2,
            "train.micro_batch": 1, "schedule.warmup_steps": 0, "evaluate.sequences": 1, "generate.prompts": [], "precision": "fp32",
            "zero.stage": stage, "kernels.backend": backend, "run.name": backend, "run.folder": tmp_path / "runs",
        }  # fmt: skip
        if backend == "triton":
            overrides["kernels.mlp"] = "fused"
        command = [sys.executable, "-m", "bigtrain", "train", ROOT / "configs/quickstart.yaml", *(f"{k}={v}" for k, v in overrides.items())]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)  # TRITON_INTERPRET=1 is inherited
        assert done.returncode == 0, done.stdout + done.stderr
        rows = [json.loads(line) for line in (tmp_path / "runs" / backend / "metrics.jsonl").read_text().splitlines()]
        losses[backend] = [row["loss"] for row in rows if "loss" in row]
        environment = json.loads((tmp_path / "runs" / backend / "attempts/1/environment.json").read_text())
        assert set(environment["kernels"].values()) == ({"torch"} if backend == "torch" else {"triton", "fused"})
        assert "mlp fused" in done.stdout if backend == "triton" else "kernels    torch" in done.stdout
    assert len(losses["torch"]) == 2
    assert all(abs(a - b) < 1e-5 * a for a, b in zip(losses["torch"], losses["triton"], strict=True)), losses
