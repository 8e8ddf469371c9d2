"""Version 1 of the checkpoint: safetensors of flat fragments and JSON; no pickle, no trace of the topology.

    checkpoints/step-00000100/
        rank-00000.safetensors ...   float32 fragments; the key of one is its number in the index
        index.json                   version, shape of every parameter, and the fragments:
                                     [parameter, kind, offset, length, file, key]
        state.json                   step, position in the data, optimizer scalars, what the run was (model, data, versions)
        config.yaml  tokenizer/      what made it, and what turns its tokens into text
        manifest.json                size and SHA-256 of every other file; written last

A fragment is `length` elements of the flattened parameter from `offset`. Kinds: "model" (float32 weights), "ema" (their
moving average), and the optimizer's own states under their own names. Together the fragments of a kind cover every
parameter, whatever ZeRO stage and number of ranks wrote them, and are cut to size by whatever reads them.

A folder named step-* is complete: it is written under another name and renamed once, when everything is on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.errors import RunError, UserError

VERSION = 1
PREFIX = "step-"


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


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a run's checkpoints folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.is_dir() and p.name.startswith(PREFIX) and p.name[len(PREFIX) :].isdecimal()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[len(PREFIX) :])


def read_json(path: Path) -> Any:
    """Contents of a JSON file of a checkpoint. Raises RunError that names the file when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}): a damaged checkpoint; remove its folder, and an earlier one is used") from None


def read_index(checkpoint: Path) -> Index:
    """Raises UserError for another version of the format, RunError when the index is damaged or names files elsewhere."""
    path = checkpoint / "index.json"
    raw = read_json(path)
    try:
        if raw["version"] != VERSION:
            raise UserError(f"{checkpoint}: format version {raw['version']}, this bigtrain reads version {VERSION}; use a newer one")
        index = Index(raw["shapes"], [Fragment(*row) for row in raw["fragments"]])
        for name in {f.file for f in index.fragments}:
            if name in ("", ".", "..") or Path(name).name != name:
                raise RunError(f"{path}: names the file {name!r}, which is outside the checkpoint; do not use it")
    except (KeyError, TypeError) as error:
        raise RunError(f"{path}: damaged ({type(error).__name__}: {error}); use another checkpoint") from None
    return index


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


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry(path: Path) -> list[Any]:
    """What the manifest says of a file: size and checksum."""
    return [path.stat().st_size, checksum(path)]


def manifest(folder: Path, known: dict[str, list[Any]]) -> dict[str, Any]:
    """The entry of every file below `folder`; those in `known` are not read again."""
    names = {str(p.relative_to(folder)): p for p in sorted(_files(folder))}
    return {"version": VERSION, "files": {name: known.get(name) or entry(path) for name, path in names.items()}}


def verify(checkpoint: Path) -> None:
    """Compare every file with the manifest. Raises RunError naming the first file that is missing, cut, changed or not listed."""
    try:
        listed = {name: (size, sha256) for name, (size, sha256) in read_json(checkpoint / "manifest.json")["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{checkpoint / 'manifest.json'}: damaged ({type(error).__name__}: {error})") from None
    for path in sorted(_files(checkpoint)):
        if str(path.relative_to(checkpoint)) not in listed:
            raise RunError(f"{path}: not in the manifest; it was put there, or the manifest changed, after the checkpoint was written")
    for name, (size, expected) in listed.items():
        path = checkpoint / name
        if not path.is_file():
            raise RunError(f"{path}: missing")
        if path.stat().st_size != size:
            raise RunError(f"{path}: {path.stat().st_size} bytes, the manifest says {size}")
        if checksum(path) != expected:
            raise RunError(f"{path}: checksum differs from the manifest; the file was changed after it was written")


def _files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and p != folder / "manifest.json"]


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
