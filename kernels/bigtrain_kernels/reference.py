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


def visible(T: int, S: int, causal: bool, document_BT: Tensor | None, device: torch.device) -> Tensor:
    """Which keys a query may see: bool [1 or B, 1, T, S]. Queries are the last T of the S positions; documents need T == S."""
    ok = torch.ones(1, 1, T, S, dtype=torch.bool, device=device)
    if causal:
        ok = ok.tril(S - T)
    if document_BT is not None:
        ok = ok & (document_BT[:, None, :, None] == document_BT[:, None, None, :])
    return ok


def attention(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, causal: bool, document_BT: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T) v over the visible keys (Vaswani et al. 2017, eq. 1); see `ops.attention`."""
    T, H, D = q_BTHD.shape[1:]
    S, G = k_BSGD.shape[1:3]
    q, k, v = wide(q_BTHD), wide(k_BSGD).repeat_interleave(H // G, 2), wide(v_BSGD).repeat_interleave(H // G, 2)
    score_BHTS = torch.einsum("bthd,bshd->bhts", q, k) * (D**-0.5 if scale is None else scale)
    hidden = ~visible(T, S, causal, document_BT, q.device)
    p_BHTS = torch.softmax(score_BHTS.masked_fill(hidden, torch.finfo(q.dtype).min), -1).masked_fill(hidden, 0)
    return torch.einsum("bhts,bshd->bthd", p_BHTS, v).to(q_BTHD.dtype)


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


def rope(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) by their angle (Su et al. 2021, eq. 34, in the half layout of GPT-NeoX and Llama)."""
    a, b = wide(x_BTHD).chunk(2, -1)
    cos, sin = cos_BTR[:, :, None], sin_BTR[:, :, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_BTHD.dtype)


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
    """act(gate) * up with SiLU (swiglu) or exact GELU (geglu): Shazeer 2020, eq. 6."""
    g = wide(gate)
    if kind == "swiglu":
        act = g * torch.sigmoid(g)
    elif kind == "geglu":
        act = activation(g, "gelu")
    else:
        raise ValueError(f"glu {kind!r}: expected swiglu or geglu")
    return (act * wide(up)).to(gate.dtype)


def linear_cross_entropy(hidden_NE: Tensor, weight_VE: Tensor, target_N: Tensor, bias_V: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of softmax(hidden weight^T + bias) and the number of targets; see `ops.linear_cross_entropy`."""
    logits_NV = F.linear(wide(hidden_NE), wide(weight_VE), None if bias_V is None else wide(bias_V))
    loss = F.cross_entropy(logits_NV, target_N.long(), ignore_index=IGNORE, reduction="sum")
    return loss, (target_N != IGNORE).sum()
