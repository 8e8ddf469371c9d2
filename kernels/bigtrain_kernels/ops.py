"""The operators that a model calls: one signature each, whichever backend computes it.

`backend` is an argument, decided once by `resolve_backend` and passed down; no global is kept. Inputs are float32, bf16
or fp16 (float64 for tests); sums, norms and losses are taken in float32 inside.

B batch, T query length, S key length, H query heads, G key and value heads, D head dim, R = D / 2, N flattened tokens,
E width, F mlp width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fused, host, reference
from .reference import IGNORE, rope_angles

__all__ = [
    "IGNORE", "activation", "attention", "attention_mask", "glu", "layer_norm", "linear_cross_entropy", "resolve_backend", "rms_norm",
    "rope", "rope_angles",
]  # fmt: skip

BACKENDS = ("torch",)


def resolve_backend(name: str, device: torch.device | str) -> str:
    """The backend that `auto` means on this device, or `name` itself. Raises ValueError for a name that is none."""
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"kernel backend {name!r}: expected auto or one of {', '.join(BACKENDS)}")
    return "torch"


def attention_mask(
    T: int, S: int, *, causal: bool, document_BT: Tensor | None, dtype: torch.dtype, device: torch.device, backend: str = "torch"
) -> Tensor | None:
    """What `attention` needs to know beside its flags, made once and shared by all layers (each would keep its own for backward).

    For torch: 0 where a query may look and -inf elsewhere, [1 or B, 1, T, S]; None where causal alone says it.
    """
    if document_BT is None and (not causal or T == 1 or T == S):
        return None
    hidden = ~reference.visible(T, S, causal, document_BT, device)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    *,
    causal: bool,
    document_BT: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "torch",
) -> Tensor:
    """Grouped-query attention (Ainslie et al. 2023): query head h reads key head h // (H / G). Returns out_BTHD.

    The queries are the last T of the S positions, so `causal` hides s > t + S - T, as with a KV cache. `document_BT`
    (integer ids, T == S) hides positions with another id: packed documents, or padding under an id of its own. A query
    that sees no key gives 0. `scale` multiplies the scores, 1 / sqrt(D) if left out. `mask` is what `attention_mask` made
    of the same arguments; left out, it is made here.
    """
    _, T, H, D = q_BTHD.shape
    S, G = k_BSGD.shape[1:3]
    if document_BT is not None and T != S:
        raise ValueError(f"document_BT needs as many queries as keys, found {T} and {S}")
    if mask is None:
        mask = attention_mask(T, S, causal=causal, document_BT=document_BT, dtype=q_BTHD.dtype, device=q_BTHD.device, backend=backend)
    q_BHTD, k_BGSD, v_BGSD = q_BTHD.transpose(1, 2), k_BSGD.transpose(1, 2), v_BSGD.transpose(1, 2)
    # A dense mask beside grouped heads has no fused CUDA kernel: repeat the heads there rather than materialise the scores.
    if mask is not None and G != H and q_BTHD.is_cuda:
        k_BGSD, v_BGSD = k_BGSD.repeat_interleave(H // G, 1), v_BGSD.repeat_interleave(H // G, 1)
    is_causal = causal and mask is None and T > 1
    if q_BTHD.dtype == torch.bfloat16 and q_BTHD.device.type == "cpu" and torch.is_grad_enabled():
        k_BHSD, v_BHSD = (x.repeat_interleave(H // G, 1) if G != H else x for x in (k_BGSD, v_BGSD))
        out_BHTD = host.Attention.apply(q_BHTD, k_BHSD, v_BHSD, mask, is_causal, D**-0.5 if scale is None else scale)
        return out_BHTD.transpose(1, 2)
    out_BHTD = F.scaled_dot_product_attention(
        q_BHTD, k_BGSD, v_BGSD, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=k_BGSD.shape[1] != H
    )
    return out_BHTD.transpose(1, 2)


def rms_norm(x: Tensor, weight_E: Tensor, eps: float, *, residual: Tensor | None = None, backend: str = "torch"):
    """RMSNorm over the last dimension: x [..., E]. With `residual`: (norm of x + residual, x + residual)."""
    flat = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (x, residual)]
    normed, total = fused.RmsNorm.apply(*flat, weight_E, eps)
    return normed.view(x.shape) if residual is None else (normed.view(x.shape), total.view(x.shape))


def layer_norm(x: Tensor, weight_E: Tensor, bias_E: Tensor, eps: float, *, residual: Tensor | None = None, backend: str = "torch"):
    """LayerNorm over the last dimension: x [..., E]. With `residual`: (norm of x + residual, x + residual)."""
    total = x if residual is None else x + residual
    normed = F.layer_norm(total, weight_E.shape, weight_E, bias_E, eps)
    return normed if residual is None else (normed, total)


def rope(q_BTHD: Tensor, k_BTGD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, backend: str = "torch") -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by the angles of `rope_angles` ([1 or B, T, D / 2], float32), in the half layout of Llama."""
    return fused.Rope.apply(q_BTHD, cos_BTR, sin_BTR), fused.Rope.apply(k_BTGD, cos_BTR, sin_BTR)


def glu(gate: Tensor, up: Tensor, kind: str, *, backend: str = "torch") -> Tensor:
    """act(gate) * up, elementwise: swiglu (SiLU) or geglu (exact GELU)."""
    if kind not in ("swiglu", "geglu"):
        raise ValueError(f"glu {kind!r}: expected swiglu or geglu")
    return fused.Glu.apply(gate, up, kind)


def activation(x: Tensor, kind: str, *, backend: str = "torch") -> Tensor:
    """gelu (exact), gelu_tanh or relu2 (squared ReLU), elementwise."""
    if kind == "relu2":
        return F.relu(x).square()
    if kind not in ("gelu", "gelu_tanh"):
        raise ValueError(f"activation {kind!r}: expected gelu, gelu_tanh or relu2")
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def linear_cross_entropy(
    hidden_NE: Tensor, weight_VE: Tensor, target_N: Tensor, bias_V: Tensor | None = None, *, backend: str = "torch"
) -> tuple[Tensor, Tensor]:
    """Cross entropy of softmax(hidden weight^T + bias) without the logits of the whole batch in memory.

    Returns (loss summed over the targets, float32; number of targets, int64), both scalars; a target of -100 has no loss and
    no gradient, and (0, 0) is the value of a batch of those. Rows of `weight_VE` beyond the tokenizer's take part in the
    softmax like any other. The gradients are formed in the forward pass when any is needed, so backward runs once.
    """
    need_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden_NE, weight_VE, bias_V))
    return fused.LinearCrossEntropy.apply(hidden_NE, weight_VE, bias_V, target_N, need_grad)
