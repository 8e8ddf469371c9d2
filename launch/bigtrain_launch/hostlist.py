"""Host lists as Slurm writes them, `n[9-10],gpu-a[001-003,7]`, read and written without Slurm: `scontrol show hostnames` wants
the cluster's configuration, and every launcher wants the order."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

from bigtrain.errors import UserError

LARGEST = 1 << 16  # hosts in a list, as in Slurm itself
_ITEM = re.compile(r"(?:[A-Za-z0-9_.-]|\[[0-9,-]*\])+")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
_NUMBERED = re.compile(r"(.*?)([0-9]{1,18})", re.DOTALL)


def expand(text: str) -> list[str]:
    """The hosts of a list, in its order; a host that stands twice is there twice. Raises UserError for what is no host list."""
    hosts: list[str] = []
    place = 0
    while True:
        item = _ITEM.match(text, place)
        if not item:
            raise _error(text, f"expected a host at {text[place : place + 20]!r}" if text[place:] else "expected a host at its end")
        parts = [_numbers(part, text) if part.startswith("[") else [part] for part in re.findall(r"\[[^]]*\]|[^[]+", item[0])]
        size = 1
        for part in parts:
            size *= len(part)
        if len(hosts) + size > LARGEST:
            raise _error(text, f"more than {LARGEST:,} hosts")
        hosts += map("".join, itertools.product(*parts))
        place = item.end()
        if place == len(text):
            return hosts
        if text[place] != ",":
            raise _error(text, f"expected a comma at {text[place : place + 20]!r}")
        place += 1


def _numbers(brackets: str, text: str) -> Sequence[str]:
    """What stands in brackets: numbers, and ranges whose first number says how wide all are."""
    found: list[str] = []
    for part in brackets[1:-1].split(","):
        match = _RANGE.fullmatch(part)
        if not match:
            raise _error(text, f"expected numbers and ranges in {brackets[:40]!r}, as in [1-3,007]")
        first, last = match[1], match[2] or match[1]
        if int(first) > int(last) or (len(last) != len(first) and last.startswith("0")):
            raise _error(text, f"the range {part} runs backwards" if int(first) > int(last) else f"the range {part} changes its width")
        if len(found) + int(last) - int(first) >= LARGEST:
            raise _error(text, f"more than {LARGEST:,} hosts")
        found += (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return found


def fold(hosts: Iterable[str]) -> str:
    """The shortest list in this order that `expand` reads back: neighbours that differ in their last number share brackets."""
    groups: list[tuple[str, list[list[str]]]] = []  # a name without its number, and its ranges [first, last]
    for host in hosts:
        match = _NUMBERED.fullmatch(host)
        name, number = (match[1], match[2]) if match else (host, "")
        if not (match and groups and groups[-1][0] == name and groups[-1][1]):
            groups.append((name, [[number, number]] if match else []))
            continue
        ranges = groups[-1][1]
        first, last = ranges[-1]
        if number == str(int(last) + 1).zfill(len(first)):
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(name + _brackets(ranges) for name, ranges in groups)


def _brackets(ranges: list[list[str]]) -> str:
    if not ranges:
        return ""
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return ranges[0][0]
    return "[" + ",".join(first if first == last else f"{first}-{last}" for first, last in ranges) + "]"


def _error(text: str, what: str) -> UserError:
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    return UserError(f"host list {shown!r}: {what}; a list looks like n[9-10],gpu-a[001-003,7]")
