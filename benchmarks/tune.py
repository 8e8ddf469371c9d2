"""Which block sizes of the attention kernels are fastest on this GPU?

    python benchmarks/tune.py [--dim 64 128] [--kernel forward backward_kv backward_q] [--tokens 16384] [--length 4096] [--json FILE]

Candidates are compiled first, in parallel processes whose work the compiler's cache keeps, then timed one after the other:
causal, bf16, median of repeated launches. One that does not compile, wants more shared memory than there is or spills
registers is left out. Prints the fastest as rows of the tables in kernels/bigtrain_kernels/attention.py; put there by
hand, an entry must pass `python -m bigtrain_kernels.static`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton

from bigtrain_kernels import attention
from bigtrain_kernels.launch import Launch, architecture

TABLES = {"forward": attention.FORWARD, "backward_kv": attention.BACKWARD_KV, "backward_q": attention.BACKWARD_Q}
PRODUCTS = {"forward": 2, "backward_kv": 4, "backward_q": 3}
"""Matrix products of the size of the scores in each."""
BLOCKS = (32, 64, 128)
WARPS = (4, 8)
STAGES = (1, 2, 3, 4)


def launcher(kernel: str, D: int, tokens: int, length: int) -> tuple[Callable[[], object], int]:
    """A function that launches `kernel` alone on fresh inputs, and its floating-point operations."""
    B, H = tokens // length, 2048 // D
    q, k, v, grad = (torch.randn(B, length, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    mask = attention.Mask(causal=True, scale=D**-0.5)
    flops = PRODUCTS[kernel] * 2 * B * H * length**2 * D // 2
    if kernel == "forward":
        return lambda: attention.forward(q, k, v, mask), flops
    out, lse = attention.forward(q, k, v, mask)
    delta, lse2 = attention.row_sums(grad, out, None), lse * attention.LOG2E
    return lambda: getattr(attention, kernel)(grad, delta, q, k, v, lse2, mask), flops


def attempt(kernel: str, D: int, candidate: Launch, tokens: int, length: int) -> str | None:
    """Compile and launch one candidate. Returns what is wrong with it, or None."""
    launch, _ = launcher(kernel, D, tokens, length)
    TABLES[kernel][architecture(), D, 2, False] = candidate
    try:
        launch()
        torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler or the driver has against it
        return f"{type(error).__name__}: {error}".splitlines()[0][:100]
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dim", type=int, nargs="+", choices=attention.HEAD_DIMS, default=[64, 128])
    parser.add_argument("--kernel", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--tokens", type=int, default=16384, help="in all sequences together")
    parser.add_argument("--length", type=int, default=4096, help="of a sequence")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune.py measures kernels on a GPU, and there is none; what can be said without one: python -m bigtrain_kernels.static")
    sizes = itertools.product(BLOCKS, BLOCKS, WARPS, STAGES)
    candidates = [Launch({"BLOCK_M": M, "BLOCK_N": N}, warps, stages) for M, N, warps, stages in sizes]
    jobs = [
        (kernel, D, candidate, options.tokens, options.length) for kernel in options.kernel for D in options.dim for candidate in candidates
    ]
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), torch.multiprocessing.get_context("spawn")) as pool:
        faults = list(pool.map(attempt, *zip(*jobs)))
    rows = []
    for (kernel, D, candidate, tokens, length), fault in zip(jobs, faults):
        row = {"kernel": kernel, "dim": D, **candidate.arguments(), "fault": fault}
        if fault is None:
            launch, flops = launcher(kernel, D, tokens, length)
            TABLES[kernel][architecture(), D, 2, False] = candidate
            row["ms"] = triton.testing.do_bench(launch, warmup=10, rep=50, return_mode="median")
            row["tflops"] = flops / row["ms"] / 1e9
        rows.append(row)
        print(f"\r{len(rows)} of {len(jobs)}", end="", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    print(
        f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}: median of repeated launches, measured"
    )
    for (kernel, D), group in itertools.groupby(rows, lambda row: (row["kernel"], row["dim"])):
        group = list(group)
        ran = sorted((row for row in group if "ms" in row), key=lambda row: row["ms"])
        for row in ran[:5]:
            entry = f"{architecture()}  {D}  2  plain  {row['BLOCK_M']} {row['BLOCK_N']} {row['num_warps']} {row['num_stages']}"
            print(f"{kernel:12s} {entry:40s} {row['ms']:.3f} ms  {row['tflops']:.0f} TFLOP/s")
        print(f"{kernel:12s} {len(group) - len(ran)} of {len(group)} candidates cannot run")


if __name__ == "__main__":
    main()
