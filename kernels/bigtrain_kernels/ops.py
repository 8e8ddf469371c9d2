"""The operators that a model calls: one signature each, whichever backend computes it.

`backend` is an argument, decided once by `resolve_backends` and passed down; no global is kept. Triton's kernels are imported
where they are called, so that a rank without them pays nothing. Inputs are float32, bf16 or fp16 (float64 for tests, in
torch); sums, norms and losses are taken in float32 inside. All raise ValueError for what they cannot take, as `arguments` says.

B batch, T query length, S key length, H query heads, G key and value heads, D head dim, R = half of the rotary dim,
N flattened tokens, E width, F mlp width, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from . import arguments, fused, host, reference
from .reference import IGNORE, rope_angles

if TYPE_CHECKING:
    from .attention import Ranges

__all__ = [
    "IGNORE", "Backends", "activation", "attention", "attention_mask", "gated_linear", "glu", "layer_norm", "linear_cross_entropy",
    "packed_mask", "range_mask", "resolve_backends", "rms_norm", "rope", "rope_angles",
]  # fmt: skip

Mask = Union[Tensor, "Ranges"]
"""What `attention_mask` makes: for torch 0 where a query may look and -inf elsewhere, [1 or B, 1, T, S]; for Triton the ranges."""


class Backends(NamedTuple):
    """Who computes each family of operators: torch or triton; the MLP also fused, as `gated_linear`."""

    attention: str = "torch"
    norm: str = "torch"
    rope: str = "torch"
    mlp: str = "torch"
    loss: str = "torch"

    @property
    def elementwise(self) -> str:
        """Who computes the activations of an MLP that is not fused."""
        return "triton" if self.mlp == "fused" else self.mlp

    def __str__(self) -> str:
        if len(set(self)) == 1:
            return self[0]
        return ", ".join(f"{family} {backend}" for family, backend in self._asdict().items())


def resolve_backends(device: torch.device | str, backend: str = "auto", choices: Mapping[str, str] | None = None) -> Backends:
    """Who computes what on this device: `backend` (auto, torch, triton) for all, except where `choices` names a family of `Backends`.

    auto is triton on a GPU where Triton is installed, and torch elsewhere. On a CPU triton means Triton's interpreter, slow
    and meant for tests: it wants TRITON_INTERPRET=1 in the environment. Raises ValueError where triton cannot run.
    """
    device, chosen = torch.device(device), dict(choices or {})
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"kernel backend {backend!r}: expected auto, torch or triton")
    for family, name in chosen.items():
        if family not in Backends._fields or name not in ("torch", "triton", *["fused"] * (family == "mlp")):
            raise ValueError(f"kernel backend {family}={name!r}: expected torch or triton for one of {', '.join(Backends._fields)}")
    if backend == "auto":
        backend = "triton" if device.type == "cuda" and importlib.util.find_spec("triton") else "torch"
    backends = Backends(*(backend,) * len(Backends._fields))._replace(**chosen)
    if set(backends) != {"torch"}:
        _require_triton(device)
    return backends


def _require_triton(device: torch.device) -> None:
    if importlib.util.find_spec("triton") is None:
        raise ValueError("the triton kernels need Triton, which is not installed; use kernels.backend=torch")
    if device.type == "cuda":
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"the triton kernels run on a GPU, and this device is {device.type}; use kernels.backend=torch, or set TRITON_INTERPRET=1 "
            "to have Triton's interpreter run them (slowly: for tests)"
        )
    _repair_interpreter()


@functools.cache
def _repair_interpreter() -> None:
    from . import interpreter

    interpreter.install()


def attention_mask(
    T: int,
    S: int,
    *,
    causal: bool,
    document_BT: Tensor | None = None,
    window: int | None = None,
    dtype: torch.dtype,
    device: torch.device,
    backend: str = "torch",
) -> Mask | None:
    """What `attention` needs to know beside its flags, made once and shared by all layers (each would keep its own for backward).

    None where causal alone says it.
    """
    arguments.documents("attention_mask", "B", T, S, document_BT)
    arguments.window_size("attention_mask", window)
    triton = arguments.on_triton(backend)
    if document_BT is None and window is None and (not causal or T == 1 or (T == S or triton)):
        return None
    if triton:
        return _range_mask(*reference.seen_keys(T, S, causal, document_BT, window, device), S, dtype, triton)
    return _additive(reference.visible(T, S, causal, document_BT, device, window), dtype)


def packed_mask(
    end_query: Tensor, end_key: Tensor, *, causal: bool, window: int | None = None, dtype: torch.dtype, backend: str = "torch"
) -> Mask:
    """The mask of several sequences laid end to end, with as many queries and keys as the caller likes: `attention` then takes
    q [1, all queries, H, D] and k, v [1, all keys, G, D]. `end_query` and `end_key` are the running totals of their lengths,
    int32 or int64, starting with 0 (cu_seqlens in other libraries); empty sequences may be among them. In each the queries are
    the last positions, as in `attention`.
    """
    arguments.window_size("packed_mask", window)
    T, S = arguments.running_totals(end_query, end_key)
    return _range_mask(*reference.packed_keys(end_query, end_key, T, causal, window), S, dtype, arguments.on_triton(backend))


def range_mask(first_key_BT: Tensor, end_key_BT: Tensor, S: int, dtype: torch.dtype, backend: str = "torch") -> Mask:
    """The mask in which query t sees the keys first_key <= s < end_key of S: int32 [1 or B, T], neither ever decreasing along T."""
    arguments.key_ranges(first_key_BT, end_key_BT, S)
    return _range_mask(first_key_BT, end_key_BT, S, dtype, arguments.on_triton(backend))


def _range_mask(first_key_BT: Tensor, end_key_BT: Tensor, S: int, dtype: torch.dtype, triton: bool) -> Mask:
    if triton:
        from .attention import ranges

        return ranges(first_key_BT, end_key_BT, S)
    key = torch.arange(S, device=first_key_BT.device)
    return _additive(((key >= first_key_BT[..., None]) & (key < end_key_BT[..., None]))[:, None], dtype)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    *,
    causal: bool,
    document_BT: Tensor | None = None,
    window: int | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
    cap: float = 0.0,
    sink_H: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "torch",
) -> Tensor | tuple[Tensor, Tensor]:
    """Grouped-query attention (Ainslie et al. 2023): query head h reads key head h // (H / G). Returns out_BTHD.

    The queries are the last T of the S positions, so `causal` hides s > t + S - T, as with a KV cache. `document_BT`
    (integer ids, T == S) hides positions with another id: packed documents, or padding under an id of its own; a document is
    one run of positions. `window` hides keys that are that many positions away, or more (Beltagy et al. 2020). `mask` is what
    `attention_mask` made of the same arguments; left out, it is made here. A query that sees no key gives 0.

    scale       multiplies the scores, 1 / sqrt(D) if left out
    cap         then cap * tanh(score / cap), where it is above 0 (Gemma Team 2024, Gemma 2, section 2)
    sink_H      one more score a head that takes probability and adds nothing (OpenAI 2025, gpt-oss, section 2.2)
    return_lse  (out, lse_BHT): also the log of the sum of exponentials of a query's scores, float32, the sink among them; -inf
                where it sees no key. Both carry gradients, so that attention over parts of the keys can be combined.
    """
    triton = arguments.on_triton(backend)
    arguments.attention(q_BTHD, k_BSGD, v_BSGD, document_BT, window, mask, scale, cap, sink_H, backend)
    T, H, D = q_BTHD.shape[1:]
    S, G = k_BSGD.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    if mask is None:
        mask = attention_mask(
            T, S, causal=causal, document_BT=document_BT, window=window, dtype=q_BTHD.dtype, device=q_BTHD.device, backend=backend
        )
    if triton:
        from .attention import attention as flash

        sink_H = None if sink_H is None else sink_H.contiguous()
        out_BTHD, lse_BHT = flash(q_BTHD, k_BSGD, v_BSGD, sink_H, *(mask or (None,) * 4), causal and mask is None, scale, cap)
        return (out_BTHD, lse_BHT) if return_lse else out_BTHD
    if cap or sink_H is not None or return_lse:
        visible = None if mask is None else mask == 0
        out_BTHD, lse_BHT = reference.scores_to_output(q_BTHD, k_BSGD, v_BSGD, visible, causal, scale, cap, sink_H)
        return (out_BTHD, lse_BHT) if return_lse else out_BTHD
    q_BHTD, k_BGSD, v_BGSD = q_BTHD.transpose(1, 2), k_BSGD.transpose(1, 2), v_BSGD.transpose(1, 2)
    # A dense mask beside grouped heads has no fused CUDA kernel: repeat the heads there rather than materialise the scores.
    if mask is not None and G != H and q_BTHD.is_cuda:
        k_BGSD, v_BGSD = k_BGSD.repeat_interleave(H // G, 1), v_BGSD.repeat_interleave(H // G, 1)
    is_causal = causal and mask is None and T > 1
    if q_BTHD.dtype == torch.bfloat16 and q_BTHD.device.type == "cpu" and torch.is_grad_enabled():
        k_BHSD, v_BHSD = (x.repeat_interleave(H // G, 1) if G != H else x for x in (k_BGSD, v_BGSD))
        return host.Attention.apply(q_BHTD, k_BHSD, v_BHSD, mask, is_causal, scale).transpose(1, 2)
    out_BHTD = F.scaled_dot_product_attention(
        q_BHTD, k_BGSD, v_BGSD, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=k_BGSD.shape[1] != H
    )
    return out_BHTD.transpose(1, 2)


def rms_norm(x: Tensor, weight_E: Tensor, eps: float, *, residual: Tensor | None = None, backend: str = "torch"):
    """RMSNorm over the last dimension: x [..., E]. With `residual`: (norm of x + residual, x + residual)."""
    if arguments.on_triton(backend):
        from .norm import rms_norm as kernel

        return kernel(x, weight_E, eps, residual)
    arguments.norm("rms_norm", x, residual, backend, weight_E=weight_E)
    normed, total = fused.RmsNorm.apply(x, residual, weight_E, eps)
    return normed if residual is None else (normed, total)


def layer_norm(x: Tensor, weight_E: Tensor, bias_E: Tensor, eps: float, *, residual: Tensor | None = None, backend: str = "torch"):
    """LayerNorm over the last dimension: x [..., E]. With `residual`: (norm of x + residual, x + residual)."""
    if arguments.on_triton(backend):
        from .norm import layer_norm as kernel

        return kernel(x, weight_E, bias_E, eps, residual)
    arguments.norm("layer_norm", x, residual, backend, weight_E=weight_E, bias_E=bias_E)
    total = x if residual is None else x + residual
    # torch takes weights of another dtype on some devices only.
    dtype = x.dtype if weight_E.dtype == bias_E.dtype == x.dtype else reference.wide_dtype(x)
    normed = F.layer_norm(total.to(dtype), weight_E.shape, weight_E.to(dtype), bias_E.to(dtype), eps).to(x.dtype)
    return normed if residual is None else (normed, total)


def rope(
    q_BTHD: Tensor, k_BTGD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, interleaved: bool = False, backend: str = "torch"
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by the angles of `rope_angles` ([1 or B, T, R], float32), in the half layout of Llama or, with
    `interleaved`, that of GPT-J. Where 2R is less than D the rest of a head passes through."""
    if arguments.on_triton(backend):
        from .rope import rope as kernel

        return kernel(q_BTHD, k_BTGD, cos_BTR, sin_BTR, interleaved)
    arguments.rope(q_BTHD, k_BTGD, cos_BTR, sin_BTR, backend)
    return tuple(fused.Rope.apply(x_BTHD, cos_BTR, sin_BTR, interleaved) for x_BTHD in (q_BTHD, k_BTGD))


def glu(gate: Tensor, up: Tensor, kind: str, *, backend: str = "torch") -> Tensor:
    """act(gate) * up, elementwise: swiglu (SiLU), geglu (exact GELU) or geglu_tanh."""
    if arguments.on_triton(backend):
        from .mlp import glu as kernel

        return kernel(gate, up, kind)
    arguments.glu(gate, up, kind, backend)
    return fused.Glu.apply(gate, up, kind)


def gated_linear(x: Tensor, gate_FE: Tensor, up_FE: Tensor, kind: str, *, backend: str = "torch") -> Tensor:
    """act(x gate^T) * (x up^T), kinds as for `glu`: x [..., E] -> [..., F]. On Triton one kernel, and neither product is kept."""
    triton = arguments.on_triton(backend)
    arguments.gated_linear(x, gate_FE, up_FE, kind, backend)
    if triton:
        from .gated_linear import gated_linear as kernel

        return kernel(fused.flat(x), gate_FE, up_FE, kind).view(*x.shape[:-1], gate_FE.shape[0])
    return glu(F.linear(x, gate_FE), F.linear(x, up_FE), kind)


def activation(x: Tensor, kind: str, *, backend: str = "torch") -> Tensor:
    """gelu (exact), gelu_tanh or relu2 (squared ReLU), elementwise."""
    if arguments.on_triton(backend):
        from .mlp import activation as kernel

        return kernel(x, kind)
    arguments.activation(x, kind, backend)
    if kind == "relu2":
        return F.relu(x).square()
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def linear_cross_entropy(
    hidden_NE: Tensor,
    weight_VE: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None = None,
    *,
    z_loss: float = 0.0,
    cap: float = 0.0,
    smoothing: float = 0.0,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Cross entropy of softmax(hidden weight^T + bias) without the logits of the whole batch in memory.

    Returns (loss summed over the targets, float32; number of targets, int64), both scalars; a target of -100 has no loss and
    no gradient, and (0, 0) is the value of a batch of those. Targets are int64 or int32; another one outside the vocabulary is
    an error where a value may be looked at, in torch on the host (IndexError), and makes loss and gradients NaN on Triton. Rows
    of `weight_VE` beyond the tokenizer's take part in the softmax like any other. Weight and bias are taken in the dtype of the
    hidden states. The gradients are formed in the forward pass when any is needed, so backward runs once.

    z_loss     adds z_loss * logsumexp^2 a target (Chowdhery et al. 2022, PaLM, section 5)
    cap        bounds the logits to cap * tanh(logits / cap), where it is above 0 (Gemma Team 2024, Gemma 2, section 2)
    smoothing  spreads that share of each target over the whole vocabulary (Szegedy et al. 2016, section 7)
    """
    options = {"z_loss": z_loss, "cap": cap, "smoothing": smoothing}
    if arguments.on_triton(backend):
        from .cross_entropy import linear_cross_entropy as kernel

        return kernel(hidden_NE, weight_VE, target_N, bias_V, **options)
    arguments.linear_cross_entropy(hidden_NE, weight_VE, target_N, bias_V, **options, backend=backend)
    weight_VE, bias_V = (None if t is None else t.to(hidden_NE.dtype) for t in (weight_VE, bias_V))
    need_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden_NE, weight_VE, bias_V))
    return fused.LinearCrossEntropy.apply(
        hidden_NE, weight_VE, bias_V, target_N, need_grad, *(options.values() if any(options.values()) else ())
    )
