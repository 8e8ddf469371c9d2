"""What does a checkpoint cost: how long does training wait, and how long until it is on disk, checked, and loaded again?

    python benchmarks/checkpoint.py [--ranks 2] [--saves 30] [--dtype fp32] [--folder runs/benchmarks]

The model and optimizer of throughput.yaml under ZeRO-2 train, and after each few steps one of the ways to save is used, in
turns: bigtrain's in the background, bigtrain's waited for, DeepSpeed's `save_checkpoint`, and PyTorch's
`dcp.async_save`. For the two in the background the next step is timed as well, which shares the machine with the writing.
The copy of the state into host memory, which nothing can avoid, is timed by itself. Medians over the saves of rank 0; a table
and FOLDER/TIME/checkpoint.json. Bytes are those of all ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from processes import run
from rich.console import Console
from rich.table import Table
from throughput import WORK, check_quiet, environment, places

from bigtrain import configfile
from bigtrain.config import Config, batch_arithmetic
from bigtrain.errors import BigtrainError, UserError
from bigtrain.hardware import look
from bigtrain.runfolder import RunFolder, write_atomically

TIMEOUT = 1800.0
GOAL = 0.035
"""Share of a step for which training may wait, beyond the copy."""
WAYS = {
    "background": "bigtrain, in the background",
    "waited": "bigtrain, waited for",
    "deepspeed": "DeepSpeed's save_checkpoint",
    "dcp": "PyTorch's dcp.async_save",
}
Row = dict[str, float]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, metavar="N")
    parser.add_argument("--saves", type=int, default=30, metavar="N", help="of each way")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks"), help="for results; checkpoints are written there too")
    parser.add_argument("--data", default="data/stdlib-bpe4096", metavar="FOLDER", help="prepared data")
    parser.add_argument("--anyway", action="store_true", help="measure although the machine is busy; such numbers are not to be quoted")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    for name in ("ranks", "saves"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: at least 1")
    return options


def settings(options: argparse.Namespace) -> Config:
    return configfile.load(WORK, [f"precision={options.dtype}", f"data.folder={options.data}", "train.steps=1000000"])


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    if options.rank_of:
        measure(options, options.rank_of)
        return 0
    check_quiet(os.getloadavg()[0], options.anyway)
    hardware = look()
    folder = options.folder / time.strftime("checkpoint-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    command = [sys.executable, __file__, *(argv or sys.argv[1:]), "--rank-of", str(folder)]
    variables = environment(hardware) | {"OMP_NUM_THREADS": str(max(1, hardware.cores // options.ranks))}
    run([(command, variables | place) for place in places(options.ranks)], folder / "output.log", TIMEOUT)
    found = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    summary = summarise(found["saves"])
    show(found | {"summary": summary}, options)
    write_atomically(folder / "checkpoint.json", json.dumps(found | {"summary": summary}, indent=1))
    (folder / "measured.json").unlink()
    print(f"{folder / 'checkpoint.json'}: every save")
    return 0


def summarise(saves: dict[str, list[Row]]) -> dict[str, Row]:
    """The median of each figure, by way."""
    return {way: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for way, rows in saves.items()}


def show(found: dict[str, Any], options: argparse.Namespace) -> None:
    table = Table(title=f"{options.ranks} ranks, {options.dtype}, {found['parameters'] / 1e6:.1f} M parameters", title_justify="left")
    for heading in ("", "waits ms", "of it copy ms", "beyond it, of a step", "next step", "on disk s", "B/parameter", "check s", "load s"):
        table.add_column(heading, justify="right" if heading else "left")
    for way, row in found["summary"].items():
        beyond = (row["waits"] - row["copy"]) / row["step"]
        more = [f"{row[key]:.3f}" if key in row else "" for key in ("check", "load")]
        table.add_row(
            WAYS[way], f"{1e3 * row['waits']:,.1f}", f"{1e3 * row['copy']:,.1f}", f"{beyond:.1%}", f"{row['next'] / row['step']:.2f}",
            f"{row['total']:.3f}", f"{row['bytes'] / found['parameters']:.1f}", *more,
        )  # fmt: skip
    table.caption = f"Measured: medians of {options.saves} saves of each, taking turns. A step without a save is 1."
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(table)
    ours = found["summary"]["background"]
    share = (ours["waits"] - ours["copy"]) / ours["step"]
    console.print(f"{'met' if share <= GOAL else 'not met'}  training waits for at most {GOAL:.1%} of a step beyond the copy: {share:.2%}")
    console.print(f"the same bytes in the background as waited for: {found['same_bytes']}")


# ---- One rank ----


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Train and save in turns as one rank; rank 0 leaves measured.json."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    from bigtrain.checkpoint import format, save
    from bigtrain.checkpoint.load import Reader, load_all
    from bigtrain.start import with_data
    from bigtrain.train import Report, Trainer
    from bigtrain.world import World

    world = World.join(look().kind, 600)
    config = with_data(settings(options))
    trainer = Trainer(config, batch_arithmetic(config.train, world.size), options.dtype, 1.0, world, RunFolder(folder), Report())
    saving, batches = trainer.saving, trainer.loader.steps(0)
    saver = saving.saver
    group = dist.new_group(backend="gloo")
    copying = 0.0
    real_copy = saver._copy

    def timed_copy(*arguments):
        nonlocal copying
        start = time.perf_counter()
        try:
            return real_copy(*arguments)
        finally:
            copying += time.perf_counter() - start

    saver._copy = timed_copy

    def step() -> float:
        world.barrier()
        start = time.perf_counter()
        micro_batches, position = next(batches)
        trainer.unlogged = trainer.train_step(micro_batches, start)
        trainer.progress.step, trainer.progress.position = trainer.progress.step + 1, position
        trainer.finish_step()
        return time.perf_counter() - start

    def tensors() -> dict[str, Any]:
        return {f"{world.rank}-{n}-{k}": t for n, p in enumerate(trainer.partitions) for k, (t, _) in p.tensors().items()}

    def begin(way: str, path: Path) -> Callable[[], Any]:
        """Save in one of the ways; what is returned waits until it is on disk."""
        if way == "background":
            saver.start(trainer.progress.step, trainer.partitions, saving.state(trainer.progress, {}, False), saving.files())
            return saver.wait
        if way == "waited":
            saver.write(trainer.progress.step, trainer.partitions, saving.state(trainer.progress, {}, False), saving.files())
            return lambda: None
        if way == "deepspeed":
            trainer.engine.deepspeed.save_checkpoint(str(path), tag="saved")
            return lambda: None
        return dcp.async_save(tensors(), checkpoint_id=str(path), process_group=group).result

    rows: dict[str, list[Row]] = {way: [] for way in WAYS}
    for _ in range(5):
        step()
    for number in range(options.saves):
        for way in WAYS:
            path = folder / f"{way}-{number}"
            quiet, copying = step(), 0.0
            world.barrier()
            start = time.perf_counter()
            wait = begin(way, path)
            waits = time.perf_counter() - start
            after = step()
            wait()
            row = {"step": quiet, "waits": waits, "copy": copying, "next": after, "total": time.perf_counter() - start}
            if way in ("deepspeed", "waited"):
                row["total"] = waits
            path = path if path.exists() else folder / "checkpoints" / f"{format.PREFIX}{trainer.progress.step - 1:08d}"
            world.barrier()
            row["bytes"] = float(sum(f.stat().st_size for f in path.rglob("*") if f.is_file()))
            if way == "waited":
                start = time.perf_counter()
                format.verify(path, (world.rank, world.size))
                row["check"] = time.perf_counter() - start
                start = time.perf_counter()
                load_all(Reader(path), trainer.partitions, format.read_state(path).optimizer)
                row["load"] = time.perf_counter() - start
            world.barrier()
            if world.first:
                shutil.rmtree(path)
            rows[way].append(row)
    twice = []
    for name in ("one", "two"):  # the same moment, in the background and waited for
        at, files = folder / name, saving.files()
        content = save.Content(1, saving.shapes, save.fragments(trainer.partitions, world, real_copy if name == "one" else lambda t, _: t),
                               saving.state(trainer.progress, {}, False), files)  # fmt: skip
        path = save.save(at, content, world)
        twice.append(json.loads((path / format.MANIFEST).read_text())["files"])
        world.barrier()
    if world.first:
        for name in ("one", "two", "checkpoints"):
            shutil.rmtree(folder / name, ignore_errors=True)
        parameters = trainer.engine.module.count_parameters()
        found = {"parameters": parameters, "same_bytes": twice[0] == twice[1], "ranks": world.size, "saves": rows}
        write_atomically(folder / "measured.json", json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # gloo's and dcp's threads now and then abort the interpreter's own end


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BigtrainError as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        sys.exit(error.code)
