"""The run, read aloud: build, then for every step take a batch, train on it, and now and then evaluate and save.

Position in the data is one integer; a batch, the dropout in it and the learning rate are functions of the position, the
seed and the step. So a run that is stopped and started again goes on as if nothing had happened.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigtrain.checkpoint.state import partitions
from bigtrain.config import Batch, Config
from bigtrain.data.loader import Loader, evaluation_batches
from bigtrain.data.shards import TOKENIZER, TokenStore
from bigtrain.data.tokenizer import load as load_tokenizer
from bigtrain.engine import Engine
from bigtrain.errors import BigtrainError, RunError, StopRequested, UserError
from bigtrain.evaluate import evaluate, to_device
from bigtrain.generate import generate
from bigtrain.metrics import Deferred, peak_memory_gib
from bigtrain.model.initialise import initial_value
from bigtrain.model.transformer import Transformer
from bigtrain.progress import Progress
from bigtrain.runfolder import RunFolder
from bigtrain.saving import Saving
from bigtrain.schedule import learning_rate_share
from bigtrain.tasks import make_task
from bigtrain.watchdog import Pulse
from bigtrain.world import World
from bigtrain_kernels.ops import resolve_backends

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass
class Step:
    """One optimizer step, with numbers that may still be on their way from the device."""

    number: int
    position: int
    """Of its first sequence."""
    tokens: float
    """Target tokens of the whole global batch."""
    loss_sum: Deferred
    """This rank's part of the summed loss."""
    grad_norm: float
    learning_rate: float
    seconds: float
    loss_scale: float | None
    skipped: list[str]
    """Where the trouble came from when the step was passed over, see `pass_over`; empty when it was applied."""


class Trainer:
    """A run on this rank. `peak` is what all devices together can multiply, in TFLOP/s, which MFU divides by.

    `report` gets what rank 0 shows and keeps; the other ranks pass a bare `Report`, which drops it. `pulse` is told what this
    rank does. `guard` raises LostRun when this process may not commit checkpoints any more.
    """

    def __init__(
        self,
        config: Config,
        batch: Batch,
        precision: str,
        peak: float,
        world: World,
        run: RunFolder,
        report: Report,
        *,
        pulse: Pulse | None = None,
        guard: Callable[[], None] = lambda: None,
    ):
        self.peak, self.pulse = peak, pulse or Pulse()
        self.config, self.batch, self.precision, self.world, self.report = config, batch, precision, world, report
        store = TokenStore(config.data.folder, "train")
        data = store.manifest.fingerprint
        self.held_out = TokenStore(config.data.folder, "validation")
        self.tokenizer = load_tokenizer(Path(config.data.folder) / TOKENIZER)
        self.task = make_task(config, store.manifest.tokenizer)
        self.loader = Loader(store, self.task, config, batch, world.rank, config.train.seed)
        self.engine = self._engine()
        self.partitions = partitions(self.engine.deepspeed)
        self.progress = Progress()
        self.saving = Saving(
            config, batch, world, run.checkpoints, self.engine, self.partitions, data, warn=report.warn, pulse=self.pulse, guard=guard
        )
        self.evaluated: dict[str, float] = {}  # what the newest evaluation found, if it was at this step
        self.flops_per_token = self.engine.module.flops_per_token(config.data.sequence_length)
        self.unlogged: Step | None = None
        self.step_seconds: float | None = None  # how long the step before took, over all ranks; None in the first one
        self.damage: str | None = None  # what this rank has found wrong with its data
        self.stop: int | None = None  # the signal that asked this rank to stop
        for number in STOP_SIGNALS:
            signal.signal(number, lambda arrived, frame: setattr(self, "stop", arrived))

    def _engine(self) -> Engine:
        config = self.config
        try:
            self.backends = resolve_backends(self.world.device, config.kernels.backend, config.kernels.choices)
        except ValueError as error:
            raise UserError(f"kernels: {error}") from None
        return Engine(
            config,
            self.batch,
            self.precision,
            self.world,
            build=lambda: Transformer(config.model, config.model.vocab_size, self.backends),
            initialise=lambda name, p: p.copy_(initial_value(name, p.shape, config.model, config.train.seed)),
        )

    def train(self) -> None:
        """Train to `train.steps`, or until early stopping. Raises StopRequested after saving when a signal came."""
        config, progress = self.config, self.progress
        try:
            with closing(self.loader.steps(progress.position)) as batches:
                while progress.step < config.train.steps:
                    started = time.perf_counter()
                    self.pulse("data", progress.step + 1, progress.position)
                    micro_batches, position = self.take(batches)
                    self.unlogged = self.train_step(micro_batches, started)
                    progress.step, progress.position, self.evaluated = progress.step + 1, position, {}
                    last = progress.step == config.train.steps
                    if last or _due(progress.step, config.evaluate.every):
                        self.finish_step()
                        last |= self.evaluate()
                    if last:
                        self.finish_step()
                        return self.saving.save(progress, self.evaluated, done=True)
                    if _due(progress.step, config.checkpoint.every) and not progress.skipped:  # the last good one stays the newest
                        self.finish_step()
                        self.saving.begin(progress, self.evaluated)
        except BigtrainError:  # all ranks have agreed on it, so a checkpoint that is being written can be finished
            with suppress(RunError):  # what ended the run is what is told
                self.saving.finish()
            raise

    def take(self, batches: Iterator[tuple[list[dict[str, Any]], int]]) -> tuple[list[dict[str, Any]], int]:
        """This rank's micro-batches of the next step. Damaged data is found by one rank alone: it is kept for `agree`."""
        try:
            return next(batches)
        except UserError as error:
            self.found_damage(error)
            return [], self.progress.position

    def found_damage(self, error: UserError) -> None:
        """Keep it until all ranks meet again, see `refuse`."""
        self.damage = self.damage or str(error)

    def refuse(self, damaged: float) -> None:
        """Raise what any rank has found wrong with its data, on all of them. `damaged`: by how many ranks."""
        if damaged:
            raise UserError(next(filter(None, self.world.gather(self.damage))))

    def train_step(self, micro_batches: list[dict[str, Any]], started: float) -> Step:
        """One update of the weights from this rank's part of a global batch.

        The loss is the sum over target tokens divided by their number in the whole global batch, so neither
        accumulation, packing nor the number of ranks changes it.
        """
        tokens = self.agree(sum(batch["count"] for batch in micro_batches))
        losses = []
        for batch in micro_batches:
            if losses and self.hurried:
                self.stop_if_asked(f"in the middle of step {self.progress.step + 1}, which was given up")
            self.pulse("forward")
            torch.manual_seed(_seed(self.config.train.seed, batch["first_position"]))
            loss, _ = self.task.loss(self.engine, to_device(batch, self.world.device))
            self.pulse("backward")
            self.engine.backward(loss / tokens)
            losses.append(loss.detach())
        loss_sum = Deferred(torch.stack(losses).sum())
        share = learning_rate_share(self.config, self.progress.step)
        self.pulse("optimizer")
        grad_norm, applied = self.engine.step(share, self.progress.largest_norm(self.config.train.spike))
        skipped = []
        if applied:
            self.progress.applied(grad_norm)
            self.follow()
        elif self.precision != "fp16" or math.isfinite(grad_norm):  # fp16 passes over overflows by design and lowers its loss scale
            skipped = self.pass_over(micro_batches, losses, grad_norm)
        rate = share * self.config.optimizer.lr
        seconds = time.perf_counter() - started
        return Step(
            self.progress.step + 1, self.progress.position, tokens, loss_sum, grad_norm, rate, seconds, self.engine.loss_scale, skipped
        )

    def agree(self, tokens: int) -> float:
        """The one small all-reduce of a step: target tokens of the global batch, the loss and time of the step before, whether a
        checkpoint could not be written, whether any rank has found its data damaged, which every rank raises as a UserError, and
        whether any rank was asked to stop, in which case every rank saves and raises StopRequested."""
        self.pulse("agree")
        before = self.unlogged
        mine = [
            tokens,
            before.loss_sum.value() if before else 0.0,
            before.seconds if before else 0.0,
            self.saving.failed,
            self.damage is not None,
            self.stop is not None,
        ]
        tokens_sum, loss_sum, seconds, failed, damaged, stops = self.world.sum(mine)
        self.log(loss_sum, seconds)
        self.refuse(damaged)
        if stops:
            self.stop_now(f"after step {self.progress.step}")
        if failed:
            self.saving.finish()
        return max(1.0, tokens_sum)

    @property
    def hurried(self) -> bool:
        """A step takes longer than a scheduler waits between asking and killing, or nobody knows yet how long, in the first one of
        an attempt, with kernels to compile: look for a signal after every micro-batch."""
        return self.config.launch.grace is not None and (self.step_seconds is None or self.step_seconds > self.config.launch.grace)

    def stop_if_asked(self, when: str) -> None:
        """Stop now if any rank was asked to; one all-reduce."""
        if self.world.sum([self.stop is not None])[0]:
            self.stop_now(when)

    def stop_now(self, when: str) -> None:
        self.saving.save(self.progress, self.evaluated)
        raise StopRequested(f"stopped on request {when}; the same command goes on from there")

    def finish_step(self) -> None:
        """Log the step just done without waiting for the next one to begin."""
        if self.unlogged:
            self.log(*self.world.sum([self.unlogged.loss_sum.value(), self.unlogged.seconds]))

    def log(self, loss_sum: float, seconds: float) -> None:
        """Log the step before, if it has not been; its loss and its time are sums over all ranks."""
        step, self.unlogged = self.unlogged, None
        if step is None:
            return
        self.step_seconds = seconds / self.world.size
        loss = loss_sum / step.tokens
        if not math.isfinite(loss) and not step.skipped and self.precision != "fp16":
            raise RunError(f"step {step.number}: the loss is {loss}; {self.saving.safe}")
        tokens = self.batch.global_batch * self.config.data.sequence_length
        row = {
            "step": step.number,
            "loss": loss,
            "lr": step.learning_rate,
            "grad_norm": step.grad_norm,
            "tokens": step.number * tokens,
            "position": step.position,
            "tokens_per_s": tokens / step.seconds,
            "mfu": self.flops_per_token * tokens / step.seconds / (self.peak * 1e12),
            "step_s": step.seconds,
            "memory_gib": peak_memory_gib(self.world.device),
        }
        if step.loss_scale is not None:
            row["loss_scale"] = step.loss_scale
        if step.skipped:
            row["skipped"] = step.skipped
        self.report.step(row)

    def follow(self) -> None:
        """Move the moving average of the weights a little towards them."""
        if decay := self.config.train.ema_decay:
            for partition in self.partitions:
                if "ema" not in partition.extra:
                    partition.extra["ema"] = partition.master.to(torch.float32, copy=True)
                partition.extra["ema"].lerp_(partition.master.float(), 1 - decay)

    def pass_over(self, micro_batches: list[dict[str, Any]], losses: list[torch.Tensor], grad_norm: float) -> list[str]:
        """Count a step that was not applied, and say from which ranks and sequences the trouble came.

        Raises RunError on all ranks when it is one more in a row than `train.skip_limit`.
        """
        mine = [b["first_position"] for b, loss in zip(micro_batches, losses, strict=True) if not math.isfinite(float(loss))]
        found = []
        for rank, positions in enumerate(self.world.gather(mine)):
            for first in positions:
                found.append(f"rank {rank}, sequences {first} to {first + self.batch.micro_batch - 1}")
        first, last = self.progress.position, self.progress.position + self.batch.global_batch - 1
        what = f"the loss is not finite on {'; '.join(found)}"
        if not found and math.isfinite(grad_norm):
            what = f"the gradient's norm is {grad_norm:.3g}, usual is {self.progress.norm_average:.3g} (sequences {first} to {last})"
        elif not found:
            what = f"the gradient's norm is {grad_norm} while every loss is finite (sequences {first} to {last})"
        self.progress.skipped += 1
        step, limit = self.progress.step + 1, self.config.train.skip_limit
        row = f"The step was not applied: {self.progress.skipped} in a row, train.skip_limit is {limit}"
        if self.progress.skipped > limit:
            raise RunError(f"step {step}: {what}. {row}; {self.saving.safe}")
        self.report.warn(f"step {step}: {what}. {row}")
        return found or [f"sequences {first} to {last}"]

    def evaluate(self) -> bool:
        """Evaluate on the held-out split and write samples. Returns whether early stopping says that it is enough. Raises UserError on
        all ranks when any has found damaged data."""

        def total(sums: list[float]) -> list[float]:  # damage is raised here: until then the other ranks need this one
            *sums, damaged = self.world.sum([*sums, self.damage is not None])
            self.refuse(damaged)
            return sums

        with self.engine.evaluating() as model:
            batches = evaluation_batches(self.held_out, self.task, self.config, self.batch, self.world.rank, self.found_damage)
            metrics = evaluate(model, self.task, self.pulse.each("evaluate", batches), self.world.device, total)
            samples = []
            for prompt in self.config.generate.prompts:
                pieces = generate(model, self.tokenizer, prompt, self.config.generate, self.world.device)
                text = "".join(self.pulse.each("generate", pieces))
                samples.append({"step": self.progress.step, "prompt": prompt, "text": text})
        self.report.evaluation({"step": self.progress.step, **metrics}, samples)
        self.evaluated = metrics
        stopping, progress = self.config.train.early_stopping, self.progress
        if metrics["validation_loss"] < progress.best_loss - (stopping.min_delta if stopping else 0.0):
            progress.best_loss, progress.evaluations_since_best = metrics["validation_loss"], 0
        else:
            progress.evaluations_since_best += 1
        if stopping is None or progress.evaluations_since_best < stopping.patience:
            return False
        self.report.message(
            f"stopping early at step {progress.step}: no better than {progress.best_loss:.4f} in {stopping.patience} evaluations"
        )
        return True


class Report:
    """What a trainer tells the outside; the base tells nobody, for all ranks but the first."""

    def step(self, row: dict[str, Any]) -> None: ...

    def evaluation(self, row: dict[str, Any], samples: list[dict[str, Any]]) -> None: ...

    def message(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _seed(seed: int, position: int) -> int:
    # Any injective mix will do: torch scrambles the seed itself.
    return (seed << 40 ^ position) & (2**63 - 1)
