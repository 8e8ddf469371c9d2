"""Config files: YAML in, one validated `Config` out, and everything that is wrong said at once.

A file is a YAML mapping of the sections of `config.py`. `include:` names files whose keys it builds on; overrides
(`section.key=value`, from the command line) come last:

    include: [../models/gpt2-124m.yaml, base.yaml]     # the later wins, this file's own keys win over both
    train: {steps: 1e4}

Every key remembers where it was set, so a message can name the line and `bigtrain config show` can say who decided.
"""

from __future__ import annotations

import difflib
import site
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bigtrain import plainyaml
from bigtrain.config import Config, flat
from bigtrain.configschema import Key, is_section, short, validate
from bigtrain.errors import UserError
from bigtrain.secrets import kinds

COMMAND_LINE = "command line"
_LARGEST_FILE = 1 << 20  # bytes; a config has a few thousand, and YAML is read at a megabyte in several seconds


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, its includes and the overrides. Raises one UserError that lists every problem."""
    return read(path, overrides).config


def load_saved(path: str | Path) -> Config:
    """Read what `dump` wrote, of a run or a checkpoint that others may have made: as `load`, and an include is refused."""
    return read(path, alone=True).config


def read(path: str | Path, overrides: Sequence[str] = (), alone: bool = False) -> Source:
    """As `load`, together with where each value was set. `alone`: the file may include no other."""
    reader = _Reader(alone)
    file = find(path)
    values = reader.file(file)
    for override in overrides:
        values = _merge(values, reader.override(override))
    config, refused = validate(values, reader.complete)
    for key, text in [*refused, *(_secrets(config) if config else [])]:
        reader.problem(_where(reader.origins, key) or str(file), key, text)
    if reader.problems or config is None:
        raise _user_error(file, reader.problems)
    return Source(config, file, reader.origins)


@dataclass(frozen=True)
class Source:
    """A config and where it came from."""

    config: Config
    path: Path
    origins: dict[Key, str]
    """Where each key was set: `file:line` or `command line`; keys that nobody set are not in it."""

    def show(self) -> str:
        """The resolved config as YAML; a comment says where each value was set, those without one are defaults."""
        return dump(self.config, self.origins)

    def error(self, found: Iterable[tuple[str, str]]) -> UserError:
        """The UserError for problems (key, text) found later, for example on this hardware."""
        lines = []
        for key, text in found:
            lines.append(f"{_where(self.origins, tuple(key.split('.'))) or self.path}: {key}: {text}")
        return _user_error(self.path, lines)


def dump(config: Config, origins: dict[Key, str] | None = None) -> str:
    """YAML text of the whole config that `load` reads back to an equal one."""
    lines: list[str] = []

    def write(mapping: dict[str, Any], section: Key) -> None:
        for name, value in mapping.items():
            key = (*section, name)
            line = "  " * len(section) + f"{name}:"
            if isinstance(value, dict) and value:
                lines.append(line)
                write(value, key)
            else:
                origin = origins.get(key) if origins else None
                line += f" {plainyaml.one_line(value)}"
                lines.append(f"{line:<40}  # {origin}" if origin else line)

    write(config.model_dump(), ())
    return "\n".join(lines) + "\n"


def find(path: str | Path, beside: Path = Path()) -> Path:
    """The file at `path`, relative to the folder `beside`, or else the config of that name that ships with bigtrain.

    `pretrain/gpt2-124m`, `pretrain/gpt2-124m.yaml` and `configs/pretrain/gpt2-124m.yaml` name the same shipped file.
    """
    asked = beside / path
    if asked.is_dir():
        inside = sorted(p.name for p in asked.glob("*.yaml"))
        raise UserError(f"{asked}: is a folder; name a .yaml file" + (f" in it: {', '.join(inside[:5])}" if inside else ""))
    if asked.exists() and not asked.is_file():
        raise UserError(f"{asked}: is a device or a pipe; name a .yaml file")
    if asked.exists():
        return asked
    name = str(path).removeprefix("configs/").removesuffix(".yaml") + ".yaml"
    for folder in shipped_folders():
        if (folder / name).is_file():
            return folder / name
    shipped = sorted({p.relative_to(f).as_posix() for f in shipped_folders() for p in f.rglob("*.yaml")})
    close = difflib.get_close_matches(name, shipped, n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; bigtrain ships {', '.join(shipped)}" if shipped else ""
    raise UserError(f"{asked}: there is no such file{hint}")


def shipped_folders() -> list[Path]:
    """Where this installation keeps its configs: the checkout, or what pip installed for everyone or for this user."""
    installed = [Path(base) / "share/bigtrain/configs" for base in (sys.prefix, site.getuserbase())]
    return [folder for folder in [Path(__file__).parents[1] / "configs", *installed] if folder.is_dir()]


@dataclass
class _Reader:
    """Values of the files and overrides read so far: where each was set, and what was wrong."""

    alone: bool = False
    origins: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    complete: bool = True
    """False when a file could not be read: what is missing may be in it."""

    def problem(self, where: str, key: Key, text: str) -> None:
        self.problems.append(": ".join(filter(None, (where, ".".join(key), text))))

    def file(self, path: Path, including: tuple[Path, ...] = ()) -> dict[str, Any]:
        """The mapping in a file, its includes merged under it."""
        node = self._compose(path)
        if node is None:
            self.complete = False
            return {}
        includes = [(name, value) for name, value in node.value if name.value == "include"]
        merged: dict[str, Any] = {}
        for name, value in includes[:1]:
            if self.alone:
                self.problem(
                    f"{path}:{name.start_mark.line + 1}", ("include",), "the config of a run or checkpoint includes nothing; remove it"
                )
                break
            for included in self._include(value, path, (*including, path)):
                merged = _merge(merged, included)
        for name, _ in includes[1:]:
            self.problem(f"{path}:{name.start_mark.line + 1}", ("include",), "stands twice; give one list")
        own = [item for item in node.value if item not in includes]
        return _merge(merged, _filled(self._mapping(own, (), lambda mark: f"{path}:{mark.line + 1}")))

    def _compose(self, path: Path) -> yaml.MappingNode | None:
        """The file's mapping; None, and a problem, where there is none."""
        try:
            if path.stat().st_size > _LARGEST_FILE:
                self.problem(str(path), (), f"is larger than {_LARGEST_FILE >> 20} MiB: no config")
                return None
            node = yaml.compose(path.read_bytes().decode("utf-8-sig"), plainyaml.Loader)
        except OSError as error:
            self.problem(str(path), (), f"cannot be read: {error.strerror}")
        except UnicodeDecodeError as error:
            self.problem(str(path), (), f"is not UTF-8 text (byte {error.start}); save it as UTF-8")
        except (yaml.YAMLError, RecursionError) as error:
            where, text = plainyaml.problem(error)
            self.problem(f"{path}:{where}" if where else str(path), (), text)
        else:
            if isinstance(node, yaml.MappingNode):
                return node
            what = f"found {short(node.value)}" if isinstance(node, yaml.ScalarNode) else "found a list" if node else "the file is empty"
            self.problem(str(path), (), f"expected a mapping of sections (model:, data:, train:, ...); {what}")
        return None

    def _include(self, node: yaml.Node, path: Path, chain: tuple[Path, ...]) -> Iterable[dict[str, Any]]:
        where = f"{path}:{node.start_mark.line + 1}"
        for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(item, yaml.ScalarNode) or item.tag != "tag:yaml.org,2002:str":
                self.problem(where, ("include",), "expected a path or a list of paths")
                continue
            try:
                file = find(item.value, beside=path.parent)
            except UserError as error:
                self.problem(where, ("include",), str(error))
                self.complete = False
                continue
            known = [p.resolve() for p in chain]
            if file.resolve() in known:
                circle = [*chain[known.index(file.resolve()) :], file]
                self.problem(where, ("include",), f"the files include each other: {' -> '.join(map(str, circle))}")
                continue
            yield self.file(file, chain)

    def override(self, text: str) -> dict[str, Any]:
        """`section.key=value` as a mapping of mappings; the value is YAML."""
        path, equals, value = text.partition("=")
        key = tuple(path.strip().split("."))
        if not equals or not all(key):
            self.problem(COMMAND_LINE, (), f"expected section.key=value, found {text!r}")
            return {}
        try:
            node = yaml.compose(value, plainyaml.Loader)
        except (yaml.YAMLError, RecursionError) as error:
            self.problem(COMMAND_LINE, key, f"{plainyaml.problem(error)[1]}, in {value!r}; quote text as '\"...\"'")
            return {}
        for length in range(1, len(key)):
            self.origins.setdefault(key[:length], COMMAND_LINE)
        self.origins[key] = COMMAND_LINE
        nested = None if node is None else self._value(node, key, lambda mark: COMMAND_LINE)
        for name in reversed(key):
            nested = {name: nested}
        return _filled(nested)

    def _mapping(self, items: list, section: Key, place: Callable[[yaml.Mark], str]) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        first: dict[str, str] = {}
        for name, value in items:
            where = place(name.start_mark)
            if not isinstance(name, yaml.ScalarNode):
                self.problem(where, section, "expected a key, found a list or mapping")
                continue
            key = (*section, name.value)
            if name.value in mapping:
                self.problem(where, key, f"stands twice; the first is at {first[name.value]}: remove one")
                continue
            self.origins[key] = first[name.value] = where
            mapping[name.value] = self._value(value, key, place)
        return mapping

    def _value(self, node: yaml.Node, key: Key, place: Callable[[yaml.Mark], str]) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node.value, key, place)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, key, place) for item in node.value]
        try:
            return yaml.constructor.SafeConstructor().construct_object(node)
        except ValueError:
            return node.value  # an integer of over 4300 digits; validation refuses it as text


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; anything else is replaced."""
    merged = dict(under)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(under.get(name), dict)
        merged[name] = _merge(under[name], value) if both else value
    return merged


def _filled(values: dict[str, Any]) -> dict[str, Any]:
    """A section with nothing in it (`zero:`) is an empty mapping, not a null."""
    return {name: {} if value is None and is_section(name) else value for name, value in values.items()}


def _secrets(config: Config) -> Iterable[tuple[Key, str]]:
    """Keys whose values hold a secret. The config is copied into the run's folder, where none may stand, to be compared on resuming."""
    for key, value in flat(config.model_dump()).items():
        if found := kinds("\n".join(map(str, value)) if isinstance(value, list) else str(value)):
            text = f"holds a secret ({found[0]}), and is copied into the run's folder; take it out, keep secrets in the environment"
            yield tuple(key.split(".")), text


# ---- Messages ----


def _where(origins: dict[Key, str], key: Key) -> str | None:
    """Where a key, or else the section around it, was set."""
    return next((origins[key[:n]] for n in range(len(key), 0, -1) if key[:n] in origins), None)


def _user_error(file: Path, lines: list[str]) -> UserError:
    if len(lines) == 1:
        return UserError(lines[0])
    return UserError("\n".join([f"{file}: {len(lines)} problems", *(f"  {line}" for line in lines)]))
