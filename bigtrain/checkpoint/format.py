"""Version 1 of the checkpoint: safetensors of flat fragments and JSON; no pickle, no trace of the topology.

    checkpoints/step-00000100/
        rank-00000-0.safetensors ...  float32 fragments; the key of one is its number in the index
        index.json                    version, shape of every parameter, and the fragments:
                                      [parameter, kind, offset, length, file, key]
        state.json                    step, position in the data, optimizer scalars, what the run was (data, batch, versions)
        config.yaml  tokenizer/       what made it, and what turns its tokens into text
        manifest.json                 size and checksum (XXH3, 128 bits) of every other file, and of itself; written last

A fragment is `length` elements of the flattened parameter from `offset`. Kinds: "model" (float32 weights), "ema" (their
moving average), and the optimizer's own states under their own names. Together the fragments of a kind cover every
parameter, whatever ZeRO stage and number of ranks wrote them, and are cut to size by whatever reads them.

A folder named step-* with a manifest is complete: it is written under another name and renamed once, when everything is on
disk. Checksums find what disks and copies do to files; they are no signature, and nothing in a checkpoint can run code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field, ValidationError

from bigtrain.configsection import Count, Section
from bigtrain.errors import RunError, UserError

VERSION = 1
PREFIX = "step-"
MANIFEST = "manifest.json"
INDEX_BYTES = 1 << 32
"""A larger JSON file than this is no index of ours."""
BLOCK = 1 << 22
"""Bytes that are read and summed at a time."""


@dataclass(frozen=True)
class Fragment:
    parameter: str
    kind: str
    offset: int
    length: int
    file: str
    key: str


@dataclass(frozen=True)
class Index:
    """Where every element of every parameter's every state is."""

    shapes: dict[str, list[int]]
    fragments: list[Fragment]

    @property
    def kinds(self) -> set[str]:
        return {f.kind for f in self.fragments}

    def to_json(self) -> dict[str, Any]:
        rows = [[f.parameter, f.kind, f.offset, f.length, f.file, f.key] for f in self.fragments]
        return {"version": VERSION, "shapes": self.shapes, "fragments": rows}


class State(Section):
    """state.json: all of a run that is not a tensor. Everything but the versions is needed to go on."""

    step: Count
    """Optimizer steps done, those that were passed over among them."""
    position: Count
    """Sequences consumed, over all epochs."""
    global_batch: Count
    """Sequences a step: the learning rate and the data order of the steps to come were chosen for it."""
    data: str
    """Fingerprint of the prepared data."""
    done: bool
    """The run ended here."""
    best_loss: float | None
    evaluations_since_best: Count
    skipped: Count
    """Steps passed over in a row, up to this one."""
    norm_average: float
    norm_count: Count
    optimizer: dict[str, float]
    """The optimizer's numbers that are not tensors."""
    loss_scaler: dict[str, float]
    metrics: dict[str, float]
    """Of the evaluation at this step, those that are finite; empty when there was none."""
    versions: dict[str, str] = Field(default_factory=dict)


def checkpoints(folder: Path, complete: bool = True) -> list[Path]:
    """Complete checkpoints in a run's checkpoints folder, oldest first; with `complete` false also those without a manifest,
    which the renaming of a folder never leaves behind: somebody has removed it."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.name.startswith(PREFIX) and p.name[len(PREFIX) :].isdecimal()]
    return sorted((p for p in found if (p / MANIFEST).is_file() or (p.is_dir() and not complete)), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[len(PREFIX) :])


def find(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest of a run folder or checkpoints folder.

    Raises UserError when there is none.
    """
    if (path / "index.json").is_file():
        return path
    for folder in (path, path / "checkpoints"):
        if found := checkpoints(folder):
            return found[-1]
    raise UserError(f"{path}: no checkpoint here; give a run folder, or a folder checkpoints/step-* of one")


# ---- Reading what is not tensors ----


def read_json(path: Path) -> Any:
    """Contents of a JSON file of a checkpoint. Raises RunError that names the file when it is missing or broken."""
    try:
        if not path.is_file() or path.stat().st_size > INDEX_BYTES:
            raise ValueError("not a file of JSON")  # a pipe would never end
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read ({_line(error)}): a damaged checkpoint") from None


def read_state(checkpoint: Path) -> State:
    """Raises RunError when state.json is damaged."""
    path = checkpoint / "state.json"
    try:
        return State.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise RunError(f"{path}: damaged ({where}: {first['msg']})") from None


def read_index(checkpoint: Path) -> Index:
    """Raises UserError for another version of the format, RunError when the index is damaged or names files elsewhere."""
    path = checkpoint / "index.json"
    raw = read_json(path)
    try:
        if raw["version"] != VERSION:
            raise UserError(f"{checkpoint}: format version {raw['version']}, this bigtrain reads version {VERSION}; use a newer one")
        index = Index(raw["shapes"], [Fragment(*row) for row in raw["fragments"]])
        for name, shape in index.shapes.items():
            if not all(type(n) is int and n >= 0 for n in [*shape]):
                raise RunError(f"{path}: damaged (the shape of {name} is {shape!r:.80})")
        for f in index.fragments:
            if not all(isinstance(text, str) for text in (f.parameter, f.kind, f.file, f.key)):
                raise RunError(
                    f"{path}: damaged (a fragment of {f.parameter!r:.80} with the file {f.file!r:.80} and the key {f.key!r:.80})"
                )
            if not (type(f.offset) is int and type(f.length) is int and f.offset >= 0 and f.length >= 0 and f.parameter in index.shapes):
                raise RunError(f"{path}: damaged (a fragment of {f.parameter!r:.80} at {f.offset!r:.80}, {f.length!r:.80} long)")
        for name in {f.file for f in index.fragments}:
            if name in ("", ".", "..") or Path(name).name != name:
                raise RunError(f"{path}: names the file {name!r}, which is outside the checkpoint; do not use it")
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: damaged ({type(error).__name__}: {_line(error)})") from None
    return index


# ---- The manifest ----


def checksum(path: Path) -> str:
    """XXH3 of a file, 128 bits in hexadecimal."""
    import xxhash  # not at the top: a login node looks for checkpoints without it

    found = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        block = bytearray(BLOCK)
        while count := file.readinto(block):
            found.update(memoryview(block)[:count])
    return found.hexdigest()


def manifest(folder: Path, known: dict[str, list[Any]]) -> dict[str, Any]:
    """The entry (size, checksum) of every file below `folder`; those in `known` are not read again."""
    names = {p.relative_to(folder).as_posix(): p for p in _files(folder)}
    files = {name: known.get(name) or [names[name].stat().st_size, checksum(names[name])] for name in sorted(names)}
    return {"version": VERSION, "files": files, "checksum": _own_checksum(files)}


def verify(checkpoint: Path, share: tuple[int, int] | None = (0, 1), sign: Callable[[], None] = lambda: None) -> None:
    """Compare the files with the manifest: names and sizes of all, contents of every n-th from the i-th on, `share` being (i, n);
    of none with None. `sign` is called after every file.

    Raises RunError naming the first file that is missing, cut, changed, a link, or not listed.
    """
    path = checkpoint / MANIFEST
    found = read_json(path)
    try:
        listed = {name: (size, expected) for name, (size, expected) in found["files"].items()}
        intact = share is None or found["checksum"] == _own_checksum(found["files"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path}: damaged ({type(error).__name__}: {_line(error)})") from None
    if not intact:
        raise RunError(f"{path}: its own checksum differs; it was changed after it was written")
    for name in listed:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise RunError(f"{path}: names the file {name!r}, which is outside the checkpoint; do not use it")
    try:
        there = _files(checkpoint)
    except OSError as error:
        raise RunError(f"{checkpoint}: cannot be read ({error.strerror})") from None
    for file in there:
        if file.relative_to(checkpoint).as_posix() not in listed:
            raise RunError(f"{file}: not in the manifest; it was put there, or the manifest changed, after the checkpoint was written")
    for number, (name, (size, expected)) in enumerate(sorted(listed.items())):
        file = checkpoint / name
        try:
            if file.is_symlink() or not file.is_file():
                raise RunError(f"{file}: {'a link' if file.is_symlink() else 'missing'}; a checkpoint holds plain files")
            if file.stat().st_size != size:
                raise RunError(f"{file}: {file.stat().st_size} bytes, the manifest says {size}")
            if share and number % share[1] == share[0] and checksum(file) != expected:
                raise RunError(f"{file}: checksum differs from the manifest; the file was changed after it was written")
        except OSError as error:
            raise RunError(f"{file}: cannot be read ({error.strerror})") from None
        sign()


def _own_checksum(files: dict[str, Sequence[Any]]) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())


def _files(folder: Path) -> list[Path]:
    """Everything below a checkpoint's folder but folders and the manifest: files, and what should not be there."""
    return sorted(p for p in folder.rglob("*") if (p.is_symlink() or not p.is_dir()) and p != folder / MANIFEST)


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
