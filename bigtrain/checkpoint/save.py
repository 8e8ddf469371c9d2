"""Writing a checkpoint: every rank its own fragments, rank 0 the rest, and one step that makes it exist.

Nothing is gathered but file names and checksums. What is written depends on the state alone, so a checkpoint that was
written in the background (background.py) has the same bytes as one that training waited for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from bigtrain.checkpoint import format
from bigtrain.checkpoint.format import Fragment, Index
from bigtrain.config import Checkpoint
from bigtrain.errors import LostRun, RunError
from bigtrain.world import World

if TYPE_CHECKING:  # it imports deepspeed
    from bigtrain.checkpoint.state import Partition

Verdict = RunError | None
"""What kept a checkpoint from being written, the same on every rank; None when it was."""


Problem = tuple[str, bool] | None
"""What went wrong on one rank, and whether it has lost the run."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint is to hold: this rank's fragments, and what rank 0 adds."""

    step: int
    shapes: dict[str, list[int]]
    """Of every parameter, by name."""
    fragments: list[tuple[str, str, int, torch.Tensor]]
    """(parameter, kind, offset in it, elements): flat tensors of any floating dtype, on any device."""
    state: dict[str, Any]
    """For state.json."""
    files: dict[str, str | Path]
    """Added as they are: name -> text, or a folder to copy."""


def fragments(partitions: list[Partition], world: World, copy: Callable = lambda tensor, key: tensor) -> list[tuple]:
    """`Content.fragments` of this rank. `copy(flat tensor, key)` may give a copy of it, the key being the same every time."""
    found = []
    for number, partition in enumerate(partitions):
        if partition.replicated and number % world.size != world.rank:  # what every rank holds is written by one
            continue
        for kind, (tensor, pieces) in partition.tensors().items():
            kept = copy(tensor, (number, kind))
            found += [(p.name, kind, p.offset, kept[p.start : p.start + p.length]) for p in pieces]
    return found


def save(
    folder: Path,
    content: Content,
    world: World,
    rules: Checkpoint | None = None,
    guard: Callable[[], None] = lambda: None,
) -> Path:
    """Write `content` into `folder` and return the checkpoint's path. Every rank calls it.

    `guard` raises LostRun when this run may not commit (see lease.py), and so do then all ranks. Raises RunError on every rank
    when any rank could not write. What was there before stays.
    """
    final = folder / f"{format.PREFIX}{content.step:08d}"
    if verdict := write(final, content, world, rules or Checkpoint(), guard):
        raise verdict
    return final


def write(
    final: Path,
    content: Content,
    world: World,
    rules: Checkpoint,
    guard: Callable[[], None],
    sign: Callable[[], None] = lambda: None,
) -> Verdict:
    """Write `content` as the checkpoint `final`; the same verdict on every rank. When `guard` raises nothing is touched any more.
    `sign` is called after every file of this rank."""
    temporary = final if rules.commit == "file" else final.with_name(f".{final.name}.writing")

    def agree(problem: Problem) -> Verdict:
        problems = [(rank, *found) for rank, found in enumerate(world.gather(problem)) if found]
        if not problems:
            return None
        rank, text, lost = problems[0]
        if world.first and _try(guard) is None:  # else it is the one that another attempt is writing now
            shutil.rmtree(temporary, ignore_errors=True)
        before = format.checkpoints(final.parent)
        safe = f"the newest complete checkpoint is {before[-1]}" if before else "there is no earlier checkpoint"
        return (LostRun if lost else RunError)(f"{final}: not written, rank {rank} says: {text}; {safe}")

    def begin() -> None:
        guard()  # what lies there unfinished may be another attempt's by now
        _fresh(temporary, needed, rules.commit == "file")

    needed = sum(world.gather(sum(4 * tensor.numel() for *_, tensor in content.fragments)))
    if verdict := agree(_try(begin) if world.first else None):
        return verdict
    written: list[Any] = []
    if verdict := agree(_try(lambda: written.extend(_write_rank(temporary, content.fragments, world.rank, rules.file_bytes, sign)))):
        return verdict
    gathered = world.gather(written)
    return agree(_try(lambda: _commit(temporary, final, content, gathered, guard)) if world.first else None)


def _fresh(temporary: Path, needed: int, in_place: bool) -> None:
    folder = temporary.parent
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = set(format.checkpoints(folder, complete=False)) - set(format.checkpoints(folder)) if in_place else ()
    for left in [*folder.glob(".*.writing"), *folder.glob(".*.removing"), *unfinished]:  # of a save that a crash cut short
        shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(f"no space: {needed / 2**20:,.0f} MiB are needed in {folder}, {free / 2**20:,.0f} MiB are free")
    if temporary.exists():
        remove(temporary)
    temporary.mkdir()


def _write_rank(
    folder: Path, fragments: list[tuple], rank: int, file_bytes: int, sign: Callable[[], None]
) -> tuple[list[list[Any]], dict[str, list[Any]]]:
    """Write this rank's files; its fragments, as the index lists them, and the files' entries for the manifest."""
    rows, entries, start = [], {}, 0
    while start < len(fragments):
        name, stop, size = f"rank-{rank:05d}-{len(entries)}.safetensors", start, 0
        while stop < len(fragments) and (stop == start or size + 4 * fragments[stop][3].numel() <= file_bytes):
            size += 4 * fragments[stop][3].numel()
            stop += 1
        entries[name] = _write_tensors(folder / name, fragments[start:stop])
        for key, (parameter, kind, offset, tensor) in enumerate(fragments[start:stop]):
            rows.append([parameter, kind, offset, tensor.numel(), name, str(key)])
        start = stop
        sign()
    return rows, entries


def _write_tensors(path: Path, fragments: list[tuple]) -> list[Any]:
    """Write a safetensors file of float32 tensors keyed 0, 1, ... and return its entry, once it reads back as it was written.

    Written here, a tensor at a time: the library would hold a second copy of all of them, and read nothing back.
    """
    header, at = {}, 0
    for key, (*_, tensor) in enumerate(fragments):
        header[str(key)] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [at, at + 4 * tensor.numel()]}
        at += 4 * tensor.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight
    found = xxhash.xxh3_128()
    with open(path, "wb", buffering=0) as file:
        for block in [len(text).to_bytes(8, "little") + text, *fragments]:
            if isinstance(block, tuple):
                parameter, kind, _, tensor = block
                block = _bytes(tensor, f"{kind} of {parameter}")
            view = memoryview(block)
            found.update(view)
            while view:  # a disk that fills up takes a part
                view = view[file.write(view) :]
    format.sync(path)
    entry = [8 + len(text) + at, found.hexdigest()]
    if [path.stat().st_size, format.checksum(path)] != entry:
        raise RunError(f"{path}: does not read back as it was written")
    return entry


def _bytes(tensor: torch.Tensor, what: str) -> memoryview:
    host = tensor.detach().to("cpu", torch.float32).contiguous()
    if host.numel() and not all(bound.isfinite() for bound in torch.aminmax(host)):
        raise RunError(f"{what} is not finite")  # the last good checkpoint must stay the newest
    return memoryview(host.numpy()).cast("B") if host.numel() else memoryview(b"")


def _commit(temporary: Path, final: Path, content: Content, gathered: list[Any], guard: Callable[[], None]) -> None:
    sums = {name: entry for _, listed in gathered for name, entry in listed.items()}
    index = Index(content.shapes, [Fragment(*row) for rows, _ in gathered for row in rows])
    _write_text(temporary / "index.json", json.dumps(index.to_json()))
    _write_text(temporary / "state.json", json.dumps(content.state, indent=1))
    for name, part in content.files.items():
        if isinstance(part, Path):
            shutil.copytree(part, temporary / name)
        else:
            _write_text(temporary / name, part)
    for path in [*temporary.rglob("*"), temporary]:
        if path.name not in sums:  # the ranks have done theirs
            format.sync(path)
    guard()
    _write_text(temporary / f".{format.MANIFEST}", json.dumps(format.manifest(temporary, sums), indent=1))
    format.sync(temporary / f".{format.MANIFEST}")
    (temporary / f".{format.MANIFEST}").rename(temporary / format.MANIFEST)
    format.sync(temporary)
    if temporary != final:
        if final.exists():  # the same step again, after a resume went back behind it
            remove(final)
        temporary.rename(final)
    format.sync(final.parent)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint: renamed first, so that a crash leaves none half deleted."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removing")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _try(action: Callable[[], None]) -> Problem:
    """Run `action`; its error as what can be agreed on, instead of leaving peers waiting."""
    try:
        action()
    except (OSError, RunError) as error:
        return str(error), isinstance(error, LostRun)
    return None
