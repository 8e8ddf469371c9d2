"""RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016) over the last dimension, with the residual add fused.

The forward pass reads a row once, keeps it in registers, and leaves one or two numbers a row for the backward pass. That one
reads the gradient and the row again and writes the row's gradient; the gradient of the sum that the residual stream
carries on is added before the result is rounded. With a residual either pass moves 4 rows of memory; an addition and a norm of
their own move 5 forward and 6 backward.

The gradient of a weight is a sum over all rows, in two stages and without atomics: a fixed number of programs each add up
their rows in registers, then a second kernel adds up the programs. Programs and rows have a fixed order, so results are the
same bits every time.

N rows (flattened tokens), E width, P programs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arguments
from .launch import INTERPRETED, Case, Launch, architecture, operator

# Launches. Keys: architecture, width up to which it serves, bytes of an element, for the backward pass also whether there is a bias.
# ROWS a program, or a step of its loop in the backward pass, where as many PROGRAMS go over the rows as the processor can hold. A
# thread has 8 or 16 elements of a tile, in loads of 128 bits.

WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}

FORWARD: dict[tuple[str, int, int], Launch] = {}
BACKWARD: dict[tuple[str, int, int, bool], Launch] = {}
SUM = Launch({"BLOCK_P": 32, "BLOCK_E": 32}, 4)


def _table() -> None:
    for width, size in itertools.product(WIDTHS, (2, 4)):
        threads = max(128, width // 16)
        rows = max(1, 2048 // width)
        for arch, count in MULTIPROCESSORS.items():
            lanes = 64 if arch == "gfx942" else 32
            FORWARD[arch, width, size] = Launch({"BLOCK_E": width, "ROWS": rows}, threads // lanes)
            if width <= 512:
                backward = Launch({"BLOCK_E": width, "ROWS": rows // 2, "PROGRAMS": 6 * count}, threads // lanes, 2)
            elif width <= 8192:
                backward = Launch({"BLOCK_E": width, "ROWS": rows, "PROGRAMS": 512 // threads * count}, threads // lanes, 2)
            else:  # the sums over rows would fill the registers: blocks of a row
                backward = Launch({"BLOCK_E": 2048, "ROWS": 4 // size, "PROGRAMS": 2 * count}, 256 // lanes)
            BACKWARD[arch, width, size, False] = BACKWARD[arch, width, size, True] = backward
        rows = 4 if width <= 128 else 1
        FORWARD[INTERPRETED, width, size] = Launch({"BLOCK_E": width, "ROWS": rows}, 4)
        for bias in (False, True):
            BACKWARD[INTERPRETED, width, size, bias] = Launch({"BLOCK_E": min(width, 128), "ROWS": rows, "PROGRAMS": 3}, 4)
    # With two stages it spills at 5,120 and 7,168.
    BACKWARD["sm_100", 8192, 2, True] = BACKWARD["sm_100", 8192, 2, True]._replace(stages=1)


_table()


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _forward(
    X, RESIDUAL, WEIGHT, BIAS, OUT, SUM, STATISTICS, x_row, residual_row, N, eps,
    E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, CENTRED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_E)
    inside = (rows[:, None] < N) & (columns[None, :] < E)
    x = tl.load(X + rows[:, None] * x_row + columns[None, :], mask=inside, other=0.0)
    at = rows[:, None] * E + columns[None, :]
    if ADD:
        residual = tl.load(RESIDUAL + rows[:, None] * residual_row + columns[None, :], mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(SUM + at, x, mask=inside)
    x = x.to(tl.float32)
    if CENTRED:
        mean = tl.sum(x, 1) * (1.0 / E)
        x = tl.where(columns[None, :] < E, x - mean[:, None], 0.0)
        # What rounding left in the mean is left in every x - mean: where rows vary little around a large mean it would be seen.
        rest, square = tl.reduce((x, x * x), 1, _add_pairs)
        rest *= 1.0 / E
        x -= rest[:, None]
        rstd = tl.rsqrt(square * (1.0 / E) - rest * rest + eps)
        tl.store(STATISTICS + N + rows, mean + rest, mask=rows < N)
    else:
        rstd = tl.rsqrt(tl.sum(x * x, 1) * (1.0 / E) + eps)
    tl.store(STATISTICS + rows, rstd, mask=rows < N)
    weight = tl.load(WEIGHT + columns, mask=columns < E, other=0.0).to(tl.float32)
    out = x * rstd[:, None] * weight[None, :]
    if CENTRED:
        out += tl.load(BIAS + columns, mask=columns < E, other=0.0).to(tl.float32)[None, :]
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _slopes(
    GRAD, X, STATISTICS, weight, rows, columns, grad_row, x_row, N, E: tl.constexpr, CENTRED: tl.constexpr, POLICY: tl.constexpr
):  # fmt: skip
    """Of a block of rows: g, the gradient of the output; its product with the weight; u = (x - mean) rstd; and rstd."""
    inside = (rows[:, None] < N) & (columns[None, :] < E)
    g = tl.load(GRAD + rows[:, None] * grad_row + columns[None, :], mask=inside, other=0.0, eviction_policy=POLICY).to(tl.float32)
    x = tl.load(X + rows[:, None] * x_row + columns[None, :], mask=inside, other=0.0, eviction_policy=POLICY).to(tl.float32)
    if CENTRED:
        x -= tl.load(STATISTICS + N + rows, mask=rows < N, other=0.0)[:, None]
    rstd = tl.load(STATISTICS + rows, mask=rows < N, other=0.0)[:, None]
    return g, g * weight[None, :], x * rstd, rstd


@triton.jit
def _store_gradient(
    gs, u, rstd, slope, mean, GRAD_SUM, DX, rows, columns, grad_sum_row, N, E: tl.constexpr, CENTRED: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    inside = (rows[:, None] < N) & (columns[None, :] < E)
    dx = gs - u * slope
    if CENTRED:
        dx -= mean
    dx *= rstd
    if ADD:
        dx += tl.load(GRAD_SUM + rows[:, None] * grad_sum_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(DX + rows[:, None] * E + columns[None, :], dx.to(DX.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    GRAD, GRAD_SUM, X, WEIGHT, STATISTICS, DX, PARTIALS, grad_row, grad_sum_row, x_row, N,
    E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, PROGRAMS: tl.constexpr, CENTRED: tl.constexpr, ADD: tl.constexpr,
    num_stages: tl.constexpr,
):  # fmt: skip
    """With u = (x - mean) rstd, g the gradient and s the weight: dx = rstd (g s - mean(g s) - u mean(g s u)), ds = sum of g u."""
    columns = tl.arange(0, BLOCK_E)
    weight = tl.load(WEIGHT + columns, mask=columns < E, other=0.0).to(tl.float32)
    d_weight = tl.zeros([ROWS, BLOCK_E], tl.float32)
    d_bias = tl.zeros([ROWS, BLOCK_E], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, ROWS), PROGRAMS, num_stages=num_stages):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        g, gs, u, rstd = _slopes(GRAD, X, STATISTICS, weight, rows, columns, grad_row, x_row, N, E, CENTRED, "")
        d_weight += g * u
        if CENTRED:
            d_bias += g
            slope, mean = tl.reduce((gs * u, gs), 1, _add_pairs, keep_dims=True)
        else:
            slope = tl.sum(gs * u, 1, keep_dims=True)
            mean = slope
        _store_gradient(gs, u, rstd, slope * (1.0 / E), mean * (1.0 / E), GRAD_SUM, DX, rows, columns, grad_sum_row, N, E, CENTRED, ADD)
    at = PARTIALS + tl.program_id(0) * E + columns
    tl.store(at, tl.sum(d_weight, 0), mask=columns < E)
    if CENTRED:
        tl.store(at + tl.num_programs(0) * E, tl.sum(d_bias, 0), mask=columns < E)


@triton.jit
def _backward_wide(
    GRAD, GRAD_SUM, X, WEIGHT, STATISTICS, DX, PARTIALS, grad_row, grad_sum_row, x_row, N,
    E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, PROGRAMS: tl.constexpr, CENTRED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The same for rows that do not fit: a block of columns at a time, twice, the second time from the cache, as are the partials."""
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), PROGRAMS):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        slope = tl.zeros([ROWS, BLOCK_E], tl.float32)
        mean = tl.zeros([ROWS, BLOCK_E], tl.float32)
        for start in range(0, E, BLOCK_E):
            columns = start + tl.arange(0, BLOCK_E)
            weight = tl.load(WEIGHT + columns, mask=columns < E, other=0.0).to(tl.float32)
            _, gs, u, _ = _slopes(GRAD, X, STATISTICS, weight, rows, columns, grad_row, x_row, N, E, CENTRED, "evict_last")
            slope += gs * u
            mean += gs
        slope = tl.sum(slope, 1, keep_dims=True) * (1.0 / E)
        mean = tl.sum(mean, 1, keep_dims=True) * (1.0 / E)
        for start in range(0, E, BLOCK_E):
            columns = start + tl.arange(0, BLOCK_E)
            weight = tl.load(WEIGHT + columns, mask=columns < E, other=0.0).to(tl.float32)
            g, gs, u, rstd = _slopes(GRAD, X, STATISTICS, weight, rows, columns, grad_row, x_row, N, E, CENTRED, "evict_first")
            _store_gradient(gs, u, rstd, slope, mean, GRAD_SUM, DX, rows, columns, grad_sum_row, N, E, CENTRED, ADD)
            at = PARTIALS + tl.program_id(0) * E + columns
            begun = tl.where(tile > tl.program_id(0), columns, E) < E  # the program's first tile finds nothing to add to
            tl.store(at, tl.load(at, mask=begun, other=0.0) + tl.sum(g * u, 0), mask=columns < E)
            if CENTRED:
                at += tl.num_programs(0) * E
                tl.store(at, tl.load(at, mask=begun, other=0.0) + tl.sum(g, 0), mask=columns < E)


@triton.jit
def _sum_partials(PARTIALS, D_WEIGHT, D_BIAS, P, E, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr):
    """Partials [1 or 2, P, E] -> the gradients of weight and bias [E]: blocks of columns by the first axis of the grid."""
    columns = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    PARTIALS += tl.program_id(1) * P * E
    total = tl.zeros([BLOCK_P, BLOCK_E], tl.float32)
    for p in range(0, P, BLOCK_P):
        rows = p + tl.arange(0, BLOCK_P)
        total += tl.load(PARTIALS + rows[:, None] * E + columns[None, :], mask=(rows[:, None] < P) & (columns[None, :] < E), other=0.0)
    total = tl.sum(total, 0)
    if tl.program_id(1) == 0:
        tl.store(D_WEIGHT + columns, total.to(D_WEIGHT.dtype.element_ty), mask=columns < E)
    else:
        tl.store(D_BIAS + columns, total.to(D_BIAS.dtype.element_ty), mask=columns < E)


def forward(x: Tensor, residual: Tensor | None, weight_E: Tensor, bias_E: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x + residual; that sum, [0] without a residual; and for backward [1 or 2, N]: 1 / std, with a bias also the mean."""
    out, total, statistics = _outputs(x, residual, bias_E)
    weight_E, bias_E = weight_E.contiguous(), None if bias_E is None else bias_E.contiguous()
    if x.numel():
        x, residual = _rows(x), None if residual is None else _rows(residual)
        N, E = x.shape
        launch = FORWARD[_key(x)]
        _forward[triton.cdiv(N, launch.blocks["ROWS"]),](
            x, x if residual is None else residual, weight_E, weight_E if bias_E is None else bias_E, out, total, statistics,
            x.stride(0), 0 if residual is None else residual.stride(0), N, eps,
            E=E, CENTRED=bias_E is not None, ADD=residual is not None, **launch.arguments(),
        )  # fmt: skip
    return out, total, statistics


def _outputs(x: Tensor, residual: Tensor | None, bias_E: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    out = x.new_empty(x.shape)
    total = x.new_empty(0) if residual is None else torch.empty_like(out)
    return out, total, x.new_empty(1 if bias_E is None else 2, math.prod(x.shape[:-1]), dtype=torch.float32)


def backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight_E: Tensor, bias_E: Tensor | None, statistics_KN: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of x, which forward took the norm of, of the weight and of the bias."""
    dx = x.new_empty(x.shape)
    if not x.numel():
        return dx, torch.zeros_like(weight_E), None if bias_E is None else torch.zeros_like(bias_E)
    x, grad, grad_sum = _rows(x), _rows(grad), None if grad_sum is None else _rows(grad_sum)
    weight_E = weight_E.contiguous()
    N, E = x.shape
    launch = BACKWARD[(*_key(x), bias_E is not None)]
    P = min(triton.cdiv(N, launch.blocks["ROWS"]), launch.blocks["PROGRAMS"])
    partials = x.new_empty(len(statistics_KN), P, E, dtype=torch.float32)
    kernel = _backward if launch.blocks["BLOCK_E"] >= E else _backward_wide
    kernel[P,](
        grad, grad if grad_sum is None else grad_sum, x, weight_E, statistics_KN, dx, partials,
        grad.stride(0), 0 if grad_sum is None else grad_sum.stride(0), x.stride(0), N,
        E=E, CENTRED=bias_E is not None, ADD=grad_sum is not None, **launch.arguments(),
    )  # fmt: skip
    d_weight = torch.empty_like(weight_E)
    d_bias = None if bias_E is None else torch.empty_like(bias_E)
    _sum_partials[triton.cdiv(E, SUM.blocks["BLOCK_E"]), len(partials)](
        partials, d_weight, d_weight if d_bias is None else d_bias, P, E, **SUM.arguments()
    )
    return dx, d_weight, d_bias


def _rows(x: Tensor) -> Tensor:
    """`x` [..., E] as [N, E], its last dimension contiguous: a row is what the kernels load."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _key(x: Tensor) -> tuple[str, int, int]:
    E = x.shape[-1]
    if WIDTHS[-1] < E:
        raise ValueError(f"norm over {E} elements: at most {WIDTHS[-1]}")
    return architecture(), next(width for width in WIDTHS if width >= E), x.element_size()


@operator("bigtrain::rms_norm")
def _rms_norm(x: Tensor, residual: Tensor | None, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return forward(x, residual, weight_E, None, eps)


@operator("bigtrain::layer_norm")
def _layer_norm(x: Tensor, residual: Tensor | None, weight_E: Tensor, bias_E: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return forward(x, residual, weight_E, bias_E, eps)


@operator("bigtrain::rms_norm_backward")
def _rms_norm_backward(grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight_E: Tensor, statistics_KN: Tensor) -> tuple[Tensor, Tensor]:
    return backward(grad, grad_sum, x, weight_E, None, statistics_KN)[:2]


@operator("bigtrain::layer_norm_backward")
def _layer_norm_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight_E: Tensor, bias_E: Tensor, statistics_KN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(grad, grad_sum, x, weight_E, bias_E, statistics_KN)


@_rms_norm.register_fake
def _(x, residual, weight, eps):
    return _outputs(x, residual, None)


@_layer_norm.register_fake
def _(x, residual, weight, bias, eps):
    return _outputs(x, residual, bias)


@_rms_norm_backward.register_fake
def _(grad, grad_sum, x, weight, statistics):
    return x.new_empty(x.shape), torch.empty_like(weight)


@_layer_norm_backward.register_fake
def _(grad, grad_sum, x, weight, bias, statistics):
    return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(bias)


def _save(ctx, inputs, output) -> None:
    x, residual, *affine, _ = inputs
    _, total, statistics = output
    ctx.added = residual is not None
    ctx.save_for_backward(total if ctx.added else x, *affine, statistics)
    ctx.set_materialize_grads(False)


def _gradients(operator):
    def gradients(ctx, grad, grad_sum, _):
        x, *saved = ctx.saved_tensors
        if grad is None:  # only the sum was used
            grad = torch.zeros_like(x)
        # One tensor object for both: autograd copies it for a leaf while another holds it. Two views of it would be stolen as two
        # gradients in the same memory: so the operators take x in its own shape.
        dx, *affine = operator(grad, grad_sum if ctx.added else None, x, *saved)
        return dx, dx if ctx.added else None, *affine, None

    return gradients


_rms_norm.register_autograd(_gradients(_rms_norm_backward), setup_context=_save)
_layer_norm.register_autograd(_gradients(_layer_norm_backward), setup_context=_save)


def rms_norm(x: Tensor, weight_E: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x [..., E] (Zhang and Sennrich 2019, eq. 4).

    With `residual`, of x's shape and dtype: (the norm of x + residual, x + residual), the sum rounded to their dtype before
    the norm is taken of it. x and the weight are bf16, fp16 or float32; statistics are float32.
    Raises ValueError for other dtypes, for shapes that do not match and for more than 16,384 elements in a row.
    """
    arguments.norm("rms_norm", x, residual, "triton", weight_E=weight_E)
    out, total, _ = _rms_norm(x, residual, weight_E, eps)
    return out if residual is None else (out, total)


def layer_norm(x: Tensor, weight_E: Tensor, bias_E: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al. 2016, eq. 4); otherwise as `rms_norm`."""
    arguments.norm("layer_norm", x, residual, "triton", weight_E=weight_E, bias_E=bias_E)
    out, total, _ = _layer_norm(x, residual, weight_E, bias_E, eps)
    return out if residual is None else (out, total)


def cases(architecture: str) -> Iterator[Case]:
    """Every entry of the tables for one architecture, at 16,384 rows and with a residual: RMSNorm and LayerNorm.

    At the full width; 16-bit entries also at five eighths of it, in multiples of 16, with weights in float32.
    """
    for arch, width, size in FORWARD:
        if arch == architecture:
            for bias in (False, True):
                yield from _cases(width, size, bias)
                if size == 2:
                    yield from _cases(triton.cdiv(width * 5, 8 * 16) * 16, size, bias, torch.float32)


def _cases(E: int, size: int, bias: bool, affine_dtype: torch.dtype | None = None) -> Iterator[Case]:
    N = 16384
    dtype = torch.bfloat16 if size == 2 else torch.float32
    x, residual, grad = (torch.empty(N, E, dtype=dtype, device="meta") for _ in range(3))
    weight_E, bias_E = (torch.empty(E, dtype=affine_dtype or dtype, device="meta") for _ in range(2))
    affine = (weight_E, bias_E if bias else None)
    statistics = torch.empty(2 if bias else 1, N, device="meta")
    label = f"{E} {str(dtype).split('.')[1]}"
    name = "layer_norm" if bias else "rms_norm"
    small = weight_E.itemsize * E * len(statistics) + 4 * statistics.numel()
    yield Case(f"{name} forward {label}", lambda: forward(x, residual, *affine, 1e-5), (8 if bias else 5) * N * E, 4 * size * N * E + small)
    moved = 4 * size * N * E + 2 * small
    yield Case(f"{name} backward {label}", lambda: backward(grad, residual, x, *affine, statistics), (14 if bias else 10) * N * E, moved)
