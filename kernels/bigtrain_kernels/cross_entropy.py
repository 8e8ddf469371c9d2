"""Linear layer and cross entropy in one: the loss of a language model whose logits are never in memory.

With n targets t_i, logits l = hidden weight^T + bias (l = cap tanh(l / cap) under a soft-cap), lse_i = log sum_v exp l_iv and
smoothed targets q_iv = (1 - smoothing) [v = t_i] + smoothing / V, the loss is

    sum_i lse_i - sum_v q_iv l_iv + z_loss lse_i^2        and        dloss / dl_iv = (1 + 2 z_loss lse_i) exp(l_iv - lse_i) - q_iv

(times 1 - (l / cap)^2 under a soft-cap). Two passes over the vocabulary, after Wijmans et al. 2024 (Cut Your Losses):

1. `_statistics` multiplies tiles of hidden and weight, keeps an online softmax in registers and writes one lse a row and stripe.
2. For each chunk of the vocabulary: `_logit_gradients` multiplies again and writes the chunk's dloss / dl, [N, C]; one library
   product gives those rows of the weight's gradient; `_add_hidden_gradients` adds the chunk's part of the hidden states' gradient.

What it costs, in matrix products of 2 N V E FLOPs: 1 without gradients, 4 with both, against 3 for a pass that keeps all logits
or goes over chunks of tokens. A chunk of tokens needs no second look at the logits, but adds to every row of the weight's
gradient as often as there are chunks: in bf16 that rounds 16 times at a sixteenth of the logits (an error 2.9 times one rounding,
growing with the chunks; small terms vanish), in float32 it takes 4 V E bytes more, the size of all logits at 8,192 tokens and
4,096 wide. Here each row of the weight's gradient is summed over all tokens in float32 and rounded once, and logits are never
rounded at all. In exchange the hidden states' gradient is the one that grows chunk by chunk. It does so in two halves, the
gradient that is returned and what its rounding left (`rest`), 16 bits of mantissa between them in bf16 and 22 in fp16.

Workspace, bytes: N (E + C) size, with C = V / 16 - E (at least SMALLEST_CHUNK) so that the sum is a sixteenth of the logits;
N C size for float32, which needs no rest. At 8,192 tokens, V 128,256, E 4,096, bf16: 67 MB of rest and 63 MB of chunk, where the
logits would be 2,101 MB. Memory moved by the second pass, in V / C steps: hidden and gradient of the hidden states, twice each, the
chunk written once and read twice, the weight twice; 0.6 GB a step and 21 GB in all there, against 34 TFLOP: 1,600 FLOPs a byte.

N flattened tokens, V vocabulary, E width, C columns of a chunk of the vocabulary, S stripes of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, Case, Launch, architecture
from .reference import IGNORE

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALLEST_CHUNK = 2048
"""Columns of a chunk at least: the depth of the product that gives the hidden states' gradient, which rereads it for each chunk."""

# Launches. Keys: architecture, bytes of an element. BLOCK_M tokens x BLOCK_N columns x BLOCK_K of the sum; GROUP blocks of tokens
# go side by side, so that what they read stays in the L2 cache; TILES blocks of the vocabulary make a stripe.


def _launch(M: int, N: int, K: int, warps: int, stages: int, **more: int) -> Launch:
    return Launch({"BLOCK_M": M, "BLOCK_N": N, "BLOCK_K": K, "GROUP": 8, **more}, warps, stages)


PRODUCT: dict[tuple[str, int], Launch] = {
    ("sm_80", 2): _launch(128, 256, 32, 8, 4),
    ("sm_90", 2): _launch(128, 256, 64, 8, 4),
    ("sm_100", 2): _launch(128, 256, 64, 8, 4),
    ("gfx942", 2): _launch(256, 128, 64, 8, 2),
    ("gfx942", 4): _launch(128, 128, 32, 8, 2),
    **{(arch, 4): _launch(128, 128, 16, 8, 3) for arch in ("sm_80", "sm_90", "sm_100")},
    **{(INTERPRETED, size): _launch(32, 64, 32, 4, 1) for size in (2, 4)},
}
"""Of both gradients."""
STATISTICS: dict[tuple[str, int], Launch] = {
    key: launch._replace(blocks=launch.blocks | {"GROUP": 16, "TILES": 2 if key[0] == INTERPRETED else 32})
    for key, launch in {**PRODUCT, ("sm_80", 2): _launch(128, 128, 64, 8, 4)}.items()  # 128 x 256 spills there
}


@triton.jit
def _tile(blocks_m, blocks_n, GROUP: tl.constexpr):
    """Row and column of this program's tile; tiles go down GROUP rows, then to the next column."""
    first = tl.program_id(0) // (GROUP * blocks_n) * GROUP
    rows = tl.minimum(blocks_m - first, GROUP)
    inside = tl.program_id(0) % (GROUP * blocks_n)
    return first + inside % rows, inside // rows


@triton.jit
def _product(
    HIDDEN, WEIGHT, m, n, N, V, E, stride_h, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden weight^T, the tile at row m and column n. Rows and columns that do not exist repeat the last: no mask in the loop."""
    rows = tl.minimum(tl.arange(0, BLOCK_M), N - 1 - m)
    columns = tl.minimum(tl.arange(0, BLOCK_N), V - 1 - n)
    inner = tl.arange(0, BLOCK_K)
    h = HIDDEN + tl.cast(m, tl.int64) * stride_h + rows[:, None] * stride_h + inner[None, :]
    w = WEIGHT + tl.cast(n, tl.int64) * stride_w + columns[None, :] * stride_w + inner[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for e in range(0, E, BLOCK_K):
        if EVEN:
            total = tl.dot(tl.load(h), tl.load(w), total, input_precision=PRECISION)
        else:
            h_tile = tl.load(h, mask=inner[None, :] < E - e, other=0.0)
            total = tl.dot(h_tile, tl.load(w, mask=inner[:, None] < E - e, other=0.0), total, input_precision=PRECISION)
        h += BLOCK_K
        w += BLOCK_K
    return total


@triton.jit
def _halves(x):
    """The left and right columns of a tile. What follows a product takes one after the other: both are more than the registers hold."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def _logits(product, columns, BIAS, V, cap, BIASED: tl.constexpr, CAP: tl.constexpr):
    if BIASED:
        product += tl.load(BIAS + tl.minimum(columns, V - 1)).to(tl.float32)[None, :]
    if CAP:
        product = cap * (2.0 * tl.sigmoid(product * (2.0 / cap)) - 1.0)
    return product


@triton.jit
def _observe(
    peak, weight, total, product, rows, n, TARGET, BIAS, PICKED, N, V, cap,
    BIASED: tl.constexpr, CAP: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Online softmax: the highest logit, the sum of exp(logit - highest) and that of logits, with the columns from n on."""
    columns = n + tl.arange(0, product.shape[1])
    logits = _logits(product, columns, BIAS, V, cap, BIASED, CAP)
    # The one tile that holds a row's target writes it: nothing to carry along, and registers are scarce in the product.
    target = tl.load(TARGET + rows, mask=rows < N, other=-1)
    picked = tl.sum(tl.where(columns[None, :] == target[:, None], logits, 0.0), 1)
    tl.store(PICKED + rows, picked, mask=(target >= n) & (target < tl.minimum(n + product.shape[1], V)))
    if SMOOTH:
        total += tl.sum(tl.where(columns[None, :] < V, logits, 0.0), 1)
    logits = tl.where(columns[None, :] < V, logits, float("-inf"))
    new = tl.maximum(peak, tl.max(logits, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # no column so far, or only such as have a bias of -inf
    weight = weight * tl.exp(peak - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
    return new, weight, total


@triton.jit
def _statistics(
    HIDDEN, WEIGHT, BIAS, TARGET, LSE, TOTAL, PICKED, N, V, E, stripes, stride_h, stride_w, cap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr,
    BIASED: tl.constexpr, CAP: tl.constexpr, SMOOTH: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of each row: the target's logit, and over the columns of a stripe the log of the sum of exponentials and the sum of logits."""
    block, stripe = _tile(tl.cdiv(N, BLOCK_M), stripes, GROUP)
    m = block * BLOCK_M
    rows = m + tl.arange(0, BLOCK_M)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    start = stripe * TILES * BLOCK_N
    for n in range(start, tl.minimum(start + TILES * BLOCK_N, V), BLOCK_N):
        left, right = _halves(_product(HIDDEN, WEIGHT, m, n, N, V, E, stride_h, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, PRECISION))
        peak, weight, total = _observe(
            peak, weight, total, left, rows, n, TARGET, BIAS, PICKED, N, V, cap, BIASED, CAP, SMOOTH
        )  # fmt: skip
        peak, weight, total = _observe(
            peak, weight, total, right, rows, n + BLOCK_N // 2, TARGET, BIAS, PICKED, N, V, cap, BIASED, CAP, SMOOTH
        )  # fmt: skip
    tl.store(LSE + stripe * N + rows, peak + tl.log(weight), mask=rows < N)
    if SMOOTH:
        tl.store(TOTAL + stripe * N + rows, total, mask=rows < N)


@triton.jit
def _store_gradients(
    product, target, lse, GRAD, BIAS, n, height, width, V, stride_g, cap, on_target, on_all, z_loss,
    BIASED: tl.constexpr, CAP: tl.constexpr, IGNORED: tl.constexpr,
):  # fmt: skip
    """dloss / dlogits of the columns from n of the vocabulary on, at GRAD, where there is room for `height` rows and `width` columns."""
    rows, columns = tl.arange(0, product.shape[0]), tl.arange(0, product.shape[1])
    logits = _logits(product, n + columns, BIAS, V, cap, BIASED, CAP)
    grad = tl.exp(logits - lse[:, None]) * (1.0 + 2.0 * z_loss * lse)[:, None] - on_all
    grad -= tl.where((n + columns)[None, :] == target[:, None], on_target, 0.0)
    if CAP:
        share = logits * (1.0 / cap)
        grad *= 1.0 - share * share
    grad = tl.where(target[:, None] == IGNORED, 0.0, grad)
    mask = (rows < height)[:, None] & (columns < width)[None, :]
    tl.store(GRAD + rows[:, None] * stride_g + columns[None, :], grad.to(GRAD.dtype.element_ty), mask=mask)


@triton.jit
def _logit_gradients(
    HIDDEN, WEIGHT, BIAS, TARGET, LSE, GRAD, start, columns, N, V, E, stride_h, stride_w, stride_g, cap, on_target, on_all, z_loss,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    BIASED: tl.constexpr, CAP: tl.constexpr, IGNORED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of dloss / dlogits, for the columns from `start` of the vocabulary on."""
    block_m, block_n = _tile(tl.cdiv(N, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    m, n = block_m * BLOCK_M, block_n * BLOCK_N
    product = _product(HIDDEN, WEIGHT, m, start + n, N, V, E, stride_h, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, PRECISION)
    left, right = _halves(product)
    rows = m + tl.arange(0, BLOCK_M)
    target = tl.load(TARGET + rows, mask=rows < N, other=IGNORED)
    lse = tl.load(LSE + rows, mask=rows < N, other=0.0)
    GRAD += tl.cast(m, tl.int64) * stride_g + n
    _store_gradients(
        left, target, lse, GRAD, BIAS, start + n, N - m, columns - n, V, stride_g, cap, on_target, on_all, z_loss, BIASED, CAP, IGNORED
    )
    GRAD += BLOCK_N // 2
    n += BLOCK_N // 2
    _store_gradients(
        right, target, lse, GRAD, BIAS, start + n, N - m, columns - n, V, stride_g, cap, on_target, on_all, z_loss, BIASED, CAP, IGNORED
    )


@triton.jit
def _add(GRAD, REST, part, m, n, N, E, FIRST: tl.constexpr, HALVES: tl.constexpr):
    """grad + rest += part, at row m and column n of [N, E]; the sum is split between them again."""
    rows, columns = m + tl.arange(0, part.shape[0]), n + tl.arange(0, part.shape[1])
    at = tl.cast(m, tl.int64) * E + n + (rows - m)[:, None] * E + (columns - n)[None, :]
    valid = (rows < N)[:, None] & (columns < E)[None, :]
    if not FIRST:
        part += tl.load(GRAD + at, mask=valid, other=0.0).to(tl.float32)
        if HALVES:
            part += tl.load(REST + at, mask=valid, other=0.0).to(tl.float32)
    grad = part.to(GRAD.dtype.element_ty)
    tl.store(GRAD + at, grad, mask=valid)
    if HALVES:
        tl.store(REST + at, (part - grad.to(tl.float32)).to(REST.dtype.element_ty), mask=valid)


@triton.jit
def _add_hidden_gradients(
    GRAD_LOGITS, WEIGHT, GRAD, REST, N, E, columns, stride_l, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    FIRST: tl.constexpr, HALVES: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad + rest += grad_logits weight, a tile [tokens, width]; WEIGHT points at the chunk's first row. FIRST: they are 0 so far."""
    block_m, block_n = _tile(tl.cdiv(N, BLOCK_M), tl.cdiv(E, BLOCK_N), GROUP)
    m, n = block_m * BLOCK_M, block_n * BLOCK_N
    rows, inside, inner = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    g = GRAD_LOGITS + tl.cast(m, tl.int64) * stride_l + tl.minimum(rows, N - 1 - m)[:, None] * stride_l + inner[None, :]
    w = WEIGHT + n + inner[:, None] * stride_w + inside[None, :]
    in_width = (n + inside < E)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for c in range(0, columns, BLOCK_K):
        if EVEN:
            total = tl.dot(tl.load(g), tl.load(w), total, input_precision=PRECISION)
        else:
            g_tile = tl.load(g, mask=inner[None, :] < columns - c, other=0.0)
            w_tile = tl.load(w, mask=(inner[:, None] < columns - c) & in_width, other=0.0)
            total = tl.dot(g_tile, w_tile, total, input_precision=PRECISION)
        g += BLOCK_K
        w += BLOCK_K * stride_w
    left, right = _halves(total)
    _add(GRAD, REST, left, m, n, N, E, FIRST, HALVES)
    _add(GRAD, REST, right, m, n + BLOCK_N // 2, N, E, FIRST, HALVES)


def chunk_columns(V: int, E: int, size: int) -> int:
    """Columns of a chunk of the vocabulary, so that chunk and rest together take a sixteenth of the logits where they can."""
    rest = 0 if size == 4 else E
    columns = max(SMALLEST_CHUNK, V // 16 - rest) // 256 * 256
    return min(columns, triton.cdiv(V, 16) * 16)


def statistics(
    hidden_NE: Tensor, weight_VE: Tensor, target_N: Tensor, bias_V: Tensor | None, cap: float, smoothing: float
) -> tuple[Tensor, Tensor]:
    """For every row lse, the log of the sum of exponentials of its logits, and the sum of q * logits; both float32 [N]."""
    (N, E), V = hidden_NE.shape, len(weight_VE)
    launch = STATISTICS[architecture(), hidden_NE.element_size()]
    S = triton.cdiv(V, launch.blocks["BLOCK_N"] * launch.blocks["TILES"])
    lse_SN = hidden_NE.new_empty(S, N, dtype=torch.float32)
    total_SN = torch.empty_like(lse_SN) if smoothing else lse_SN
    picked_N = torch.zeros_like(lse_SN[0])
    _statistics[triton.cdiv(N, launch.blocks["BLOCK_M"]) * S,](
        hidden_NE, weight_VE, lse_SN if bias_V is None else bias_V, target_N, lse_SN, total_SN, picked_N, N, V, E, S,
        hidden_NE.stride(0), weight_VE.stride(0), cap,
        **_flags(bias_V, cap, E % launch.blocks["BLOCK_K"] == 0), SMOOTH=smoothing > 0, **launch.arguments(),
    )  # fmt: skip
    if smoothing:
        picked_N = torch.lerp(picked_N, total_SN.sum(0) / V, smoothing)
    return lse_SN.logsumexp(0), picked_N


def logit_gradients_(
    out_NC: Tensor, start: int, hidden_NE: Tensor, weight_VE: Tensor, target_N: Tensor, bias_V: Tensor | None, lse_N: Tensor, *,
    z_loss: float, cap: float, smoothing: float,
) -> None:  # fmt: skip
    """Writes dloss / dlogits of the columns start to start + C of the vocabulary into `out_NC`."""
    (N, E), V, C = hidden_NE.shape, len(weight_VE), out_NC.shape[1]
    launch = PRODUCT[architecture(), hidden_NE.element_size()]
    _logit_gradients[triton.cdiv(N, launch.blocks["BLOCK_M"]) * triton.cdiv(C, launch.blocks["BLOCK_N"]),](
        hidden_NE, weight_VE, lse_N if bias_V is None else bias_V, target_N, lse_N, out_NC, start, C, N, V, E,
        hidden_NE.stride(0), weight_VE.stride(0), out_NC.stride(0), cap, 1 - smoothing, smoothing / V, z_loss,
        **_flags(bias_V, cap, E % launch.blocks["BLOCK_K"] == 0), IGNORED=IGNORE, **launch.arguments(),
    )  # fmt: skip


def add_hidden_gradients_(grad_NE: Tensor, rest_NE: Tensor | None, grad_NC: Tensor, weight_CE: Tensor, first: bool) -> None:
    """grad_NE + rest_NE += grad_NC @ weight_CE, in float32; `first`: what they held before does not count."""
    (N, E), C = grad_NE.shape, len(weight_CE)
    launch = PRODUCT[architecture(), grad_NE.element_size()]
    even = C % launch.blocks["BLOCK_K"] == 0 and E % launch.blocks["BLOCK_N"] == 0
    _add_hidden_gradients[triton.cdiv(N, launch.blocks["BLOCK_M"]) * triton.cdiv(E, launch.blocks["BLOCK_N"]),](
        grad_NC, weight_CE, grad_NE, grad_NE if rest_NE is None else rest_NE, N, E, C, grad_NC.stride(0), weight_CE.stride(0),
        FIRST=first, HALVES=rest_NE is not None, EVEN=even, PRECISION="ieee", **launch.arguments(),
    )  # fmt: skip


def _flags(bias_V: Tensor | None, cap: float, even: bool) -> dict[str, object]:
    return {"BIASED": bias_V is not None, "CAP": cap > 0, "EVEN": even, "PRECISION": "ieee"}


def forward(
    hidden_NE: Tensor, weight_VE: Tensor, target_N: Tensor, bias_V: Tensor | None, *, z_loss: float, cap: float, smoothing: float,
    need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, count, gradients of hidden, weight and bias); a gradient that is not needed is empty."""
    (N, E), V = hidden_NE.shape, len(weight_VE)
    hidden_NE, weight_VE, target_N, bias_V = (
        x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (hidden_NE, weight_VE, target_N, bias_V)
    )
    kept_N = target_N != IGNORE
    grads = _gradients_like(hidden_NE, weight_VE, bias_V, need_hidden, need_weight, need_bias)
    if N == 0:
        return hidden_NE.new_zeros((), dtype=torch.float32), kept_N.sum(), *(g.zero_() for g in grads)
    lse_N, picked_N = statistics(hidden_NE, weight_VE, target_N, bias_V, cap, smoothing)
    loss_N = lse_N - picked_N + z_loss * lse_N.square()
    loss_N = loss_N.where((target_N >= 0) & (target_N < V), float("nan")).where(kept_N, 0.0)
    if need_hidden or need_weight or need_bias:
        grad_hidden_NE, grad_weight_VE, grad_bias_V = grads
        C = chunk_columns(V, E, hidden_NE.element_size())
        chunk_NC = hidden_NE.new_empty(N, C)
        rest_NE = torch.empty_like(grad_hidden_NE) if need_hidden and C < V and hidden_NE.element_size() < 4 else None
        for start in range(0, V, C):
            columns = slice(start, min(start + C, V))
            width = columns.stop - start
            # A multiple of 16, or stores are not 128 bits wide; what is beyond the vocabulary is not read.
            out_NC = chunk_NC[:, : triton.cdiv(width, 16) * 16]
            logit_gradients_(out_NC, start, hidden_NE, weight_VE, target_N, bias_V, lse_N, z_loss=z_loss, cap=cap, smoothing=smoothing)
            grad_NC = out_NC[:, :width]
            if need_hidden:
                add_hidden_gradients_(grad_hidden_NE, rest_NE, grad_NC, weight_VE[columns], first=start == 0)
            if need_weight:
                torch.mm(grad_NC.t(), hidden_NE, out=grad_weight_VE[columns])
            if need_bias:
                grad_bias_V[columns] = grad_NC.sum(0, dtype=torch.float32)
    return loss_N.sum(), kept_N.sum(), *grads


def _gradients_like(
    hidden_NE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, need_hidden: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    like = (hidden_NE, need_hidden), (weight_VE, need_weight), (hidden_NE if bias_V is None else bias_V, need_bias)
    return tuple(x.new_empty(x.shape if need else 0) for x, need in like)


@torch.library.custom_op("bigtrain::linear_cross_entropy", mutates_args=())
def loss_and_gradients(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, z_loss: float, cap: float, smoothing: float,
    need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The registered operator: (loss, count, and what `forward` gives of the gradients for a loss of weight 1)."""
    options = {"z_loss": z_loss, "cap": cap, "smoothing": smoothing}
    return forward(hidden, weight, target, bias, **options, need_hidden=need_hidden, need_weight=need_weight, need_bias=need_bias)


@loss_and_gradients.register_fake
def _(hidden, weight, target, bias, z_loss, cap, smoothing, need_hidden, need_weight, need_bias):
    scalars = hidden.new_empty((), dtype=torch.float32), hidden.new_empty((), dtype=torch.int64)
    return *scalars, *_gradients_like(hidden, weight, bias, need_hidden, need_weight, need_bias)


def _save(ctx, inputs, output) -> None:
    *_, ctx.need_hidden, ctx.need_weight, ctx.need_bias = inputs
    _, count, *grads = output
    ctx.mark_non_differentiable(count, *grads)
    ctx.save_for_backward(*grads)


def _gradients(ctx, grad_loss, *_):
    def scaled(grad: Tensor) -> Tensor:
        # In place: no second gradient of the size of the weight, and autograd refuses a second backward pass, as it does over
        # freed buffers. A graph that is being traced gets a plain product, and its compiler decides.
        return grad.mul_(grad_loss) if type(grad) is Tensor else grad * grad_loss

    needs = ctx.need_hidden, ctx.need_weight, ctx.need_bias
    hidden, weight, bias = (scaled(grad) if need else None for grad, need in zip(ctx.saved_tensors, needs, strict=True))
    return hidden, weight, None, bias, *(None,) * 6


loss_and_gradients.register_autograd(_gradients, setup_context=_save)


def linear_cross_entropy(
    hidden_NE: Tensor, weight_VE: Tensor, target_N: Tensor, bias_V: Tensor | None = None, *,
    z_loss: float = 0.0, cap: float = 0.0, smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cross entropy of softmax(hidden weight^T + bias) without the logits in memory: (summed loss, float32; targets, int64).

    A target of -100 has no loss and no gradient; (0, 0) is the value of a batch of those; another target outside the vocabulary
    makes the loss NaN. `z_loss` adds z_loss * lse^2 a target (Chowdhery et al. 2022, PaLM, section 5); `cap` bounds the logits
    to cap * tanh(logits / cap) (Gemma 2, section 2), 0 leaves them; `smoothing` spreads that share of the target over the
    whole vocabulary (Szegedy et al. 2016, section 7). Weight and bias are taken in the dtype of the hidden states.

    The gradients are formed in the forward pass when any is needed, so backward does not read the weight, and runs once.
    Raises ValueError for another dtype than bf16, fp16 or float32, for shapes that do not fit and for options out of range.
    """
    N, E = hidden_NE.shape
    if hidden_NE.dtype not in DTYPES:
        raise ValueError(f"linear_cross_entropy: hidden states in {hidden_NE.dtype}, expected bf16, fp16 or float32")
    if weight_VE.shape[1:] != (E,) or target_N.shape != (N,) or (bias_V is not None and bias_V.shape != weight_VE.shape[:1]):
        shapes = [None if x is None else tuple(x.shape) for x in (hidden_NE, weight_VE, target_N, bias_V)]
        raise ValueError(f"linear_cross_entropy: hidden [N, E], weight [V, E], target [N], bias [V] expected, found {shapes}")
    if z_loss < 0 or cap < 0 or not 0 <= smoothing < 1:
        raise ValueError(f"linear_cross_entropy: z_loss {z_loss} and cap {cap} must be 0 or more, smoothing {smoothing} from 0 to below 1")
    inputs = hidden_NE, weight_VE.to(hidden_NE.dtype), None if bias_V is None else bias_V.to(hidden_NE.dtype)
    needs = (x is not None and torch.is_grad_enabled() and x.requires_grad for x in inputs)
    loss, count, *_ = loss_and_gradients(*inputs[:2], target_N, inputs[2], z_loss, cap, smoothing, *needs)
    return loss, count


def cases(architecture: str) -> Iterator[Case]:
    """Every entry of the tables for one architecture, at 8,192 tokens and Llama 3's vocabulary of 128,256, width 4,096."""
    for arch, size in STATISTICS:
        if arch == architecture:
            yield from _cases(size, plain=True)
            yield from _cases(size, plain=False)


def _cases(size: int, plain: bool) -> Iterator[Case]:
    N, V, E = 8192, 128256, 4096
    C = chunk_columns(V, E, size)
    dtype = torch.bfloat16 if size == 2 else torch.float32
    hidden, weight, chunk = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((N, E), (V, E), (N, C)))
    target, lse = torch.empty(N, dtype=torch.int64, device="meta"), torch.empty(N, device="meta")
    bias, rest = None if plain else weight[:, 0], torch.empty_like(hidden) if size == 2 else None
    options = {"cap": 0.0 if plain else 30.0, "smoothing": 0.0 if plain else 0.1}
    label = f"{str(dtype).split('.')[1]}{'' if plain else ' bias cap smoothing'}"
    yield Case(
        f"loss statistics {label}",
        lambda: statistics(hidden, weight, target, bias, **options),
        2 * N * V * E,
        size * (N + V) * E + 16 * N,
    )
    yield Case(
        f"loss logit gradients {label}",
        lambda: logit_gradients_(chunk, 0, hidden, weight, target, bias, lse, z_loss=1e-4, **options),
        2 * N * C * E,
        size * (N * E + C * E + N * C) + 12 * N,
    )
    if plain:
        yield Case(
            f"loss hidden gradients {label}",
            lambda: add_hidden_gradients_(hidden, rest, chunk, weight[:C], first=False),
            2 * N * C * E,
            size * (N * C + C * E + (4 if size == 2 else 2) * N * E),
        )
