"""The elementwise part of an MLP: a gated linear unit, act(gate) * up, or an activation alone.

One pass over memory each way. The backward pass keeps the inputs and nothing else: it forms the activation and its derivative
again from the same sigmoid or erf, in float32, and rounds each gradient once.

N rows, F mlp width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arguments
from .arguments import ACTIVATIONS, GLU
from .launch import INTERPRETED, Case, Launch, architecture, operator

# A thread has 8 elements: one 128-bit access to each tensor of two-byte elements.
LAUNCHES: dict[str, Launch] = {
    "sm_80": Launch({"BLOCK": 1024}, 4),
    "sm_90": Launch({"BLOCK": 1024}, 4),
    "sm_100": Launch({"BLOCK": 1024}, 4),
    "gfx942": Launch({"BLOCK": 2048}, 4),
    INTERPRETED: Launch({"BLOCK": 256}, 4),
}


@triton.jit
def act(x, KIND: tl.constexpr):
    """The activation of float32 x and its derivative; what a caller leaves unused is never computed."""
    if KIND == "silu":
        s = tl.sigmoid(x)
        return x * s, s * (1.0 + x * (1.0 - s))
    elif KIND == "gelu_tanh":
        # (1 + tanh(z)) / 2 = sigmoid(2 z), which unlike the left side loses no digits where tanh is near -1.
        s = tl.sigmoid(x * (1.5957691216057308 + 0.07135481282553182 * x * x))  # 2 sqrt(2 / pi) (x + 0.044715 x^3)
        return x * s, s + x * s * (1.0 - s) * (1.5957691216057308 + 0.21406443847659546 * x * x)
    elif KIND == "gelu":
        cdf = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        tl.static_assert(KIND == "relu2")
        positive = tl.where(x < 0.0, 0.0, x)  # a NaN stays one
        return positive * positive, 2.0 * positive


@triton.jit
def _place(F, BLOCK: tl.constexpr):
    """The row of this program and the first of its columns, int64, its columns from there on, and which are within the row."""
    blocks = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    columns = tl.arange(0, BLOCK)
    return row, start, columns, columns < tl.minimum(F - start, BLOCK).to(tl.int32)


@triton.jit
def _forward(X, UP, OUT, F, stride_x, stride_up, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    row, start, columns, inside = _place(F, BLOCK)
    x = tl.load(X + row * stride_x + start + columns, mask=inside, other=0.0).to(tl.float32)
    out, _ = act(x, KIND)
    if GATED:
        out *= tl.load(UP + row * stride_up + start + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + row * F + start + columns, out.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    GRAD, X, UP, DX, DUP, F, stride_grad, stride_x, stride_up, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, start, columns, inside = _place(F, BLOCK)
    grad = tl.load(GRAD + row * stride_grad + start + columns, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(X + row * stride_x + start + columns, mask=inside, other=0.0).to(tl.float32)
    value, slope = act(x, KIND)
    at = row * F + start + columns
    if GATED:
        up = tl.load(UP + row * stride_up + start + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(DUP + at, (grad * value).to(DUP.dtype.element_ty), mask=inside)
        slope *= up
    tl.store(DX + at, (grad * slope).to(DX.dtype.element_ty), mask=inside)


def forward(x: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """act(x) * up, or act(x) without `up`, for x and up [..., F]: contiguous [..., F]. `kind`: silu, gelu, gelu_tanh or relu2."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(_forward, kind, [x], up, [out])
    return out


def backward(grad: Tensor, x: Tensor, up: Tensor | None, kind: str) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and of up (None without `up`), each contiguous [..., F]."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dup = None if up is None else torch.empty_like(dx)
    _launch(_backward, kind, [grad, x], up, [dx, dx if dup is None else dup])
    return dx, dup


def _launch(kernel, kind: str, inputs: list[Tensor], up: Tensor | None, outputs: list[Tensor]) -> None:
    if outputs[0].numel() == 0:
        return
    inputs = _matrices(inputs if up is None else [*inputs, up])
    N, F = inputs[0].shape
    if up is None:
        inputs.append(inputs[-1])  # a pointer that is not followed
    launch = LAUNCHES[architecture()]
    grid = (N * triton.cdiv(F, launch.blocks["BLOCK"]),)
    strides = (x.stride(0) for x in inputs)
    kernel[grid](*inputs, *outputs, F, *strides, KIND=kind, GATED=up is not None, **launch.arguments())


def _matrices(xs: list[Tensor]) -> list[Tensor]:
    """[N, F] with contiguous rows; one row of everything where all are dense, so that only the very last block is partly filled."""
    if all(x.is_contiguous() for x in xs):
        return [x.view(1, -1) for x in xs]
    rows = [x.reshape(-1, x.shape[-1]) for x in xs]
    return [x if x.stride(-1) == 1 else x.contiguous() for x in rows]


@operator("bigtrain::glu")
def glu(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """act(gate) * up for gate and up [..., F]: swiglu, geglu (exact GELU) or geglu_tanh.

    The two may be halves of one projection's output: only the last dimension must be contiguous to be read where it is.
    Raises ValueError for another kind, for shapes or dtypes that differ and for other dtypes than bf16, fp16 and float32.
    """
    arguments.glu(gate, up, kind, "triton")
    return forward(gate, up, GLU[kind])


@operator("bigtrain::glu_backward")
def glu_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    arguments.glu(gate, up, kind, "triton")
    return backward(grad, gate, up, GLU[kind])


@operator("bigtrain::activation")
def activation(x: Tensor, kind: str) -> Tensor:
    """gelu (exact) and gelu_tanh (Hendrycks and Gimpel 2016) or relu2 (So et al. 2021). Raises ValueError as `glu`."""
    arguments.activation(x, kind, "triton")
    return forward(x, None, kind)


@operator("bigtrain::activation_backward")
def activation_backward(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    """The gradient of x."""
    return backward(grad, x, None, kind)[0]


def _dense(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


glu.register_fake(lambda gate, up, kind: _dense(gate))
glu_backward.register_fake(lambda grad, gate, up, kind: (_dense(gate), _dense(up)))
activation.register_fake(lambda x, kind: _dense(x))
activation_backward.register_fake(lambda grad, x, kind: _dense(x))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.kind = inputs
    ctx.save_for_backward(*tensors)


glu.register_autograd(lambda ctx, grad: (*glu_backward(grad, *ctx.saved_tensors, ctx.kind), None), setup_context=_save)
activation.register_autograd(lambda ctx, grad: (activation_backward(grad, *ctx.saved_tensors, ctx.kind), None), setup_context=_save)


# Operations of an activation, and of its derivative beyond those, an exponential or an erf counted as one.
_OPERATIONS = {"silu": (4, 4), "gelu_tanh": (8, 6), "gelu": (5, 6), "relu2": (2, 1)}


def cases(architecture: str) -> Iterator[Case]:
    """Every kind in bf16 and float32 at 8,192 rows of 14,336; gate and up are the halves of one projection's output."""
    N, F = 8192, 14336
    for dtype in (torch.bfloat16, torch.float32):
        dense = torch.empty(N, F, dtype=dtype, device="meta")
        gate, up = torch.empty(N, 2 * F, dtype=dtype, device="meta").chunk(2, -1)
        for name, kind in GLU.items():
            yield from _cases(f"glu {{}} {name} {str(dtype).split('.')[1]}", kind, dense, gate, up)
        for kind in ACTIVATIONS:
            yield from _cases(f"activation {{}} {kind} {str(dtype).split('.')[1]}", kind, dense, dense, None)


def _cases(label: str, kind: str, grad: Tensor, x: Tensor, up: Tensor | None) -> Iterator[Case]:
    value, slope = _OPERATIONS[kind]
    gated = up is not None
    size, moved = grad.numel(), grad.nbytes
    yield Case(label.format("forward"), partial(forward, x, up, kind), (value + gated) * size, (2 + gated) * moved)
    operations = (value + slope + 1 + 2 * gated) * size
    yield Case(label.format("backward"), partial(backward, grad, x, up, kind), operations, (3 + 2 * gated) * moved)
