"""Writing a checkpoint: every rank its own fragments, rank 0 the rest, and one rename that makes it exist."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from bigtrain.checkpoint import format
from bigtrain.checkpoint.format import Fragment, Index
from bigtrain.errors import RunError
from bigtrain.world import World

if TYPE_CHECKING:  # it imports deepspeed
    from bigtrain.checkpoint.state import Partition


def save(
    folder: Path,
    step: int,
    shapes: dict[str, list[int]],
    partitions: list[Partition],
    state: dict[str, Any],
    files: dict[str, str | Path],
    world: World,
) -> Path:
    """Write checkpoint `step` into `folder` and return its path. Every rank calls it; nothing is gathered.

    `state` is what goes into state.json. `files` are added as they are: name -> text, or a folder to copy.
    Raises RunError on every rank when any rank could not write; what was there before stays.
    """
    final = folder / f"{format.PREFIX}{step:08d}"
    temporary = folder / f".{final.name}.writing"
    problem = _attempt(world.first, lambda: _fresh(folder, temporary))
    _agree(world, problem, temporary, final)

    written: list[Any] = []
    problem = _attempt(True, lambda: written.extend(_write_rank(temporary, partitions, world)))
    _agree(world, problem, temporary, final)

    gathered = world.gather(written)

    def commit() -> None:
        index = Index(shapes, [Fragment(*row) for rows, _ in gathered for row in rows])
        sums = {name: entry for _, listed in gathered for name, entry in listed.items()}
        _write(temporary / "index.json", json.dumps(index.to_json()))
        _write(temporary / "state.json", json.dumps(state, indent=1))
        for name, content in files.items():
            if isinstance(content, Path):
                shutil.copytree(content, temporary / name)
            else:
                _write(temporary / name, content)
        _write(temporary / "manifest.json", json.dumps(format.manifest(temporary, sums), indent=1))
        for path in [*temporary.rglob("*"), temporary]:
            if path.name not in sums:  # the ranks have done theirs
                format.sync(path)
        if final.exists():  # the same step again, after a resume went back behind it
            _remove(final)
        temporary.rename(final)
        format.sync(folder)

    _agree(world, _attempt(world.first, commit), temporary, final)
    return final


def keep_newest(folder: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints: renamed first, so that a crash leaves none half deleted."""
    for old in format.checkpoints(folder)[:-count]:
        _remove(old)


def _remove(checkpoint: Path) -> None:
    doomed = checkpoint.with_name(f".{checkpoint.name}.removing")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _fresh(folder: Path, temporary: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.writing"):  # of a save that a crash cut short
        shutil.rmtree(left)
    for left in folder.glob(".*.removing"):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()


def _write_rank(folder: Path, partitions: list[Partition], world: World) -> tuple[list[list[Any]], dict[str, list[Any]]]:
    """Write this rank's file; its fragments, as the index lists them, and its entry for the manifest."""
    name = f"rank-{world.rank:05d}.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    fragments = []
    for number, partition in enumerate(partitions):
        if partition.replicated and number % world.size != world.rank:
            continue
        for kind, (tensor, pieces) in partition.tensors().items():
            for piece in pieces:
                key = str(len(fragments))
                fragments.append([piece.name, kind, piece.offset, piece.length, name, key])
                # A copy of its own: safetensors refuses views that share storage.
                tensors[key] = tensor[piece.start : piece.start + piece.length].to("cpu", torch.float32, copy=True)
                if kind == "model" and not tensors[key].isfinite().all():  # the last good checkpoint must stay the newest
                    raise RunError(f"the weights of {piece.name} are not finite")
    save_file(tensors, folder / name)
    format.sync(folder / name)
    return fragments, {name: format.entry(folder / name)}


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _attempt(mine: bool, action: Callable[[], None]) -> str | None:
    """Run `action` where `mine`; the error as text, so that it can be agreed on instead of leaving peers waiting."""
    if mine:
        try:
            action()
        except (OSError, SafetensorError, RunError) as error:  # safetensors reports a full disk as its own error
            return str(error)
    return None


def _agree(world: World, problem: str | None, temporary: Path, final: Path) -> None:
    problems = [(rank, text) for rank, text in enumerate(world.gather(problem)) if text]
    if not problems:
        return
    if world.first:
        shutil.rmtree(temporary, ignore_errors=True)
    rank, text = problems[0]
    before = format.checkpoints(final.parent)
    safe = f"the newest complete checkpoint is {before[-1]}" if before else "there is no earlier checkpoint"
    raise RunError(f"{final}: not written, rank {rank} says: {text}; {safe}")
