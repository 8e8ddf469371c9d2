"""Reading a checkpoint: any fragments into any partitions, so stage and number of ranks need not be those that wrote it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from bigtrain import configfile
from bigtrain.checkpoint import format
from bigtrain.checkpoint.format import Fragment, Index
from bigtrain.config import Config
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.data.tokenizer import load as load_tokenizer
from bigtrain.errors import RunError, UserError
from bigtrain.model.transformer import Transformer
from bigtrain_kernels.ops import resolve_backend

if TYPE_CHECKING:  # it imports deepspeed, which evaluating and generating do without
    from bigtrain.checkpoint.state import Partition


def find(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest of a run folder or checkpoints folder.

    Raises UserError when there is none.
    """
    if (path / "index.json").is_file():
        return path
    for folder in (path, path / "checkpoints"):
        if found := format.checkpoints(folder):
            return found[-1]
    raise UserError(f"{path}: no checkpoint here; give a run folder, or a folder checkpoints/step-* of one")


class Reader:
    """Random access to the fragments of one checkpoint."""

    def __init__(self, checkpoint: Path):
        self.path = checkpoint
        self.index: Index = format.read_index(checkpoint)
        self._by: dict[tuple[str, str], list[Fragment]] = defaultdict(list)
        for fragment in self.index.fragments:
            self._by[fragment.parameter, fragment.kind].append(fragment)
        self._files: dict[str, safe_open] = {}

    def holds(self, parameter: str, kind: str) -> bool:
        return (parameter, kind) in self._by

    def read(self, parameter: str, kind: str, offset: int, out: torch.Tensor) -> None:
        """Fill `out` (1-D) with the elements of `parameter`'s `kind` from `offset`.

        Raises RunError when the checkpoint does not hold them all.
        """
        end, covered = offset + out.numel(), 0
        for f in self._by[parameter, kind]:
            low, high = max(offset, f.offset), min(end, f.offset + f.length)
            if low < high:
                piece = self._open(f.file).get_slice(f.key)[low - f.offset : high - f.offset]
                out[low - offset : high - offset].copy_(piece)
                covered += high - low
        if covered < out.numel():
            raise RunError(f"{self.path}: {kind} of {parameter} has {covered} of the {out.numel()} elements from {offset}")

    def tensor(self, parameter: str, kind: str) -> torch.Tensor:
        """One whole parameter, float32, in its shape."""
        shape = self.index.shapes[parameter]
        out = torch.empty(torch.Size(shape).numel())
        self.read(parameter, kind, 0, out)
        return out.view(shape)

    def _open(self, name: str) -> safe_open:
        if name not in self._files:
            if Path(name).name != name:
                raise RunError(f"{self.path}: the index names {name!r}, which is outside the checkpoint")
            try:
                self._files[name] = safe_open(self.path / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise RunError(f"{self.path / name}: cannot be read ({error})") from None
        return self._files[name]


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
    state: dict[str, Any]


def restore(checkpoint: Path, kind: str, device: torch.device, dtype: torch.dtype) -> Restored:
    """Build the model of a checkpoint, in evaluation mode, with the weights of `kind` ("model" or "ema")."""
    reader = Reader(checkpoint)
    if kind not in reader.index.kinds:
        raise _no_average(reader)
    config = configfile.load(checkpoint / "config.yaml")
    with torch.device("meta"):
        model = Transformer(config.model, config.model.vocab_size, resolve_backend(config.kernels.backend, device))
    model = model.to_empty(device=device).to(dtype)
    check_shapes(checkpoint, reader.index, {name: list(p.shape) for name, p in model.named_parameters()})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.tensor(name, kind))
    state = format.read_json(checkpoint / "state.json")
    return Restored(checkpoint, config, model.eval().requires_grad_(False), load_tokenizer(checkpoint / "tokenizer"), state)


def _no_average(reader: Reader) -> UserError:
    return UserError(f"{reader.path}: holds no moving average of the weights; it was trained without train.ema_decay")
