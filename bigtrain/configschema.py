"""What a config may hold, in words: validation that reports every problem, with what was expected and the nearest key.

pydantic finds what is wrong; the JSON Schema of the config tree (also handed to editors) says what would be right.
"""

from __future__ import annotations

import difflib
import json
import re
from functools import cache
from typing import Any

from pydantic import ValidationError

from bigtrain.config import Config, problems

Key = tuple[str, ...]  # ("optimizer", "lr"), written optimizer.lr
KEY = "[key]"  # how pydantic ends the location of a mapping's key that it refuses


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a config file, for editors. No key is required: an included file may hold it."""
    tree = _without_required(_schema())
    include = {
        "description": "Files to build on, relative to this one; the later wins, this file's own keys win over all.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "bigtrain config",
        **tree,
        "properties": {"include": include, **tree["properties"]},
    }


@cache
def _schema() -> dict[str, Any]:
    """The JSON Schema of `Config` with the references filled in and the generated titles left out."""
    raw = Config.model_json_schema()

    def tidy(node: Any) -> Any:
        if isinstance(node, list):
            return [tidy(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return tidy(raw["$defs"][node["$ref"].rpartition("/")[2]])
        tidied = {k: tidy(v) for k, v in node.items() if k not in ("title", "$defs", "properties")}
        if "properties" in node:
            tidied["properties"] = {name: tidy(child) for name, child in node["properties"].items()}
        return tidied

    return tidy(raw)


def _without_required(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_required(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {k: _without_required(v) for k, v in node.items() if k != "required" or not isinstance(v, list)}


def _object(node: dict[str, Any]) -> dict[str, Any]:
    """The alternative of a schema node that is a mapping of known keys, or {}."""
    return next((n for n in [node, *node.get("anyOf", [])] if "properties" in n), {})


def _free(node: dict[str, Any]) -> dict[str, Any]:
    """The alternative of a schema node that is a mapping of free keys (variables, labels), or {}."""
    return next((n for n in [node, *node.get("anyOf", [])] if n.get("type") == "object" and "properties" not in n), {})


def _entry(node: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Of such a mapping: the pattern of its keys, None where any will do, and the schema of its values."""
    return next(iter(node.get("patternProperties", {}).items()), (None, node.get("additionalProperties", {})))


def _field(key: Key) -> dict[str, Any] | None:
    """The schema of a key, or None where there is no such key."""
    node: dict[str, Any] | None = _schema()
    for name in key:
        free = _free(node)
        node = _entry(free)[1] if free else _object(node).get("properties", {}).get(name)
        if node is None:
            return None
    return node


def validate(values: dict[str, Any], complete: bool = True) -> tuple[Config | None, list[tuple[Key, str]]]:
    """The config, and what is wrong with it: (key, text). Where the values are not complete (an included file could not
    be read), a missing key is not reported.

    What pydantic refuses is replaced by a stand-in and the rest looked at once more, so that the rules over several
    keys have their say as well. A rule that mentions a replaced key is left out: its answer hangs on the real value.
    """
    found: list[tuple[Key, str]] = []
    replaced: set[str] = set()
    values = _whole_numbers(values, _schema())

    def rule(key: Key, text: str) -> None:
        words = re.findall(r"\w+", " ".join((*key, text)))
        if (key, text) not in found and replaced.isdisjoint(words):
            found.append((key, text))

    for _ in range(2):
        try:
            config = Config.model_validate(values)
        except ValidationError as error:
            refused = {_refused_key(e["loc"]): e for e in error.errors()}
            for key, e in refused.items():
                if e["type"] == "value_error":
                    rule(key, str(e["ctx"]["error"]))
            kinds = {key: KEY if e["loc"][-1:] == (KEY,) else e["type"] for key, e in refused.items()}
            fields = [(key, kind) for key, kind in kinds.items() if kind != "value_error"]
            if not replaced:
                found += [(key, _refusal(key, kind, values)) for key, kind in fields if complete or kind != "missing"]
            for key, _kind in fields:
                replaced |= _replace(values, key)
        else:
            for key, text in problems(config):
                rule(tuple(key.split(".")), text)
            return config, found
    return None, found


def _whole_numbers(value: Any, node: dict[str, Any]) -> Any:
    """1e6 is written like a float; where only an integer is expected, a float without a fraction is one."""
    properties = _object(node).get("properties", {})
    if isinstance(value, dict):
        return {k: _whole_numbers(v, properties.get(k, {})) for k, v in value.items()}
    kinds = {n.get("type") for n in [node, *node.get("anyOf", [])]}
    if isinstance(value, float) and value.is_integer() and "integer" in kinds and "number" not in kinds:
        return int(value)
    return value


def _refused_key(loc: tuple[str | int, ...]) -> Key:
    """The config key that a pydantic location is about: without list indices and names of union branches."""
    key = tuple(str(name) for name in loc)
    for length in range(1, len(key)):
        node = _field(key[:length]) or {}
        if "properties" not in _object(node):
            return key[: length + 1] if _free(node) else key[:length]
    return key


def _refusal(key: Key, kind: str, values: dict[str, Any]) -> str:
    if kind == "extra_forbidden":
        if key[-1] == "include":
            return "stands only at the top level of a file"
        near = _nearest(key)
        return f"unknown key; did you mean {'.'.join(near)}?" if near else "unknown key"
    if kind == KEY:
        return f"is no name for an entry; expected one of the form {_form(_entry(_free(_field(key[:-1])))[0])}"
    expected = _expected(_field(key))
    if kind == "missing":
        return f"is missing; expected {expected}"
    value: Any = values
    for name in key:
        value = value[name]
    hint = "; put it in quotes" if expected.startswith("text") and isinstance(value, (bool, int, float)) else ""
    return f"found {short(value)}; expected {expected}{hint}"


def _replace(values: dict[str, Any], key: Key) -> set[str]:
    """Put a stand-in where `key` was refused (the default, else 1) and return the names whose meaning is now open."""
    for name in key[:-1]:
        values = values[name]
    values.pop(key[-1], None)
    node = _field(key)
    if _free(_field(key[:-1]) or {}):
        return {key[-1]}
    if node is None:
        return {key[-1], (_nearest(key) or key)[-1]}

    def stand_in(node: dict[str, Any]) -> Any:
        fields = _object(node).get("properties")
        return {name: stand_in(fields[name]) for name in node.get("required", [])} if fields else 1

    if "default" not in node:
        values[key[-1]] = stand_in(node)
    return {key[-1], *_object(node).get("properties", {})}


def _nearest(key: Key) -> Key | None:
    """The valid key that was probably meant: the same name elsewhere, a similar one here, a similar one anywhere."""
    known: list[Key] = []
    for section, node in _schema()["properties"].items():
        known += [(section,), *((section, name) for name in _object(node).get("properties", {}))]
    same = [k for k in known if k[-1] == key[-1]]
    if len(same) == 1:
        return same[0]
    here = _object(_field(key[:-1]) or {}).get("properties", {})
    if close := difflib.get_close_matches(key[-1], here, n=1):
        return (*key[:-1], close[0])
    paths = {".".join(k): k for k in known}
    return next((paths[p] for p in difflib.get_close_matches(".".join(key), paths, n=1)), None)


def _expected(node: dict[str, Any]) -> str:
    """What a key may hold, in words: `a whole number of at least 1 or null`."""
    if "words" in node:
        return node["words"]
    if "anyOf" in node:
        return " or ".join(_expected(n) for n in node["anyOf"])
    if "enum" in node:
        return ("one of " if len(node["enum"]) > 2 else "") + ", ".join(node["enum"][:-1]) + f" or {node['enum'][-1]}"
    if "properties" in node:
        required = node.get("required", [])
        return f"a mapping with the keys {', '.join(required)}" if required else f"a mapping of keys ({', '.join(node['properties'])})"
    kind = node["type"]
    if kind == "object":
        pattern, value = _entry(node)
        names = f" of the form {_form(pattern)}" if pattern else ""
        return f"a mapping of names{names} to values (each {_expected(value)})"
    if kind == "array":
        size = f" of {node['minItems']}" if "minItems" in node else ""
        return f"a list{size} (each item {_expected(node['items'])})"
    if kind == "string":
        return "text" + (f" of the form {_form(node['pattern'])}" if "pattern" in node else "")
    if kind in ("boolean", "null"):
        return {"boolean": "true or false", "null": "null"}[kind]
    if "minimum" in node and "maximum" in node:
        bounds = [f"from {node['minimum']} to {node['maximum']}"]
    else:
        words = {"minimum": "of at least", "maximum": "of at most", "exclusiveMinimum": "greater than", "exclusiveMaximum": "less than"}
        bounds = [f"{word} {node[name]}" for name, word in words.items() if name in node]
    return " ".join(filter(None, ("a whole number" if kind == "integer" else "a number", " and ".join(bounds))))


def _form(pattern: str) -> str:
    return pattern.removeprefix("^").removesuffix("$")


def short(value: Any) -> str:
    """A value as a message shows it: one line of at most 60 characters."""
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_section(name: str) -> bool:
    """Whether a top-level key holds a section."""
    return "properties" in (_field((name,)) or {})
