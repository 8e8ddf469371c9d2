"""How fast are bigtrain's Triton kernels on this GPU, beside what users would call instead?

    python benchmarks/kernels.py [--only attention norm rope mlp loss] [--json FILE]

Each family against plain torch, torch.compile of that, and Liger's kernels where liger-kernel is installed; attention against the
backends of torch's scaled_dot_product_attention. Results are compared with float64 first: a variant that is wrong is not
timed. Forward, and backward alone; median of repeated launches with the L2 cache flushed between them. TFLOP/s count causal attention's
half once; GB/s count each input read once and each output written once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bigtrain_kernels import ops, reference

TOLERANCE = 0.02
"""Error norm over the norm of the float64 result, at most: bf16 stays well below."""


class Work(NamedTuple):
    """One operator at one size."""

    name: str
    inputs: list[Tensor]
    """Those that are given a gradient; bf16."""
    exact: Callable[..., object]
    """The mathematics, in the dtype of its inputs."""
    variants: dict[str, Callable[..., object]]
    flops: int
    """Of the forward pass; 0 where bytes are what counts."""
    bytes: int
    """Of the forward pass."""
    backward: float
    """Work of the backward pass over that of the forward; 0 where the forward pass makes the gradients."""
    small: tuple[slice, ...] | None = None
    """What of the inputs is compared with float64 where the whole would not fit."""


def attention(D: int, H: int, T: int) -> Work:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
        def attend(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)

        return attend

    def mathematics(q, k, v):
        return reference.attention(q, k, v, causal=True)

    variants = {
        "bigtrain": lambda q, k, v: ops.attention(q, k, v, causal=True, backend="triton"),
        "torch flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "torch cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    }
    B = 16384 // T
    inputs = [randn(B, T, H, D) for _ in range(3)]
    small = slice(1), slice(512), slice(2)
    return Work(f"attention d{D} {T}", inputs, mathematics, variants, 4 * B * H * T * T * D // 2, 8 * inputs[0].numel(), 2.5, small)


def norm(E: int) -> Work:
    def plain(x, weight):
        return F.rms_norm(x, weight.shape, weight, 1e-5)

    x, weight = randn(16384, E), randn(E)
    variants = {"bigtrain": lambda x, w: ops.rms_norm(x, w, 1e-5, backend="triton"), "torch": plain, "torch.compile": torch.compile(plain)}
    if liger := liger_function("rms_norm", "LigerRMSNormFunction"):
        variants["liger"] = lambda x, w: liger(x, w, 1e-5)
    return Work(f"RMSNorm {E}", [x, weight], lambda x, w: reference.rms_norm(x, w, 1e-5), variants, 0, 4 * x.numel(), 1.5)


def rope(H: int, G: int, D: int) -> Work:
    def plain(q, k):
        return reference.rope(q, cos, sin), reference.rope(k, cos, sin)

    q, k = randn(4, 4096, H, D), randn(4, 4096, G, D)
    cos, sin = (angle.cuda() for angle in ops.rope_angles(torch.arange(4096)[None], D, 1e4))
    variants = {"bigtrain": lambda q, k: ops.rope(q, k, cos, sin, backend="triton"), "torch": plain, "torch.compile": torch.compile(plain)}
    return Work(f"RoPE {H} + {G} heads", [q, k], plain, variants, 0, 4 * (q.numel() + k.numel()), 1.0)


def mlp(width: int) -> Work:
    def plain(gate, up):
        return F.silu(gate) * up

    inputs = [randn(8192, width), randn(8192, width)]
    variants = {"bigtrain": lambda g, u: ops.glu(g, u, "swiglu", backend="triton"), "torch": plain, "torch.compile": torch.compile(plain)}
    if liger := liger_function("swiglu", "LigerSiLUMulFunction"):
        variants["liger"] = liger
    return Work(f"SwiGLU {width}", inputs, lambda g, u: reference.glu(g, u, "swiglu"), variants, 0, 6 * inputs[0].numel(), 5 / 3)


def loss(N: int, E: int, V: int) -> Work:
    def plain(hidden, weight):
        return F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="sum")

    target = torch.randint(V, (N,), device="cuda")
    variants = {
        "bigtrain": lambda h, w: ops.linear_cross_entropy(h, w, target, backend="triton")[0],
        "bigtrain's torch": lambda h, w: ops.linear_cross_entropy(h, w, target)[0],
        "torch": plain,
    }
    if liger := liger_function("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"):
        variants["liger"] = lambda h, w: liger(h, w, target, None, None, -100, 0.0, 0.0, "sum")
    return Work(f"loss {V}", [randn(N, E), randn(V, E) / E**0.5], plain, variants, 6 * N * E * V, 2 * (N + V) * E, 0.0)


FAMILIES: dict[str, tuple[Callable[..., Work], list[tuple[int, ...]]]] = {
    "attention": (attention, [(D, H, T) for D, H in ((64, 32), (128, 16)) for T in (2048, 4096, 8192, 16384)]),
    "norm": (norm, [(1024,), (4096,), (8192,)]),
    "rope": (rope, [(32, 8, 128)]),
    "mlp": (mlp, [(11008,), (14336,)]),
    "loss": (loss, [(8192, 4096, 32000), (8192, 4096, 128256)]),
}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def liger_function(module: str, name: str) -> Callable[..., object] | None:
    """The `apply` of one of Liger's autograd functions, None where liger-kernel is not installed."""
    try:
        return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name).apply
    except ImportError:
        return None


def several(x: object) -> list[Tensor]:
    return [t for t in (x if isinstance(x, (tuple, list)) else (x,)) if isinstance(t, Tensor) and t.is_floating_point()]


def passes(function: Callable[..., object], inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = several(function(*leaves))
    return outs, list(torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs]))


def wrong(work: Work, function: Callable[..., object]) -> str | None:
    """What is wrong with a variant's results, None where they are right."""
    inputs = [x[work.small[: x.ndim]] if work.small else x for x in work.inputs]
    if work.name.startswith("loss"):
        exact = passes(work.exact, [x.float() for x in inputs])  # float64 logits would not fit
    else:
        exact = passes(work.exact, [x.double() for x in inputs])
    try:
        found = passes(function, inputs)
    except Exception as error:  # a backend that does not take this shape, say
        return f"{type(error).__name__}: {error}".splitlines()[0][:60]
    for ours, true in zip(found[0] + found[1], exact[0] + exact[1], strict=True):
        error = float((ours.to(true.dtype) - true).norm() / true.norm())
        if not error < TOLERANCE:
            return f"wrong: error {error:.2g}"
    return None


def times(work: Work, function: Callable[..., object]) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward pass, medians."""
    from triton.testing import do_bench

    leaves = [x.detach().requires_grad_() for x in work.inputs]
    forward = do_bench(lambda: function(*leaves), return_mode="median")
    if not work.backward:  # its backward runs once a forward
        return forward, max(do_bench(lambda: passes(function, leaves), return_mode="median") - forward, 1e-6)
    outs = several(function(*leaves))
    grads = [torch.randn_like(x) for x in outs]
    return forward, do_bench(lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True), return_mode="median")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--json", type=Path, help="write every measurement here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("kernels.py measures on a GPU, and there is none; what can be said without one: python -m bigtrain_kernels.static")
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}: measured")
    print(f"{'':24s}{'variant':24s}{'forward ms':>11s}{'backward ms':>12s}{'forward':>16s}{'backward':>16s}")
    rows = []
    for family in options.only:
        make, sizes = FAMILIES[family]
        for work in (make(*size) for size in sizes):
            for name, function in work.variants.items():
                fault = wrong(work, function)
                if fault:
                    print(f"{work.name:24s}{name:24s}{fault}")
                    continue
                forward, backward = times(work, function)
                amount, unit = (work.flops / 1e9, "TFLOP/s") if work.flops else (work.bytes / 1e6, "GB/s")
                # Where the forward pass makes the gradients, as the losses do, its work is that of both.
                rates = amount / forward, work.backward * amount / backward
                print(
                    f"{work.name:24s}{name:24s}{forward:11.3f}{backward:12.3f}{rates[0]:9,.0f} {unit:7s}{rates[1]:9,.0f} {unit:7s}",
                    flush=True,
                )
                rows.append({"work": work.name, "variant": name, "forward_ms": forward, "backward_ms": backward})
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
