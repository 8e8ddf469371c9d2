"""What does bigtrain cost or gain against what people would use instead, on the same work?

    python benchmarks/throughput.py [--rounds 3] [--only bigtrain trainer] [--dtype bf16] [--layout 2] [--steps 20]

The work is throughput.yaml: the same decoder, batch, optimizer and token file for all. `bigtrain` is the command as a user
starts it; the others are the loops of peers.py, whose ranks are started directly, without a launcher's own start-up. Every
measurement is a set of fresh processes; a round runs each variant once, and ratios are taken within a round, because the
machine is never the same for long.

Per variant: tokens/s of all ranks together (from the median wall time between ends of steps, after WARMUP of them), seconds from
the command to the end of the first step, and peak memory of the largest rank. Prints a table for each layout and dtype, and
leaves FOLDER/TIME/throughput.json, complete after every measurement, beside the logs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from comparison import Measurement, summaries, tables
from processes import run
from rich.console import Console

from bigtrain import __version__, configfile, opbuild
from bigtrain.config import Config, batch_arithmetic
from bigtrain.data.shards import Manifest
from bigtrain.deepspeed_config import derive
from bigtrain.errors import DONE, FAILURE, BigtrainError, RunError, UserError
from bigtrain.hardware import Hardware, look
from bigtrain.runfolder import RunFolder, latest_rows, write_atomically
from bigtrain_launch.local import free_port

HERE = Path(__file__).parent
WORK = HERE / "throughput.yaml"
WARMUP = 5
"""Steps before the measured ones: allocators, thread pools and caches settle."""
MEASURED = 10
"""Fewest steps to take a median of."""
BUSY = 0.5
"""Load average above which a measurement is not worth making."""
TIMEOUT = 1800.0
"""Seconds after which a variant is taken to hang."""
VARIANTS = {
    "bigtrain": "the command `bigtrain train`, ZeRO-2",
    "deepspeed-ours": "a bare DeepSpeed ZeRO-2 loop over bigtrain's model",
    "deepspeed-llama": "a bare DeepSpeed ZeRO-2 loop over transformers' Llama",
    "torch-ours": "a bare PyTorch loop (DDP) over bigtrain's model",
    "torch-llama": "a bare PyTorch loop (DDP) over transformers' Llama",
    "trainer": "Hugging Face Trainer (DDP) over the Llama",
    "trainer-deepspeed": "Hugging Face Trainer with DeepSpeed ZeRO-2 over the Llama",
}


def arguments(argv: Sequence[str] | None, hardware: Hardware) -> argparse.Namespace:
    """The options, checked. Raises UserError for a layout that the machine has no room for, and too few steps or rounds."""
    layouts = sorted({1, hardware.devices or min(2, hardware.cores)})
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="times that each variant is measured")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--layout", nargs="+", type=int, default=layouts, metavar="RANKS", help="ranks; on a CPU they share its cores")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help=f"steps of each measurement; {WARMUP} are not counted")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks"), help="for logs and results")
    parser.add_argument("--data", default="data/stdlib-bpe4096", metavar="FOLDER", help="prepared data, or where to prepare it")
    parser.add_argument("--anyway", action="store_true", help="measure although the machine is busy; such numbers are not to be quoted")
    options = parser.parse_args(argv)
    for several in ("only", "dtype", "layout"):
        setattr(options, several, list(dict.fromkeys(getattr(options, several))))
    room = hardware.devices or hardware.cores
    if not all(1 <= ranks <= room for ranks in options.layout):
        raise UserError(f"--layout {' '.join(map(str, options.layout))}: this machine has room for 1 to {room} ranks")
    if options.steps < WARMUP + MEASURED:
        raise UserError(f"--steps {options.steps}: at least {WARMUP + MEASURED}, of which {WARMUP} are not counted")
    if options.rounds < 1:
        raise UserError(f"--rounds {options.rounds}: at least 1")
    return options


def check_quiet(load: float, anyway: bool) -> None:
    if load > BUSY and not anyway:
        raise UserError(f"the load average is {load:.1f}: this machine is busy. Wait until it is below {BUSY}, or add --anyway")


def main(argv: Sequence[str] | None = None) -> int:
    hardware = look()
    options = arguments(argv, hardware)
    load = os.getloadavg()[0]
    check_quiet(load, options.anyway)
    facts = {
        "benchmark": "throughput",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": asdict(hardware) | {"system": platform.platform()},
        "load_average_at_start": load,
        "versions": versions(),
        "variants": VARIANTS,
        "options": {key: str(value) if key == "folder" else value for key, value in vars(options).items()},
    }
    bench = Bench(options, hardware, environment(hardware), options.folder / time.strftime("throughput-%Y%m%d-%H%M%S"))
    bench.prepare()
    result = bench.folder / "throughput.json"
    measured: list[Measurement] = []
    failures: list[dict[str, Any]] = []
    for case in cases(options):
        try:
            one = bench.measure(case)
            measured.append(one)
            outcome = f"{one.tokens_per_s:,.0f} tokens/s, {one.memory_gib:.2f} GiB, first step after {one.first_step_s:.1f} s"
        except RunError as error:
            failures.append(case._asdict() | {"reason": str(error)})
            outcome = f"failed: {error}"
        print(f"{case}: {outcome}", file=sys.stderr, flush=True)
        found = {"measurements": [asdict(m) for m in measured], "failures": failures, "summary": summaries(measured)}
        write_atomically(result, json.dumps(facts | found, indent=1))
    show(bench, summaries(measured))
    print(f"{result}: every measurement" + (f"; {len(failures)} failed" if failures else ""))
    return FAILURE if failures else DONE


def versions() -> dict[str, str]:
    try:
        found = {name: metadata.version(name) for name in ("torch", "deepspeed", "transformers", "accelerate", "numpy")}
    except metadata.PackageNotFoundError as error:
        raise UserError(f"{error.name} is not installed; the benchmarks need more than training does: pip install -e '.[bench]'") from None
    return {"bigtrain": __version__, "python": platform.python_version(), **found}


def environment(hardware: Hardware) -> dict[str, str]:
    """What every process gets: DeepSpeed's ops where bigtrain builds them, and no network."""
    cpu = {"DS_ACCELERATOR": "cpu"} if hardware.kind == "cpu" else {}
    return {**os.environ, **cpu, **opbuild.environment(), "HF_HUB_OFFLINE": "1"}


class Case(NamedTuple):
    variant: str
    ranks: int
    dtype: str
    round: int

    def __str__(self) -> str:
        return f"{self.variant}-{self.dtype}-{self.ranks}-round{self.round}"


def cases(options: argparse.Namespace) -> list[Case]:
    """All rounds, each with all variants of a layout and dtype after one another; every round begins with another variant."""
    variants, found = options.only, []
    for number in range(options.rounds):
        first = number % len(variants)
        for dtype in options.dtype:
            for ranks in options.layout:
                found += [Case(variant, ranks, dtype, number + 1) for variant in variants[first:] + variants[:first]]
    return found


@dataclass(frozen=True)
class Bench:
    options: argparse.Namespace
    hardware: Hardware
    environment: dict[str, str]
    folder: Path

    def prepare(self) -> None:
        """Make the folder, the data and DeepSpeed's ops, so that none of it is measured."""
        self.folder.mkdir(parents=True)
        for command in (["data", "prepare", str(WORK), *self.overrides(Case("", 1, "fp32", 0))], ["ops", "build", str(WORK)]):
            if subprocess.run([sys.executable, "-m", "bigtrain", *command], env=self.environment, stdout=sys.stderr).returncode:
                raise RunError(f"`bigtrain {' '.join(command)}` failed; see above")

    def overrides(self, case: Case) -> list[str]:
        options = self.options
        return [
            f"train.steps={options.steps}",
            f"data.folder={options.data}",
            f"precision={case.dtype}",
            f"launch.ranks_per_node={case.ranks}",
        ]

    def measure(self, case: Case) -> Measurement:
        """Run one variant in processes of its own. Raises RunError when it fails."""
        folder = self.folder / str(case)
        folder.mkdir()
        config = configfile.load(WORK, self.overrides(case))
        environment = self.environment | {"OMP_NUM_THREADS": str(max(1, self.hardware.cores // case.ranks))}
        if case.variant == "bigtrain":
            command = [sys.executable, "-m", "bigtrain", "train", str(WORK), *self.overrides(case), f"run.folder={folder}"]
            usage = run([(command, environment)], folder / "output.log", TIMEOUT)
            ends, loss, device_gib = read_bigtrain(RunFolder(folder / config.run.name))
        else:
            (folder / "work.json").write_text(json.dumps(work(config, case, self.hardware)), encoding="utf-8")
            command = [sys.executable, str(HERE / "peers.py"), case.variant, str(folder)]
            usage = run([(command, environment | place) for place in places(case.ranks)], folder / "output.log", TIMEOUT)
            ends, loss, device_gib = read_peer(folder, case.ranks)
        seconds = step_seconds(ends)
        tokens = batch_arithmetic(config.train, case.ranks).global_batch * config.data.sequence_length
        return Measurement(
            **case._asdict(),
            tokens_per_s=tokens / statistics.median(seconds),
            memory_gib=device_gib if self.hardware.devices else usage.resident_gib,
            first_step_s=ends[0] - usage.started,
            loss=loss,
            step_s=seconds,
            cores_elsewhere=usage.cores_elsewhere,
        )


def work(config: Config, case: Case, hardware: Hardware) -> dict[str, Any]:
    """What peers.py is told: all of the config, and what bigtrain makes of it."""
    data = Path(config.data.folder).resolve()
    train = Manifest.read(data).splits["train"]
    return config.model_dump() | {
        "tokens": str(data / f"{train.shards[0].name}.tokens"),
        "token_dtype": train.token_dtype,
        "deepspeed": derive(config, batch_arithmetic(config.train, case.ranks), case.dtype),
        "device": "cuda" if hardware.devices else "cpu",
    }


def places(ranks: int) -> list[dict[str, str]]:
    """Rank variables, as torchrun sets them, of each rank on this machine."""
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def read_bigtrain(folder: RunFolder) -> tuple[list[float], float, float]:
    """When each step ended, the last loss, and the peak memory of the largest rank's device. Removes the checkpoint.

    A row's `time` is taken when its step's loss is known on rank 0: after the step, before the next one's forward pass.
    """
    rows = latest_rows(folder.metrics, "step_s")
    attempt = json.loads((folder.attempt(1) / "attempt.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder.checkpoints)
    return [row["time"] for row in rows], rows[-1]["loss"], attempt["peak_memory_gib"]


def read_peer(folder: Path, ranks: int) -> tuple[list[float], float, float]:
    """The same from what the ranks of peers.py have left."""
    records = [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
    return records[0]["step_ends"], records[0]["losses"][-1], max(record["device_gib"] for record in records)


def step_seconds(ends: list[float]) -> list[float]:
    """Wall time of each step after the warm-up, from the ends of all."""
    return [round(end - before, 4) for before, end in zip(ends[WARMUP - 1 :], ends[WARMUP:])]


def show(bench: Bench, found: list[dict[str, Any]]) -> None:
    hardware, config = bench.hardware, configfile.load(WORK)
    model, train = config.model, config.train
    place = f"{hardware.devices} x {hardware.name}" if hardware.devices else f"{hardware.cores} cores, {hardware.name}"
    done = (
        f"the same decoder ({model.layers} layers, {model.width} wide, vocabulary {model.vocab_size:,}),"
        f" {train.micro_batch} x {config.data.sequence_length} tokens a rank and step, AdamW, clipping"
    )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    for table in tables(found, place, done):
        console.print(table)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: whatever runs is ended on the way out
    try:
        sys.exit(main())
    except BigtrainError as error:
        print(f"throughput: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)
