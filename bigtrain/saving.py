"""The checkpoints of a run that trains: what one holds besides tensors, what happens when one cannot be written, and how a
start goes on from one. All ranks call everything here alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from bigtrain import __version__, configfile
from bigtrain.checkpoint import format
from bigtrain.checkpoint.background import Saver
from bigtrain.checkpoint.load import Reader, check, check_shapes, find, load_all, load_weights
from bigtrain.checkpoint.state import Partition, link, loss_scaler, publish
from bigtrain.config import Batch, Config
from bigtrain.data.shards import TOKENIZER
from bigtrain.engine import Engine
from bigtrain.errors import LostRun, RunError, UserError
from bigtrain.model.transformer import parameter_shapes
from bigtrain.progress import Progress
from bigtrain.watchdog import Pulse
from bigtrain.world import World


class Saving:
    """A run's checkpoints, in `folder`. `data` is the fingerprint of what it trains on.

    `warn` is told of a checkpoint that could not be written while training goes on. `guard` raises LostRun when this process may
    not commit any more.
    """

    def __init__(
        self,
        config: Config,
        batch: Batch,
        world: World,
        folder: Path,
        engine: Engine,
        partitions: list[Partition],
        data: str,
        *,
        warn: Callable[[str], None],
        pulse: Pulse,
        guard: Callable[[], None],
    ):
        self.config, self.batch, self.world, self.folder, self.engine = config, batch, world, folder, engine
        self.partitions, self.data, self.warn, self.pulse = partitions, data, warn, pulse
        self.shapes = {n: list(s) for n, s in parameter_shapes(config.model, config.model.vocab_size).items()}
        self.saver = Saver(folder, self.shapes, config.checkpoint, world.another(), guard, pulse.alive)
        self.saved: int | None = None  # step of the newest checkpoint that this attempt wrote, writes or resumed from

    @property
    def failed(self) -> bool:
        """The checkpoint in the background could not be written on this rank; `finish` says why."""
        return self.saver.failed

    @property
    def safe(self) -> str:
        """What is on disk, in words."""
        saved = format.checkpoints(self.folder)
        return f"the newest checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"

    def save(self, progress: Progress, metrics: dict[str, float], done: bool = False) -> None:
        """Write a checkpoint of this moment, if there is none yet, and wait until it is on disk. `metrics` are those of an evaluation
        at this step; `done` says that the run ends here.

        Raises RunError on all ranks when it cannot be written. That one in the background could not is a warning, whatever
        checkpoint.on_error says: the run ends with this one.
        """
        self.pulse("save")
        try:
            self.saver.wait()
        except LostRun:
            raise
        except RunError as error:
            self.saved = None
            self.warn(f"{error}. Another one is written now")
        if self.saved != progress.step:
            self.saver.write(progress.step, self.partitions, self.state(progress, metrics, done), self.files())
            self.saved = progress.step

    def begin(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Begin, or with checkpoint.asynchronous: false make, a checkpoint on the way. One that cannot be written is a warning, or
        where checkpoint.on_error says stop a RunError on all ranks; a run that was lost to another attempt always ends."""
        self.pulse("save")
        self.finish()
        write = self.saver.start if self.config.checkpoint.asynchronous else self.saver.write
        try:
            write(progress.step, self.partitions, self.state(progress, metrics, False), self.files())
            self.saved = progress.step
        except RunError as error:
            self._not_saved(error)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written in the background; that it could not be is told as `begin` does."""
        try:
            self.saver.wait()
        except RunError as error:
            self._not_saved(error)

    def _not_saved(self, error: RunError) -> None:
        self.saved = None  # so that a stop writes one
        if self.config.checkpoint.on_error == "stop" or isinstance(error, LostRun):
            raise error
        self.warn(f"{error}. Training goes on")

    def state(self, progress: Progress, metrics: dict[str, float], done: bool) -> dict[str, Any]:
        """state.json of a checkpoint of this moment."""
        scalars: dict[str, float] = {}
        for partition in self.partitions:
            if partition.pieces:
                scalars.update(partition.scalars())
        state = {
            **progress.to_json(),
            "global_batch": self.batch.global_batch,
            "optimizer": scalars,
            "loss_scaler": {key: value for _, key, value in loss_scaler(self.engine.deepspeed)},
            "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
            "data": self.data,
            "done": done,
            "versions": {name: metadata.version(name) for name in ("torch", "deepspeed")} | {"bigtrain": __version__},
        }
        return format.State.model_validate(state).model_dump()

    def files(self) -> dict[str, str | Path]:
        """What lies beside the tensors, see `Content`."""
        return {"config.yaml": configfile.dump(self.config), "tokenizer": Path(self.config.data.folder) / TOKENIZER}

    def resume(self, checkpoint: Path) -> Progress:
        """Load a checkpoint of this run that has been verified; where it was. Raises UserError when model, data or batch are not what
        it was made with."""
        self.pulse("resume")
        reader = Reader(checkpoint, self.pulse.alive)
        check_shapes(checkpoint, reader.index, self.shapes)
        state = format.read_state(checkpoint)
        if state.data != self.data:
            raise UserError(
                f"{self.config.data.folder}: not the data that {checkpoint} was trained on; bring that back, or start a run with --new"
            )
        if state.global_batch != self.batch.global_batch:
            raise UserError(
                f"train.global_batch: the run has {state.global_batch} sequences a step, this start would have {self.batch.global_batch} "
                f"({self.batch.micro_batch} x {self.batch.accumulation} on {self.batch.ranks} ranks); set train.global_batch="
                f"{state.global_batch} and leave out train.accumulation, or start a run with --new"
            )
        load_all(reader, self.partitions, state.optimizer)
        link(self.engine.deepspeed)
        publish(self.engine.deepspeed)
        for holder, key, _ in loss_scaler(self.engine.deepspeed):
            setattr(holder, key, type(getattr(holder, key))(state.loss_scaler[key]))
        self.saver.trust(checkpoint)
        self.saved = state.step
        return Progress.of(state)

    def start_from(self, path: Path, kind: str) -> None:
        """Take the weights of another run's checkpoint, with a fresh optimizer (fine-tuning). Raises UserError when it is damaged, of
        another model, or has no weights of this `kind`."""
        checkpoint = find(path)
        if problem := check(checkpoint, self.world):
            raise UserError(f"init.checkpoint: {problem}")
        reader = Reader(checkpoint, self.pulse.alive)
        check_shapes(reader.path, reader.index, self.shapes)
        load_weights(reader, self.partitions, kind)
        publish(self.engine.deepspeed)
