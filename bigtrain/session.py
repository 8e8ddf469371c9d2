"""One rank's life: meet the others, decide together, train, and leave a record of how it ended."""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from bigtrain import __version__
from bigtrain.config import Batch, Config, batch_arithmetic
from bigtrain.deepspeed_config import derive
from bigtrain.errors import DONE, FAILURE, STOPPED, AlreadyDone, BigtrainError, RunError, UserError
from bigtrain.hardware import Hardware, choose_precision
from bigtrain.lease import Lease
from bigtrain.logs import RankOutput
from bigtrain.metrics import peak_memory_gib, peak_tflops
from bigtrain.ranks import launched, slurm_job
from bigtrain.runfolder import OWNER, RunFolder, write_record
from bigtrain.screen import Screen, printable
from bigtrain.start import complete, create, new_name, open_run, with_data
from bigtrain.trackers import Trackers
from bigtrain.watchdog import Pulse, Watchdog, patience
from bigtrain.world import World
from bigtrain_kernels.ops import Backends


def run_rank(config: Config, hardware: Hardware, output: RankOutput, new: bool) -> int:
    """Train as one rank of a run and return the exit code. What went wrong is on the screen, and in the rank's log."""
    screen = Screen(output.screen)
    attempt: Attempt | None = None
    watchdog: Watchdog | None = None
    variables = launched(os.environ)
    rank, alone = int(variables["RANK"]) if variables else 0, True
    code, reason, restart, lost = DONE, "done", False, False
    pulse = Pulse()
    try:
        world = World.join("cpu" if hardware.kind == "cpu" else "cuda", patience(max(config.launch.timeout, config.launch.lease)), pulse)
        rank, alone = world.rank, False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # until the trainer answers them
            signal.signal(number, signal.default_int_handler)
        config, attempt, checkpoints = _decide(config, world, new, output.screen)
        output.attach(attempt.run.log(attempt.number, rank), screen.warn if rank == 0 else None)
        run, number, timeout = attempt.run, attempt.number, config.launch.timeout
        watchdog = Watchdog(run, number, rank, world.size, pulse, timeout, output.screen, attempt.lease)
        watchdog.start()
        _train(config, hardware, world, attempt, checkpoints, screen, pulse)
    except BigtrainError as error:
        code, reason = error.code, str(error)
        if rank == 0 or (alone and isinstance(error, RunError)):  # else rank 0 says the same
            screen.close()
            output.screen.write(f"bigtrain: {printable(reason)}\n")
        print(f"bigtrain: {reason}", file=sys.stderr)
    except KeyboardInterrupt:
        code, reason = STOPPED, "stopped on request before the first step; the same command starts again"
        if rank == 0:
            screen.close()
            output.screen.write(f"bigtrain: {reason}\n")
    except Exception as error:  # a bug, or a fault of torch or DeepSpeed: the whole story is in the log
        lost, restart = _lost(error), True
        code, reason = FAILURE, LOST if lost else f"{type(error).__name__}: {error}"
        traceback.print_exc()
        where = attempt.run.log(attempt.number, rank) if attempt else "above"
        screen.close()
        output.screen.write(output.unlogged())
        output.screen.write(
            f"bigtrain: rank {rank} failed: {printable(reason).splitlines()[0][:300]}\nbigtrain: the whole story: {where}\n"
        )
    finally:
        screen.close()
        if watchdog:
            watchdog.close(code, reason, restart, lost)
        if attempt and rank == 0:
            attempt.end(code, reason, restart)
            if code == DONE:
                _report(attempt.run, output.screen)
        output.screen.flush()
    return code


LOST = "the connection to another rank broke; that one, or the launcher, says why"


def _lost(error: Exception) -> bool:
    """Whether a collective failed: the fault is elsewhere, and gloo's own text sends nobody there."""
    return isinstance(error, dist.DistBackendError) or "/gloo/" in str(error)


def _report(run: RunFolder, screen: TextIO) -> None:
    from bigtrain.report import write_report

    try:
        screen.write(f"report: {write_report([run.path])}\n")
    except BigtrainError as error:  # the training is safe; a report can be written at any time
        screen.write(f"bigtrain: {error}\n")


class Attempt:
    """The record of one start of the run's processes; rank 0 writes it."""

    def __init__(self, run: RunFolder, number: int, lease: Lease | None = None):
        self.run, self.number = run, number
        self.lease = lease  # rank 0's: no other process trains the run
        self.facts: dict[str, Any] = {}  # what is known at the end only

    def begin(self, ranks: int) -> None:
        facts = {"attempt": self.number, "host": socket.gethostname(), "pid": os.getpid(), "ranks": ranks, "started": time.time()}
        if job := slurm_job(os.environ):
            facts["job"] = job
        self._try(lambda: write_record(self.run.record(self.number), facts))

    def environment(self, facts: dict[str, Any]) -> None:
        self._try(lambda: write_record(self.run.attempt(self.number) / "environment.json", facts))

    def end(self, code: int, reason: str, restart: bool) -> None:
        """Say how the attempt ended, if nobody has (the rank that found a hang), and give the run back."""
        self._try(lambda: self.run.end_attempt(self.number, code, reason, restart, self.facts))
        if self.lease:
            self._try(self.lease.close)

    @staticmethod
    def _try(action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:  # a record is not worth a run
            print(f"bigtrain: a record of the attempt was not written: {error}", file=sys.stderr)


def _decide(config: Config, world: World, new: bool, screen: TextIO) -> tuple[Config, Attempt, list[Path]]:
    """Rank 0 looks at the data and the run's folder; all ranks get its config, its attempt, and the run's checkpoints."""
    decision: dict[str, Any] = {}
    attempt: Attempt | None = None
    if world.first:
        try:
            config = with_data(new_name(config) if new else config)
            start = open_run(config)
            if start.done:
                raise AlreadyDone(complete(start))
            lease = create(config, start.run, os.environ.get(OWNER), lambda text: print(f"bigtrain: {text}", file=screen, flush=True))
            attempt = Attempt(start.run, lease.start(), lease)
            attempt.begin(world.size)
            decision = {
                "config": config.model_dump(),
                "attempt": attempt.number,
                "checkpoints": [str(path) for path in start.checkpoints],
            }
        except BigtrainError as error:
            decision = {"error": str(error), "code": error.code}
        except OSError as error:
            decision = {"error": f"{config.run.folder}/{config.run.name}: {error}", "code": FAILURE}
    decision = world.from_first(decision)
    if "error" in decision:
        kinds = {kind.code: kind for kind in (AlreadyDone, RunError, UserError)}
        raise kinds[decision["code"]](decision["error"])
    config = Config.model_validate(decision["config"])
    run = RunFolder(Path(config.run.folder) / config.run.name)
    return config, attempt or Attempt(run, decision["attempt"]), [Path(path) for path in decision["checkpoints"]]


def _train(
    config: Config, hardware: Hardware, world: World, attempt: Attempt, checkpoints: list[Path], screen: Screen, pulse: Pulse
) -> None:
    from bigtrain.checkpoint.load import newest_sound
    from bigtrain.train import Report, Trainer  # imports DeepSpeed, noisily: the log must be attached before

    try:
        batch = batch_arithmetic(config.train, world.size)
    except ValueError as error:
        raise UserError(f"train: {error}") from None
    precision, precision_reason = choose_precision(config.precision, hardware)
    peak, peak_source = peak_tflops(hardware.name, precision, world.device)
    [peak] = world.sum([peak])
    trackers = None
    if world.first:
        trackers = Trackers(config.tracking, attempt.run, attempt.number, config.model_dump(), screen.warn)
    try:
        report = OnScreen(screen, trackers, config.train.steps, config.train.log_every) if trackers else Report()
        guard = {"guard": attempt.lease.check} if attempt.lease else {}
        trainer = Trainer(config, batch, precision, peak, world, attempt.run, report, pulse=pulse, **guard)
        checkpoint = newest_sound(checkpoints, world, report.warn)
        parameters = trainer.engine.module.count_parameters()
        if trackers:
            facts = _environment(config, batch, hardware, world, precision, precision_reason, parameters, peak, peak_source)
            facts["kernels"] = trainer.backends._asdict()
            attempt.environment(facts)
            screen.header(_header(facts, config, batch, attempt, checkpoint))
        if checkpoint:
            trainer.resume(checkpoint)
        elif config.init.checkpoint:
            trainer.start_from(Path(config.init.checkpoint), config.init.weights)
        trainer.train()
        memory = max(world.gather(peak_memory_gib(world.device)))
        if trackers:
            attempt.facts["peak_memory_gib"] = memory
    finally:
        if trackers:
            trackers.close()
    world.leave()


class OnScreen:
    """Rank 0's `train.Report`: the screen for a person, the trackers for later."""

    def __init__(self, screen: Screen, trackers: Trackers, steps: int, log_every: int):
        self._screen, self._trackers, self._steps, self._log_every = screen, trackers, steps, log_every

    def step(self, row: dict[str, Any]) -> None:
        if row["step"] % self._log_every == 0 or row["step"] == self._steps or "skipped" in row:
            self._trackers.log(row)
        self._screen.update(row["step"], self._steps, row)

    def evaluation(self, row: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        self._trackers.log(row)
        self._trackers.log_samples(samples)
        self._screen.evaluation(row)
        for sample in samples:
            self._screen.sample(sample["prompt"], sample["text"])

    def message(self, text: str) -> None:
        self._screen.message(text)

    def warn(self, text: str) -> None:
        self._screen.warn(text)


def _environment(
    config: Config,
    batch: Batch,
    hardware: Hardware,
    world: World,
    precision: str,
    precision_reason: str,
    parameters: int,
    peak: float,
    peak_source: str,
) -> dict[str, Any]:
    return {
        "bigtrain": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "deepspeed", "transformers", "numpy")},
        "host": socket.gethostname(),
        "ranks": world.size,
        "hardware": asdict(hardware),
        "threads_per_rank": os.environ.get("OMP_NUM_THREADS"),
        "precision": precision,
        "precision_reason": precision_reason,
        "parameters": parameters,
        "batch": batch.model_dump(),
        "zero_stage": config.zero.stage,
        "peak_tflops": peak,
        "peak_source": peak_source,
        "flops_convention": "6 N + 12 layers heads head_dim length per token (PaLM, appendix B)",
        "deepspeed_config": derive(config, batch, precision),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    try:
        described = ["git", "describe", "--always", "--dirty", "--abbrev=16", "--exclude=*"]
        return subprocess.run(described, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _header(facts: dict[str, Any], config: Config, batch: Batch, attempt: Attempt, checkpoint: Path | None) -> dict[str, str]:
    model, hardware = config.model, facts["hardware"]
    tokens, steps = batch.global_batch * config.data.sequence_length, config.train.steps
    size = f"{facts['parameters'] / 1e6:,.1f} M parameters"
    offloaded = ", optimizer offloaded" if config.zero.offload_optimizer else ""
    passes = f"{batch.accumulation} pass{'es' * (batch.accumulation > 1)} a step"
    device = f"{facts['ranks']} ranks, {hardware['name']}" if facts["ranks"] > 1 else f"1 rank, {hardware['name']}"
    return {
        "model": f"{size}: {model.layers} layers, {model.width} wide, vocabulary {model.vocab_size:,}",
        "data": f"{config.data.folder}, {tokens:,} tokens a step, {steps * tokens / 1e6:,.1f} M in {steps:,} steps",
        "batch": f"{batch.global_batch} sequences of {config.data.sequence_length}: {batch.micro_batch} a rank, {passes}",
        "training": f"{config.optimizer.name}, ZeRO stage {config.zero.stage}{offloaded}",
        "precision": f"{facts['precision']} ({facts['precision_reason']})",
        "kernels": str(Backends(**facts["kernels"])),
        "hardware": f"{device}; peak {facts['peak_tflops']:,.2f} TFLOP/s in all ({facts['peak_source']})",
        "run": f"{attempt.run.path}, attempt {attempt.number}" + (f", resuming {checkpoint.name}" if checkpoint else ""),
    }
