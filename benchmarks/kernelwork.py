"""What kernels.py measures: operators at sizes of real models, what computes them, what is right, and how much work it is.

B batch, T sequence length, H query heads, G key and value heads, D head dim, N tokens, E width, F MLP width, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bigtrain_kernels import ops, reference

DEVICE = "cuda"
CHUNK = 512
"""Queries, and tokens of a loss, whose scores or logits are in memory in float64 at a time."""


class Part(NamedTuple):
    """Of the inputs and of the outputs: what can be computed by itself."""

    inputs: tuple[object, ...]
    outputs: tuple[object, ...]
    """An index each."""


class Work(NamedTuple):
    """One operator at one size."""

    name: str
    inputs: list[Tensor]
    """Those that are floating point are given a gradient; bf16."""
    grads: list[Tensor]
    """Of the outputs."""
    exact: Callable[..., object]
    """The mathematics, in the dtype of its inputs."""
    variants: dict[str, Callable[..., object]]
    forward: float
    backward: float
    """FLOPs, or the bytes that must move: each input read once, each output written once."""
    unit: str
    parts: list[Part] | None = None
    """Of `exact`, where the whole would not fit in float64; their gradients add up."""
    early: tuple[str, ...] = ()
    """Variants whose forward pass makes the gradients: their rates are of both passes together."""


ARITHMETIC, MEMORY = "TFLOP/s", "GB/s"


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE).bfloat16()


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def peer(module: str, name: str) -> Callable | None:
    """A function of a package that is not required, None where that is not installed."""
    try:
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except ImportError:
        return None


def documents(T: int) -> list[int]:
    """Where the documents of a sequence end: seven, of a sixteenth to five sixteenths of it."""
    return [T * n // 16 for n in (1, 4, 5, 10, 12, 15, 16)]


def attention(D: int, H: int, G: int, B: int, T: int, packed: bool = False) -> Work:
    """Causal; `packed`: in each of the documents alone."""
    ends = documents(T) if packed else [T]
    begins = [0, *ends[:-1]]
    lengths = torch.tensor([end - begin for begin, end in zip(begins, ends)], device=DEVICE)
    document_BT = torch.repeat_interleave(torch.arange(len(ends), device=DEVICE), lengths).expand(B, T)
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=DEVICE)
    seen_BT = document_BT if packed else None

    def ours(q, k, v):
        return ops.attention(q, k, v, causal=True, mask=mask, backend="triton")

    def sdpa(backend: str) -> Callable[..., Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def attend(q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(
                    q, k, v, attn_mask=visible() if packed else None, is_causal=not packed, enable_gqa=G != H
                ).transpose(1, 2)

        return attend

    @functools.cache
    def visible() -> Tensor:
        return reference.visible(T, T, True, seen_BT, torch.device(DEVICE))

    @compiled
    def plain_compiled(q, k, v, visible):
        q, k, v = q.transpose(1, 2), *(x.repeat_interleave(H // G, 2).transpose(1, 2) for x in (k, v))
        score = (q @ k.transpose(2, 3) * D**-0.5).masked_fill(~visible, float("-inf"))
        return (score.float().softmax(-1).to(q.dtype) @ v).transpose(1, 2)

    @functools.cache
    def flex() -> Callable[..., Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        document_T = document_BT[0]

        def seen(b, h, query, key):
            return (query >= key) & (document_T[query] == document_T[key])

        def causal(b, h, query, key):
            return query >= key

        blocks = create_block_mask(seen if packed else causal, None, None, T, T, device=DEVICE)
        return functools.partial(compiled(flex_attention), block_mask=blocks, enable_gqa=G != H)

    def varlen(q, k, v):
        from torch.nn.attention.varlen import varlen_attn

        longest = max(end - begin for begin, end in zip(begins, ends))
        return varlen_attn(
            *(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0), enable_gqa=G != H
        ).view_as(q)

    inputs = [randn(B, T, H, D), randn(B, T, G, D), randn(B, T, G, D)]
    mask = ops.attention_mask(T, T, causal=True, document_BT=seen_BT, dtype=torch.bfloat16, device=inputs[0].device, backend="triton")
    variants = {"bigtrain": ours}
    if packed:
        variants |= {"torch varlen": varlen, "torch efficient, dense mask": sdpa("EFFICIENT_ATTENTION")}
    else:
        variants |= {"torch flash": sdpa("FLASH_ATTENTION"), "torch cudnn": sdpa("CUDNN_ATTENTION")}
    variants["torch.compile"] = lambda q, k, v: plain_compiled(q, k, v, visible())
    variants["flex_attention"] = lambda q, k, v: flex()(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    if fla := peer("fla.ops.attn.parallel", "parallel_attn"):
        variants["fla"] = lambda q, k, v: fla(q, k, v, cu_seqlens=cu_seqlens.long() if packed else None)
    parts = []
    for b in range(B):
        for g in range(G):
            heads, head = slice(g * (H // G), (g + 1) * (H // G)), slice(g, g + 1)
            for begin, end in zip(begins, ends):
                for start in range(begin, end, CHUNK):  # as in ops.attention the queries are the last of the keys' positions
                    stop = min(start + CHUNK, end)
                    queries, keys = (slice(b, b + 1), slice(start, stop), heads), (slice(b, b + 1), slice(begin, stop), head)
                    parts.append(Part((queries, keys, keys), (queries,)))
    pairs = B * H * sum((end - begin) * (end - begin + 1) // 2 for begin, end in zip(begins, ends))
    name = f"attention d{D} {H}/{G} heads {T}" + " documents" * packed
    exact = functools.partial(reference.attention, causal=True)
    return Work(name, inputs, [randn(B, T, H, D)], exact, variants, 4 * pairs * D, 10 * pairs * D, ARITHMETIC, parts)


def rms_norm(N: int, E: int) -> Work:
    def plain(x, weight):
        return F.rms_norm(x, weight.shape, weight, 1e-5)

    variants = {"bigtrain": lambda x, w: ops.rms_norm(x, w, 1e-5, backend="triton"), "torch": plain, "torch.compile": compiled(plain)}
    if liger := peer("liger_kernel.ops.rms_norm", "LigerRMSNormFunction.apply"):
        variants["liger"] = lambda x, w: liger(x, w, 1e-5)
    exact = functools.partial(reference.rms_norm, eps=1e-5)
    return Work(f"RMSNorm {E}", [randn(N, E), randn(E)], [randn(N, E)], exact, variants, 4 * N * E, 6 * N * E, MEMORY)


def layer_norm(N: int, E: int) -> Work:
    def plain(x, weight, bias):
        return F.layer_norm(x, weight.shape, weight, bias, 1e-5)

    def ours(x, weight, bias):
        return ops.layer_norm(x, weight, bias, 1e-5, backend="triton")

    variants = {"bigtrain": ours, "torch": plain, "torch.compile": compiled(plain)}
    if liger := peer("liger_kernel.ops.layer_norm", "LigerLayerNormFunction.apply"):
        variants["liger"] = lambda x, w, b: liger(x, w, b, 1e-5)
    exact = functools.partial(reference.layer_norm, eps=1e-5)
    return Work(f"LayerNorm {E}", [randn(N, E), randn(E), randn(E)], [randn(N, E)], exact, variants, 4 * N * E, 6 * N * E, MEMORY)


def rope(B: int, T: int, H: int, G: int, D: int) -> Work:
    cos, sin = ops.rope_angles(torch.arange(T, device=DEVICE)[None], D, 1e4)

    def plain(q, k):
        return reference.rope(q, cos, sin), reference.rope(k, cos, sin)

    variants = {"bigtrain": lambda q, k: ops.rope(q, k, cos, sin, backend="triton"), "torch": plain, "torch.compile": compiled(plain)}
    if liger := peer("liger_kernel.ops.rope", "LigerRopeFunction.apply"):
        twice = [torch.cat([angle, angle], -1) for angle in (cos, sin)]
        variants["liger"] = lambda q, k: [x.transpose(1, 2) for x in liger(q.transpose(1, 2), k.transpose(1, 2), *twice)]
    inputs, grads = ([randn(B, T, H, D), randn(B, T, G, D)] for _ in range(2))
    moved = 4 * sum(x.numel() for x in inputs)
    return Work(f"RoPE d{D} {H}/{G} heads", inputs, grads, plain, variants, moved, moved, MEMORY)


def glu(kind: str, N: int, width: int) -> Work:
    def plain(gate, up):
        return (F.silu(gate) if kind == "swiglu" else F.gelu(gate, approximate="tanh")) * up

    variants = {"bigtrain": lambda g, u: ops.glu(g, u, kind, backend="triton"), "torch": plain, "torch.compile": compiled(plain)}
    module, name = {"swiglu": ("swiglu", "LigerSiLUMulFunction"), "geglu_tanh": ("geglu", "LigerGELUMulFunction")}[kind]
    if liger := peer(f"liger_kernel.ops.{module}", f"{name}.apply"):
        variants["liger"] = liger
    moved = 2 * N * width
    inputs, exact = [randn(N, width), randn(N, width)], functools.partial(reference.glu, kind=kind)
    return Work(f"{kind} {width}", inputs, [randn(N, width)], exact, variants, 3 * moved, 5 * moved, MEMORY)


def activation(kind: str, N: int, width: int) -> Work:
    def plain(x):
        return F.relu(x).square() if kind == "relu2" else F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")

    variants = {"bigtrain": lambda x: ops.activation(x, kind, backend="triton"), "torch": plain, "torch.compile": compiled(plain)}
    if kind == "relu2" and (liger := peer("liger_kernel.ops.relu_squared", "LigerReLUSquaredFunction.apply")):
        variants["liger"] = liger
    moved, exact = 2 * N * width, functools.partial(reference.activation, kind=kind)
    return Work(f"{kind} {width}", [randn(N, width)], [randn(N, width)], exact, variants, 2 * moved, 3 * moved, MEMORY)


def gated_linear(N: int, E: int, width: int) -> Work:
    def plain(x, gate, up):
        return F.silu(F.linear(x, gate)) * F.linear(x, up)

    def exact(x, gate, up):
        return reference.glu(F.linear(x, gate), F.linear(x, up), "swiglu")

    variants = {
        "bigtrain, fused": lambda x, g, u: ops.gated_linear(x, g, u, "swiglu", backend="triton"),
        "bigtrain": lambda x, g, u: ops.glu(F.linear(x, g), F.linear(x, u), "swiglu", backend="triton"),
        "torch": plain,
        "torch.compile": compiled(plain),
    }
    inputs = [randn(N, E), randn(width, E) / E**0.5, randn(width, E) / E**0.5]
    product = 2 * N * E * width
    return Work(f"gate and up {E} x {width}", inputs, [randn(N, width)], exact, variants, 2 * product, 4 * product, ARITHMETIC)


def loss(N: int, E: int, V: int) -> Work:
    def plain(hidden, weight, target):
        return F.cross_entropy(F.linear(hidden, weight).to(reference.wide_dtype(hidden)), target, reduction="sum")

    variants = {
        "bigtrain": lambda h, w, t: ops.linear_cross_entropy(h, w, t, backend="triton")[0],
        "bigtrain's torch": lambda h, w, t: ops.linear_cross_entropy(h, w, t)[0],
        "torch": plain,
        "torch.compile": compiled(plain),
    }
    if liger := peer("liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction.apply"):
        variants["liger"] = lambda h, w, t: liger(h, w, t, None, None, -100, 0.0, 0.0, "sum")[0]
    inputs = [randn(N, E), randn(V, E) / E**0.5, torch.randint(V, (N,), device=DEVICE)]
    chunks = [slice(start, start + CHUNK) for start in range(0, N, CHUNK)]
    parts = [Part((chunk, slice(None), chunk), ((),)) for chunk in chunks]
    product, early = 2 * N * E * V, ("bigtrain", "bigtrain's torch", "liger")
    return Work(f"loss {V}", inputs, [torch.ones((), device=DEVICE)], plain, variants, product, 2 * product, ARITHMETIC, parts, early)


FAMILIES: dict[str, list[Callable[[], Work]]] = {
    "attention": [
        *(functools.partial(attention, D, H, H, 16384 // T, T) for D, H in ((64, 32), (128, 16)) for T in (2048, 4096, 8192, 16384)),
        functools.partial(attention, 128, 32, 8, 4, 4096),
        functools.partial(attention, 128, 32, 8, 1, 16384),
        functools.partial(attention, 128, 16, 16, 1, 16384, packed=True),
    ],
    "norm": [functools.partial(norm, 16384, E) for norm in (rms_norm, layer_norm) for E in (1024, 4096, 8192)],
    "rope": [functools.partial(rope, 4, 4096, 32, 8, 128)],
    "mlp": [
        *(functools.partial(glu, kind, 8192, width) for kind in ("swiglu", "geglu_tanh") for width in (11008, 14336)),
        *(functools.partial(activation, kind, 8192, 16384) for kind in ("gelu", "gelu_tanh", "relu2")),
    ],
    "gated": [functools.partial(gated_linear, 8192, 4096, 14336)],
    "loss": [functools.partial(loss, 8192, 4096, V) for V in (32000, 128256)],
}
