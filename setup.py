"""What is installed. Bounds are the oldest versions that are meant to work; constraints.txt holds the tested ones.

`pip install --no-deps .` with pydantic, pyyaml, typer and rich is enough to check configs and launch jobs from a login node.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
FOLDERS = {"bigtrain": ".", "bigtrain_kernels": "kernels", "bigtrain_launch": "launch"}


def shipped_configs() -> list[tuple[str, list[str]]]:
    """configs/ with its folders, under share/bigtrain of the installation."""
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    return [(f"share/bigtrain/{file.parent.relative_to(ROOT).as_posix()}", [file.relative_to(ROOT).as_posix()]) for file in files]


setup(
    name="bigtrain",
    version=re.search(r'^__version__ = "(.+)"$', (ROOT / "bigtrain/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)[1],
    description="Distributed training of transformers, from a laptop without a GPU to many nodes",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[package for name, folder in FOLDERS.items() for package in find_packages(folder, include=[name, f"{name}.*"])],
    package_dir={name: f"{folder}/{name}" for name, folder in FOLDERS.items()},
    package_data={"bigtrain": ["report_page/*"], "bigtrain_kernels": ["budgets.json"]},
    data_files=shipped_configs(),
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19",
        "transformers>=5.10.1",
        "datasets>=3",
        "tokenizers>=0.21",
        "safetensors>=0.5",
        "xxhash>=3",
        "numpy>=1.26",
        "triton>=3.6; platform_system == 'Linux'",
        "pydantic>=2.12",
        "pyyaml>=6",
        "typer>=0.15",
        "rich>=13",
        "tensorboard>=2.16",
        "wandb>=0.19",
    ],
    extras_require={
        "test": ["pytest>=8", "ruff>=0.14", "hypothesis>=6", "kubernetes-validate>=1.31", "kubeflow-trainer-api>=2.1"],
        "bench": ["accelerate>=1.1", "liger-kernel>=0.6; platform_system == 'Linux'", "fla-core>=0.4; platform_system == 'Linux'"],
    },
    entry_points={"console_scripts": ["bigtrain = bigtrain.cli:main"]},
)
