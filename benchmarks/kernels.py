"""How fast are bigtrain's Triton kernels on this GPU, beside what users would call instead?

    python benchmarks/kernels.py [--only attention norm rope mlp gated loss] [--json FILE]

Each family against plain torch, torch.compile of that, and Liger's and fla's kernels where those are installed; attention against
the backends of torch's scaled_dot_product_attention and flex_attention. Outputs and gradients are compared with float64 first, whole
and at the sizes that are measured: a variant that is wrong is not timed, one that fails is a row that says why.

Forward, and backward alone: medians of the GPU's time. Every repetition works on fresh copies of the inputs, since some kernels write
their results there, and begins after 2 GiB of zeros, which leave nothing in the L2 cache and give the launches time to queue. TFLOP/s
count the products that the mathematics has, under a mask those of what is visible, and none that is computed again; GB/s count each
input read once and each output written once. The fused losses make their gradients in the forward pass, so only both passes together
have a rate. Ends with 1 where a variant of bigtrain's is wrong or fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import kernelwork
import torch
import triton
from kernelwork import Part, Work
from torch import Tensor

TOLERANCE = 0.02
"""Error norm over the norm of the float64 result, at most: bf16 stays well below."""
FLUSH = 2 << 30
"""Bytes written between repetitions."""
REPETITIONS, SECONDS = (10, 100), 0.3
"""Of one measurement: at least and at most, and until when beyond the least."""


def several(x: object) -> list[Tensor]:
    return [t for t in (x if isinstance(x, (tuple, list)) else (x,)) if isinstance(t, Tensor) and t.is_floating_point()]


def fresh(xs: Sequence[Tensor]) -> list[Tensor]:
    """Copies; those that are floating point ask for a gradient."""
    return [x.detach().clone().requires_grad_(x.is_floating_point()) for x in xs]


def gradients(outs: Sequence[Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(outs, several(leaves), grads))


def truth(work: Work) -> list[Tensor]:
    """Outputs and gradients in float64."""
    outs = [torch.zeros_like(x, dtype=torch.float64) for x in work.grads]
    grads = [torch.zeros_like(x, dtype=torch.float64) for x in several(work.inputs)]
    everything = Part(((),) * len(work.inputs), ((),) * len(outs))
    for part in work.parts or [everything]:
        pieces = [x[index] for x, index in zip(work.inputs, part.inputs, strict=True)]
        leaves = fresh([x.double() if x.is_floating_point() else x for x in pieces])
        found = several(work.exact(*leaves))
        above = [grad[index].double() for grad, index in zip(work.grads, part.outputs, strict=True)]
        for total, index, piece in zip(outs, part.outputs, found, strict=True):
            total[index] += piece.detach()
        floating = [index for x, index in zip(work.inputs, part.inputs) if x.is_floating_point()]
        for total, index, piece in zip(grads, floating, gradients(found, leaves, above), strict=True):
            total[index] += piece
    return outs + grads


def largest_error(work: Work, function: Callable[..., object], exact: Sequence[Tensor]) -> float:
    """Of a variant's outputs and gradients: error norm over the norm of what is right; nan counts as the largest."""
    leaves = fresh(work.inputs)
    outs = several(function(*leaves))
    kept = [x.detach().clone() for x in outs]
    found = kept + gradients(outs, leaves, [grad.to(x.dtype, copy=True) for grad, x in zip(work.grads, outs, strict=True)])
    errors = [float((ours.detach().double() - true).norm() / true.norm()) for ours, true in zip(found, exact, strict=True)]
    return next((error for error in errors if error != error), max(errors))


def milliseconds(prepare: Callable[[], Any], run: Callable[[Any], object]) -> float:
    """The GPU's time of `run` on what `prepare` made, the median of repetitions. The first, which may compile, does not count."""
    run(prepare())
    zeros = torch.empty(FLUSH, dtype=torch.int8, device=kernelwork.DEVICE)
    spans: list[float] = []
    begun, (least, most) = time.monotonic(), REPETITIONS
    while len(spans) < least or (len(spans) < most and time.monotonic() - begun < SECONDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        ready = prepare()
        zeros.zero_()
        start.record()
        kept = run(ready)  # freed after the end is recorded
        end.record()
        torch.cuda.synchronize()
        del kept, ready
        spans.append(start.elapsed_time(end))
    return statistics.median(spans)


def times(work: Work, function: Callable[..., object]) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward pass."""

    def after_forward() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        leaves = fresh(work.inputs)
        outs = several(function(*leaves))
        return outs, leaves, [grad.to(x.dtype, copy=True) for grad, x in zip(work.grads, outs, strict=True)]

    forward = milliseconds(lambda: fresh(work.inputs), lambda leaves: function(*leaves))
    return forward, milliseconds(after_forward, lambda ready: gradients(*ready))


def measure(work: Work, name: str, exact: Sequence[Tensor]) -> dict[str, Any]:
    """A row: the error, then times and rates, or under `fault` why there are none."""
    row: dict[str, Any] = {"work": work.name, "variant": name, "unit": work.unit}
    try:
        error = largest_error(work, work.variants[name], exact)
        if not error < TOLERANCE:
            return row | {"fault": f"wrong: error {error:.2g}, at most {TOLERANCE} expected"}
        forward, backward = times(work, work.variants[name])
    except Exception as error:  # a backend that does not take this shape, say, or too little memory
        return row | {"fault": f"{type(error).__name__}: {error}"}
    scale = 1e9 if work.unit == kernelwork.ARITHMETIC else 1e6
    rates = {"both": (work.forward + work.backward) / scale / (forward + backward)}
    if name not in work.early:
        rates |= {"forward": work.forward / scale / forward, "backward": work.backward / scale / backward}
    return row | {"error": error, "forward_ms": forward, "backward_ms": backward, "rates": rates}


def measure_all(families: Sequence[str]) -> Iterator[dict[str, Any]]:
    for family in families:
        for make in kernelwork.FAMILIES[family]:
            torch._dynamo.reset()  # else the second size would be compiled for any
            work = make()
            try:
                exact = truth(work)
            except Exception as error:
                yield {"work": work.name, "variant": "float64", "unit": work.unit, "fault": f"{type(error).__name__}: {error}"}
                continue
            for name in work.variants:
                yield measure(work, name, exact)
                torch.cuda.empty_cache()
            del work, exact


HEADING = f"{'':40s}{'variant':30s}{'error':>9s}{'forward ms':>12s}{'backward ms':>12s}{'forward':>10s}{'backward':>10s}{'both':>10s}"


def line(row: dict[str, Any]) -> str:
    begin = f"{row['work']:40s}{row['variant']:30s}"
    if "fault" in row:
        return f"{begin}{'-':>9s}  {row['fault'].splitlines()[0][:100]}"
    rates = "".join(f"{row['rates'][name]:10,.0f}" if name in row["rates"] else f"{'-':>10s}" for name in ("forward", "backward", "both"))
    return f"{begin}{row['error']:9.1e}{row['forward_ms']:12.3f}{row['backward_ms']:12.3f}{rates} {row['unit']}"


def report(families: Sequence[str], file: Path | None) -> list[dict[str, Any]]:
    """Print a line for each measurement; `file` gets all that there are, also when it is interrupted."""
    print(f"Error: against float64, whole and at the measured size. Rates: {kernelwork.ARITHMETIC} or {kernelwork.MEMORY}.\n{HEADING}")
    rows = []
    try:
        for row in measure_all(families):
            rows.append(row)
            print(line(row), flush=True)
    finally:
        if file:
            file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=kernelwork.FAMILIES, default=list(kernelwork.FAMILIES))
    parser.add_argument("--json", type=Path, help="write every measurement here")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("kernels.py measures on a GPU, and there is none; what can be said without one: python -m bigtrain_kernels.static")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}: measured")
    rows = report(options.only, options.json)
    return 1 if any("fault" in row and row["variant"].startswith(("bigtrain", "float64")) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
