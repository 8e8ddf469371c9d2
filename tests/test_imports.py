"""Imports point down only: every file stands on a floor and may import from floors below it, and inside its own folder
without a circle. docs/architecture.md draws the floors and gives the reasons."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. A folder or a file of bigtrain/, by its name; a name that is missing here fails a test.
FLOORS = [
    {"__init__", "errors"},
    {"config", "configsection", "configlaunch", "configschema", "configfile", "jsonfile", "plainyaml", "runfolder", "secrets"},
    {"hardware", "opbuild", "ranks", "logs", "lease", "watchdog", "world", "schedule", "metrics", "deepspeed_config", "data"},
    {"model", "optim"},
    {"tasks"},
    {"engine", "probe"},
    {"checkpoint"},
    {"progress", "start", "evaluate", "generate", "trackers", "screen", "report_data", "report"},
    {"train"},
    {"session"},
    {"cli_common", "cli_launch", "cli_slurm", "cli_kubernetes", "cli_jobs", "cli_doctor"},
    {"cli"},
    {"__main__"},
]
MAY_IMPORT = {
    "deepspeed": {"bigtrain.engine", "bigtrain.checkpoint.state"},
    "transformers": {"bigtrain.model.hf", "bigtrain.data.tokenizer", "bigtrain.checkpoint.export", "bigtrain.tasks"},
    "bigtrain_launch": {
        "bigtrain.cli",
        *(f"bigtrain.cli_{name}" for name in ("launch", "slurm", "kubernetes", "jobs", "doctor")),
        "bigtrain_launch",
    },
    "triton": {"bigtrain_kernels"},
}
LAUNCH_MAY_USE = {
    "pydantic",
    "yaml",
    "rich",
    "bigtrain.errors",
    "bigtrain.config",
    "bigtrain.configlaunch",
    "bigtrain.hardware",
    "bigtrain.opbuild",
    "bigtrain.ranks",
    "bigtrain.runfolder",
    "bigtrain_launch",
}
KERNELS_MAY_USE = {"torch", "triton", "numpy", "bigtrain_kernels"}  # numpy: Triton's interpreter is made of it
WITHOUT_TORCH = {
    "__init__",
    "errors",
    "config",
    "configsection",
    "configlaunch",
    "configschema",
    "configfile",
    "runfolder",
    "lease",
    "watchdog",
    "jsonfile",
    "plainyaml",
    "secrets",
    "hardware",
    "opbuild",
    "ranks",
    "start",
    "deepspeed_config",
}


def modules() -> dict[str, Path]:
    """Module name -> file, of the three packages."""
    files = [(base, f) for base in (ROOT, ROOT / "kernels", ROOT / "launch") for f in sorted(base.glob("bigtrain*/**/*.py"))]
    return {".".join(f.relative_to(base).with_suffix("").parts).removesuffix(".__init__"): f for base, f in files}


def imports(name: str, text: str, is_package: bool, known: set[str]) -> set[str]:
    """Modules that a module imports, anywhere in its text: those of `known` in full, others by their full dotted name."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            submodules = {f"{source}.{alias.name}" for alias in node.names} & known
            found |= submodules or {source}
    return found - {name}


def graph() -> dict[str, set[str]]:
    files = modules()
    return {name: imports(name, f.read_text(), f.name == "__init__.py", set(files)) for name, f in files.items()}


def is_in(module: str, allowed: set[str]) -> bool:
    return any(module == a or module.startswith(f"{a}.") for a in allowed)


def floor(module: str) -> int | None:
    part = [*module.split("."), "__init__"][1]
    return next((n for n, names in enumerate(FLOORS) if part in names), None)


def arrows_up(edges: dict[str, set[str]]) -> list[str]:
    """Imports within bigtrain of a file on a higher floor. The same floor is one's own folder."""
    return [
        f"{module} imports {target}, which stands higher"
        for module, targets in edges.items()
        for target in targets
        if is_in(module, {"bigtrain"}) and is_in(target, {"bigtrain"}) and (floor(target) or 0) > (floor(module) or 0)
    ]


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other, in order, or nothing."""
    try:
        TopologicalSorter({m: {t for t in targets if t in edges} for m, targets in edges.items()}).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_file_has_a_floor():
    assert [m for m in modules() if is_in(m, {"bigtrain"}) and floor(m) is None] == []


def test_no_arrow_points_up():
    assert arrows_up(graph()) == []


def test_no_circle():
    assert circle(graph()) == []


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_only_these_import(package):
    assert {m for m, targets in graph().items() if any(is_in(t, {package}) for t in targets) and not is_in(m, MAY_IMPORT[package])} == set()


@pytest.mark.parametrize(("package", "allowed"), [("bigtrain_launch", LAUNCH_MAY_USE), ("bigtrain_kernels", KERNELS_MAY_USE)])
def test_launch_and_kernels_use_little(package, allowed):
    for module, targets in graph().items():
        if is_in(module, {package}):
            others = {t for t in targets if t.split(".")[0] not in sys.stdlib_module_names} - {"bigtrain"}  # its __init__ imports nothing
            assert {t for t in others if not is_in(t, allowed)} == set(), module


def test_config_and_hardware_need_no_torch():
    heavy = {"torch", "deepspeed", "transformers", "datasets", "triton", "wandb", "bigtrain_kernels"}
    for module, targets in graph().items():
        if is_in(module, {"bigtrain"}) and [*module.split("."), "__init__"][1] in WITHOUT_TORCH:
            assert not any(is_in(t, heavy) for t in targets), module


def test_kernels_is_no_package():
    """transformers looks for a package called `kernels`; one in the working directory breaks it."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "launch/__init__.py").exists()


def test_these_checks_can_fail():
    known = {"bigtrain.world", "bigtrain.train", "bigtrain.data", "bigtrain.data.order"}
    assert imports("bigtrain.world", "def f():\n    from .train import run\n", False, known) == {"bigtrain.train"}
    assert imports("bigtrain.data.order", "from .. import train", False, known) == {"bigtrain.train"}
    assert imports("bigtrain.data", "from . import order\nfrom .order import x", True, known) == {"bigtrain.data.order"}
    assert imports("bigtrain.world", "import torch.distributed as d, os", False, known) == {"torch.distributed", "os"}
    assert arrows_up({"bigtrain.world": {"bigtrain.train"}, "bigtrain.train": {"bigtrain.world"}}) == [
        "bigtrain.world imports bigtrain.train, which stands higher"
    ]
    assert circle({"a": {"b"}, "b": {"a"}, "c": {"a"}}) and not circle({"a": {"b"}, "b": set()})
