"""What must not stand anywhere in the code, because a file or a text from someone else could then run code: found by ast,
whatever the imports are called."""

import ast
from pathlib import Path

import pytest
import yaml

from bigtrain import plainyaml

ROOT = Path(__file__).parents[1]
FILES = sorted(
    [*(f for folder in ("bigtrain", "kernels", "launch", "benchmarks") for f in (ROOT / folder).rglob("*.py")), ROOT / "setup.py"]
)

# Names that are refused wherever they are used, called or handed on: `use(pickle.load)` is a call, only later.
NAMES = {
    *(f"{module}.{name}" for module in ("pickle", "_pickle", "dill", "cloudpickle") for name in ("load", "loads", "Unpickler")),
    *("marshal.load", "marshal.loads", "shelve.open", "joblib.load", "pandas.read_pickle"),
    *("yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all"),
    *("yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.CLoader", "yaml.CFullLoader", "yaml.CUnsafeLoader"),
    *("eval", "exec", "builtins.eval", "builtins.exec"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *(f"torch.distributed.checkpoint.{name}" for name in ("load", "load_state_dict", "async_load")),
    *(f"torch.distributed.checkpoint.state_dict_loader.{name}" for name in ("load", "load_state_dict")),
    *("torch.serialization.add_safe_globals", "torch.hub.load", "torch.package.PackageImporter", "torch.jit.load"),
}  # fmt: skip
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader", "bigtrain.plainyaml.Loader"}
EXTRACT = {"extractall", "extract"}


def found(text: str) -> list[str]:
    """What a module does that is banned, as `line: what`."""
    tree = ast.parse(text)
    names: dict[str, str] = {}
    safe = set(SAFE_LOADERS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
            names |= {alias.name.split(".")[0]: alias.name.split(".")[0] for alias in node.names if not alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):  # names given on: f = pickle.load
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name) and dotted(node.value, names):
            names.setdefault(node.targets[0].id, dotted(node.value, names))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(dotted(base, names) in safe for base in node.bases):
            safe.add(node.name)
    problems = []

    def problem(node: ast.AST, what: str) -> None:
        problems.append(f"{node.lineno}: {what}")

    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name == "*" or f"{node.module}.{alias.name}" in NAMES:
                    problem(node, f"from {node.module} import {alias.name}")
        elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Load) and dotted(node, names) in NAMES:
            problem(node, dotted(node, names))
        elif isinstance(node, ast.Call):
            _call(node, dotted(node.func, names), safe, names, problem)
    return problems


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """The full name of an expression a.b.c, through imports and their aliases; of anything else the attributes at its end."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return ""


def _call(node: ast.Call, name: str, safe: set[str], names: dict[str, str], problem) -> None:
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    last = name.rpartition(".")[2]

    def given(key: str, value) -> bool:
        return isinstance(keywords.get(key), ast.Constant) and keywords[key].value == value

    if name == "torch.load" and not given("weights_only", True):
        problem(node, "torch.load without weights_only=True")
    for key, value in (("weights_only", True), ("shell", False), ("allow_pickle", False), ("trust_remote_code", False)):
        if key in keywords and not given(key, value):
            problem(node, f"{key} is not {value}")
    if name in ("yaml.load", "yaml.load_all", "yaml.compose", "yaml.parse", "yaml.scan"):
        loader = keywords.get("Loader") or (node.args[1] if len(node.args) > 1 else None)
        if loader is None or dotted(loader, names) not in safe:
            problem(node, f"{name} without a SafeLoader")
    if name in ("compile", "builtins.compile"):
        problem(node, "compile of text")
    if last == "from_pretrained" and not given("trust_remote_code", False):
        problem(node, "from_pretrained without trust_remote_code=False")
    if last in EXTRACT and not given("filter", "data"):
        problem(node, f'{last} without filter="data"')
    if name == "numpy.load" and len(node.args) > 2:
        problem(node, "numpy.load with allow_pickle by position")
    if None in keywords and (name in ("torch.load", "numpy.load") or last == "from_pretrained"):
        problem(node, f"{name} with **: what is in it cannot be seen")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_nothing_banned(file):
    assert found(file.read_text()) == []


def test_our_loader_is_a_safe_one():
    assert issubclass(plainyaml.Loader, yaml.SafeLoader) and plainyaml.Loader.yaml_constructors == yaml.SafeLoader.yaml_constructors


def test_the_files_are_all_there():
    assert len(FILES) > 60 and ROOT / "bigtrain/configfile.py" in FILES and ROOT / "benchmarks/throughput.py" in FILES


@pytest.mark.parametrize(
    "text",
    [
        "import pickle\npickle.load(f)",
        "import pickle as p\np.loads(b)",
        "from pickle import load as l\nl(f)",
        "from pickle import *",
        "def f():\n    from _pickle import Unpickler\n    return Unpickler(x)",
        "import pickle\nread = pickle.load\nread(f)",
        "import pickle\nmap(pickle.loads, rows)",
        "import dill\ndill.load(f)",
        "import cloudpickle as c\nc.loads(b)",
        "import joblib\njoblib.load(f)",
        "import marshal\nmarshal.loads(b)",
        "import pandas as pd\npd.read_pickle(f)",
        "import torch\ntorch.load(f)",
        "import torch as t\nt.load(f)",
        "from torch import load\nload(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.load(f, weights_only=flag)",
        "import torch\ntorch.load(f, **options)",
        "engine.load_checkpoint(d, weights_only=False)",
        "import yaml\nyaml.load(text)",
        "import yaml as y\ny.load(text, Loader=y.FullLoader)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "from yaml import load\nload(text, Loader=make())",
        "import yaml\nclass L(yaml.UnsafeLoader): pass\nyaml.load(text, L)",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "import yaml\nyaml.full_load(text)",
        "import yaml\nyaml.compose(text)",
        "eval('1')",
        "exec(code)",
        "import builtins as b\nb.eval(x)",
        "run = exec\nrun(code)",
        "compile(text, 'f', 'exec')",
        "import torch.distributed.checkpoint as dcp\ndcp.load(state)",
        "from torch.distributed.checkpoint import load\nload(state)",
        "from torch.distributed import checkpoint\ncheckpoint.load(state)",
        "import torch\ntorch.distributed.checkpoint.load_state_dict(state)",
        "import subprocess\nsubprocess.run(c, shell=True)",
        "from subprocess import Popen\nPopen(c, shell=yes)",
        "import os\nos.system(c)",
        "from os import system as s\ns(c)",
        "import os as o\no.popen(c)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "AutoModel.from_pretrained(p)",
        "x.y().from_pretrained(p, **options)",
        "import tarfile\ntarfile.open(f).extractall(d)",
        "archive.extractall(d, filter='fully_trusted')",
        "import zipfile\nwith zipfile.ZipFile(f) as z:\n    z.extract(n)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "from numpy import load\nload(f, None, True)",
    ],
)  # fmt: skip
def test_it_is_found(text):
    assert found(text)


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load(f, weights_only=True)",
        "import torch\ntorch.compile(model)",
        "import re\nre.compile('x')",
        "import triton\ntriton.compile(source)",
        "model.eval()",
        "import yaml\nyaml.safe_load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "import yaml\nclass L(yaml.SafeLoader): pass\nyaml.compose(text, L)",
        "import yaml\nclass L(yaml.SafeLoader): pass\nclass M(L): pass\nyaml.load(text, M)",
        "import json\njson.load(f)",
        "from bigtrain.data.tokenizer import load\nload(folder)",
        "import subprocess\nsubprocess.run(['ls'])",
        "AutoTokenizer.from_pretrained(p, trust_remote_code=False)",
        "archive.extractall(d, filter='data')",
        "import numpy as np\nnp.load(f)",
        "import pickle\npickle.PickleError",
    ],
)  # fmt: skip
def test_what_is_allowed(text):
    assert found(text) == []
