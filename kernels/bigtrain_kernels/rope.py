"""Rotary position embedding (Su et al. 2021, RoFormer, eq. 34) of queries and keys, in one launch.

A program takes a few positions, reads their angles once, and goes over the query heads and then the key heads in blocks. The
gradient is the rotation by the opposite angles, so the operator is its own backward pass, at any order.

B batch, T sequence length, H query heads, G key heads, D head dim, R pairs that are rotated, 2R <= D.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arguments
from .launch import ARCHITECTURES, INTERPRETED, Case, Launch, architecture, operator

# Launches. Keys: architecture, pairs up to which it serves, bytes of an element. ROWS of a tile are HEADS, or as many as there are,
# times positions. A thread has 8 or 16 elements of either half: one to four loads of 128 bits. (With fewer, some would be loaded by
# two threads, in place perhaps after one of them has stored.) More heads would leave the angles narrower loads.

PAIRS = (16, 32, 64, 128)

TABLE: dict[tuple[str, int, int], Launch] = {}
for _size, (_pairs, _rows, _heads) in itertools.product((2, 4), ((16, 64, 2), (32, 64, 4), (64, 32, 4), (128, 8, 2))):
    for _arch in ARCHITECTURES:
        TABLE[_arch, _pairs, _size] = Launch({"BLOCK_R": _pairs, "ROWS": _rows, "HEADS": _heads}, 2 if _arch == "gfx942" else 4)
    TABLE[INTERPRETED, _pairs, _size] = Launch({"BLOCK_R": _pairs, "ROWS": 32, "HEADS": _heads}, 4)


@triton.jit
def _rotate(
    X, OUT, x_t, x_h, out_t, out_h, t, T, cos, sin,
    H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, HEADS: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """All heads at a block of positions t: (a, b) -> (a cos - b sin, b cos + a sin)."""
    for first in range(0, H, HEADS):
        h = first + tl.arange(0, HEADS)
        inside = (t < T)[:, None, None] & (h < H)[None, :, None]
        x = X + t[:, None, None] * x_t + h[None, :, None] * x_h
        out = OUT + t[:, None, None] * out_t + h[None, :, None] * out_h
        if INTERLEAVED:
            column = tl.arange(0, 2 * BLOCK_R)[None, None, :]
            mask = inside & (column < 2 * R)
            pairs = tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(pairs, [t.shape[0], HEADS, BLOCK_R, 2]))
            pairs = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [t.shape[0], HEADS, 2 * BLOCK_R])
            tl.store(out + column, pairs.to(OUT.dtype.element_ty), mask=mask)
        else:
            column = tl.arange(0, BLOCK_R)[None, None, :]
            mask = inside & (column < R)
            a = tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(x + R + column, mask=mask, other=0.0).to(tl.float32)
            tl.store(out + column, (a * cos - b * sin).to(OUT.dtype.element_ty), mask=mask)
            tl.store(out + R + column, (b * cos + a * sin).to(OUT.dtype.element_ty), mask=mask)
        if REST:  # what is not rotated goes over as it is
            column = 2 * R + tl.arange(0, REST)[None, None, :]
            mask = inside & (column < D)
            tl.store(out + column, tl.load(x + column, mask=mask), mask=mask)


@triton.jit
def _rope(
    Q, K, COS, SIN, Q_OUT, K_OUT, qb, qt, qh, kb, kt, kg, qob, qot, qoh, kob, kot, kog, angle_b, T, blocks,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, HEADS: tl.constexpr, POSITIONS: tl.constexpr,
    REST: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    pair = tl.arange(0, BLOCK_R)
    at = b * angle_b + t[:, None, None] * R + pair[None, None, :]
    mask = (t < T)[:, None, None] & (pair < R)[None, None, :]
    cos, sin = tl.load(COS + at, mask=mask, other=0.0), tl.load(SIN + at, mask=mask, other=0.0)
    if INVERSE:
        sin = -sin
    _rotate(Q + b * qb, Q_OUT + b * qob, qt, qh, qot, qoh, t, T, cos, sin, H, D, R, BLOCK_R, HEADS, REST, INTERLEAVED)
    _rotate(K + b * kb, K_OUT + b * kob, kt, kg, kot, kog, t, T, cos, sin, G, D, R, BLOCK_R, HEADS, REST, INTERLEAVED)


def forward(
    q_BTHD: Tensor, k_BTGD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool, inverse: bool, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """Queries and keys rotated, with `inverse` back; in place they are overwritten and returned, so the caller must own them."""
    (B, T, H, D), G, R = q_BTHD.shape, k_BTGD.shape[2], cos_BTR.shape[-1]
    q, k = (x if x.stride(-1) == 1 or inplace else x.contiguous() for x in (q_BTHD, k_BTGD))
    q_out, k_out = (x if inplace else torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    cos, sin = (x.contiguous() for x in torch.broadcast_tensors(cos_BTR, sin_BTR))
    launch = TABLE[architecture(), next(pairs for pairs in PAIRS if pairs >= R), q.element_size()]
    heads = min(triton.next_power_of_2(max(1, min(H, G))), launch.blocks["HEADS"])
    positions = launch.blocks["ROWS"] // heads
    blocks = triton.cdiv(T, positions)
    if B * T:
        _rope[B * blocks,](
            q, k, cos, sin, q_out, k_out, *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3],
            0 if len(cos) == 1 else T * R, T, blocks,
            H=H, G=G, D=D, R=R, BLOCK_R=launch.blocks["BLOCK_R"], HEADS=heads, POSITIONS=positions,
            REST=0 if inplace or D == 2 * R else triton.next_power_of_2(D - 2 * R),
            INTERLEAVED=interleaved, INVERSE=inverse, num_warps=launch.warps,
        )  # fmt: skip
    return q_out, k_out


@operator("bigtrain::rope")
def _rope_op(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    return forward(q, k, cos, sin, interleaved, inverse)


@_rope_op.register_fake
def _(q, k, cos, sin, interleaved, inverse):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))


def _save(ctx, inputs, output) -> None:
    *_, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx, grad_q, grad_k):
    return *_rope_op(grad_q, grad_k, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), None, None, None, None


_rope_op.register_autograd(_gradients, setup_context=_save)


@operator("bigtrain::rope_", mutates_args=("q", "k"))
def _rope_op_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    if q.numel() and q.data_ptr() == k.data_ptr():
        raise ValueError("rope: q_BTHD and k_BTGD are the same memory: in place it would be rotated twice")
    for name, x in (("q_BTHD", q), ("k_BTGD", k)):
        if _overlaps(x):
            raise ValueError(f"rope: {name} has elements that share memory, strides {x.stride()}: in place they would be rotated twice")
    forward(q, k, cos, sin, interleaved, False, inplace=True)


def _overlaps(x: Tensor) -> bool:
    reach = 1
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size > 1 and stride < reach:
            return True
        reach += (size - 1) * stride
    return False


class _InPlace(torch.autograd.Function):
    """Overwrites its inputs. The gradients that arrive belong to the caller: they are rotated into new tensors."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool):
        _rope_op_(q, k, cos, sin, interleaved)
        ctx.mark_dirty(q, k)
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return q, k

    @staticmethod
    def backward(ctx, grad_q, grad_k):
        return *_rope_op(grad_q, grad_k, *ctx.saved_tensors, ctx.interleaved, True), None, None, None


def rope(
    q_BTHD: Tensor, k_BTGD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool = False, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate pairs of the first 2R elements of every head by the angles of their position; the rest stays as it is.

    The angles are float32, [1 or B, T, R], for each position its own: packed documents, or positions that continue a cache.
    A pair is (x[i], x[i + R]), the half layout of GPT-NeoX and Llama, or if `interleaved` (x[2i], x[2i + 1]), that of GPT-J.
    Queries and keys are bf16, fp16 or float32 with any strides; results are contiguous. `inplace` overwrites and returns the
    queries and keys instead: for inference, since where gradients are recorded autograd refuses it to views and to values that
    are still needed. The angles get no gradient.

    Raises ValueError for shapes or dtypes that do not match, for more than 128 pairs, and in place for elements that share memory.
    """
    arguments.rope(q_BTHD, k_BTGD, cos_BTR, sin_BTR, "triton")
    if cos_BTR.shape[-1] > PAIRS[-1]:
        arguments.refuse("rope: cos_BTR", cos_BTR, f"R of {PAIRS[-1]} at most")
    if not inplace:
        return _rope_op(q_BTHD, k_BTGD, cos_BTR, sin_BTR, interleaved, False)
    if q_BTHD.stride(-1) != 1 or k_BTGD.stride(-1) != 1:
        raise ValueError("rope: in place the last dimension of q_BTHD and k_BTGD must be contiguous")
    return _InPlace.apply(q_BTHD, k_BTGD, cos_BTR, sin_BTR, interleaved)


def cases(architecture: str) -> Iterator[Case]:
    """Every entry of the table for one architecture, at 4 x 4,096 positions: both layouts, back, in place, and half the dimensions."""
    for arch, pairs, size in TABLE:
        if arch == architecture:
            for interleaved in (False, True):
                yield _case(pairs, 2 * pairs, size, interleaved)
            yield _case(pairs, 2 * pairs, size, False, inverse=True)
            yield _case(pairs, 2 * pairs, size, False, inplace=True)
            if pairs < PAIRS[-1]:
                yield _case(pairs, 4 * pairs, size, False)


def _case(R: int, D: int, size: int, interleaved: bool, inverse: bool = False, inplace: bool = False) -> Case:
    B, T, H, G = 4, 4096, 32, 8
    dtype = torch.bfloat16 if size == 2 else torch.float32
    q, k = (torch.empty(B, T, heads, D, dtype=dtype, device="meta") for heads in (H, G))
    cos, sin = (torch.empty(B, T, R, device="meta") for _ in range(2))
    kind = [f"rope d{D}", f"{2 * R} rotated" if 2 * R < D else "", str(dtype).split(".")[1], "interleaved" if interleaved else "half"]
    kind += ["backward" if inverse else "", "in place" if inplace else ""]
    moved = 2 * size * B * T * (H + G) * (2 * R if inplace else D) + 8 * cos.numel()
    return Case(
        " ".join(filter(None, kind)),
        lambda: forward(q, k, cos, sin, interleaved, inverse, inplace=inplace),
        6 * B * T * (H + G) * R,
        moved,
    )
