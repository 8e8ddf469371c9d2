"""The mathematics of every operator in plain torch: what `ops` must compute, in any floating dtype and differentiable.

Written to be read and to be tested against, not to be fast: scores and logits are materialised, and everything that is
narrower than float32 is computed in float32 and rounded once at the end.

B batch, T query length, S key length, H query heads, G key and value heads, D head dim, N flattened tokens, E width,
F mlp width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Target of a token that carries no loss."""


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x))


def visible(T: int, S: int, causal: bool, document_BT: Tensor | None, device: torch.device, window: int | None = None) -> Tensor:
    """Which keys a query may see: bool [1 or B, 1, T, S]. Queries are the last T of the S positions; documents need T == S."""
    ok = torch.ones(1, 1, T, S, dtype=torch.bool, device=device)
    if causal:
        ok = ok.tril(S - T)
    if window is not None:
        ok = ok.triu(S - T - window + 1).tril(S - T + window - 1)
    if document_BT is not None:
        ok = ok & (document_BT[:, None, :, None] == document_BT[:, None, None, :])
    return ok


def seen_keys(T: int, S: int, causal: bool, document_BT: Tensor | None, window: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """`visible` as ranges: query t sees first[t] <= s < end[t], two int32 tensors [1 or B, T]. A document is one run of positions."""
    place_T = torch.arange(S - T, S, device=device)
    if document_BT is None:
        first, end = torch.zeros(1, T, dtype=torch.int64, device=device), torch.full((1, T), S, device=device)
    else:
        ends_BT = document_BT.diff(append=document_BT[:, -1:] - 1) != 0
        begins_BT = ends_BT.roll(1, -1)  # the last position ends a document: so the first begins one
        first = torch.where(begins_BT, place_T, 0).cummax(-1).values
        end = torch.where(ends_BT, place_T + 1, S).flip(-1).cummin(-1).values.flip(-1)
    return _narrow(place_T, first, end, causal, window)


def packed_keys(end_query: Tensor, end_key: Tensor, T: int, causal: bool, window: int | None) -> tuple[Tensor, Tensor]:
    """The ranges of T queries of sequences laid end to end, by the running totals of the lengths."""
    lengths = end_query.diff()
    each = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=T)
    place_T = torch.arange(T, device=lengths.device) - end_query[1:][each] + end_key[1:][each]
    first, end = (end_key[each].expand(1, T), end_key[1:][each].expand(1, T))
    return _narrow(place_T, first, end, causal, window)


def _narrow(place_T: Tensor, first: Tensor, end: Tensor, causal: bool, window: int | None) -> tuple[Tensor, Tensor]:
    """Ranges cut by a causal order and a window around each query's place among the keys."""
    begin = first
    if causal:
        end = torch.minimum(end, place_T + 1)
    if window is not None:
        first = torch.maximum(first, place_T - window + 1)
        end = torch.minimum(end, place_T + window)
    # Nothing to see is an empty range at the document's first key, or at the end of a window that has left it behind.
    end = torch.maximum(end, begin)
    return torch.minimum(first, end).int(), end.int()


def attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    *,
    causal: bool,
    document_BT: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    cap: float = 0.0,
    sink_H: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the visible keys (Vaswani et al. 2017, eq. 1); see `ops.attention`."""
    T, S, D = q_BTHD.shape[1], k_BSGD.shape[1], q_BTHD.shape[3]
    seen = visible(T, S, causal, document_BT, q_BTHD.device, window)
    out_BTHD, lse_BHT = scores_to_output(q_BTHD, k_BSGD, v_BSGD, seen, causal, D**-0.5 if scale is None else scale, cap, sink_H)
    return (out_BTHD, lse_BHT) if return_lse else out_BTHD


def scores_to_output(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    visible_BHTS: Tensor | None,
    causal: bool,
    scale: float,
    cap: float,
    sink_H: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output and the log of the sum of exponentials, [B, H, T], with every score in memory. `causal` counts where nothing else
    says what is visible."""
    (B, T, H, _), (S, G) = q_BTHD.shape, k_BSGD.shape[1:3]
    q, k, v = wide(q_BTHD), wide(k_BSGD).repeat_interleave(H // G, 2), wide(v_BSGD).repeat_interleave(H // G, 2)
    score_BHTS = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if cap:
        score_BHTS = cap * torch.tanh(score_BHTS / cap)
    hidden = ~(visible(T, S, causal, None, q.device) if visible_BHTS is None else visible_BHTS)
    least = torch.finfo(q.dtype).min
    score_BHTS = score_BHTS.masked_fill(hidden, least)
    # Of a sink of -inf where nothing is seen no finite score is left: -inf in a log-sum-exp of nothing else has no gradient.
    extra = [] if sink_H is None else [wide(sink_H).clamp_min(least)[None, :, None, None].expand(B, H, T, 1)]
    lse_BHT1 = torch.cat([score_BHTS, *extra], -1).logsumexp(-1, keepdim=True)
    p_BHTS = torch.exp(score_BHTS - lse_BHT1).masked_fill(hidden, 0)
    out_BTHD = torch.einsum("bhts,bshd->bthd", p_BHTS, v).to(q_BTHD.dtype)
    nothing = hidden.all(-1) if sink_H is None else hidden.all(-1) & (sink_H == float("-inf"))[:, None]
    return out_BTHD, lse_BHT1.squeeze(-1).masked_fill(nothing, float("-inf"))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, eq. 4)."""
    w = wide(x)
    return (w * torch.rsqrt(w.square().mean(-1, keepdim=True) + eps) * wide(weight)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / std * weight + bias over the last dimension (Ba et al. 2016, eq. 4)."""
    w = wide(x)
    centred = w - w.mean(-1, keepdim=True)
    return (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * wide(weight) + wide(bias)).to(x.dtype)


def rope_angles(position_BT: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i / head_dim), i < head_dim / 2: two float32 tensors [B, T, head_dim / 2]."""
    frequency = theta ** (torch.arange(0, head_dim, 2, device=position_BT.device, dtype=torch.float32) / -head_dim)
    angle = position_BT[..., None].float() * frequency
    return angle.cos(), angle.sin()


def rope(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate pairs of x by their angle (Su et al. 2021, eq. 34): x[i] and x[i + R] in the half layout of GPT-NeoX and Llama, x[2i]
    and x[2i + 1] in the interleaved one of GPT-J. What lies beyond the first 2R passes through."""
    R = cos_BTR.shape[-1]
    turned, rest = wide(x_BTHD).split([2 * R, x_BTHD.shape[-1] - 2 * R], -1)
    a, b = turned.unflatten(-1, (R, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    cos, sin = cos_BTR[:, :, None], sin_BTR[:, :, None]
    parts = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([turned, rest], -1).to(x_BTHD.dtype)


def activation(x: Tensor, kind: str) -> Tensor:
    """gelu (exact) and gelu_tanh: Hendrycks and Gimpel 2016; relu2: So et al. 2021 (Primer)."""
    w = wide(x)
    if kind == "gelu":
        out = 0.5 * w * (1 + torch.erf(w * 0.5**0.5))
    elif kind == "gelu_tanh":
        out = 0.5 * w * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (w + 0.044715 * w**3)))
    elif kind == "relu2":
        out = torch.relu(w).square()
    else:
        raise ValueError(f"activation {kind!r}: expected gelu, gelu_tanh or relu2")
    return out.to(x.dtype)


def glu(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """act(gate) * up with SiLU (swiglu), exact GELU (geglu) or its tanh form (geglu_tanh): Shazeer 2020, eq. 6."""
    g = wide(gate)
    if kind == "swiglu":
        act = g * torch.sigmoid(g)
    elif kind in ("geglu", "geglu_tanh"):
        act = activation(g, "gelu" if kind == "geglu" else "gelu_tanh")
    else:
        raise ValueError(f"glu {kind!r}: expected swiglu, geglu or geglu_tanh")
    return (act * wide(up)).to(gate.dtype)


def linear_cross_entropy(
    hidden_NE: Tensor,
    weight_VE: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None = None,
    *,
    z_loss: float = 0.0,
    cap: float = 0.0,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of softmax(hidden weight^T + bias) and the number of targets; see `ops.linear_cross_entropy`.

    z_loss * logsumexp^2 a target: Chowdhery et al. 2022 (PaLM), section 5; logits = cap tanh(logits / cap): Gemma 2, section 2;
    smoothing: Szegedy et al. 2016, section 7.
    """
    logits_NV = F.linear(wide(hidden_NE), wide(weight_VE), None if bias_V is None else wide(bias_V))
    if cap:
        logits_NV = cap * torch.tanh(logits_NV / cap)
    keep_N = target_N != IGNORE
    loss = F.cross_entropy(logits_NV, target_N.long(), ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
    if z_loss:
        loss = loss + z_loss * logits_NV.logsumexp(-1).square().where(keep_N, 0).sum()
    return loss, keep_N.sum()
