"""Where text comes from: a stream of named documents, in an order that depends on nothing but the data."""

from __future__ import annotations

import codecs
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bigtrain.config import Data
from bigtrain.errors import UserError

# Not part of the stdlib source: packages of third parties; tests, because they are 60% of the bytes (tables of expected
# output), hold files that are broken on purpose, and are left out by many distributions. lib2to3 and idlelib stay: they
# are ordinary code, only their tests go.
_STDLIB_WITHOUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_LONGEST_LINE = 1 << 28  # bytes of a line of JSON: a file of another kind would be read into memory whole


class Document(NamedTuple):
    name: str
    """Where it was found: a file, or file:line."""
    text: str
    """Never empty, and always encodable as UTF-8."""


def documents(data: Data) -> Iterator[Document]:
    """Every document of the configured source that has any text, in sorted order of files and of lines in a file.

    Raises UserError for a path that is missing or unreadable, bytes that are not UTF-8, rows that are not what
    `data.field` promises, and for a source without any document; the message names the file and the row.
    """
    found = False
    for document in _SOURCES[data.source](data):
        if document.text:
            found = True
            yield document
    if not found:
        raise UserError(f"data.source {data.source}: no text found in {data.path or 'the standard library'}; check data.path")


def roots(data: Data) -> list[Path]:
    """The configured paths; empty for the standard library."""
    if data.path is None:
        return []
    return [Path(p) for p in ([data.path] if isinstance(data.path, str) else data.path)]


def _stdlib(data: Data) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in _walk(root, "*.py"):
        # _sysconfigdata is written when Python is built: it differs from machine to machine.
        if _STDLIB_WITHOUT.isdisjoint(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata"):
            yield Document(path.relative_to(root).as_posix(), _decode(_read(path), str(path)))


def _text(data: Data) -> Iterator[Document]:
    for path in _files(data, "*"):
        yield Document(str(path), _decode(_read(path), str(path)))


def _jsonl(data: Data) -> Iterator[Document]:
    for path in _files(data, "*.jsonl"):
        try:
            with open(path, "rb") as file:
                number = 0
                while line := file.readline(_LONGEST_LINE + 1):
                    number += 1
                    row = f"{path}:{number}"
                    if len(line) > _LONGEST_LINE:
                        raise UserError(f"{row}: longer than {_LONGEST_LINE >> 20} MiB; every line must be one JSON object: split it")
                    if line.strip():
                        yield Document(row, _field(_decode(line, row), data.field, row))
        except OSError as error:
            raise _unreadable(path, error) from None


_SOURCES = {"stdlib": _stdlib, "text": _text, "jsonl": _jsonl}


def _field(line: str, field: str, row: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{row}: not JSON ({error.msg}, column {error.colno}); every line must be one JSON object") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        raise UserError(f"{row}: not JSON that can be read ({reason}); mend the row or take it out") from None
    if not isinstance(value, dict):
        raise UserError(f"{row}: expected a JSON object with the field {field!r}, found {_kind(value)}")
    if field not in value:
        names = ", ".join(map(repr, value)) or "none"
        raise UserError(f"{row}: no field {field!r}; its fields are {names}: set data.field to the one that holds the text")
    text = value[field]
    if not isinstance(text, str):
        raise UserError(f"{row}: field {field!r} must be a string, found {_kind(text)}; mend the row or set data.field to another field")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair, UTF-8 has no bytes for it
        raise UserError(f"{row}: field {field!r} has a lone surrogate at character {error.start}; remove it, it is not text") from None
    return text


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _files(data: Data, pattern: str) -> Iterator[Path]:
    for root in roots(data):
        if root.is_dir():
            yield from _walk(root, pattern)
        elif root.is_file():
            yield root
        elif root.exists():
            raise UserError(f"data.path: {root} is a device or a pipe; give a file or a folder")
        else:
            raise UserError(f"data.path: {root} does not exist; give a file or a folder (from {Path.cwd()})")


def _walk(root: Path, pattern: str) -> Iterator[Path]:
    """Files under a folder, hidden ones and those in hidden folders left out, sorted alike on every machine."""
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob(pattern) if path.is_file()}
    yield from (paths[name] for name in sorted(paths) if not name.startswith(".") and "/." not in name)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); make it readable or take it out of data.path")


def _decode(raw: bytes, row: str) -> str:
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{row}: not UTF-8 (byte 0x{raw[error.start]:02x} at {error.start}); convert it to UTF-8 or take it out of data.path"
        ) from None
