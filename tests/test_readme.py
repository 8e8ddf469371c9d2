"""Every command in README.md works: those of its ```bash blocks are run as they stand, in the order in which they stand.

They run in a folder that looks like the checkout after `make train`, but for the size of what is trained: its `configs/` hold
files of the same names that include the shipped ones and shrink them. A command that cannot be run so stands in INSTEAD.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigtrain.runfolder import read_rows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL) for line in block.splitlines() if line]

# Commands that are not run as they stand: what is run, or looked at, in their place.
INSTEAD = {
    "make train": f"make --dry-run --directory {ROOT} train",
    "make test": f"make --dry-run --directory {ROOT} test",
    "source .venv/bin/activate": "type bigtrain",  # which is what the folder's PATH stands for
    # Its data is prepared; fine-tuning, below, trains on these texts.
    "bigtrain train configs/quickstart.yaml --new data.source=text data.path=my-texts data.folder=data/my-texts": (
        "bigtrain data prepare configs/quickstart.yaml data.source=text data.path=my-texts data.folder=data/my-texts"
    ),
    # srun's variables for the only task of a step; on a real Slurm: tests/cluster.
    "srun --ntasks-per-node 2 bigtrain train configs/quickstart.yaml": (
        "env SLURM_JOB_ID=1 SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_NODELIST=localhost"
        " bigtrain train configs/quickstart.yaml"
    ),
}
# A word of what each command must print.
SAYS = {
    "make train": "bigtrain train configs/quickstart.yaml",
    "make test": "-m pytest",
    "bigtrain evaluate runs/quickstart": '"bits_per_byte"',
    'bigtrain generate runs/quickstart --prompt "def main(" --tokens 64': "def main(",
    "bigtrain report runs/quickstart": "runs/quickstart/report.html",
    "bigtrain checkpoint verify runs/quickstart": "ok  runs/quickstart/checkpoints/step-",
    "bigtrain config show configs/quickstart.yaml optimizer.lr=1e-3": "lr: 0.001",
    "bigtrain train configs/quickstart.yaml --new optimizer.lr=1e-3": "report: runs/quickstart-2/report.html",
    "bigtrain train configs/finetune/quickstart.yaml": "report: runs/finetune/report.html",
    "bigtrain config show configs/pretrain/llama-70b.yaml": "stage: 3",
    "bigtrain diagnose runs/quickstart": "What to do: nothing; the run is complete",
    "bigtrain launch hosts configs/quickstart.yaml --hostfile hosts --dry-run": "# node2: 1 rank",
    "bigtrain launch slurm configs/quickstart.yaml launch.nodes=2 launch.time=02:00:00 --dry-run": "#SBATCH --time=02:00:00",
    "bigtrain launch kubernetes configs/quickstart.yaml launch.nodes=2 launch.container.image=bigtrain:1"
    " launch.kubernetes.claim=shared --dry-run": "kind: JobSet",
    "bigtrain jobs": "runs/quickstart",
    "bigtrain logs runs/quickstart": "deepspeed",
    "bigtrain cancel runs/quickstart": "nothing to cancel",
    "bigtrain data prepare configs/quickstart.yaml": "validation:",
    "torchrun --nproc-per-node 2 -m bigtrain train configs/quickstart.yaml": "is complete at step",
    "deepspeed --num_gpus 2 --no_local_rank --module bigtrain train configs/quickstart.yaml": "is complete at step",
    "srun --ntasks-per-node 2 bigtrain train configs/quickstart.yaml": "is complete at step",
}
SMALL = """
include: {shipped}
model: {{layers: 1, width: 32, heads: 2, mlp_width: 48}}
data: {{{data} sequence_length: 32, validation_fraction: 0.2}}
train: {{steps: {steps}, global_batch: 2, micro_batch: 2}}
schedule: {{warmup_steps: 1}}
precision: fp32
checkpoint: {{every: null}}
evaluate: {{every: null, sequences: 4}}
generate: {{tokens: 4}}
tracking: {{tensorboard: false}}
launch: {{ranks_per_node: 1}}
"""


class Checkout:
    """A folder to run commands in."""

    def __init__(self, path: Path):
        self.path = path
        scripts = path / ".venv/bin"
        scripts.mkdir(parents=True)
        (scripts / "bigtrain").write_text(f'#!/bin/sh\nexec {sys.executable} -m bigtrain "$@"\n')
        (scripts / "bigtrain").chmod(0o755)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")},
            "PATH": os.pathsep.join([str(scripts), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(str(p) for p in (ROOT, ROOT / "kernels", ROOT / "launch")),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        (path / "configs/finetune").mkdir(parents=True)
        self.config("quickstart.yaml", steps=1000, data="source: text, path: texts, bpe_vocab_size: 300,")
        self.config("finetune/quickstart.yaml", steps=2)
        (path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
        for folder in ("texts", "my-texts"):
            (path / folder).mkdir()
            for i in range(20):
                functions = [f"def f{i}_{j}(self):\n    return {i * j}\n" for j in range(30)]
                (path / folder / f"{i}.py").write_text(f"# {folder} {i}\n" + "".join(functions))

    def config(self, name: str, steps: int, data: str = "") -> None:
        (self.path / "configs" / name).write_text(SMALL.format(shipped=ROOT / "configs" / name, steps=steps, data=data))

    def run(self, command: str) -> subprocess.CompletedProcess:
        place = {"cwd": self.path, "env": self.environment, "stdin": subprocess.DEVNULL}
        return subprocess.run(["bash", "-c", command], **place, capture_output=True, text=True, timeout=100)

    def rows(self) -> list[dict]:
        return read_rows(self.path / "runs/quickstart/metrics.jsonl")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Checkout:
    """With a quick start that was interrupted once by Ctrl-C, as the page says that one may."""
    place = Checkout(tmp_path_factory.mktemp("checkout"))
    command = ["bigtrain", "train", "configs/quickstart.yaml"]
    training = subprocess.Popen(command, cwd=place.path, env=place.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    end = time.monotonic() + 100
    while len(place.rows()) < 3 and training.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    training.send_signal(signal.SIGINT)
    output, _ = training.communicate(timeout=60)
    assert training.returncode == 75, output.decode()
    return place


@pytest.mark.parametrize("command", COMMANDS)
def test_command(checkout, command):
    instead = INSTEAD.get(command, command)
    result = checkout.run(instead)
    assert result.returncode == 0, f"{instead}\n{result.stdout}{result.stderr}"
    assert SAYS.get(command, "") in result.stdout + result.stderr
    if command == "bigtrain train configs/quickstart.yaml":
        assert {row["attempt"] for row in checkout.rows()} == {1, 2}
        assert sorted({row["step"] for row in checkout.rows() if "loss" in row}) == list(range(1, 1001))


def test_what_it_says_of_mistakes(checkout):
    for block in re.findall(r"^```console\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        command, _, expected = block.removeprefix("$ ").partition("\n")
        result = checkout.run(command)
        assert (result.returncode, result.stdout + result.stderr) == (2, expected)


def test_the_folder_of_a_run_holds_what_it_says(checkout):
    listed = re.search(r"^    runs/quickstart/\n(.*?)\n\n", README, re.MULTILINE | re.DOTALL)[1]
    names = [name for line in listed.splitlines() for name in line.strip().split("    ")[0].split()]
    there = {name for name in names if list((checkout.path / "runs/quickstart").glob(name.replace("00000300", "*").rstrip("/")))}
    assert set(names) - there == {"tensorboard/", "lease.json"}  # switched off here; there while the run is trained
    assert len(names) > 8


def test_no_table_entry_is_left_over():
    assert set(INSTEAD) | set(SAYS) <= set(COMMANDS)


def test_the_repository_has_the_folders_that_it_says():
    listed = re.search(r"## What is in this repository\n\n(.*?)\n\n", README, re.DOTALL)[1]
    assert [line for line in listed.splitlines() if not (ROOT / line.split()[0]).is_dir()] == []


def test_commands_are_split_as_a_shell_splits_them():
    assert all(shlex.split(command) for command in COMMANDS) and len(COMMANDS) > 15
