"""What the operators demand of their arguments, alike for both backends: otherwise a ValueError that names the operator and the
argument, and says what it is and what was expected.

Shapes, dtypes and numbers are looked at, of tensors' values only those of a mask that is made on the host: to read a GPU's would
have the host wait for every launch so far, and a graph that is being traced has none.
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16, torch.float32)
FLOATS = {"triton": NARROW, "torch": (*NARROW, torch.float64)}
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
GLU = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
"""Gated linear units, by the activation of their gate (Shazeer 2020, eq. 6)."""
ACTIVATIONS = ("gelu", "gelu_tanh", "relu2")

Size = int | str | tuple[int, ...]
"""Of a dimension: a number, several that are allowed, or a letter for any."""


def on_triton(backend: str) -> bool:
    if backend not in FLOATS:
        raise ValueError(f"kernel backend {backend!r}: expected torch or triton")
    return backend == "triton"


def refuse(name: str, found: object, expected: str) -> NoReturn:
    if isinstance(found, Tensor):
        found = f"{list(found.shape)} {_short(found.dtype)}"
    raise ValueError(f"{name} is {found}, expected {expected}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shaped(name: str, x: Tensor, *sizes: Size) -> None:
    shape = x.shape
    fits = len(shape) == len(sizes)
    for size, wanted in zip(shape, sizes):  # a generator in all() takes twice as long
        fits = fits and (isinstance(wanted, str) or (size in wanted if isinstance(wanted, tuple) else size == wanted))
    if not fits:
        sizes = (" or ".join(str(n) for n in sorted({*size})) if isinstance(size, tuple) else str(size) for size in sizes)
        refuse(name, x, f"[{', '.join(sizes)}]")


def typed(name: str, x: Tensor, *dtypes: torch.dtype) -> None:
    if x.dtype not in dtypes:
        refuse(name, x, " or ".join(map(_short, dtypes)))


def _readable(x: Tensor) -> bool:
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def documents(operator: str, B: Size, T: int, S: int, document_BT: Tensor | None) -> None:
    if document_BT is not None:
        if T != S:
            raise ValueError(f"{operator}: document_BT needs as many queries as keys, found {T} and {S}")
        shaped(f"{operator}: document_BT", document_BT, B, T)
        typed(f"{operator}: document_BT", document_BT, *INTEGERS)


def window_size(operator: str, window: int | None) -> None:
    if window is not None and window < 1:
        refuse(f"{operator}: window", window, "1 or more")


def key_ranges(first_key_BT: Tensor, end_key_BT: Tensor, S: int) -> None:
    shaped("range_mask: first_key_BT", first_key_BT, "1 or B", "T")
    shaped("range_mask: end_key_BT", end_key_BT, *first_key_BT.shape)
    for name, x in (("first_key_BT", first_key_BT), ("end_key_BT", end_key_BT)):
        typed(f"range_mask: {name}", x, torch.int32)
        if _readable(x) and (x.diff() < 0).any():
            raise ValueError(f"range_mask: {name} decreases along T")
    if _readable(first_key_BT) and ((first_key_BT < 0) | (first_key_BT > end_key_BT) | (end_key_BT > S)).any():
        raise ValueError(f"range_mask: expected 0 <= first_key_BT <= end_key_BT <= S, which is {S}")


def running_totals(end_query: Tensor, end_key: Tensor) -> tuple[int, int]:
    """The numbers of queries and keys. The host needs those, so that on a GPU, too, it waits: once."""
    shaped("packed_mask: end_query", end_query, "sequences + 1")
    shaped("packed_mask: end_key", end_key, len(end_query))
    for name, x in (("end_query", end_query), ("end_key", end_key)):
        typed(f"packed_mask: {name}", x, torch.int32, torch.int64)
    if torch.compiler.is_compiling():
        return int(end_query[-1]), int(end_key[-1])
    both = torch.stack([end_query, end_key]).tolist()
    for name, totals in zip(("end_query", "end_key"), both):
        if totals[:1] != [0] or totals != sorted(totals):
            raise ValueError(f"packed_mask: {name} must begin with 0 and never decrease, found {str(totals)[:80]}")
    return both[0][-1], both[1][-1]


def attention(
    q: Tensor, k: Tensor, v: Tensor, document_BT: Tensor | None, window: int | None, mask: object | None, scale: float | None, cap: float,
    sink_H: Tensor | None, backend: str,
) -> None:  # fmt: skip
    shaped("attention: q_BTHD", q, "B", "T", "H", "D")
    B, T, H, D = q.shape
    shaped("attention: k_BSGD", k, B, "S", "G", D)
    S, G = k.shape[1:3]
    shaped("attention: v_BSGD", v, B, S, G, D)
    if D < 1 or G < 1 or H % G:
        refuse("attention: k_BSGD", k, f"G to divide the {H} heads of q_BTHD, and neither G nor D to be 0")
    typed("attention: q_BTHD", q, *FLOATS[backend])
    typed("attention: k_BSGD", k, q.dtype)
    typed("attention: v_BSGD", v, q.dtype)
    documents("attention", (1, B), T, S, document_BT)
    window_size("attention", window)
    if scale is not None and not 0 < scale < math.inf:
        refuse("attention: scale", scale, "a finite number above 0")
    if not 0 <= cap < math.inf:
        refuse("attention: cap", cap, "a finite number, 0 or more")
    if sink_H is not None:
        shaped("attention: sink_H", sink_H, H)
        typed("attention: sink_H", sink_H, *FLOATS[backend])
    if mask is None:
        return
    if isinstance(mask, Tensor) == (backend == "triton"):
        refuse("attention: mask", f"of type {type(mask).__name__}", f"what attention_mask makes with backend={backend!r}")
    if torch.compiler.is_compiling():  # what packed_mask makes has sizes that only the graph will know: it looks at them when it runs
        parts = ((mask, -2, T), (mask, -1, S)) if isinstance(mask, Tensor) else ((mask.first_key, -1, T), (mask.first_query, -1, S))
        for part, dim, size in parts:
            torch._check(part.shape[dim] == size)
    elif isinstance(mask, Tensor):
        shaped("attention: mask", mask, (1, B), 1, T, S)
        typed("attention: mask", mask, *FLOATS[backend])
    else:
        shaped("attention: mask.first_key", mask.first_key, (1, B), T)
        shaped("attention: mask.first_query", mask.first_query, (1, B), S)


def norm(operator: str, x: Tensor, residual: Tensor | None, backend: str, **affine_E: Tensor) -> None:
    if x.dim() < 1 or x.shape[-1] < 1:
        refuse(f"{operator}: x", x, "[..., E] with E of 1 or more")
    typed(f"{operator}: x", x, *FLOATS[backend])
    if residual is not None:
        shaped(f"{operator}: residual", residual, *x.shape)
        typed(f"{operator}: residual", residual, *([x.dtype] if backend == "triton" else FLOATS[backend]))  # torch has autocast for it
    for name, t in affine_E.items():
        shaped(f"{operator}: {name}", t, x.shape[-1])
        typed(f"{operator}: {name}", t, *FLOATS[backend])


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backend: str) -> None:
    shaped("rope: q_BTHD", q, "B", "T", "H", "D")
    B, T, _, D = q.shape
    shaped("rope: k_BTGD", k, B, T, "G", D)
    typed("rope: q_BTHD", q, *FLOATS[backend])
    typed("rope: k_BTGD", k, q.dtype)
    shaped("rope: cos_BTR", cos, (1, B), T, "R")
    shaped("rope: sin_BTR", sin, (1, B), T, cos.shape[-1])
    if not 0 < 2 * cos.shape[-1] <= D:
        refuse("rope: cos_BTR", cos, f"R from 1 to half of the {D} elements of a head")
    for name, angle in (("cos_BTR", cos), ("sin_BTR", sin)):
        typed(f"rope: {name}", angle, torch.float32, *[torch.float64] * (backend == "torch"))


def activation(x: Tensor, kind: str, backend: str) -> None:
    if kind not in ACTIVATIONS:
        refuse("activation: kind", repr(kind), " or ".join(ACTIVATIONS))
    typed("activation: x", x, *FLOATS[backend])


def glu(gate: Tensor, up: Tensor, kind: str, backend: str) -> None:
    if kind not in GLU:
        refuse("glu: kind", repr(kind), " or ".join(GLU))
    if gate.dim() < 1:
        refuse("glu: gate", gate, "[..., F]")
    shaped("glu: up", up, *gate.shape)
    typed("glu: gate", gate, *FLOATS[backend])
    typed("glu: up", up, gate.dtype)


def gated_linear(x: Tensor, gate_FE: Tensor, up_FE: Tensor, kind: str, backend: str) -> None:
    if kind not in GLU:
        refuse("gated_linear: kind", repr(kind), " or ".join(GLU))
    if x.dim() < 1:
        refuse("gated_linear: x", x, "[..., E]")
    shaped("gated_linear: gate_FE", gate_FE, "F", x.shape[-1])
    shaped("gated_linear: up_FE", up_FE, *gate_FE.shape)
    typed("gated_linear: x", x, *FLOATS[backend])
    if backend == "triton":  # torch has autocast for it
        typed("gated_linear: gate_FE", gate_FE, x.dtype)
        typed("gated_linear: up_FE", up_FE, x.dtype)


def linear_cross_entropy(
    hidden_NE: Tensor, weight_VE: Tensor, target_N: Tensor, bias_V: Tensor | None, z_loss: float, cap: float, smoothing: float,
    backend: str,
) -> None:  # fmt: skip
    shaped("linear_cross_entropy: hidden_NE", hidden_NE, "N", "E")
    N, E = hidden_NE.shape
    shaped("linear_cross_entropy: weight_VE", weight_VE, "V", E)
    V = weight_VE.shape[0]
    if V < 1 or E < 1:
        refuse("linear_cross_entropy: weight_VE", weight_VE, "neither V nor E to be 0")
    shaped("linear_cross_entropy: target_N", target_N, N)
    typed("linear_cross_entropy: hidden_NE", hidden_NE, *FLOATS[backend])
    typed("linear_cross_entropy: weight_VE", weight_VE, *FLOATS[backend])
    typed("linear_cross_entropy: target_N", target_N, torch.int64, torch.int32)
    if bias_V is not None:
        shaped("linear_cross_entropy: bias_V", bias_V, V)
        typed("linear_cross_entropy: bias_V", bias_V, *FLOATS[backend])
    for name, value in (("z_loss", z_loss), ("cap", cap)):
        if not 0 <= value < math.inf:
            refuse(f"linear_cross_entropy: {name}", value, "a finite number, 0 or more")
    if not 0 <= smoothing < 1:
        refuse("linear_cross_entropy: smoothing", smoothing, "from 0 to below 1")
