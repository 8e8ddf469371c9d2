"""The commands. Each imports what it needs when it is called, so that `bigtrain --help` answers at once."""

from __future__ import annotations

import os
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from bigtrain import cli_jobs, cli_kubernetes, cli_slurm  # noqa: F401 (the last two only add to launch_app)
from bigtrain.cli_common import SETTINGS, ConfigPath, New, Overrides, RunPath, prepare, require_torch
from bigtrain.cli_doctor import doctor
from bigtrain.cli_launch import launch_app, launch_local
from bigtrain.errors import BadNode, BigtrainError, UserError


class _Commands(TyperGroup):
    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BigtrainError as error:
            # Of ranks that find the same, one says so; an agent keeps what each says, and lets the first be heard.
            names = ("LOCAL_RANK", "SLURM_LOCALID") if isinstance(error, BadNode) else ("RANK", "SLURM_PROCID")
            if "BIGTRAIN_AGENT" in os.environ or next((os.environ[name] for name in names if name in os.environ), "0") == "0":
                from bigtrain.screen import printable

                print(f"bigtrain: {printable(error)}", file=sys.stderr)
            raise typer.Exit(error.code) from None


app = typer.Typer(cls=_Commands, help="Train transformers, from a laptop without a GPU to many nodes.", **SETTINGS)
config_app = typer.Typer(help="Show a config, its schema, or what it becomes for DeepSpeed.", **SETTINGS)
data_app = typer.Typer(help="Turn text into shards of tokens.", **SETTINGS)
checkpoint_app = typer.Typer(help="List, verify, compare and prune the checkpoints of a run.", **SETTINGS)
ops_app = typer.Typer(help="Build DeepSpeed's C++ ops.", **SETTINGS)
GROUPS = (("launch", launch_app), ("config", config_app), ("data", data_app), ("checkpoint", checkpoint_app), ("ops", ops_app))
for name, group in GROUPS:
    app.add_typer(group, name=name)


class Kind(str, Enum):
    model = "model"
    ema = "ema"


Weights = Annotated[Kind, typer.Option(help="As trained, or their moving average.")]


@app.callback()
def main_options(local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None) -> None:
    # The deepspeed launcher puts --local_rank=N before the command; LOCAL_RANK says the same.
    pass


@app.command()
def train(config: ConfigPath, overrides: Overrides = None, new: New = False) -> None:
    """Train, or go on with a run that was stopped. Starts the ranks itself, unless a launcher has."""
    from bigtrain import configfile, hardware, opbuild
    from bigtrain.ranks import launched, machines
    from bigtrain_launch.environment import joining

    if (variables := launched(os.environ)) is None:
        launch_local(config, overrides, new)
        return
    require_torch()
    source = configfile.read(config, overrides or [])
    here = hardware.look()
    found = hardware.problems(source.config, here, int(variables["WORLD_SIZE"]))
    least, there = source.config.launch.min_nodes or source.config.launch.nodes, machines(os.environ)
    if there is not None and there < least:
        found.append(("launch.nodes", f"{least} machines are asked for, but ranks were started on {there}; start more, or lower it"))
    if found:
        raise source.error(found)
    os.environ.update(opbuild.environment())
    if here.kind == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.update(joining(os.environ, variables, here))
    opbuild.check_locks(opbuild.needed(source.config, here.kind))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while torch is imported and ranks meet, Ctrl-C leaves no traceback
    from bigtrain.logs import RankOutput

    output = RankOutput()
    from bigtrain.session import run_rank

    code = run_rank(source.config, here, output, new)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads outlive the interpreter now and then, and abort the process after it has ended well


@app.command()
def evaluate(
    run: RunPath,
    weights: Weights = Kind.model,
    sequences: Annotated[int | None, typer.Option(min=1, help="Held-out sequences; left out: all.")] = None,
) -> None:
    """Loss, perplexity and bits per byte of a run's newest checkpoint on its held-out data."""
    import json

    from rich.console import Console
    from rich.progress import Progress

    device, dtype = _device()
    from bigtrain.evaluate import evaluate_run

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("evaluating", total=sequences)
        metrics = evaluate_run(run, weights.value, device, dtype, sequences, lambda done: bar.update(task, completed=done))
    print(json.dumps(metrics))


@app.command()
def generate(
    run: RunPath,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(min=1e-6, max=1.0, help="Keep the likeliest tokens that sum to p.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    weights: Weights = Kind.model,
) -> None:
    """Continue a prompt with a run's newest checkpoint, as it is written."""
    device, dtype = _device()
    from bigtrain.checkpoint.load import restore
    from bigtrain.config import Generate
    from bigtrain.generate import generate as write
    from bigtrain.screen import printable

    restored = restore(run, weights.value, device, dtype)
    settings = Generate(tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    shown = printable if sys.stdout.isatty() else str
    print(shown(prompt), end="", flush=True)
    for piece in write(restored.model, restored.tokenizer, prompt, settings, device):
        print(shown(piece), end="", flush=True)
    print()


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are drawn over each other.")],
    out: Annotated[Path | None, typer.Option(help="File to write; left out: report.html in the run's folder.")] = None,
) -> None:
    """Write one HTML file with curves, config differences and samples of one or more runs."""
    from bigtrain.report import write_report

    print(write_report(runs, out))


@app.command()
def diagnose(run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]) -> None:
    """Say what happened to a run, to which rank, at which step, and what to do; also while it trains."""
    from rich.console import Console

    from bigtrain_launch.diagnose import examine, show

    show(examine(run), Console(highlight=False))


for command in (cli_jobs.jobs, cli_jobs.logs, cli_jobs.cancel, doctor):
    app.command()(command)


@config_app.command("show")
def config_show(config: ConfigPath, overrides: Overrides = None) -> None:
    """The resolved config, with where each value was set."""
    from bigtrain import configfile

    print(configfile.read(config, overrides or []).show(), end="")


@config_app.command("schema")
def config_schema() -> None:
    """JSON Schema of a config file, for editors."""
    import json

    from bigtrain.configschema import schema

    print(json.dumps(schema(), indent=2))


@config_app.command("deepspeed")
def config_deepspeed(config: ConfigPath, overrides: Overrides = None) -> None:
    """What the config becomes for DeepSpeed on this machine (JSON)."""
    import json

    from bigtrain import configfile, hardware
    from bigtrain.config import batch_arithmetic
    from bigtrain.deepspeed_config import derive

    source = configfile.read(config, overrides or [])
    here = hardware.look()
    if found := hardware.problems(source.config, here):
        raise source.error(found)
    batch = batch_arithmetic(source.config.train, hardware.ranks(source.config, here))
    print(json.dumps(derive(source.config, batch, hardware.choose_precision(source.config.precision, here)[0]), indent=2))


@data_app.command("prepare")
def data_prepare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Tokenise the text that a config names into shards; returns at once when they are there."""
    from bigtrain import configfile
    from bigtrain.data.shards import Manifest

    data = configfile.load(config, overrides or []).data
    prepare(data)
    for name, split in Manifest.read(data.folder).splits.items():
        print(f"{data.folder}: {name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes of text")


@checkpoint_app.command("list")
def checkpoint_list(run: RunPath) -> None:
    """Checkpoints of a run, oldest first: step, size, what the evaluation at that step found, path."""
    from bigtrain.checkpoint import format
    from bigtrain.errors import RunError

    for path in _checkpoints(run):
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        try:
            metrics = "  ".join(f"{name} {value:.4g}" for name, value in format.read_state(path).metrics.items())
        except RunError as error:
            metrics = f"damaged: {error}"
        print(f"step {format.step_of(path):>8}  {size / 2**20:10,.1f} MiB  {path}  {metrics}".rstrip())


@checkpoint_app.command("verify")
def checkpoint_verify(run: RunPath) -> None:
    """Compare every file of a run's checkpoints, or of one, with the checksums written beside it."""
    from bigtrain.checkpoint import format
    from bigtrain.errors import RunError

    damaged = []
    for path in _checkpoints(run):
        try:
            format.verify(path)
            format.read_index(path)
            format.read_state(path)
            print(f"ok  {path}")
        except RunError as error:
            damaged.append(str(error))
    if damaged:
        raise RunError("\nbigtrain: ".join(damaged))


@checkpoint_app.command("diff")
def checkpoint_diff(
    one: RunPath,
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Another run folder or checkpoint.")],
    rows: Annotated[int, typer.Option(min=1, help="Tensors to show, those that differ most first.")] = 20,
) -> None:
    """Which tensors differ between two checkpoints, and by how much."""
    from rich.console import Console
    from rich.table import Table

    from bigtrain.checkpoint.compare import differences
    from bigtrain.checkpoint.format import find

    pair = find(one), find(other)
    found = sorted(differences(*pair), key=lambda d: -1.0 if d.relative is None else -d.relative)
    if not found:
        print(f"equal, bit for bit: {pair[0]} and {pair[1]}")
        return
    table = Table(title=f"{pair[0]} and {pair[1]}: {len(found)} tensors differ", title_justify="left")
    for column in ("tensor", "kind"):
        table.add_column(column, overflow="fold")
    for column in ("elements", "largest difference", "relative (L2)"):
        table.add_column(column, justify="right")
    for d in found[:rows]:
        numbers = ("only one has it, or the shapes differ", "") if d.largest is None else (f"{d.largest:.3g}", f"{d.relative or 0:.3g}")
        table.add_row(d.parameter, d.kind, f"{d.elements:,}", *numbers)
    Console().print(table)
    if len(found) > rows:
        print(f"and {len(found) - rows} more; --rows shows them")


@checkpoint_app.command("prune")
def checkpoint_prune(
    run: RunPath, dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False
) -> None:
    """Remove the checkpoints that the run's config does not keep; never the newest two that are sound."""
    from bigtrain import configfile
    from bigtrain.checkpoint.retention import Kept
    from bigtrain.runfolder import RunFolder

    folder = RunFolder(run)
    if not folder.config.is_file():
        raise UserError(f"{run}: not a run folder (there is no config.yaml in it); give one")
    _checkpoints(run)
    removed, damaged = Kept(folder.checkpoints, configfile.load_saved(folder.config).checkpoint).prune(dry_run)
    for problem in damaged.values():
        print(f"damaged, and left there: {problem}")
    for path in removed:
        print(f"{'would remove' if dry_run else 'removed'}  {path}")
    if not removed:
        print("nothing to remove")


def _checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run's folder, or the one that `run` is."""
    from bigtrain.checkpoint import format

    found = [run] if (run / format.MANIFEST).is_file() else format.checkpoints(run / "checkpoints")
    if not found:
        raise UserError(f"{run}: no checkpoints here; give a run folder or a checkpoint")
    return found


@ops_app.command("build")
def ops_build(
    config: Annotated[Path | None, typer.Argument(help="Build what this config needs; left out: all for the CPU.")] = None,
    overrides: Overrides = None,
) -> None:
    """Compile the ops before anything waits for them; returns at once when they are there."""
    from bigtrain import configfile, hardware, opbuild

    os.environ.update(opbuild.environment())
    needed = opbuild.needed(configfile.load(config, overrides or []), hardware.look().kind) if config else list(opbuild.ALL)
    opbuild.build(needed, print)


@ops_app.command("load", hidden=True)
def ops_load(op: str) -> None:
    """Load one op in this process, compiling it if need be; `ops build` runs it in a process of its own."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from bigtrain.engine import load_op

    load_op(op)


def _device():
    """Device and dtype for using a trained model in one process."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def main() -> None:
    """Entry point of the `bigtrain` command."""
    app(prog_name="bigtrain")
