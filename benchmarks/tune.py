"""Which block sizes are fastest on this GPU? Prints the entries of the attention kernels' tables, measured.

    python benchmarks/tune.py [--dim 64 128] [--kernel forward backward_kv backward_q] [--tokens 16384] [--length 4096]

Every candidate is compiled first, in parallel processes (the compiler's cache keeps them), then timed one after the other:
median of repeated launches over fresh inputs, causal, bf16. A candidate that does not compile, asks for more shared memory than
there is, or spills registers is left out. What it prints goes into `kernels/bigtrain_kernels/attention.py` by hand, through the static gate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton

from bigtrain_kernels import attention
from bigtrain_kernels.launch import Launch, architecture

SPACE = {
    "forward": itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
    "backward_kv": itertools.product((32, 64, 128), (64, 128), (4, 8), (1, 2, 3)),
    "backward_q": itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3)),
}
TABLES = {"forward": attention.FORWARD, "backward_kv": attention.BACKWARD_KV, "backward_q": attention.BACKWARD_Q}


def inputs(D: int, tokens: int, length: int, heads: int, causal: bool):
    B, H, G = tokens // length, heads, heads
    q, k, v, grad = (torch.randn(B, length, h, D, device="cuda", dtype=torch.bfloat16) for h in (H, G, G, H))
    kind = {"causal": causal, "scale": D**-0.5}
    out, lse = attention.forward(q, k, v, **kind)
    return q, k, v, grad, out, lse, kind


def launcher(kernel: str, D: int, options: argparse.Namespace):
    """A function that launches only `kernel`, and the floating-point operations of it."""
    q, k, v, grad, out, lse, kind = inputs(D, options.tokens, options.length, 2048 // D, True)
    product = 2 * q.shape[0] * q.shape[2] * options.length**2 * D // 2
    if kernel == "forward":
        return (lambda: attention.forward(q, k, v, **kind)), 2 * product
    return (lambda: attention.backward(grad, None, q, k, v, out, lse, **kind, only=kernel)), (4 if kernel == "backward_kv" else 3) * product


def attempt(job) -> str | None:
    """Compile and launch one candidate; returns what is wrong with it, or None."""
    kernel, D, candidate, options = job
    try:
        table = TABLES[kernel]
        launch, _ = launcher(kernel, D, options)
        table[architecture(), D, 2] = candidate
        launch()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--kernel", nargs="+", choices=SPACE, default=list(SPACE))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--json", type=Path, help="write every measurement here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune.py needs a GPU: it measures, and a CPU has nothing to say about a GPU's time")
    space = {kernel: [Launch({"BLOCK_M": M, "BLOCK_N": N}, w, s) for M, N, w, s in SPACE[kernel]] for kernel in options.kernel}
    jobs = [(kernel, D, candidate, options) for kernel in options.kernel for D in options.dim for candidate in space[kernel]]
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        faults = list(pool.map(attempt, jobs))
    rows = []
    for (kernel, D, candidate, _), fault in zip(jobs, faults):
        row = {"kernel": kernel, "dim": D, **candidate.blocks, "warps": candidate.warps, "stages": candidate.stages, "fault": fault}
        if fault is None:
            launch, flops = launcher(kernel, D, options)
            TABLES[kernel][architecture(), D, 2] = candidate
            milliseconds = triton.testing.do_bench(launch, warmup=10, rep=40, return_mode="median")
            row |= {"ms": milliseconds, "tflops": flops / milliseconds / 1e9}
        rows.append(row)
    if options.json:
        options.json.write_text(json.dumps(rows))
    print(torch.cuda.get_device_name(), architecture(), "triton", triton.__version__, "torch", torch.__version__)
    for (kernel, D), group in itertools.groupby(rows, lambda row: (row["kernel"], row["dim"])):
        group = list(group)
        best = sorted((row for row in group if "ms" in row), key=lambda row: row["ms"])[:5]
        for row in best:
            print(f"{kernel:12s} d{D:3d}  M {row['BLOCK_M']:3d}  N {row['BLOCK_N']:3d}  warps {row['warps']}  stages {row['stages']}  {row['ms']:.3f} ms  {row['tflops']:.0f} TFLOP/s")
        print(f"{kernel:12s} d{D:3d}  {len(group) - sum('ms' in row for row in group)} of {len(group)} candidates cannot run")


if __name__ == "__main__":
    main()
