"""Which block sizes of the attention kernels are fastest on this GPU?

    python benchmarks/tune.py [--kernel forward backward_kv backward_q] [--dim 64 128] [--bytes 2] [--mask plain ranges]
                              [--tokens 16384] [--length 4096] [--json FILE]

It tunes kernels/bigtrain_kernels/attention_tables.py, all entries for this architecture unless told otherwise, and no other family's
tables. Candidates are compiled first, in parallel processes that need no GPU: what the static gate would refuse in any of its cases
(spilled registers, too much shared memory, products without tensor cores, and so on) is left out. That is thousands of compiles: name some
entries where there are few cores. What is left is timed one after the other, causal or with documents of a seventh of the length: median of
repeated launches. A candidate whose results differ from those of the present entry is left out too, and one that is less than 2 % faster
does not replace it.

Prints what was gained for each entry, then rows to be pasted into the tables; `python -m bigtrain_kernels.static --update` comes after.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from bigtrain.hardware import look
from bigtrain_kernels import attention, ops, static
from bigtrain_kernels.launch import Case, Launch, architecture

DEVICE = "cuda"
TABLES = {"forward": attention.FORWARD, "backward_kv": attention.BACKWARD_KV, "backward_q": attention.BACKWARD_Q}
PRODUCTS = {"forward": 2, "backward_kv": 4, "backward_q": 3}
"""Matrix products of the size of the scores in each."""
SIZES = {2: ((32, 64, 128), (1, 2, 3, 4)), 4: ((16, 32, 64), (1, 2))}
"""Blocks and stages that are tried, by the bytes of an element."""
WARPS = (4, 8)
DTYPES = {2: torch.bfloat16, 4: torch.float32}
WIDTH = 2048
"""Of all query heads; each four share a key head."""
DOCUMENTS = 7
TOLERANCE = 0.02
"""Norm of the difference to the present entry's results, over their norm."""
NOISE = 1.02
"""How many times as fast as the present entry another must be to replace it."""
WORKER_GIB = 2
"""Host memory that a compiling process may take."""


class Entry(NamedTuple):
    """A place in one of TABLES."""

    kernel: str
    key: attention.Key

    def __str__(self) -> str:
        _, D, size, ranges = self.key
        return f"{self.kernel} d{D} {size} bytes {'ranges' if ranges else 'plain'}"

    @property
    def present(self) -> Launch:
        return TABLES[self.kernel][self.key]


class Size(NamedTuple):
    tokens: int
    """In all sequences together."""
    length: int
    """Of a sequence."""


def candidates(entry: Entry) -> list[Launch]:
    """The present one first."""
    blocks, stages = SIZES[entry.key[2]]
    tried = (Launch({"BLOCK_M": M, "BLOCK_N": N}, *rest) for M, N, *rest in itertools.product(blocks, blocks, WARPS, stages))
    return [entry.present, *(launch for launch in tried if launch != entry.present)]


@contextlib.contextmanager
def entered(entry: Entry, candidate: Launch) -> Iterator[None]:
    """Within it the table has `candidate` in that place."""
    with mock.patch.dict(TABLES[entry.kernel], {entry.key: candidate}):
        yield


def work(entry: Entry, size: Size, device: str) -> tuple[Callable[[], Any], int]:
    """A function that launches the entry's kernel alone, and its floating-point operations (on meta tensors: of a causal mask)."""
    _, D, width, ranges = entry.key
    B, T, H = max(1, size.tokens // size.length), size.length, max(4, WIDTH // D)
    q, grad, k, v = (torch.randn(B, T, heads, D, device=device).to(DTYPES[width]) for heads in (H, H, H // 4, H // 4))
    seen, pairs = None, B * T * (T + 1) // 2
    if ranges and device == "meta":
        seen = attention.Ranges(*(torch.empty(B, T, dtype=torch.int32, device=device) for _ in range(4)))
    elif ranges:
        document_BT = (torch.arange(T, device=device) * DOCUMENTS // T).expand(B, T)
        seen = ops.attention_mask(T, T, causal=True, document_BT=document_BT, dtype=q.dtype, device=q.device, backend="triton")
        pairs = int((seen.end_key - seen.first_key).sum())
    mask = attention.Mask(causal=not ranges, scale=D**-0.5, seen=seen)
    flops = PRODUCTS[entry.kernel] * 2 * H * D * pairs
    if entry.kernel == "forward":
        return lambda: attention.forward(q, k, v, mask), flops
    if device == "meta":
        lse, delta = (torch.empty(B, H, T, device=device) for _ in range(2))
    else:
        out, lse = attention.forward(q, k, v, mask)
        delta = attention.row_sums(grad, out, None)
    launch, lse2 = getattr(attention, entry.kernel), lse * attention.LOG2E
    return lambda: launch(grad, delta, q, k, v, lse2, mask), flops


def cases(entry: Entry) -> Iterator[Case]:
    """What the static gate compiles for an entry."""
    arch, D, width, ranges = entry.key
    begin = f"attention {entry.kernel.replace('_', ' ')} d"
    for case in attention.cases(arch):
        if case.name.startswith(begin):
            dim, dtype, kind = case.name.removeprefix(begin).split()
            if (D - 16 <= int(dim) <= D, dtype == "fp32", "ranges" in kind) == (True, width == 4, ranges):
                yield case


def refused(entry: Entry, candidate: Launch, size: Size) -> str | None:
    """Compile a candidate, first as it will be timed, into Triton's cache. Returns what the compiler or the static gate has against it."""
    try:
        with entered(entry, candidate):
            launch, flops = work(entry, size, "meta")
            for case in (Case(str(entry), launch, flops, 1), *cases(entry)):
                for row in static.rows_of(entry.key[0], case):
                    if broken := [*static.broken_rules(row), *static.broken_choices(row, {})]:
                        return f"{case.name}: {'; '.join(broken)}"
    except Exception as error:
        return short(error)
    return None


def short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def all_refused(jobs: Sequence[tuple[Entry, Launch]], size: Size) -> list[str | None]:
    """`refused` of each, in parallel processes: as many as there are cores, and memory for."""
    machine = look()
    workers = max(1, min(machine.cores, int(machine.memory_gib / WORKER_GIB), len(jobs)))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        running = [pool.submit(refused, *job, size) for job in jobs]
        for done, _ in enumerate(as_completed(running), 1):
            print(f"\r{done} of {len(jobs)} compiled", end="", file=sys.stderr)
    print(file=sys.stderr)
    return [result(future) for future in running]


def result(future: Future) -> str | None:
    try:
        return future.result()
    except Exception as error:  # the process is gone
        return short(error)


def measure(entry: Entry, faults: Sequence[tuple[Launch, str | None]], size: Size) -> list[dict[str, Any]]:
    """A row for each candidate: milliseconds and TFLOP/s, or under `fault` why there are none."""
    prepared = functools.cache(lambda: work(entry, size, DEVICE))  # where it fails, it fails for each
    expected: tuple[Tensor, ...] = ()
    rows = []
    for candidate, fault in faults:
        row = {"kernel": entry.kernel, "key": entry.key, "launch": candidate, "fault": fault}
        rows.append(row)
        if fault is not None:
            continue
        try:
            launch, flops = prepared()
            with entered(entry, candidate):
                found = launch()
                found = (found,) if isinstance(found, Tensor) else found
                expected = expected or found
                errors = [float((x - true).float().norm() / true.float().norm()) for x, true in zip(found, expected)]
                if not all(error < TOLERANCE for error in errors):
                    row["fault"] = f"differs from the present entry: error {' '.join(f'{error:.2g}' for error in errors)}"
                    continue
                milliseconds = do_bench(launch, warmup=10, rep=50, return_mode="median")
            row |= {"ms": milliseconds, "tflops": flops / milliseconds / 1e9}
        except Exception as problem:  # whatever the driver has against it
            row["fault"] = short(problem)
    return rows


def choice(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the rows of an entry, the present one's first: the fastest, or the present one where none is faster by more than noise."""
    ran = [row for row in rows if "ms" in row]
    best = min(ran, key=lambda row: row["ms"], default=None)
    return rows[0] if "ms" in rows[0] and rows[0]["ms"] < best["ms"] * NOISE else best


def sizes(launch: Launch) -> str:
    return " ".join(f"{n:3d}" for n in launch.blocks.values()) + f"  {launch.warps}  {launch.stages}"


HEADING = f"{'entry':32s}{'present':>15s}{'ms':>9s}   {'best':>15s}{'ms':>9s}{'TFLOP/s':>9s}{'gain':>9s}  left out"


def gain(entry: Entry, rows: Sequence[dict[str, Any]]) -> str:
    present, best = rows[0], choice(rows)
    faults = sum("ms" not in row for row in rows)
    begin = f"{entry!s:32s}{sizes(present['launch']):>15s}" + (f"{present['ms']:9.3f}" if "ms" in present else f"{'-':>9s}")
    if best is None:
        return f"{begin}   nothing runs: {present['fault']}"
    times = f"{present['ms'] / best['ms']:7.2f} x" if "ms" in present else f"{'-':>9s}"
    return f"{begin}   {sizes(best['launch']):>15s}{best['ms']:9.3f}{best['tflops']:9.0f}{times}  {faults} of {len(rows)}"


def table(chosen: dict[attention.Key, Launch]) -> str:
    """Rows as those of attention_tables.py's: architectures, head dims, bytes, mask, BLOCK_M, BLOCK_N, warps, stages."""
    lines = []
    for (arch, D, width, ranges), launch in chosen.items():
        both = chosen.get((arch, D, width, not ranges)) == launch
        if not (both and ranges):
            mask = "any" if both else "ranges" if ranges else "plain"
            lines.append(f"        {arch:13s} {D:<5d}  {width}  {mask:6s}  {sizes(launch)}")
    return "\n".join(lines)


def tune(entries: Sequence[Entry], size: Size, file: Path | None) -> None:
    """Measure and print; `file` gets every measurement."""
    faults = iter(all_refused([(entry, candidate) for entry in entries for candidate in candidates(entry)], size))
    measured: dict[Entry, list[dict[str, Any]]] = {}
    print(HEADING)
    try:
        for entry in entries:
            measured[entry] = measure(entry, list(zip(candidates(entry), faults)), size)
            print(gain(entry, measured[entry]), flush=True)
    finally:
        if file:
            rows = [row | {"launch": row["launch"].arguments()} for rows in measured.values() for row in rows]
            file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    for kernel in dict.fromkeys(entry.kernel for entry in entries):
        best = {entry.key: (choice(rows) or rows[0])["launch"] for entry, rows in measured.items() if entry.kernel == kernel}
        print(f"\n{kernel.upper()}\n{table(best)}")


def selected(arch: str, options: argparse.Namespace) -> list[Entry]:
    return [
        Entry(kernel, key)
        for kernel in options.kernel
        for key in TABLES[kernel]
        if key[0] == arch and key[1] in options.dim and key[2] in options.bytes and ("ranges" if key[3] else "plain") in options.mask
    ]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--kernel", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--dim", type=int, nargs="+", choices=attention.HEAD_DIMS, default=list(attention.HEAD_DIMS))
    parser.add_argument("--bytes", type=int, nargs="+", choices=SIZES, default=list(SIZES), help="of an element: 2 is bf16, 4 is float32")
    parser.add_argument("--mask", nargs="+", choices=("plain", "ranges"), default=["plain", "ranges"])
    parser.add_argument("--tokens", type=int, default=16384, help="in all sequences together")
    parser.add_argument("--length", type=int, default=4096, help="of a sequence")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    if not torch.cuda.is_available():
        sys.exit("tune.py measures kernels on a GPU, and there is none; what can be said without one: python -m bigtrain_kernels.static")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}: measured")
    tune(selected(architecture(), options), Size(options.tokens, options.length), options.json)


if __name__ == "__main__":
    main()
