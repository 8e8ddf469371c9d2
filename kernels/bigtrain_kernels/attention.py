"""Flash attention: exact attention that never writes a score to memory (Dao 2023, FlashAttention-2).

Every mask is a range of keys per query: causal order, packed documents, padding and a sliding window all come down to "query t
sees keys first[t] to end[t]", and seen from a key to a range of queries. So one kernel serves all of them, the blocks that a
mask empties are never visited, and those inside the range take no mask at all.

Three kernels and no atomics: the forward pass; dK and dV, a program a block of keys, which goes over the queries and the query
heads that share it; dQ, a program a block of queries. Each output has one writer and a fixed order of summation, so results are
the same bits every time.

B batch, T query length, S key length, H query heads, G key and value heads, D head dim; M queries and N keys of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import attention_kernels as kernels
from .attention_tables import BACKWARD_KV, BACKWARD_Q, CAPPED, FORWARD, Key
from .launch import INTERPRETED, Case, Launch, architecture, operator

LOG2E = 1.4426950408889634
HEAD_DIMS = (32, 64, 128, 256)
"""Widths of a block; a head dimension between two of them is padded in registers."""
MOST_SEQUENCES = 65535
"""Of a batch: the third dimension of a grid on CUDA."""
ROWS = 64
"""Queries of a program of `row_sums`."""


class Ranges(NamedTuple):
    """Which positions see which, as `ranges` makes them: int32, each of shape [1 or B, T] or [1 or B, S]."""

    first_key: Tensor
    end_key: Tensor
    """Query t sees the keys first_key[t] <= s < end_key[t]; none where they are equal. Both never decrease along t."""
    first_query: Tensor
    end_query: Tensor
    """The same from the keys' side: key s is seen by the queries first_query[s] <= t < end_query[s]."""


def ranges(first_key_BT: Tensor, end_key_BT: Tensor, S: int) -> Ranges:
    """The mask in which query t sees the keys first_key <= s < end_key: int32 [1 or B, T], neither ever decreasing along T."""
    key_BS = torch.arange(S, dtype=torch.int32, device=end_key_BT.device).expand(len(end_key_BT), S).contiguous()
    first_key_BT, end_key_BT = first_key_BT.contiguous(), end_key_BT.contiguous()
    first_query_BS = torch.searchsorted(end_key_BT, key_BS, right=True, out_int32=True)
    end_query_BS = torch.searchsorted(first_key_BT, key_BS, right=True, out_int32=True)
    return Ranges(first_key_BT, end_key_BT, first_query_BS, end_query_BS)


class Mask(NamedTuple):
    """What decides the scores, apart from queries and keys."""

    causal: bool
    """The queries are the last T of S positions and see no later key. Not looked at beside `seen`."""
    scale: float
    """Multiplies the scores."""
    cap: float = 0.0
    """Then cap * tanh(score / cap), where it is above 0 (Gemma Team 2024, Gemma 2, section 2)."""
    seen: Ranges | None = None


def forward(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Mask, sink_H: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The output [B, T, H, D], and the log of the sum of exponentials of the scores, float32 [B, H, T], -inf where a query sees nothing."""
    (B, T, H, _), S = q_BTHD.shape, k_BSGD.shape[1]
    if B > MOST_SEQUENCES:
        raise ValueError(f"attention over {B} sequences: a GPU launches {MOST_SEQUENCES} at a time; split the batch, or pack it")
    q, k, v = (_rows(x) for x in (q_BTHD, k_BSGD, v_BSGD))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    launch = _launch("forward", FORWARD, q, mask)
    M, N = launch.blocks["BLOCK_M"], launch.blocks["BLOCK_N"]
    by_tma = _described(k, N), _described(v, N)
    keys = by_tma if all(isinstance(x, TensorDescriptor) for x in by_tma) else (k, v)
    if out.numel():
        kernels.forward[triton.cdiv(T, M), H, B](
            _described(q, M), *keys, out, lse, *_query_ranges(mask, lse), lse if sink_H is None else sink_H,
            *_strides(q, k, v, out), _range_stride(mask), T, S, H, H // k.shape[2], *_rates(mask),
            **_flags(q, mask, S % N), SINKS=sink_H is not None, **launch.arguments(),
        )  # fmt: skip
    return out, lse


def row_sums(grad_BTHD: Tensor, out_BTHD: Tensor, grad_lse_BHT: Tensor | None) -> Tensor:
    """delta = rowsum(dO * O) - dLSE, float32 [B, H, T]: what the gradients of all scores of a query have subtracted."""
    B, T, H, D = out_BTHD.shape
    grad = _rows(grad_BTHD)
    delta = out_BTHD.new_empty(B, H, T, dtype=torch.float32)
    if delta.numel():
        kernels.row_sums[triton.cdiv(T, ROWS), H, B](
            out_BTHD, grad, delta if grad_lse_BHT is None else grad_lse_BHT.contiguous(), delta, *_strides(out_BTHD, grad), T, H,
            D=D, BLOCK_D=_block_dim(D), BLOCK_M=ROWS, HAS_LSE=grad_lse_BHT is not None,
            num_warps=4 if D <= 64 else 8 if D <= 128 else 16,  # on half as many, rows of 128 in fp16 and of 240 spill on sm_100
        )  # fmt: skip
    return delta


def backward_q(
    grad_BTHD: Tensor, delta_BHT: Tensor, q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, lse2_BHT: Tensor, mask: Mask
) -> Tensor:
    """The gradient of the queries. `lse2_BHT` is what `forward` gave times LOG2E, `delta_BHT` from `row_sums`."""
    (B, T, H, _), S = q_BTHD.shape, k_BSGD.shape[1]
    q, k, v, grad = (_rows(x) for x in (q_BTHD, k_BSGD, v_BSGD, grad_BTHD))
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    launch = _launch("backward_q", BACKWARD_Q, q, mask)
    M, N = launch.blocks["BLOCK_M"], launch.blocks["BLOCK_N"]
    if dq.numel():
        kernels.backward_q[triton.cdiv(T, M), H, B](
            _described(q, M), k, v, _described(grad, M), lse2_BHT, delta_BHT, dq, *_query_ranges(mask, delta_BHT),
            *_strides(q, k, v, grad, dq), _range_stride(mask), T, S, H, H // k.shape[2], mask.scale, *_rates(mask),
            **_flags(q, mask, S % N), **launch.arguments(),
        )  # fmt: skip
    return dq


def backward_kv(
    grad_BTHD: Tensor, delta_BHT: Tensor, q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, lse2_BHT: Tensor, mask: Mask
) -> tuple[Tensor, Tensor]:
    """The gradients of the keys and the values, from the same as `backward_q`."""
    (B, T, H, _), (S, G) = q_BTHD.shape, k_BSGD.shape[1:3]
    q, k, v, grad = (_rows(x) for x in (q_BTHD, k_BSGD, v_BSGD, grad_BTHD))
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    launch = _launch("backward_kv", BACKWARD_KV, q, mask)
    M, N = launch.blocks["BLOCK_M"], launch.blocks["BLOCK_N"]
    if dk.numel():
        kernels.backward_kv[triton.cdiv(S, N), G, B](
            q, _described(k, N), _described(v, N), grad, lse2_BHT, delta_BHT, dk, dv, *_key_ranges(mask, delta_BHT),
            *_strides(q, k, v, grad, dk, dv), _range_stride(mask, keys=True), T, S, H, H // G, mask.scale, *_rates(mask),
            **_flags(q, mask, T % M), **launch.arguments(),
        )  # fmt: skip
    return dk, dv


def _rows(x: Tensor) -> Tensor:
    """`x` with its last dimension contiguous: a row is what the kernels load."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _described(x_BTHD: Tensor, rows: int) -> Tensor | TensorDescriptor:
    """`x_BTHD` for a kernel that loads tiles of so many rows: a descriptor where TMA pays and can read it, otherwise itself.

    It pays where a row is two of its boxes of 128 bytes (attention_kernels says why); at 256 wide the kernels of 32 rows spill.
    It reads what begins, and whose strides are, at multiples of 16 bytes.
    """
    x_BHTD, width = x_BTHD.transpose(1, 2), _block_dim(x_BTHD.shape[-1])
    pays = architecture() in ("sm_90", INTERPRETED) and x_BTHD.element_size() == 2 and width == 128
    units = [x_BTHD.data_ptr(), *(stride * x_BTHD.element_size() for stride in x_BHTD.stride()[:-1])]
    if not pays or not x_BTHD.numel() or any(unit % 16 for unit in units):
        return x_BTHD
    return TensorDescriptor(x_BTHD, list(x_BHTD.shape), list(x_BHTD.stride()), [1, 1, rows, width])


def _block_dim(D: int) -> int:
    if HEAD_DIMS[-1] < D:
        raise ValueError(f"the attention kernels take head dimensions up to {HEAD_DIMS[-1]}, found {D}; use kernels.attention=torch")
    return next(width for width in HEAD_DIMS if width >= D)


def _launch(kernel: str, table: dict[Key, Launch], q: Tensor, mask: Mask) -> Launch:
    key = architecture(), _block_dim(q.shape[-1]), q.element_size(), mask.seen is not None
    return (mask.cap > 0 and CAPPED[kernel].get(key)) or table[key]


def _strides(*xs: Tensor) -> list[int]:
    """Batch, row and head strides of each: a row's own elements are contiguous."""
    return [stride for x in xs for stride in x.stride()[:3]]


def _rates(mask: Mask) -> tuple[float, float]:
    """`rate` and `slope` of the kernels."""
    return (mask.cap * LOG2E, mask.scale / mask.cap) if mask.cap > 0 else (mask.scale * LOG2E, 0.0)


def _flags(q: Tensor, mask: Mask, rest: int) -> dict[str, object]:
    ranges = mask.seen is not None
    return {
        "D": q.shape[-1],
        "BLOCK_D": _block_dim(q.shape[-1]),
        "CAUSAL": mask.causal and not ranges,
        "RANGES": ranges,
        "EVEN": rest == 0,  # the loop's last block is whole
        "CAP": mask.cap > 0,
        "PRECISION": "ieee",  # float32 is for tests and small models: exact products rather than tensor cores
    }


def _query_ranges(mask: Mask, unused: Tensor) -> tuple[Tensor, Tensor]:
    return (unused, unused) if mask.seen is None else (mask.seen.first_key, mask.seen.end_key)


def _key_ranges(mask: Mask, unused: Tensor) -> tuple[Tensor, Tensor]:
    return (unused, unused) if mask.seen is None else (mask.seen.first_query, mask.seen.end_query)


def _range_stride(mask: Mask, keys: bool = False) -> int:
    if mask.seen is None:
        return 0
    ends = mask.seen.end_query if keys else mask.seen.end_key
    return 0 if len(ends) == 1 else ends.shape[1]


@operator("bigtrain::attention")
def attention(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, first_key: Tensor | None, end_key: Tensor | None, first_query: Tensor | None,
    end_query: Tensor | None, causal: bool, scale: float, cap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The registered operator; `ops.attention` says what it computes. The ranges are those of `Ranges`, or None."""
    return forward(q, k, v, _mask(first_key, end_key, first_query, end_query, causal, scale, cap), sink)


@attention.register_fake
def _(q, k, v, sink, first_key, end_key, first_query, end_query, causal, scale, cap):
    B, T, H, _ = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(B, H, T, dtype=torch.float32)


@operator("bigtrain::attention_backward")
def attention_backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, first_key: Tensor | None,
    end_key: Tensor | None, first_query: Tensor | None, end_query: Tensor | None, causal: bool, scale: float, cap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    mask = _mask(first_key, end_key, first_query, end_query, causal, scale, cap)
    delta, lse2 = row_sums(grad, out, grad_lse), lse * LOG2E  # not in the loops, where every block of keys would do it again
    return backward_q(grad, delta, q, k, v, lse2, mask), *backward_kv(grad, delta, q, k, v, lse2, mask), delta


@attention_backward.register_fake
def _(grad, grad_lse, q, k, v, out, lse, first_key, end_key, first_query, end_query, causal, scale, cap):
    return *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)), torch.empty_like(lse)


def _mask(first_key, end_key, first_query, end_query, causal, scale, cap) -> Mask:
    seen = None if first_key is None else Ranges(first_key, end_key, first_query, end_query)
    return Mask(causal, scale, cap, seen)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.causal, ctx.scale, ctx.cap = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, grad_lse):
    q, k, v, sink, *seen, out, lse = ctx.saved_tensors
    if grad is None:  # only the log-sum-exp was used
        grad = torch.zeros_like(out)
    dq, dk, dv, delta = attention_backward(grad, grad_lse, q, k, v, out, lse, *seen, ctx.causal, ctx.scale, ctx.cap)
    # A sink is one more score, without a value: minus its probability times delta.
    if sink is None:
        dsink = None
    else:
        share = torch.exp(sink.float()[:, None] - lse).where(lse > float("-inf"), 0.0)
        dsink = -(share * delta).sum((0, 2)).to(sink.dtype)
    return dq, dk, dv, dsink, *(None,) * 7


attention.register_autograd(_gradients, setup_context=_save)


def cases(architecture: str) -> Iterator[Case]:
    """Every entry of the tables for one architecture: 4 sequences of 4,096 tokens, 16 heads on 4, causal or with ranges.

    16-bit entries in bf16, also without a mask ("full") and with all that a kernel can be asked for at once ("options": a padded
    head dimension, lengths that no block divides, soft-cap, sink and the gradient of the log-sum-exp); fp16, which shares them, for
    the usual widths.
    """
    for arch, width, size, masked in FORWARD:
        if arch == architecture:
            mask = "ranges" if masked else "causal"
            yield from _cases(width, torch.bfloat16 if size == 2 else torch.float32, mask)
            if size == 2:
                yield from _cases(width - 16, torch.bfloat16, f"options-{mask}")
            if size == 2 and not masked:
                yield from _cases(width, torch.bfloat16, "full")
            if size == 2 and not masked and width in (64, 128):
                yield from _cases(width, torch.float16, mask)


def _cases(D: int, dtype: torch.dtype, kind: str) -> Iterator[Case]:
    B, T, S, H, G = 4, 4096, 4096, 16, 4
    options = kind.startswith("options")
    if options:
        T, S = T - 3, S + 3
    q, out, grad = (torch.empty(B, T, H, D, dtype=dtype, device="meta") for _ in range(3))
    k, v = (torch.empty(B, S, G, D, dtype=dtype, device="meta") for _ in range(2))
    lse, delta = (torch.empty(B, H, T, device="meta") for _ in range(2))
    sink = torch.empty(H, device="meta") if options else None
    query, key = (torch.empty(B, length, dtype=torch.int32, device="meta") for length in (T, S))
    mask = Mask("causal" in kind, D**-0.5, 50.0 * options, Ranges(query, query, key, key) if "ranges" in kind else None)
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    label = f"d{D} {name} {kind}"
    product = 2 * B * H * T * S * D // (1 if kind == "full" else 2)  # one matrix product over what a mask leaves: half
    size = dtype.itemsize
    wide, narrow, row = size * q.numel(), size * k.numel(), 4 * lse.numel()
    inputs = grad, delta, q, k, v, lse, mask
    yield Case(f"attention forward {label}", lambda: forward(q, k, v, mask, sink), 2 * product, 2 * wide + 2 * narrow + row)
    yield Case(f"attention row sums {label}", lambda: row_sums(grad, out, lse if options else None), 2 * q.numel(), 2 * wide + row)
    yield Case(f"attention backward q {label}", lambda: backward_q(*inputs), 3 * product, 3 * wide + 2 * narrow + 2 * row)
    yield Case(f"attention backward kv {label}", lambda: backward_kv(*inputs), 4 * product, 2 * wide + 4 * narrow + 2 * row)
