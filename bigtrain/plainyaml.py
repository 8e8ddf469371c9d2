"""YAML of plain values, which is all that a config needs: no tags, which could name code, and no aliases, which could grow without end."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml


class Loader(yaml.SafeLoader):
    """Plain values by the rules of YAML 1.2: 1e-4 is a number, `off` and `2024-01-01` are text. No aliases, no tags."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not supported; use include", problem_mark=event.start_mark)
        if event.tag is not None:
            raise yaml.MarkedYAMLError(problem=f"the tag {event.tag} is not supported; write a plain value", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


_NUMBER = r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_PLAIN = {"null": r"null|Null|NULL|~|", "bool": r"true|True|TRUE|false|False|FALSE", "int": r"[-+]?(?:0|[1-9][0-9_]*)", "float": _NUMBER}


def load(text: str) -> Any:
    """What YAML text from others holds, as plain values. Raises ValueError for anything else."""
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(problem(error)[1]) from None


class Dumper(yaml.SafeDumper):
    """Quotes text that either YAML version would take for something else."""


for _name, _pattern in _PLAIN.items():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), None)
Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')
)


def one_line(value: Any) -> str:
    """YAML for a value, on one line, that `load` reads back to an equal one."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


def problem(error: Exception) -> tuple[int | None, str]:
    """(line or None, text) of what the YAML parser refused."""
    mark = getattr(error, "problem_mark", None)
    text = getattr(error, "problem", None) or getattr(error, "reason", None) or "nested too deeply"
    if "'\\t'" in text:
        text += " (indent with spaces, not tabs)"
    return (mark.line + 1 if mark else None), f"is not valid YAML: {text}"
