"""Linear layer and cross entropy in one: the loss of a language model whose logits are never in memory.

With n targets t_i, logits l = hidden weight^T + bias (l = cap tanh(l / cap) under a soft-cap), lse_i = log sum_v exp l_iv and
smoothed targets q_iv = (1 - smoothing) [v = t_i] + smoothing / V, the loss is

    sum_i lse_i - sum_v q_iv l_iv + z_loss lse_i^2        and        dloss / dl_iv = (1 + 2 z_loss lse_i) exp(l_iv - lse_i) - q_iv

(times 1 - (l / cap)^2 under a soft-cap). Two passes over the vocabulary, after Wijmans et al. 2024 (Cut Your Losses):

1. `kernels.statistics` multiplies tiles of hidden and weight, keeps an online softmax in registers and writes one lse a row and stripe.
2. For each chunk of the vocabulary: `kernels.logit_gradients` multiplies again and writes the chunk's dloss / dl, [N, C]; one library
   product gives those rows of the weight's gradient; `kernels.add_hidden_gradients` adds the chunk's part of the hidden states' gradient.

What it costs, in matrix products of 2 N V E FLOPs: 1 without gradients, 4 with both, against 3 for a pass that keeps all logits
or goes over chunks of tokens. A chunk of tokens needs no second look at the logits, but adds to every row of the weight's
gradient as often as there are chunks: in bf16 that rounds 16 times at a sixteenth of the logits (an error 2.9 times one rounding,
growing with the chunks; small terms vanish), in float32 it takes 4 V E bytes more, the size of all logits at 8,192 tokens and
4,096 wide. Here each row of the weight's gradient is summed over all tokens in float32 and rounded once, and logits are never
rounded at all. In exchange the hidden states' gradient is the one that grows chunk by chunk. It does so in two halves, the
gradient that is returned and what its rounding left (`rest`), 16 bits of mantissa between them in bf16 and 22 in fp16.

fp16 has the mantissa but not the range: what is formed here is the gradient of a loss of weight 1, before a loss scale can protect
it. So dloss / dl is lifted there (`fused.lift`), and each row of the weight's gradient by a power of two of its own, as far as
its sum over tokens cannot overflow (`fused.lift_columns_`); the backward pass takes both back when it multiplies by the loss's weight.
Two more passes over each chunk, then, one of which writes: 6 bytes an element beside the 6 of the products.

Workspace, bytes: N (E + C) size, with C = V / 16 - E (at least SMALLEST_CHUNK) so that the sum is a sixteenth of the logits;
N C size for float32, which needs no rest. At 8,192 tokens, V 128,256, E 4,096, bf16: 67 MB of rest and 63 MB of chunk, where the
logits would be 2,101 MB. The second pass moves 0.7 GB in each of its 34 steps there (the chunk once out and twice in, hidden twice,
the weight twice, both halves of the gradient in and out), 23 GB in all, against 26 TFLOP: 1,100 FLOPs a byte, where an H100 needs 295
to be bound by arithmetic. The first pass writes 8 bytes a row and stripe.

N flattened tokens, V vocabulary, E width, C columns of a chunk of the vocabulary, S stripes of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from . import arguments
from . import cross_entropy_kernels as kernels
from .fused import begin_backward, lift, lift_columns_, peak, scale_
from .launch import INTERPRETED, Case, Launch, architecture, operator
from .reference import IGNORE

SMALLEST_CHUNK = 2048
"""Columns of a chunk at least: the depth of the product that gives the hidden states' gradient, which rereads it for each chunk."""

UNALIGNED = "unaligned"
"""In place of the architecture where rows do not start at multiples of 16 elements: nothing is loaded 128 bits or asynchronously then,
so that the pipeline lives in registers and larger tiles would spill. No case of the static gate: its loads are narrow."""

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
    **{(UNALIGNED, size): _launch(64, 64, 32, 8, 2) for size in (2, 4)},
}
"""Of both gradients."""
STATISTICS: dict[tuple[str, int], Launch] = {
    key: launch._replace(blocks=launch.blocks | {"GROUP": 16, "TILES": 2 if key[0] == INTERPRETED else 32})
    for key, launch in {
        **PRODUCT,
        ("sm_80", 2): _launch(128, 128, 64, 8, 4),  # 128 x 256 spills there
        ("sm_80", 4): _launch(128, 32, 32, 4, 3),  # wider tiles lose their asynchronous loads
    }.items()
}


def _key(*operands: Tensor) -> tuple[str, int]:
    aligned = all(t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in operands)
    arch = architecture()
    return arch if aligned or arch == INTERPRETED else UNALIGNED, operands[0].element_size()


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
    launch = STATISTICS[_key(hidden_NE, weight_VE)]
    S = triton.cdiv(V, launch.blocks["BLOCK_N"] * launch.blocks["TILES"])
    lse_SN = hidden_NE.new_empty(S, N, dtype=torch.float32)
    total_SN = torch.empty_like(lse_SN) if smoothing else lse_SN
    picked_N = torch.zeros_like(lse_SN[0])
    kernels.statistics[triton.cdiv(N, launch.blocks["BLOCK_M"]) * S,](
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
    """Writes dloss / dlogits of the columns start to start + C of the vocabulary into `out_NC`, lifted in fp16."""
    (N, E), V, C = hidden_NE.shape, len(weight_VE), out_NC.shape[1]
    launch, by = PRODUCT[_key(hidden_NE, weight_VE, out_NC)], lift(hidden_NE.dtype)
    kernels.logit_gradients[triton.cdiv(N, launch.blocks["BLOCK_M"]) * triton.cdiv(C, launch.blocks["BLOCK_N"]),](
        hidden_NE, weight_VE, lse_N if bias_V is None else bias_V, target_N, lse_N, out_NC, start, C, N, V, E,
        hidden_NE.stride(0), weight_VE.stride(0), out_NC.stride(0), cap, by * (1 - smoothing), by * smoothing / V, by * z_loss,
        **_flags(bias_V, cap, E % launch.blocks["BLOCK_K"] == 0), IGNORED=IGNORE, LIFT=by, **launch.arguments(),
    )  # fmt: skip


def add_hidden_gradients_(grad_NE: Tensor, rest_NE: Tensor | None, grad_NC: Tensor, weight_CE: Tensor, first: bool) -> None:
    """grad_NE + rest_NE += grad_NC @ weight_CE, in float32; `first`: what they held before does not count."""
    (N, E), C = grad_NE.shape, len(weight_CE)
    launch = PRODUCT[_key(grad_NE, grad_NC, weight_CE)]
    even = C % launch.blocks["BLOCK_K"] == 0 and E % launch.blocks["BLOCK_N"] == 0
    kernels.add_hidden_gradients[triton.cdiv(N, launch.blocks["BLOCK_M"]) * triton.cdiv(E, launch.blocks["BLOCK_N"]),](
        grad_NC, weight_CE, grad_NE, grad_NE if rest_NE is None else rest_NE, N, E, C, grad_NC.stride(0), weight_CE.stride(0),
        FIRST=first, HALVES=rest_NE is not None, EVEN=even, PRECISION="ieee", **launch.arguments(),
    )  # fmt: skip


def _flags(bias_V: Tensor | None, cap: float, even: bool) -> dict[str, object]:
    return {"BIASED": bias_V is not None, "CAP": cap > 0, "EVEN": even, "PRECISION": "ieee"}


def forward(
    hidden_NE: Tensor, weight_VE: Tensor, target_N: Tensor, bias_V: Tensor | None, *, z_loss: float, cap: float, smoothing: float,
    need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, count, gradients of hidden, weight and bias, lift_V); a gradient that is not needed is empty.

    In fp16 the gradients are `lift` times too large, and those of weight and bias by row `lift_V` times more; else it is empty.
    """
    (N, E), V = hidden_NE.shape, len(weight_VE)
    hidden_NE, weight_VE, target_N, bias_V = (
        x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (hidden_NE, weight_VE, target_N, bias_V)
    )
    kept_N = target_N != IGNORE
    *grads, lift_V = _gradients_like(hidden_NE, weight_VE, bias_V, need_hidden, need_weight, need_bias)
    if N == 0:
        return hidden_NE.new_zeros((), dtype=torch.float32), kept_N.sum(), *(g.zero_() for g in grads), lift_V.fill_(1)
    lse_N, picked_N = statistics(hidden_NE, weight_VE, target_N, bias_V, cap, smoothing)
    # Neither a loss nor a gradient for a target that does not exist: both are taken from this.
    lse_N = lse_N.where((target_N >= 0) & (target_N < V), float("nan"))
    loss_N = (lse_N - picked_N + z_loss * lse_N.square()).where(kept_N, 0.0)
    if need_hidden or need_weight or need_bias:
        grad_hidden_NE, grad_weight_VE, grad_bias_V = grads
        C = chunk_columns(V, E, hidden_NE.element_size())
        largest = peak(hidden_NE) if len(lift_V) else None
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
            if len(lift_V):
                lift_V[columns] = lift_columns_(grad_NC, largest)
            if need_weight:
                torch.mm(grad_NC.t(), hidden_NE, out=grad_weight_VE[columns])
            if need_bias:
                grad_bias_V[columns] = grad_NC.sum(0, dtype=torch.float32)
    return loss_N.sum(), kept_N.sum(), *grads, lift_V


def _gradients_like(
    hidden_NE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, need_hidden: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = (hidden_NE, need_hidden), (weight_VE, need_weight), (hidden_NE if bias_V is None else bias_V, need_bias)
    lifted = lift(hidden_NE.dtype) > 1 and (need_weight or need_bias)
    grads = (x.new_empty(x.shape if need else 0) for x, need in like)
    return *grads, weight_VE.new_empty(len(weight_VE) if lifted else 0, dtype=torch.float32)


@operator("bigtrain::linear_cross_entropy")
def loss_and_gradients(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, z_loss: float, cap: float, smoothing: float,
    need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
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
    begin_backward(ctx)
    *grads, lift_V = ctx.saved_tensors
    factor = grad_loss / lift(grads[0].dtype)
    factors = (factor, (factor / lift_V)[:, None], factor / lift_V) if lift_V.numel() else (factor,) * 3
    needs = ctx.need_hidden, ctx.need_weight, ctx.need_bias
    hidden, weight, bias = (scale_(grad, by) if need else None for grad, by, need in zip(grads, factors, needs, strict=True))
    return hidden, weight, None, bias, *(None,) * 6


loss_and_gradients.register_autograd(_gradients, setup_context=_save)


def linear_cross_entropy(
    hidden_NE: Tensor, weight_VE: Tensor, target_N: Tensor, bias_V: Tensor | None = None, *,
    z_loss: float = 0.0, cap: float = 0.0, smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cross entropy of softmax(hidden weight^T + bias) without the logits in memory: (summed loss, float32; targets, int64).

    A target of -100 has no loss and no gradient; (0, 0) is the value of a batch of those; another target outside the vocabulary
    makes the loss and its gradients NaN. `z_loss` adds z_loss * lse^2 a target (Chowdhery et al. 2022, PaLM, section 5); `cap`
    bounds the logits to cap * tanh(logits / cap) (Gemma 2, section 2), 0 leaves them; `smoothing` spreads that share of the
    target over the whole vocabulary (Szegedy et al. 2016, section 7). Weight and bias are taken in the dtype of the hidden states.

    The gradients are formed in the forward pass when any is needed, so backward does not read the weight, and runs once.
    Raises ValueError for another dtype than bf16, fp16 or float32 (of targets: int64 or int32), for shapes that do not fit and
    for options out of range.
    """
    arguments.linear_cross_entropy(hidden_NE, weight_VE, target_N, bias_V, z_loss, cap, smoothing, "triton")
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
