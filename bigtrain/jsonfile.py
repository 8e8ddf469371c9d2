"""JSON that others may have written, read strictly. Standard library only."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any


def read(path: Path) -> Any:
    """What a JSON file holds; raises as `read_text` and `parse` do."""
    return parse(read_text(path))


def read_text(path: Path) -> str:
    """The text of a file. Raises OSError when it cannot be read, or is a device or a pipe, which a read could wait on for ever, and
    ValueError when it is not UTF-8."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return path.read_text(encoding="utf-8")


def parse(text: str) -> Any:
    """What a JSON text holds. Raises ValueError for anything but strict JSON: no key twice, no NaN, no endless nesting."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:60]!r} stands twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")
