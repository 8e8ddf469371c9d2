"""What an operator cannot take is refused before anything is computed: by both backends, in one sentence that names the argument.

Nothing is launched here, so Triton's backend needs neither a GPU nor its interpreter.
"""

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

from bigtrain_kernels import arguments, ops

F32, F64, I32 = torch.float32, torch.float64, torch.int32
BACKENDS = ["torch", "triton"]


def zeros(*shape, dtype=F32):
    return torch.zeros(shape, dtype=dtype)


def ints(*values, dtype=I32):
    return torch.tensor(values, dtype=dtype)


def ranges(backend, T=8, B=1):
    """A mask of windows, made for one more sequence where there are several."""
    first = torch.arange(T, dtype=I32).expand(B, T)
    return ops.range_mask(first, first + 1, T, F32, backend)


def refused(message, call, *args, **kwargs):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(*args, **kwargs)


ATTENTION = dict(q_BTHD=zeros(2, 8, 4, 32), k_BSGD=zeros(2, 8, 2, 32), v_BSGD=zeros(2, 8, 2, 32), causal=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q_BTHD=zeros(8, 4, 32)), "q_BTHD is [8, 4, 32] float32, expected [B, T, H, D]"),
        (dict(q_BTHD=zeros(2, 8, 3, 32)), "k_BSGD is [2, 8, 2, 32] float32, expected G to divide the 3 heads"),
        (dict(k_BSGD=zeros(2, 8, 0, 32), v_BSGD=zeros(2, 8, 0, 32)), "k_BSGD is [2, 8, 0, 32] float32, expected G to divide"),
        (dict(k_BSGD=zeros(8, 2, 32)), "k_BSGD is [8, 2, 32] float32, expected [2, S, G, 32]"),
        (dict(k_BSGD=zeros(1, 8, 2, 32)), "k_BSGD is [1, 8, 2, 32] float32, expected [2, S, G, 32]"),
        (dict(k_BSGD=zeros(2, 8, 2, 40)), "k_BSGD is [2, 8, 2, 40] float32, expected [2, S, G, 32]"),
        (dict(v_BSGD=zeros(2, 5, 2, 32)), "v_BSGD is [2, 5, 2, 32] float32, expected [2, 8, 2, 32]"),
        (dict(v_BSGD=zeros(2, 9, 2, 32)), "v_BSGD is [2, 9, 2, 32] float32, expected [2, 8, 2, 32]"),
        (dict(v_BSGD=zeros(2, 8, 1, 32)), "v_BSGD is [2, 8, 1, 32] float32, expected [2, 8, 2, 32]"),
        (dict(v_BSGD=zeros(2, 8, 2, 40)), "v_BSGD is [2, 8, 2, 40] float32, expected [2, 8, 2, 32]"),
        (dict(q_BTHD=zeros(2, 8, 4, 32, dtype=I32)), "q_BTHD is [2, 8, 4, 32] int32, expected bfloat16 or float16 or float32"),
        (dict(k_BSGD=zeros(2, 8, 2, 32, dtype=F64)), "k_BSGD is [2, 8, 2, 32] float64, expected float32"),
        (dict(v_BSGD=zeros(2, 8, 2, 32).bfloat16()), "v_BSGD is [2, 8, 2, 32] bfloat16, expected float32"),
        (dict(sink_H=zeros(1)), "sink_H is [1] float32, expected [4]"),
        (dict(sink_H=zeros(4, dtype=I32)), "sink_H is [4] int32, expected bfloat16"),
        (dict(document_BT=zeros(3, 8, dtype=I32)), "document_BT is [3, 8] int32, expected [1 or 2, 8]"),
        (dict(document_BT=zeros(2, 5, dtype=I32)), "document_BT is [2, 5] int32, expected [1 or 2, 8]"),
        (dict(document_BT=zeros(2, 8, dtype=torch.bool)), "document_BT is [2, 8] bool, expected uint8 or int8"),
        (dict(document_BT=zeros(2, 8)), "document_BT is [2, 8] float32, expected uint8 or int8"),
        (dict(window=0), "window is 0, expected 1 or more"),
        (dict(window=-3), "window is -3, expected 1 or more"),
        (dict(scale=float("nan")), "scale is nan, expected a finite number above 0"),
        (dict(scale=float("inf")), "scale is inf, expected a finite number above 0"),
        (dict(scale=0.0), "scale is 0.0, expected a finite number above 0"),
        (dict(cap=float("nan")), "cap is nan, expected a finite number, 0 or more"),
        (dict(cap=float("inf")), "cap is inf, expected a finite number, 0 or more"),
        (dict(cap=-1.0), "cap is -1.0, expected a finite number, 0 or more"),
    ],
)
def test_attention(change, message, backend):
    refused(f"attention: {message}", ops.attention, **ATTENTION | change, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("B", "T"), [(1, 5), (3, 8)])
def test_attention_with_a_mask_of_another_shape(B, T, backend):
    refused("attention: mask", ops.attention, **ATTENTION, mask=ranges(backend, T, B), backend=backend)


def test_attention_with_the_other_backends_mask():
    refused("mask is of type Tensor, expected what", ops.attention, **ATTENTION, mask=ranges("torch"), backend="triton")
    refused("mask is of type Ranges, expected what", ops.attention, **ATTENTION, mask=ranges("triton"), backend="torch")
    refused("mask is [2, 1, 8, 8] bool", ops.attention, **ATTENTION, mask=zeros(2, 1, 8, 8, dtype=torch.bool))


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_mask(backend):
    kind = dict(causal=True, dtype=F32, device="cpu", backend=backend)
    refused("attention_mask: window is 0", ops.attention_mask, 8, 8, window=0, **kind)
    refused("attention_mask: document_BT is [1, 7]", ops.attention_mask, 8, 8, document_BT=zeros(1, 7, dtype=I32), **kind)
    refused("attention_mask: document_BT needs", ops.attention_mask, 7, 8, document_BT=zeros(1, 7, dtype=I32), **kind)
    assert ops.attention_mask(8, 8, document_BT=zeros(1, 8, dtype=torch.uint8), **kind) is not None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("first", "end", "message"),
    [
        (ints(0, 1), ints(1, 2), "first_key_BT is [2] int32, expected [1 or B, T]"),
        (ints([0, 1]), ints([1, 2, 3]), "end_key_BT is [1, 3] int32, expected [1, 2]"),
        (ints([0, 1], dtype=torch.int64), ints([1, 2]), "first_key_BT is [1, 2] int64, expected int32"),
        (ints([0, 1]), ints([1, 2]).float(), "end_key_BT is [1, 2] float32, expected int32"),
        (ints([1, 0]), ints([2, 2]), "first_key_BT decreases along T"),
        (ints([0, 0]), ints([2, 1]), "end_key_BT decreases along T"),
        (ints([-1, 0]), ints([2, 2]), "expected 0 <= first_key_BT <= end_key_BT <= S, which is 4"),
        (ints([2, 2]), ints([1, 2]), "expected 0 <= first_key_BT <= end_key_BT <= S, which is 4"),
        (ints([0, 0]), ints([2, 5]), "expected 0 <= first_key_BT <= end_key_BT <= S, which is 4"),
    ],
)
def test_range_mask(first, end, message, backend):
    refused(f"range_mask: {message}", ops.range_mask, first, end, 4, F32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("queries", "keys", "message"),
    [
        (ints(0, 5, 3, 8), ints(0, 5, 6, 8), "end_query must begin with 0 and never decrease, found [0, 5, 3, 8]"),
        (ints(0, 3, 5, 8), ints(0, 5, 3, 8), "end_key must begin with 0 and never decrease, found [0, 5, 3, 8]"),
        (ints(2, 5, 8), ints(0, 5, 8), "end_query must begin with 0"),
        (ints(0, 5, 8), ints(0, 3, 5, 8), "end_key is [4] int32, expected [3]"),
        (ints(0, 5, 8).float(), ints(0, 5, 8), "end_query is [3] float32, expected int32 or int64"),
        (ints([0, 5, 8]), ints([0, 5, 8]), "end_query is [1, 3] int32, expected [sequences + 1]"),
        (ints(), ints(), "end_query must begin with 0"),
    ],
)
def test_packed_mask(queries, keys, message, backend):
    refused(f"packed_mask: {message}", ops.packed_mask, queries, keys, causal=True, dtype=F32, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("total", [5, 12])
def test_packed_mask_of_another_length_than_what_it_is_used_for(total, backend):
    refused("window is -1", ops.packed_mask, ints(0, 5), ints(0, 5), causal=True, window=-1, dtype=F32, backend=backend)
    mask = ops.packed_mask(ints(0, total), ints(0, 8), causal=True, dtype=F32, backend=backend)
    refused("attention: mask", ops.attention, **ATTENTION, mask=mask, backend=backend)
    mask = ops.packed_mask(ints(0, 8), ints(0, total), causal=True, dtype=F32, backend=backend)
    refused("attention: mask", ops.attention, **ATTENTION, mask=mask, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=zeros()), "x is [] float32, expected [..., E] with E of 1 or more"),
        (dict(x=zeros(3, 0)), "x is [3, 0] float32, expected [..., E] with E of 1 or more"),
        (dict(x=zeros(3, 8, dtype=I32)), "x is [3, 8] int32, expected bfloat16 or float16 or float32"),
        (dict(residual=zeros(1, 8)), "residual is [1, 8] float32, expected [3, 8]"),
        (dict(residual=zeros(3, 8, dtype=I32)), "residual is [3, 8] int32, expected "),
        (dict(weight_E=zeros(1)), "weight_E is [1] float32, expected [8]"),
        (dict(weight_E=zeros(8, dtype=I32)), "weight_E is [8] int32, expected bfloat16"),
        (dict(bias_E=zeros(8, 1)), "bias_E is [8, 1] float32, expected [8]"),
    ],
)
def test_norms(change, message, backend):
    inputs = dict(x=zeros(3, 8), weight_E=zeros(8), bias_E=zeros(8), eps=1e-5) | change
    refused(f"layer_norm: {message}", ops.layer_norm, **inputs, backend=backend)
    if inputs.pop("bias_E").shape == (8,):
        refused(f"rms_norm: {message}", ops.rms_norm, **inputs, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q_BTHD=zeros(3, 2, 8)), "q_BTHD is [3, 2, 8] float32, expected [B, T, H, D]"),
        (dict(q_BTHD=zeros(2, 3, 2, 8, dtype=I32)), "q_BTHD is [2, 3, 2, 8] int32, expected bfloat16"),
        (dict(k_BTGD=zeros(2, 4, 1, 8)), "k_BTGD is [2, 4, 1, 8] float32, expected [2, 3, G, 8]"),
        (dict(k_BTGD=zeros(2, 3, 1, 6)), "k_BTGD is [2, 3, 1, 6] float32, expected [2, 3, G, 8]"),
        (dict(k_BTGD=zeros(2, 3, 1, 8).half()), "k_BTGD is [2, 3, 1, 8] float16, expected float32"),
        (dict(cos_BTR=zeros(3, 3, 4)), "cos_BTR is [3, 3, 4] float32, expected [1 or 2, 3, R]"),
        (dict(sin_BTR=zeros(1, 3, 3)), "sin_BTR is [1, 3, 3] float32, expected [1 or 2, 3, 4]"),
        (dict(sin_BTR=zeros(1, 3, 4).half()), "sin_BTR is [1, 3, 4] float16, expected float32"),
        (dict(cos_BTR=zeros(1, 3, 5), sin_BTR=zeros(1, 3, 5)), "cos_BTR is [1, 3, 5] float32, expected R from 1 to half of the 8 elements"),
        (dict(cos_BTR=zeros(1, 3, 0), sin_BTR=zeros(1, 3, 0)), "cos_BTR is [1, 3, 0] float32, expected R from 1 to half of the 8 elements"),
    ],
)
def test_rope(change, message, backend):
    inputs = dict(q_BTHD=zeros(2, 3, 2, 8), k_BTGD=zeros(2, 3, 1, 8), cos_BTR=zeros(1, 3, 4), sin_BTR=zeros(1, 3, 4))
    refused(f"rope: {message}", ops.rope, **inputs | change, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mlp(backend):
    x, w = zeros(3, 8), zeros(5, 8)
    refused("glu: kind is 'silu', expected swiglu or geglu or geglu_tanh", ops.glu, x, x, "silu", backend=backend)
    refused("glu: gate is [] float32, expected [..., F]", ops.glu, zeros(), zeros(), "geglu", backend=backend)
    refused("glu: up is [1, 8] float32, expected [3, 8]", ops.glu, x, x[:1], "geglu", backend=backend)
    refused("glu: up is [3, 8] float16, expected float32", ops.glu, x, x.half(), "geglu", backend=backend)
    refused("glu: gate is [3, 8] int32, expected bfloat16", ops.glu, x.int(), x.int(), "geglu", backend=backend)
    refused("activation: kind is 'relu', expected gelu or gelu_tanh or relu2", ops.activation, x, "relu", backend=backend)
    refused("activation: x is [3, 8] int32, expected bfloat16", ops.activation, x.int(), "relu2", backend=backend)
    refused("gated_linear: kind is 'silu', expected swiglu", ops.gated_linear, x, w, w, "silu", backend=backend)
    refused("gated_linear: x is [] float32", ops.gated_linear, zeros(), w, w, "geglu", backend=backend)
    refused("gated_linear: gate_FE is [5, 7] float32, expected [F, 8]", ops.gated_linear, x, w[:, 1:], w, "geglu", backend=backend)
    refused("gated_linear: up_FE is [4, 8] float32, expected [5, 8]", ops.gated_linear, x, w, w[1:], "geglu", backend=backend)
    refused("gated_linear: x is [3, 8] int32", ops.gated_linear, x.int(), w.int(), w.int(), "geglu", backend=backend)


LOSS = dict(hidden_NE=zeros(6, 8), weight_VE=zeros(5, 8), target_N=zeros(6, dtype=torch.int64), bias_V=zeros(5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden_NE=zeros(8)), "hidden_NE is [8] float32, expected [N, E]"),
        (dict(hidden_NE=zeros(2, 3, 8)), "hidden_NE is [2, 3, 8] float32, expected [N, E]"),
        (dict(hidden_NE=zeros(6, 8, dtype=I32)), "hidden_NE is [6, 8] int32, expected bfloat16"),
        (dict(weight_VE=zeros(5, 7)), "weight_VE is [5, 7] float32, expected [V, 8]"),
        (dict(weight_VE=zeros(0, 8)), "weight_VE is [0, 8] float32, expected neither V nor E to be 0"),
        (dict(hidden_NE=zeros(6, 0), weight_VE=zeros(5, 0)), "weight_VE is [5, 0] float32, expected neither V nor E to be 0"),
        (dict(target_N=zeros(5, dtype=I32)), "target_N is [5] int32, expected [6]"),
        *[(dict(target_N=zeros(6, dtype=getattr(torch, name))), f"target_N is [6] {name}, expected int64 or int32")
          for name in ("uint8", "bool", "int8", "int16", "float32", "bfloat16")],
        (dict(bias_V=zeros(3)), "bias_V is [3] float32, expected [5]"),
        (dict(bias_V=zeros(5, dtype=I32)), "bias_V is [5] int32, expected bfloat16"),
        (dict(z_loss=-1.0), "z_loss is -1.0, expected a finite number, 0 or more"),
        (dict(z_loss=float("nan")), "z_loss is nan, expected a finite number, 0 or more"),
        (dict(cap=-1.0), "cap is -1.0, expected a finite number, 0 or more"),
        (dict(cap=float("inf")), "cap is inf, expected a finite number, 0 or more"),
        (dict(smoothing=1.0), "smoothing is 1.0, expected from 0 to below 1"),
        (dict(smoothing=-0.1), "smoothing is -0.1, expected from 0 to below 1"),
    ],
)  # fmt: skip
def test_loss(change, message, backend):
    refused(f"linear_cross_entropy: {message}", ops.linear_cross_entropy, **LOSS | change, backend=backend)


CALLS = {
    "attention": lambda x, **b: ops.attention(x, x, x, causal=True, **b),
    "attention_mask": lambda x, **b: ops.attention_mask(8, 8, causal=True, dtype=F32, device="cpu", **b),
    "range_mask": lambda x, **b: ops.range_mask(ints([0]), ints([1]), 1, F32, **b),
    "packed_mask": lambda x, **b: ops.packed_mask(ints(0, 1), ints(0, 1), causal=True, dtype=F32, **b),
    "rms_norm": lambda x, **b: ops.rms_norm(x, x[0, 0, 0], 1e-5, **b),
    "layer_norm": lambda x, **b: ops.layer_norm(x, x[0, 0, 0], x[0, 0, 0], 1e-5, **b),
    "rope": lambda x, **b: ops.rope(x, x, zeros(1, 8, 4), zeros(1, 8, 4), **b),
    "glu": lambda x, **b: ops.glu(x, x, "swiglu", **b),
    "activation": lambda x, **b: ops.activation(x, "gelu", **b),
    "gated_linear": lambda x, **b: ops.gated_linear(x, x[0, 0], x[0, 0], "swiglu", **b),
    "loss": lambda x, **b: ops.linear_cross_entropy(x[0, 0], x[0, 0], zeros(4, dtype=I32), **b),
}


@pytest.mark.parametrize("name", CALLS)
def test_unknown_backend(name):
    refused("kernel backend 'trition': expected torch or triton", CALLS[name], zeros(1, 8, 4, 8), backend="trition")


@pytest.mark.parametrize("name", [name for name in CALLS if "mask" not in name])
def test_float64_is_for_torch(name):
    CALLS[name](zeros(1, 8, 4, 8, dtype=F64), backend="torch")
    refused("float64, expected bfloat16 or float16 or float32", CALLS[name], zeros(1, 8, 4, 8, dtype=F64), backend="triton")


def test_no_value_is_read_where_it_would_have_to_be_waited_for():
    """Of a GPU's tensors, of those that are being traced: here of one that has no values."""
    with FakeTensorMode():
        first = torch.zeros(1, 8, dtype=I32)
        arguments.key_ranges(first, first, 8)
    arguments.key_ranges(*torch.zeros(2, 1, 8, dtype=I32, device="meta"), 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_mask_is_made_and_checked_in_one_graph(dynamic, backend):
    def masks(first, document):
        T = first.shape[1]
        kind = dict(causal=True, window=3, dtype=F32, device=first.device, backend=backend)
        return ops.range_mask(first, first + 1, T, F32, backend), ops.attention_mask(T, T, document_BT=document, **kind)

    compiled = torch.compile(masks, fullgraph=True, backend="eager", dynamic=dynamic)
    for T in (8, 11):
        inputs = torch.arange(T, dtype=I32)[None], torch.zeros(2, T, dtype=I32)
        torch.testing.assert_close(compiled(*inputs), masks(*inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_in_one_graph(backend):
    """Whose lengths nobody knows when it is traced; that they fit is found out when it runs."""

    def mask(x, ends):
        made = ops.packed_mask(ends, ends, causal=True, dtype=F32, backend=backend)
        arguments.attention(x, x, x, None, None, made, None, 0.0, None, backend)
        return x * (made.sum() if backend == "torch" else made.first_key.sum())

    compiled, x = torch.compile(mask, fullgraph=True, backend="eager"), torch.ones(1, 8, 2, 4)
    torch.testing.assert_close(compiled(x, ints(0, 3, 8)), mask(x, ints(0, 3, 8)))
    with pytest.raises(RuntimeError):
        compiled(x, ints(0, 3, 9))
