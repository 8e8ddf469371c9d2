"""Reading a checkpoint: any fragments into any partitions, so stage and number of ranks need not be those that wrote it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from bigtrain import configfile
from bigtrain.checkpoint import format
from bigtrain.checkpoint.format import Fragment, Index, find
from bigtrain.config import Config
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.data.tokenizer import load as load_tokenizer
from bigtrain.errors import BigtrainError, RunError, UserError
from bigtrain.model.transformer import Transformer
from bigtrain.world import World
from bigtrain_kernels.ops import resolve_backends

if TYPE_CHECKING:  # it imports deepspeed, which evaluating and generating do without
    from bigtrain.checkpoint.state import Partition


class Reader:
    """Random access to the fragments of one checkpoint. `sign` is called after every `read`."""

    def __init__(self, checkpoint: Path, sign: Callable[[], None] = lambda: None):
        self.path, self._sign = checkpoint, sign
        self.index: Index = format.read_index(checkpoint)
        self._by: dict[tuple[str, str], list[Fragment]] = defaultdict(list)
        for fragment in self.index.fragments:
            self._by[fragment.parameter, fragment.kind].append(fragment)
        for fragments in self._by.values():
            fragments.sort(key=lambda f: f.offset)
        self._files: dict[str, safe_open] = {}

    def holds(self, parameter: str, kind: str) -> bool:
        return (parameter, kind) in self._by

    def read(self, parameter: str, kind: str, offset: int, out: torch.Tensor) -> None:
        """Fill `out` (1-D) with the elements of `parameter`'s `kind` from `offset`.

        Raises RunError when the checkpoint does not hold them all, or a file does not hold what the index says.
        """
        at, end = offset, offset + out.numel()
        for f in self._by.get((parameter, kind), []):
            high = min(end, f.offset + f.length)
            if f.offset <= at < high:
                out[at - offset : high - offset].copy_(self._fragment(f, at, high))
                at = high
        if at < end:
            raise RunError(f"{self.path}: {kind} of {parameter} lacks element {at} of {offset} to {end - 1}; use another checkpoint")
        self._sign()

    def tensor(self, parameter: str, kind: str) -> torch.Tensor:
        """One whole parameter, float32, in its shape."""
        shape = self.index.shapes[parameter]
        out = torch.empty(torch.Size(shape).numel())
        self.read(parameter, kind, 0, out)
        return out.view(shape)

    def _fragment(self, f: Fragment, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a parameter, out of the fragment that covers them."""
        path = self.path / f.file
        try:
            if f.file not in self._files:
                self._files[f.file] = safe_open(path, framework="pt")
            stored = self._files[f.file].get_slice(f.key)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{path}: cannot be read ({error}); use another checkpoint") from None
        if stored.get_shape() != [f.length]:
            raise RunError(f"{path}: {f.key} has shape {stored.get_shape()}, the index says {f.length} elements; use another checkpoint")
        return stored[start - f.offset : stop - f.offset]


def newest_sound(found: list[Path], world: World, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of `found` (oldest first) whose files are what was written; None when `found` is empty.

    All ranks call it with the same list, share the reading, and get the same answer. One that is damaged is passed over, and
    `warn` is told. Raises RunError when all are: a run that has checkpoints never starts again from nothing.
    """
    problems = []
    for checkpoint in reversed(found):
        problem = check(checkpoint, world)
        if problem is None:
            return checkpoint
        problems.append(problem)
        warn(f"{problem}. Passing over {checkpoint.name}")
    if problems:
        raise RunError(
            f"every checkpoint of this run is damaged: {'; '.join(problems)}. Bring one back, or start a new run with --new; "
            "nothing was changed"
        )
    return None


def check(checkpoint: Path, world: World) -> str | None:
    """What is wrong with a checkpoint, the same on all ranks, which share the reading; None when nothing is."""
    problem = None
    try:
        format.verify(checkpoint, (world.rank, world.size), world.pulse.alive)
        if world.first:
            format.read_index(checkpoint)
            format.read_state(checkpoint)
    except BigtrainError as error:
        problem = str(error)
    return next(filter(None, world.gather(problem)), None)


def check_shapes(checkpoint: Path, index: Index, shapes: dict[str, list[int]]) -> None:
    """Raise UserError with the first differences when the checkpoint is of another model."""
    differ = [
        f"{name} {index.shapes.get(name, 'missing')} in the checkpoint, {shapes.get(name, 'missing')} in the model"
        for name in sorted(set(index.shapes) | set(shapes))
        if index.shapes.get(name) != shapes.get(name)
    ]
    if differ:
        more = f"; and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise UserError(f"{checkpoint}: a checkpoint of another model: {'; '.join(differ[:3])}{more}. Use its config.yaml's model section")


def load_all(reader: Reader, partitions: list[Partition], scalars: dict[str, float]) -> None:
    """Fill this rank's partitions with everything that the checkpoint holds: weights, optimizer, moving average.

    `scalars` are the optimizer's. Raises RunError when the checkpoint lacks a part of something.
    """
    for partition in partitions:
        for kind in sorted(reader.index.kinds):
            pieces = partition.own_layout.get(kind, partition.pieces)
            # An optimizer keeps some kinds for some parameters only (Muon's momentum, AdamW's moments).
            if any(reader.holds(piece.name, kind) for piece in pieces):
                partition.create(kind)
                _fill(reader, partition, kind, kind)
        partition.set_scalars(scalars)


def load_weights(reader: Reader, partitions: list[Partition], kind: str) -> None:
    """Fill only the weights, from `kind` of the checkpoint: "model", or "ema" for the moving average.

    Raises UserError when the checkpoint has no moving average.
    """
    if kind not in reader.index.kinds:
        raise _no_average(reader)
    for partition in partitions:
        _fill(reader, partition, "model", kind)


def _fill(reader: Reader, partition: Partition, kind: str, source: str) -> None:
    tensor, pieces = partition.tensors()[kind]
    for piece in pieces:
        out = torch.empty(piece.length)
        reader.read(piece.name, source, piece.offset, out)
        tensor[piece.start : piece.start + piece.length].copy_(out)


@dataclass(frozen=True)
class Restored:
    """A whole model in one process, ready to evaluate or generate with."""

    path: Path
    config: Config
    model: Transformer
    tokenizer: Tokenizer
    state: format.State


def restore(path: Path, kind: str, device: torch.device, dtype: torch.dtype) -> Restored:
    """Build the model of a checkpoint (`path` as for `find`), in evaluation mode, with the weights of `kind` ("model" or "ema").

    Raises UserError when there is no checkpoint or it has no such weights, RunError when it is damaged.
    """
    checkpoint = find(path)
    try:
        format.verify(checkpoint)
    except RunError as error:
        raise RunError(f"{error}. An earlier checkpoints/step-* of the run may be given instead") from None
    reader = Reader(checkpoint)
    if kind not in reader.index.kinds:
        raise _no_average(reader)
    config = configfile.load_saved(checkpoint / "config.yaml")
    if config.model.layers > len(reader.index.shapes):  # before a model of a billion layers is built to be compared
        raise RunError(f"{checkpoint}: holds {len(reader.index.shapes)} parameters, its config.yaml says {config.model.layers} layers")
    try:
        backends = resolve_backends(device, config.kernels.backend, config.kernels.choices)
    except ValueError:  # trained with Triton on a GPU, looked at on a machine without one
        backends = resolve_backends(device)
    with torch.device("meta"):
        model = Transformer(config.model, config.model.vocab_size, backends)
    check_shapes(checkpoint, reader.index, {name: list(p.shape) for name, p in model.named_parameters()})
    model = model.to_empty(device=device).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.tensor(name, kind))
    state = format.read_state(checkpoint)
    return Restored(checkpoint, config, model.eval().requires_grad_(False), load_tokenizer(checkpoint / "tokenizer"), state)


def _no_average(reader: Reader) -> UserError:
    return UserError(f"{reader.path}: holds no moving average of the weights; it was trained without train.ema_decay")
