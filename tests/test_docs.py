"""The documents say what the code says. `python tests/test_docs.py` writes the table of docs/configuration.md again."""

import ast
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIGURATION = ROOT / "docs/configuration.md"
DOCUMENTS = sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
BEGIN, END = "<!-- written by tests/test_docs.py -->\n", "<!-- end -->\n"


def tables() -> str:
    """Every key of the config with what it may hold, its default and its meaning, a table for each section."""
    from bigtrain import configschema

    lines = []
    sections = configschema.schema()["properties"]
    alone = {name: node for name, node in sections.items() if not _object(node)}
    for section, node in {"": {"properties": alone}, **sections}.items():
        if section in alone:
            continue
        lines += [f"### {section or 'At the top level'}", "", *([node["description"], ""] if "description" in node else [])]
        lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
        lines += _rows(_object(node)["properties"], f"{section}." if section else "")
        lines.append("")
    return "\n".join(lines)


def _rows(fields: dict, prefix: str) -> list[str]:
    from bigtrain.configschema import _expected

    rows = []
    for name, node in fields.items():
        if inner := _object(node):
            rows.append(f"| `{prefix}{name}` | a mapping of the keys below, or null | {_default(node)} | |")
            rows += _rows(inner["properties"], f"{prefix}{name}.")
        elif name == "include":
            rows.append(f"| `include` | a path or a list of paths | none | {node['description']} |")
        else:
            # A pattern is code, and its bars do not end the cell.
            holds = re.sub(r"(?<=of the form )([^\w\s]\S*?)(?=\)? |\)?$)", r"`\1`", _expected(node)).replace("|", "\\|")
            rows.append(f"| `{prefix}{name}` | {holds} | {_default(node)} | {node.get('description', '')} |")
    return [" ".join(row.split()) for row in rows]


def _default(node: dict) -> str:
    return f"`{json.dumps(node['default'], ensure_ascii=False)}`" if "default" in node else "needed"


def _object(node: dict) -> dict:
    return next((n for n in [node, *node.get("anyOf", [])] if "properties" in n), {})


def written() -> str:
    return CONFIGURATION.read_text().partition(BEGIN)[2].partition(END)[0]


def test_configuration_names_every_key():
    assert written() == tables(), "run: python tests/test_docs.py"


def test_the_table_has_every_key():
    from bigtrain.config import Config

    def keys(model, prefix=""):
        for name, field in model.model_fields.items():
            inner = [t for t in [field.annotation, *getattr(field.annotation, "__args__", ())] if hasattr(t, "model_fields")]
            yield from keys(inner[0], f"{prefix}{name}.") if inner else [f"{prefix}{name}"]

    missing = [key for key in keys(Config) if f"| `{key}` |" not in tables()]
    assert missing == []


def test_architecture_names_every_module_and_no_other():
    text = (ROOT / "docs/architecture.md").read_text()
    named = re.findall(r"`((?:bigtrain|kernels|launch)/[\w/]+\.py)`", text.partition("## One batch")[0])
    folders = ("bigtrain", "kernels/bigtrain_kernels", "launch/bigtrain_launch")
    files = {p.relative_to(ROOT).as_posix() for folder in folders for p in (ROOT / folder).rglob("*.py")}
    assert {"missing": sorted(files - set(named)), "gone": sorted(set(named) - files)} == {"missing": [], "gone": []}


def test_architecture_has_the_floors_of_the_imports():
    sys.path.insert(0, str(ROOT / "tests"))
    from test_imports import FLOORS

    floor, found = 0, {}
    for line in (ROOT / "docs/architecture.md").read_text().splitlines():
        if row := re.match(r"\| (\d*) ?\| (`bigtrain/.*?) \|", line):
            floor = int(row[1] or floor)
            for file in re.findall(r"`bigtrain/([\w/]+)\.py`", row[2]):
                found[file.split("/")[0]] = floor
    assert found == {name: number for number, names in enumerate(FLOORS) for name in names if name in found}
    assert found.keys() >= {name for names in FLOORS for name in names if (ROOT / f"bigtrain/{name}.py").exists()}


def test_the_variables_of_ranks_are_explained():
    from bigtrain_launch.environment import planned

    rows = re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "docs/launch.md").read_text(), re.MULTILINE)
    assert rows == [setting.name for setting in planned({})]


def test_the_messages_that_are_explained_are_those_of_the_code():
    files = [f for folder in ("bigtrain", "launch/bigtrain_launch") for f in (ROOT / folder).rglob("*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    said = {node.value.strip() for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    section = (ROOT / "docs/launch.md").read_text().partition("## What goes wrong")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| `(.*?)` \|", section, re.MULTILINE)
    assert len(messages) > 15
    assert [message for message in messages if not any(text in message for text in said if len(text) > 15)] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_have_the_options_that_are_said(document):
    import typer

    from bigtrain.cli import app

    text = (ROOT / document).read_text()
    blocks = re.findall(r"^```\w+\n(.*?)^```$|((?:^    .*\n)+)", text, re.MULTILINE | re.DOTALL)
    for line in re.findall(r"^(?:    |\$ )?(bigtrain .*)$", "\n".join(map("".join, blocks)), re.MULTILINE):
        command = typer.main.get_command(app)
        for word in shlex.split(line, comments=True)[1:]:
            if word in getattr(command, "commands", {}):
                command = command.commands[word]
            elif word.startswith("-"):
                assert word.partition("=")[0] in [option for parameter in command.params for option in parameter.opts], line
        assert not hasattr(command, "commands"), line


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_named_files_exist(document):
    text = (ROOT / document).read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", re.sub(r"`[^`\n]*`", "", text))
    files = re.findall(r"`((?:bigtrain|kernels|launch|configs|docs|tests|benchmarks)/[\w/.-]+\.\w+)`", text)
    gone = [link for link in links if not (ROOT / document).parent.joinpath(link).exists()]
    assert gone + [file for file in files if not (ROOT / file).exists()] == []


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    before, _, rest = CONFIGURATION.read_text().partition(BEGIN)
    CONFIGURATION.write_text(before + BEGIN + tables() + END + rest.partition(END)[2])
