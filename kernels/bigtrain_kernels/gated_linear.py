"""The first half of a gated MLP as one kernel: act(x gate^T) * (x up^T).

A program computes one tile of both products, so that it reads its rows of x once for two weights, and multiplies them while
they are still in registers: the products are never written. The backward pass computes them again, forms their gradients in the
epilogue of the same loop, and leaves the three matrix products that remain to the vendor's library.

Without gradients that is all gain: 8 N F bytes less (for two-byte elements) than two products that write and a `glu` that reads.
In training it trades time for memory. Gate and up are not kept, 4 N F bytes a layer, and 12 N F bytes less are moved; the
price is 4 N E F operations on top of 12 N E F, a third more: at E = 4,096, by the data sheet of an H100, 4.6 times the time of those
bytes. So where memory is plentiful two plain products and `glu` are the faster choice, and where it is not this is cheaper
than to checkpoint the block, which would compute its attention and its other products again too.

N tokens, E width, F mlp width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arguments
from .arguments import GLU
from .launch import ARCHITECTURES, INTERPRETED, Case, Launch, architecture, operator
from .mlp import act
from .tile import grouped, halves


def _entry(n: int, f: int, e: int, warps: int, stages: int, parts: int) -> Launch:
    return Launch({"BLOCK_N": n, "BLOCK_F": f, "BLOCK_E": e, "GROUP": 8, "PARTS": parts}, warps, stages)


SMALL = _entry(64, 64, 32, 8, 2, 1)
"""Of float32, and of any dtype where rows do not start at multiples of 16 elements: nothing is loaded 128 bits or asynchronously
there, so that the pipeline lives in registers and larger tiles would spill. No case of the static gate: its loads are narrow."""

# Keys: architecture, bytes of an element. Both accumulators of a tile take half of the registers (none on sm_100, which has tensor
# memory for them), so the epilogue goes through a tile in PARTS: in one piece the backward pass of sm_90 spills 200 to 500 bytes.
# Tiles are as large as 128 x 256 of one product; sm_80 takes them upright, since 128 x 128 of both spills with an erf behind it.
FORWARD: dict[tuple[str, int], Launch] = {
    ("sm_80", 2): _entry(256, 64, 32, 8, 4, 2),
    ("sm_90", 2): _entry(128, 128, 64, 8, 4, 8),
    ("sm_100", 2): _entry(128, 128, 64, 8, 4, 4),
    ("gfx942", 2): _entry(128, 128, 32, 8, 2, 2),
    **{(arch, 4): SMALL for arch in ARCHITECTURES},
    **{(INTERPRETED, size): _entry(32, 32, 32, 4, 1, 2) for size in (2, 4)},
}
BACKWARD: dict[tuple[str, int], Launch] = {**FORWARD, ("sm_80", 2): _entry(256, 64, 32, 8, 4, 4)}


@triton.jit
def _tile(N, F, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of this program's tile."""
    block_n, block_f = grouped(tl.cdiv(N, BLOCK_N), tl.cdiv(F, BLOCK_F), GROUP)
    return block_n * BLOCK_N, block_f * BLOCK_F


@triton.jit
def _rows(base, start, length, stride, columns, BLOCK: tl.constexpr):
    """Addresses of BLOCK rows from `start` on. The last row stands in for those beyond it, so that no load takes a mask for them."""
    rows = tl.minimum(tl.arange(0, BLOCK), length - 1 - start)
    return base + start.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]


@triton.jit
def _products(
    X, GATE, UP, n, f, N, E, F, stride_x, stride_gate, stride_up,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of x gate^T and of x up^T, float32. WHOLE: the width is a multiple of BLOCK_E."""
    columns = tl.arange(0, BLOCK_E)
    x_at = _rows(X, n, N, stride_x, columns, BLOCK_N)
    gate_at = _rows(GATE, f, F, stride_gate, columns, BLOCK_F)
    up_at = _rows(UP, f, F, stride_up, columns, BLOCK_F)
    gate = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for e in range(0, E, BLOCK_E):
        if WHOLE:
            x, gate_weight, up_weight = tl.load(x_at), tl.load(gate_at), tl.load(up_at)
        else:
            inside = columns[None, :] < E - e
            x = tl.load(x_at, mask=inside, other=0.0)
            gate_weight = tl.load(gate_at, mask=inside, other=0.0)
            up_weight = tl.load(up_at, mask=inside, other=0.0)
        gate = tl.dot(x, tl.trans(gate_weight), gate, input_precision=PRECISION)
        up = tl.dot(x, tl.trans(up_weight), up, input_precision=PRECISION)
        x_at += BLOCK_E
        gate_at += BLOCK_E
        up_at += BLOCK_E
    return gate, up


@triton.jit
def _corner(n, f, N, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offset of a tile in [N, F], int64, those of its elements from there on, and which exist."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return n.to(tl.int64) * F + f, rows * F + columns, (rows < N - n) & (columns < F - f)


@triton.jit
def _store_output(OUT, gate, up, n, f, N, F, KIND: tl.constexpr, PARTS: tl.constexpr):
    if PARTS > 1:
        gate_left, gate_right = halves(gate)
        up_left, up_right = halves(up)
        _store_output(OUT, gate_left, up_left, n, f, N, F, KIND, PARTS // 2)
        _store_output(OUT, gate_right, up_right, n, f + gate_left.shape[1], N, F, KIND, PARTS // 2)
    else:
        corner, at, inside = _corner(n, f, N, F, gate.shape[0], gate.shape[1])
        value, _ = act(gate, KIND)
        tl.store(OUT + corner + at, (value * up).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _store_gradients(GRAD, DGATE, DUP, gate, up, n, f, N, F, KIND: tl.constexpr, PARTS: tl.constexpr):
    if PARTS > 1:
        gate_left, gate_right = halves(gate)
        up_left, up_right = halves(up)
        _store_gradients(GRAD, DGATE, DUP, gate_left, up_left, n, f, N, F, KIND, PARTS // 2)
        _store_gradients(GRAD, DGATE, DUP, gate_right, up_right, n, f + gate_left.shape[1], N, F, KIND, PARTS // 2)
    else:
        corner, at, inside = _corner(n, f, N, F, gate.shape[0], gate.shape[1])
        grad = tl.load(GRAD + corner + at, mask=inside, other=0.0).to(tl.float32)
        value, slope = act(gate, KIND)
        tl.store(DUP + corner + at, (grad * value).to(DUP.dtype.element_ty), mask=inside)
        tl.store(DGATE + corner + at, (grad * (slope * up)).to(DGATE.dtype.element_ty), mask=inside)


@triton.jit
def _forward(
    X, GATE, UP, OUT, N, E, F, stride_x, stride_gate, stride_up,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, f = _tile(N, F, BLOCK_N, BLOCK_F, GROUP)
    gate, up = _products(
        X, GATE, UP, n, f, N, E, F, stride_x, stride_gate, stride_up, BLOCK_N, BLOCK_F, BLOCK_E, WHOLE, PRECISION
    )  # fmt: skip
    _store_output(OUT, gate, up, n, f, N, F, KIND, PARTS)


@triton.jit
def _backward(
    GRAD, X, GATE, UP, DGATE, DUP, N, E, F, stride_x, stride_gate, stride_up,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, f = _tile(N, F, BLOCK_N, BLOCK_F, GROUP)
    gate, up = _products(
        X, GATE, UP, n, f, N, E, F, stride_x, stride_gate, stride_up, BLOCK_N, BLOCK_F, BLOCK_E, WHOLE, PRECISION
    )  # fmt: skip
    _store_gradients(GRAD, DGATE, DUP, gate, up, n, f, N, F, KIND, PARTS)


def forward(x_NE: Tensor, gate_FE: Tensor, up_FE: Tensor, kind: str) -> Tensor:
    """act(x gate^T) * (x up^T): contiguous [N, F]."""
    x, gate, up = (_inner_contiguous(t) for t in (x_NE, gate_FE, up_FE))
    out = x.new_empty(len(x), len(gate))
    if out.numel():
        launch = _launch(FORWARD, x, gate, up)
        _forward[_grid(out, launch)](x, gate, up, out, *_arguments(x, gate, up), **_options(x, kind, launch))
    return out


def backward(grad_NF: Tensor, x_NE: Tensor, gate_FE: Tensor, up_FE: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The gradients of the products x gate^T and x up^T, each contiguous [N, F]."""
    grad, x, gate, up = (_inner_contiguous(t) for t in (grad_NF, x_NE, gate_FE, up_FE))
    dgate, dup = (torch.empty_like(grad, memory_format=torch.contiguous_format) for _ in range(2))
    if grad.numel():
        launch = _launch(BACKWARD, x, gate, up)
        _backward[_grid(grad, launch)](grad, x, gate, up, dgate, dup, *_arguments(x, gate, up), **_options(x, kind, launch))
    return dgate, dup


def _inner_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _launch(table: dict[tuple[str, int], Launch], *operands: Tensor) -> Launch:
    aligned = all(t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in operands)
    return table[architecture(), operands[0].element_size()] if aligned else SMALL


def _grid(out_NF: Tensor, launch: Launch) -> tuple[int]:
    N, F = out_NF.shape
    return (triton.cdiv(N, launch.blocks["BLOCK_N"]) * triton.cdiv(F, launch.blocks["BLOCK_F"]),)


def _arguments(x_NE: Tensor, gate_FE: Tensor, up_FE: Tensor, *grad_NF: Tensor) -> tuple[int, ...]:
    return len(x_NE), x_NE.shape[1], len(gate_FE), *(t.stride(0) for t in (*grad_NF, x_NE, gate_FE, up_FE))


def _options(x_NE: Tensor, kind: str, launch: Launch) -> dict[str, object]:
    whole = x_NE.shape[1] % launch.blocks["BLOCK_E"] == 0
    return {"KIND": GLU[kind], "WHOLE": whole, "PRECISION": "ieee", **launch.arguments()}


@operator("bigtrain::gated_linear")
def gated_linear(x_NE: Tensor, gate_FE: Tensor, up_FE: Tensor, kind: str) -> Tensor:
    """act(x gate^T) * (x up^T), [N, F], for x [N, E] and two weights [F, E]: Shazeer 2020, eq. 6. `kind` as in `mlp.glu`.

    The products stay in float32 until they are multiplied: one rounding, where two plain products and `glu` round three times.
    float32 inputs are multiplied in IEEE float32. Raises ValueError for another kind, shapes that do not fit and mixed dtypes.
    """
    arguments.shaped("gated_linear: x_NE", x_NE, "N", "E")
    arguments.gated_linear(x_NE, gate_FE, up_FE, kind, "triton")
    return forward(x_NE, gate_FE, up_FE, kind)


@operator("bigtrain::gated_linear_backward")
def gated_linear_backward(grad_NF: Tensor, x_NE: Tensor, gate_FE: Tensor, up_FE: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The gradients of the two products; those of x and the weights are plain matrix products of them."""
    return backward(grad_NF, x_NE, gate_FE, up_FE, kind)


@gated_linear.register_fake
def _(x_NE, gate_FE, up_FE, kind):
    return x_NE.new_empty(x_NE.shape[0], gate_FE.shape[0])


@gated_linear_backward.register_fake
def _(grad_NF, x_NE, gate_FE, up_FE, kind):
    return tuple(torch.empty_like(grad_NF, memory_format=torch.contiguous_format) for _ in range(2))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.kind = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad_NF):
    x_NE, gate_FE, up_FE = ctx.saved_tensors
    need_x, need_gate, need_up, _ = ctx.needs_input_grad
    dgate_NF, dup_NF = gated_linear_backward(grad_NF, x_NE, gate_FE, up_FE, ctx.kind)
    dx_NE = torch.addmm(dgate_NF @ gate_FE, dup_NF, up_FE) if need_x else None
    return dx_NE, dgate_NF.t() @ x_NE if need_gate else None, dup_NF.t() @ x_NE if need_up else None, None


gated_linear.register_autograd(_gradients, setup_context=_save)


def cases(architecture: str) -> Iterator[Case]:
    """Every entry of the tables for one architecture: 8,192 tokens, width 4,096, mlp width 14,336."""
    N, E, F = 8192, 4096, 14336
    for dtype in (torch.bfloat16, torch.float32):
        x, weight, grad = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((N, E), (F, E), (N, F)))
        inputs = dtype.itemsize * (N * E + 2 * F * E)
        output = dtype.itemsize * N * F
        for kind in GLU:
            label = f"{kind} {str(dtype).split('.')[1]}"
            operands = x, weight, weight, kind
            yield Case(f"gated_linear forward {label}", lambda a=operands: forward(*a), 4 * N * E * F, inputs + output)
            yield Case(f"gated_linear backward {label}", lambda g=grad, a=operands: backward(g, *a), 4 * N * E * F, inputs + 3 * output)
