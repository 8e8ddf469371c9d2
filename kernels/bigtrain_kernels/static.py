"""The static gate: every kernel in every entry of the launch tables, compiled for GPUs that are not here and checked.

    python -m bigtrain_kernels.static [--arch sm_90 gfx942] [--kernel attention] [--representative] [--json FILE] [--update]

Compiles through the kernels' own host functions (static_compile), reads what the compiler decided (static_facts), prints a
table and holds it against two kinds of budget. Rules: no spills, shared memory within the limit, tensor cores of the
architecture's own kind, no float64, no atomics, wide or asynchronous loads. And the figures in budgets.json: what got worse fails
until `--update` changes the file. Spills, loads and figures are the compiler's choices, so they are held to one version of Triton.

A main loop's instructions for each matrix instruction compare launches of the same tile; those for each million operations
("per MFLOP") compare any. Statically verified is not benchmarked.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton

from .launch import ARCHITECTURES, Case, interpreted
from .static_compile import INTERPRETED_HERE, compile_only
from .static_facts import PROCESSORS, Facts, facts

FAMILIES = ("attention", "norm", "rope", "mlp", "gated_linear", "cross_entropy")
REPRESENTATIVE = (
    "sm_80 attention d64 bf16 causal",
    "sm_80 attention d128 bf16 causal",
    "sm_90 attention d64 bf16 causal",
    "sm_90 attention d128 bf16 causal",
    "sm_80 attention forward d64 fp16 causal",
    "sm_90 attention d128 fp16 causal",
    "sm_100 attention forward d128 bf16 causal",
    "gfx942 attention forward d128 bf16 causal",
    "sm_90 norm rms_norm 4096 bfloat16",
    "sm_100 norm layer_norm backward 4096 bfloat16",
    "sm_80 rope d128 bfloat16 half backward",
    "sm_90 mlp glu swiglu bfloat16",
    "gfx942 mlp glu backward swiglu bfloat16",
    "sm_90 gated_linear swiglu bfloat16",
    "sm_90 cross_entropy statistics bfloat16",
)
"""What CI compiles every time: launches whose key has all words of a line."""
BUDGETS = Path(__file__).with_name("budgets.json")
LABEL = "statically verified, not benchmarked"
SLACK = 1.03
"""By how much a figure may grow before the gate fails."""


class Row(NamedTuple):
    """One launch of one case, for one architecture."""

    architecture: str
    case: str
    kernel: str
    """Numbered from the second launch of the same kernel in a case on."""
    grid: tuple[int, ...]
    constants: dict[str, Any]
    warps: int
    stages: int
    facts: Facts
    flops: int | None
    bytes: int | None
    """The case's, by formula (each input read once, each output written once); None after its first launch."""

    @property
    def key(self) -> str:
        return f"{self.architecture} {self.case}: {self.kernel}"

    @property
    def floor_us(self) -> float:
        """Microseconds below which the roofline lets no kernel go: at the peak of arithmetic or at that of memory."""
        gpu = PROCESSORS[self.architecture]
        tflops = gpu.tensor_tflops if self.facts.tensor_core else gpu.vector_tflops
        return max(self.flops / tflops, self.bytes / gpu.terabytes) / 1e6

    def document(self) -> dict[str, Any]:
        """For machines."""
        nested = self.facts._asdict() | {
            "loads": self.facts.loads._asdict(),
            "loop_ratio": self.facts.loop_ratio,
            "loop_cost": self.facts.loop_cost,
        }
        roofline = {} if self.flops is None else {"intensity": round(self.flops / self.bytes, 2), "floor_us": round(self.floor_us, 2)}
        return {"key": self.key, **self._asdict(), "facts": nested, **roofline}

    def baseline(self) -> dict[str, float | None]:
        """The figures that may not get worse."""
        f = self.facts
        return {
            "registers": f.registers,
            "spilled_bytes": f.spilled_bytes,
            "shared_bytes": f.shared_bytes,
            "resident_warps": f.resident_warps,
            "instructions": f.instructions,
            "loop_ratio": f.loop_ratio,
            "narrow_share": f.loads.narrow_share,
        }


class Job(NamedTuple):
    """One case of a family, by its place among the cases of an architecture."""

    architecture: str
    family: str
    index: int
    name: str

    def words(self) -> str:
        return f"{self.architecture} {self.family} {self.name}"


def family_cases(family: str, architecture: str) -> list[Case]:
    return list(importlib.import_module(f"bigtrain_kernels.{family}").cases(architecture))


def jobs(architectures: Sequence[str], kernels: Sequence[str] = (), representative: bool = False) -> list[Job]:
    """The cases whose words have one of `kernels` among them, for each architecture."""
    found = [Job(a, f, i, case.name) for a in architectures for f in FAMILIES for i, case in enumerate(family_cases(f, a))]
    if kernels:
        found = [job for job in found if any(set(k.split()) <= set(job.words().split()) for k in kernels)]
    if representative:
        found = [job for job in found if any(set(line.split()) <= set(job.words().split()) for line in REPRESENTATIVE)]
    return found


def measure(job: Job) -> list[Row]:
    """Compile one case; its launches in order."""
    return rows_of(job.architecture, family_cases(job.family, job.architecture)[job.index])


def rows_of(architecture: str, case: Case) -> list[Row]:
    with compile_only(architecture) as launched:
        case.run()
    seen: Counter[str] = Counter()
    rows = []
    for launch in launched:
        seen[launch.kernel] += 1
        kernel = launch.kernel if seen[launch.kernel] == 1 else f"{launch.kernel} {seen[launch.kernel]}"
        work = (None, None) if rows else (case.flops, case.bytes)
        found = facts(launch.compiled, architecture)
        rows.append(Row(architecture, case.name, kernel, launch.grid, launch.constants, launch.warps, launch.stages, found, *work))
    return rows


def measure_all(todo: Sequence[Job], workers: int) -> tuple[list[Row], list[str]]:
    """All jobs in parallel processes (one worker: in this one), with progress on stderr: rows in order, and a line for each failure."""
    rows: dict[Job, list[Row]] = {}
    failures: list[str] = []
    start = time.monotonic()
    # A compile is set up by changing Triton's globals, so workers are processes, or one thread.
    with ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else ThreadPoolExecutor(1) as pool:
        running = {pool.submit(measure, job): job for job in todo}
        for done, future in enumerate(as_completed(running), 1):
            job = running[future]
            try:
                rows[job] = future.result()
                if not rows[job]:
                    failures.append(f"{job.architecture} {job.name}: launches no kernel")
            except Exception as error:
                failures.append(f"{job.architecture} {job.name}: does not compile: {type(error).__name__}: {error}")
            print(f"[{done}/{len(todo)}] {time.monotonic() - start:5.0f} s  {job.architecture} {job.name}", file=sys.stderr)
    return [row for job in todo for row in rows.get(job, [])], failures


def broken_rules(row: Row) -> Iterator[str]:
    """The rules that the source alone must keep, whatever compiles it."""
    f, limit = row.facts, PROCESSORS[row.architecture].shared_per_block
    if any(size > 1 for size in row.grid[1:]):
        yield f"has a grid of {' x '.join(map(str, row.grid))} programs: CUDA takes no more than 65,535 beyond the first dimension"
    if f.shared_bytes > limit:
        yield f"asks for {f.shared_bytes} bytes of shared memory, a block may have {limit}"
    if f.float64:
        yield f"has {f.float64} float64 instructions"
    if f.atomics:
        yield f"has {f.atomics} atomic instructions on global memory"
    own = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(row.architecture)
    if f.tall_matmuls + f.short_matmuls and not f.tensor_core:
        yield "multiplies 16-bit matrices without tensor cores"
    elif own and f.tall_matmuls and (own not in f.tensor_core or "HMMA" in f.tensor_core):
        yield f"multiplies 16-bit matrices of 64 rows or more without {own}"


def broken_choices(row: Row, accepted_spills: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The rules that the compiler may break. `accepted_spills`: by key, the bytes that cannot be done without, and the reason."""
    f = row.facts
    allowed = accepted_spills.get(row.key, {}).get("bytes", 0)
    if f.spilled_bytes > allowed:
        yield f"spills {f.spilled_bytes} bytes a thread" + (f", {allowed} accepted" if allowed else "")
    if f.loop_tensor_core > 2 and f.loop_waits >= f.loop_tensor_core:
        yield f"waits for each of the {f.loop_tensor_core} HGMMA of its main loop before the next"
    if f.loads.narrow_share > 0.5:
        yield f"loads {f.loads.narrow_share:.0%} of its bytes on the hot path neither 128 bits at a time nor asynchronously"


def worse_figures(row: Row, baseline: dict[str, dict[str, float | None]]) -> Iterator[str]:
    """What is worse than budgets.json says."""
    if row.key not in baseline:
        yield "has no baseline: --update adds it"
        return
    for name, before in baseline[row.key].items():
        now = row.baseline()[name]
        if before is None:
            continue
        # No loop ratio any more is no main loop, or no tensor cores in it.
        if now is None or (now < before if name == "resident_warps" else now > before * SLACK):
            yield f"{name.replace('_', ' ')} went from {before} to {now}: make it better, or --update the baseline"


def violations(rows: Sequence[Row], budgets: dict[str, Any], *, complete: bool = False) -> list[str]:
    """A line for each budget that is broken. `complete`: the rows are all there are, so a baseline without one is stale."""
    pinned = triton.__version__ == budgets["triton"]
    lines = []
    for row in rows:
        broken = list(broken_rules(row))
        if pinned:
            broken += [*broken_choices(row, budgets["accepted_spills"]), *worse_figures(row, budgets["launches"])]
        lines += [f"{row.key}: {text}" for text in broken]
    if pinned and complete:
        stale = (budgets["launches"].keys() | budgets["accepted_spills"].keys()) - {row.key for row in rows}
        lines += [f"{key}: in budgets.json, but nothing launches it" for key in sorted(stale)]
    return lines


def update(rows: Sequence[Row], budgets: dict[str, Any], *, complete: bool) -> dict[str, Any]:
    """The budgets with the rows' figures as the baseline."""
    kept = {} if complete else budgets["launches"]
    return budgets | {"launches": kept | {row.key: row.baseline() for row in rows}}


COLUMNS = (
    "case", "kernel", "blocks", "warps", "stages", "regs", "spilled B", "stack B", "shared KiB", "resident warps", "matrix instr.",
    "instr.", "in loop", "per matrix", "per MFLOP", "wide", "async", "narrow", "f64", "atomics", "GFLOP", "MB", "FLOP/B", "roofline us",
)  # fmt: skip
"""Instructions of the kernel, of its main loop, and of that for each matrix instruction in it; global loads on the hot path."""


def cells(row: Row) -> list[str]:
    f = row.facts
    blocks = " ".join(f"{name.removeprefix('BLOCK_')}{value}" for name, value in row.constants.items() if name.startswith("BLOCK"))
    registers = f"{f.registers}" + (f" ({f.accumulation_registers}a)" if f.accumulation_registers else "")
    roofline = ["", "", "", ""]
    if row.flops is not None:
        roofline = [f"{row.flops / 1e9:.4g}", f"{row.bytes / 1e6:.4g}", f"{row.flops / row.bytes:.1f}", f"{row.floor_us:.1f}"]
    return [
        row.case, row.kernel, blocks, str(row.warps), str(row.stages), registers, str(f.spilled_bytes), str(f.stack_bytes),
        f"{f.shared_bytes / 1024:.1f}", str(f.resident_warps), " ".join(f"{n} {kind}" for kind, n in f.tensor_core.items()) or "-",
        str(f.instructions), str(f.loop_instructions or "-"), f"{f.loop_ratio:.1f}" if f.loop_ratio else "-",
        f"{f.loop_cost:.0f}" if f.loop_cost else "-",
        str(f.loads.wide), str(f.loads.asynchronous), str(f.loads.narrow), str(f.float64), str(f.atomics), *roofline,
    ]  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Aligned text, a part for each architecture; a column that is 0 in all of a part is a word below it."""
    lines = []
    for architecture in dict.fromkeys(row.architecture for row in rows):
        part = [cells(row) for row in rows if row.architecture == architecture]
        zero = [all(line[i] == "0" for line in part) for i in range(len(COLUMNS))]
        shown = [[cell for cell, empty in zip(line, zero) if not empty] for line in (COLUMNS, *part)]
        widths = [max(map(len, column)) for column in zip(*shown)]
        lines.append(f"{architecture} ({PROCESSORS[architecture].gpu}), triton {triton.__version__}: {LABEL}")
        for line in shown:
            lines.append("  ".join(cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip())
        if any(zero):
            lines.append("0 in all rows: " + ", ".join(name for name, empty in zip(COLUMNS, zero) if empty))
        lines.append("")
    return "\n".join(lines)


def dumps(budgets: dict[str, Any]) -> str:
    """budgets.json: a line for each launch, so that a change of the baseline reads as one."""
    parts = []
    for name, value in budgets.items():
        if isinstance(value, dict) and value:
            inner = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in sorted(value.items()))
            parts.append(f" {json.dumps(name)}: {{\n{inner}\n }}")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bigtrain_kernels.static", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), metavar="ARCH", help=", ".join(ARCHITECTURES)
    )
    parser.add_argument("--kernel", nargs="+", default=[], metavar="WORDS", help="a family or words of a case: attention, 'attention d64'")
    parser.add_argument("--representative", action="store_true", help="only what CI compiles every time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same as a list of objects")
    parser.add_argument("--update", action="store_true", help="write the figures into budgets.json")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parallel processes (default: all cores)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    if interpreted():
        print(INTERPRETED_HERE, file=sys.stderr)
        return 2
    budgets = json.loads(BUDGETS.read_text(encoding="utf-8"))
    if options.update and triton.__version__ != budgets["triton"]:
        print(f"the baseline is of triton {budgets['triton']}, this is {triton.__version__}: not updated", file=sys.stderr)
        return 2
    todo = jobs(options.arch, options.kernel, options.representative)
    complete = len(options.arch) == len(ARCHITECTURES) and not options.kernel and not options.representative
    rows, failures = measure_all(todo, options.jobs)
    print(table(rows))
    if options.json:
        options.json.write_text(
            json.dumps({"label": LABEL, "triton": triton.__version__, "rows": [row.document() for row in rows]}, indent=1)
        )
    if options.update:
        budgets = update(rows, budgets, complete=complete and not failures)
        BUDGETS.write_text(dumps(budgets), encoding="utf-8")
    failures += violations(rows, budgets, complete=complete)
    for line in failures:
        print(line)
    print(f"{len(rows)} launches compiled, {len(failures)} violations; {LABEL}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
