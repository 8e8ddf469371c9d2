"""Every operator against the plain mathematics of reference.py: values, gradients, dtypes, masks, memory, torch.compile."""

import ast
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bigtrain_kernels import fused, ops, reference

F64 = torch.float64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rand(*shape, dtype=F64):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def same(ours, plain, inputs, rtol=1e-9, atol=1e-9):
    """Values and gradients of two functions of the same inputs are equal, under random gradients of the outputs."""
    outs, refs = (x if isinstance(x, tuple) else (x,) for x in (ours(*inputs), plain(*inputs)))
    weights = [torch.randn_like(ref) for ref in refs]
    for out, ref in zip(outs, refs, strict=True):
        torch.testing.assert_close(out, ref, rtol=rtol, atol=atol)
    grads, ref_grads = (torch.autograd.grad(sum((o * w).sum() for o, w in zip(xs, weights, strict=True)), inputs) for xs in (outs, refs))
    for grad, ref in zip(grads, ref_grads, strict=True):
        torch.testing.assert_close(grad, ref, rtol=rtol, atol=atol)


def rounding(ours, inputs, ulps=4.0):
    """bf16 results of `ours` lie within a few roundings of what it gives in float64, in values and gradients."""
    results = []
    for dtype in (torch.bfloat16, F64):
        leaves = [x.detach().bfloat16().to(dtype).requires_grad_() for x in inputs]
        outs = ours(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        results.append([*outs, *torch.autograd.grad(sum(o.to(F64).sin().sum() for o in outs), leaves)])
    for low, high in zip(*results, strict=True):
        error = (low.to(F64) - high).norm() / high.norm()
        assert error < ulps * 2**-9, error


# attention


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S"), [(6, 6), (1, 6), (3, 6), (6, 4)])
@pytest.mark.parametrize("G", [4, 2, 1])
def test_attention(causal, T, S, G):
    inputs = rand(2, T, 4, 8), rand(2, S, G, 8), rand(2, S, G, 8)
    same(lambda *x: ops.attention(*x, causal=causal), lambda *x: reference.attention(*x, causal=causal), inputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [dict(cap=2.0), dict(window=3), dict(window=3, cap=2.0), dict(scale=0.3), dict(return_lse=True)], ids=str)
@pytest.mark.parametrize("sink", [True, False])
def test_attention_of_other_kinds(causal, kind, sink):
    inputs = [rand(2, 6, 4, 8), rand(2, 6, 2, 8), rand(2, 6, 2, 8), *([rand(4)] if sink else [])]

    def by(attention):
        return lambda q, k, v, sink_H=None: attention(q, k, v, causal=causal, sink_H=sink_H, **kind)

    same(by(ops.attention), by(reference.attention), inputs)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_stays_within_documents(causal):
    document_BT = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, -1, -1]], dtype=torch.int32)
    inputs = rand(2, 8, 4, 8), rand(2, 8, 2, 8), rand(2, 8, 2, 8)
    kwargs = dict(causal=causal, document_BT=document_BT)
    same(lambda *x: ops.attention(*x, **kwargs), lambda *x: reference.attention(*x, **kwargs), inputs)
    out = ops.attention(*inputs, **kwargs)
    alone = ops.attention(*(x[:1, 3:5] for x in inputs), causal=causal)
    torch.testing.assert_close(out[:1, 3:5], alone)
    mask = ops.attention_mask(8, 8, **kwargs, dtype=F64, device="cpu")
    torch.testing.assert_close(ops.attention(*inputs, **kwargs, mask=mask), out)


def test_attention_without_visible_keys_is_zero():
    q, k, v = rand(1, 5, 2, 4), rand(1, 3, 2, 4), rand(1, 3, 2, 4)
    out = ops.attention(q, k, v, causal=True)
    assert (out[:, :2] == 0).all() and (out[:, 2:] != 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("S", [3, 0])
def test_a_sink_of_minus_infinity_is_none(S):
    """Neither where there are keys, nor where it is all there is."""
    q, k, v, sink = rand(1, 5, 2, 4), rand(1, S, 2, 4), rand(1, S, 2, 4), torch.tensor([-math.inf, 0.5], dtype=F64, requires_grad=True)
    out, lse = ops.attention(q, k, v, causal=True, sink_H=sink, return_lse=True)
    plain, plain_lse = ops.attention(q, k, v, causal=True, return_lse=True)
    torch.testing.assert_close((out[:, :, 0], lse[:, 0]), (plain[:, :, 0], plain_lse[:, 0]))
    assert (out[:, : 5 - S] == 0).all() and (lse[:, 0, : 5 - S] == -math.inf).all() and (lse[:, 1, : 5 - S] == 0.5).all()
    gradients = torch.autograd.grad(out.sum() + lse[:, 1].sum(), (q, k, v, sink))
    assert all(g.isfinite().all() for g in gradients) and gradients[-1][0] == 0


def test_attention_scale_and_softmax_by_hand():
    q, k = torch.tensor([[[[2.0]], [[3.0]]]]), torch.tensor([[[[1.0]], [[-1.0]]]])
    v = torch.tensor([[[[10.0]], [[20.0]]]])
    p = torch.tensor([1.5, -1.5]).softmax(0)
    torch.testing.assert_close(ops.attention(q, k, v, causal=True, scale=0.5).flatten(), torch.stack([torch.tensor(10.0), p @ v.flatten()]))


def test_attention_refuses_documents_beside_other_keys():
    with pytest.raises(ValueError, match="as many queries as keys"):
        ops.attention(rand(1, 2, 1, 4), rand(1, 3, 1, 4), rand(1, 3, 1, 4), causal=True, document_BT=torch.zeros(1, 2))


# norms, positions, activations


@pytest.mark.parametrize("residual", [False, True])
def test_norms(residual):
    x, r, weight, bias = rand(2, 3, 8), rand(2, 3, 8), rand(8), rand(8)

    def plain(norm):
        return lambda x, r, *w: (norm(x + r, *w, 1e-2), x + r) if residual else norm(x, *w, 1e-2) + 0 * r

    def ours(op):
        return lambda x, r, *w: op(x, *w, 1e-2, residual=r) if residual else op(x, *w, 1e-2) + 0 * r

    same(ours(ops.rms_norm), plain(reference.rms_norm), (x, r, weight))
    same(ours(ops.layer_norm), plain(reference.layer_norm), (x, r, weight, bias))
    assert gradcheck(ours(ops.rms_norm), (x, r, weight))


def test_norms_against_torch():
    x, weight, bias = rand(5, 8, dtype=torch.float32), rand(8, dtype=torch.float32), rand(8, dtype=torch.float32)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (8,), weight, 1e-5))
    torch.testing.assert_close(reference.layer_norm(x, weight, bias, 1e-5), torch.nn.functional.layer_norm(x, (8,), weight, bias, 1e-5))


@pytest.mark.parametrize("norm", [ops.rms_norm, ops.layer_norm])
def test_gradients_of_both_leaves_of_a_norm_accumulate(norm):
    """x and the residual have one gradient: in one memory, the second backward pass would add to it twice."""
    leaves = rand(2, 3, 8), rand(2, 3, 8)
    affine = [torch.ones(8, dtype=F64)] * (2 if norm is ops.layer_norm else 1)
    outs = norm(leaves[0], *affine, 1e-2, residual=leaves[1])[0]
    once = torch.autograd.grad(outs.sin().sum(), leaves, retain_graph=True)
    for _ in range(3):
        outs.sin().sum().backward(retain_graph=True)
    for leaf, grad in zip(leaves, once):
        torch.testing.assert_close(leaf.grad, 3 * grad)


def test_rms_norm_leaves_its_input_alone():
    x = torch.randn(4, 8)
    before = x.clone()
    ops.rms_norm(x, torch.full((8,), 3.0), 1e-5)
    assert torch.equal(x, before)


def test_rope():
    position_BT = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 0, 1, 2]])
    cos, sin = ops.rope_angles(position_BT, 6, 100.0)
    q, k = rand(2, 5, 4, 6), rand(2, 5, 2, 6)
    same(lambda q, k: ops.rope(q, k, cos, sin), lambda q, k: tuple(reference.rope(x, cos, sin) for x in (q, k)), (q, k))
    assert gradcheck(lambda q: ops.rope(q, q, cos.double(), sin.double()), (q,))
    # Rotation 1 of pair 0 turns (x[0], x[3]) by one radian at position 1, as complex numbers do.
    turned = torch.complex(q[0, 1, 0, 0], q[0, 1, 0, 3]) * torch.exp(torch.tensor(1j, dtype=torch.complex128))
    out = ops.rope(q, k, cos.double(), sin.double())[0][0, 1, 0]
    torch.testing.assert_close(torch.complex(out[0], out[3]), turned, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("R", [3, 2])
def test_rope_layouts_and_part_of_the_dimension(R, interleaved):
    cos, sin = ops.rope_angles(torch.arange(5)[None], 2 * R, 100.0)
    q, k = rand(2, 5, 4, 6), rand(2, 5, 2, 6)
    kind = dict(interleaved=interleaved)
    same(lambda q, k: ops.rope(q, k, cos, sin, **kind), lambda q, k: tuple(reference.rope(x, cos, sin, **kind) for x in (q, k)), (q, k))
    out = ops.rope(q, k, cos, sin, **kind)[0]
    assert torch.equal(out[..., 2 * R :], q[..., 2 * R :])
    pair = (0, 1) if interleaved else (0, R)
    turned = torch.complex(q[0, 1, 0, pair[0]], q[0, 1, 0, pair[1]]) * torch.exp(torch.tensor(1j, dtype=torch.complex128))
    torch.testing.assert_close(torch.complex(out[0, 1, 0, pair[0]], out[0, 1, 0, pair[1]]), turned, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["swiglu", "geglu", "geglu_tanh"])
def test_glu(kind):
    inputs = rand(2, 3, 8), rand(2, 3, 8)
    same(lambda *x: ops.glu(*x, kind), lambda *x: reference.glu(*x, kind), inputs)
    assert gradcheck(lambda *x: ops.glu(*x, kind), inputs)


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "relu2"])
def test_activation(kind):
    same(lambda x: ops.activation(x, kind), lambda x: reference.activation(x, kind), (rand(4, 8),))


def test_bf16_rounds_little():
    cos, sin = ops.rope_angles(torch.arange(16)[None], 8, 1e4)
    rounding(lambda x, w: ops.rms_norm(x, w, 1e-5), (rand(32, 64), rand(64)))
    rounding(lambda x, r, w: ops.rms_norm(x, w, 1e-5, residual=r), (rand(32, 64), rand(32, 64), rand(64)))
    rounding(lambda x, w, b: ops.layer_norm(x, w, b, 1e-5), (rand(32, 64), rand(64), rand(64)))
    rounding(lambda q, k: ops.rope(q, k, cos, sin), (rand(2, 16, 4, 8), rand(2, 16, 2, 8)), ulps=2)
    rounding(lambda g, u: ops.glu(g, u, "swiglu"), (rand(32, 64), rand(32, 64)))
    rounding(lambda g, u: ops.glu(g, u, "geglu"), (rand(32, 64), rand(32, 64)))
    rounding(lambda q, k, v: ops.attention(q, k, v, causal=True), [rand(2, 16, h, 8) for h in (4, 2, 2)])
    target = torch.arange(32)
    for options in ({}, {"z_loss": 1e-3, "cap": 5.0, "smoothing": 0.1}):
        rounding(
            lambda h, w, options=options: ops.linear_cross_entropy(h, w, target, **options)[0] / 32, (rand(32, 64), 0.1 * rand(80, 64))
        )


# the loss

MANY = 1 << 17  # a vocabulary for which 70 tokens are three chunks of 18 passes


def loss_inputs(N=7, E=8, V=11, ignored=(2,)):
    target = torch.randint(V, (N,))
    target[list(ignored)] = -100
    return (rand(N, E), rand(V, E), rand(V)), target


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [dict(), dict(ignored=()), dict(N=1, ignored=()), dict(N=70, E=2, V=MANY, ignored=(0, 40, 69))])
def test_loss(bias, size):
    inputs, target = loss_inputs(**size)
    inputs = inputs if bias else inputs[:2]

    def summed(op):
        return lambda h, w, b=None: 3 * op(h, w, target, b)[0]

    same(summed(ops.linear_cross_entropy), summed(reference.linear_cross_entropy), inputs)
    assert ops.linear_cross_entropy(*inputs[:2], target)[1] == (target != -100).sum()


@pytest.mark.parametrize(
    "options", [{"z_loss": 0.1}, {"cap": 1.5}, {"smoothing": 0.2}, {"z_loss": 0.1, "cap": 1.5, "smoothing": 0.2}], ids=" ".join
)
@pytest.mark.parametrize("size", [dict(), dict(N=70, E=2, V=MANY, ignored=(0, 40, 69))], ids=["one chunk", "many chunks"])
def test_loss_options(options, size):
    inputs, target = loss_inputs(**size)

    def summed(op):
        return lambda h, w, b: 3 * op(h, w, target, b, **options)[0]

    same(summed(ops.linear_cross_entropy), summed(reference.linear_cross_entropy), inputs)


def test_loss_options_by_hand():
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]], dtype=F64)
    target, eye = torch.tensor([2, 0]), torch.eye(3, dtype=F64)

    def loss(**options):
        return ops.linear_cross_entropy(logits, eye, target, **options)[0]

    lse = logits.exp().sum(1).log()
    picked = logits[[0, 1], target]
    torch.testing.assert_close(loss(z_loss=0.1), (lse - picked + 0.1 * lse**2).sum())
    torch.testing.assert_close(loss(smoothing=0.3), (lse - 0.7 * picked - 0.3 * logits.mean(1)).sum())
    bounded = 2 * torch.tanh(logits / 2)
    torch.testing.assert_close(loss(cap=2.0), ops.linear_cross_entropy(bounded, eye, target)[0])


def test_loss_types():
    h, w = rand(4, 8, dtype=torch.bfloat16), rand(5, 8, dtype=torch.bfloat16)
    loss, count = ops.linear_cross_entropy(h, w, torch.tensor([0, 1, 2, -100], dtype=torch.int32))
    assert loss.dtype == torch.float32 and count.dtype == torch.int64 and loss.dim() == count.dim() == 0
    loss.backward()
    assert h.grad.dtype == w.grad.dtype == torch.bfloat16


def test_loss_of_nothing_is_zero():
    inputs, target = loss_inputs(ignored=range(7))
    loss, count = ops.linear_cross_entropy(*inputs[:2], target, inputs[2])
    loss.backward()
    assert loss == 0 and count == 0 and all((x.grad == 0).all() for x in inputs)


def test_loss_without_gradients():
    (h, w, b), target = loss_inputs()
    expected = ops.linear_cross_entropy(h, w, target, b)[0]
    with torch.no_grad():
        loss, _ = ops.linear_cross_entropy(h, w, target, b)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)


def test_loss_of_frozen_weight():
    (h, w, _), target = loss_inputs()
    (grad,) = torch.autograd.grad(ops.linear_cross_entropy(h, w.detach(), target)[0], h)
    torch.testing.assert_close(grad, torch.autograd.grad(reference.linear_cross_entropy(h, w, target)[0], h)[0])


def test_loss_under_checkpointing():
    (h, w, b), target = loss_inputs()
    same(
        lambda h, w, b: checkpoint(ops.linear_cross_entropy, h, w, target, b, use_reentrant=False)[0],
        lambda h, w, b: reference.linear_cross_entropy(h, w, target, b)[0],
        (h, w, b),
    )


def test_loss_does_not_need_the_weight_in_backward():
    (h, w, b), target = loss_inputs()
    expected = torch.autograd.grad(reference.linear_cross_entropy(h, w, target, b)[0], (h, w, b))
    loss, _ = ops.linear_cross_entropy(h, w, target, b)
    w.data.fill_(float("nan"))  # as a released ZeRO-3 parameter would be
    for grad, ref in zip(torch.autograd.grad(loss, (h, w, b)), expected, strict=True):
        torch.testing.assert_close(grad, ref)


def test_second_backward_over_the_loss_is_refused():
    (h, w, b), target = loss_inputs()
    loss, _ = ops.linear_cross_entropy(h, w, target, b)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()


def test_second_backward_over_the_loss_is_refused_under_hooks():
    """They hand autograd the saved tensor without its version: it would not notice that the gradients are scaled already."""
    (h, w, b), target = loss_inputs()
    with torch.autograd.graph.save_on_cpu():
        loss = 0.5 * ops.linear_cross_entropy(h, w, target, b)[0]
    loss.backward(retain_graph=True)
    torch.testing.assert_close(h.grad, torch.autograd.grad(0.5 * reference.linear_cross_entropy(h, w, target, b)[0], h)[0])
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()


def test_range_of_fp16_gradients_of_the_loss():
    """The loss scale comes after the gradients of rare tokens, as does the mean after the sum of a frequent one's."""
    h, w = torch.randn(256, 32).half(), (2 * torch.randn(4096, 32)).half()
    for hidden, weight, scale in ((h, w, 65536 / 256), (h + 300, w / 1000, 1 / 256)):
        target = torch.randint(4096, (256,)) if scale > 1 else torch.full((256,), 7)
        plain = [t.clone().requires_grad_() for t in (hidden, weight)]
        loss = torch.nn.functional.cross_entropy((plain[0] @ plain[1].t()).float(), target, reduction="sum")
        wanted = torch.autograd.grad(loss * scale, plain)[1]
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        found = torch.autograd.grad(ops.linear_cross_entropy(*leaves, target)[0] * scale, leaves)[1]
        assert int((found == 0).all(1).sum()) <= 1.02 * int((wanted == 0).all(1).sum())
        torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.01 * float(wanted.abs().max()))


def test_loss_never_holds_all_logits():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    self.numel = max(self.numel, t.numel())
            return out

    (h, w, _), target = loss_inputs(N=128, E=2, V=MANY)
    with Largest() as seen:
        ops.linear_cross_entropy(h, w, target)[0].backward()
    assert seen.numel == fused.chunk_tokens(128, 2, MANY) * MANY == 32 * MANY


# the package


@pytest.mark.parametrize("name", ["rms_norm", "rope", "glu", "attention", "loss"])
def test_no_graph_break(name):
    cos, sin = ops.rope_angles(torch.arange(5)[None], 8, 1e4)
    target = torch.tensor([1, -100, 3, 0, 2])
    document_BT = torch.tensor([[0, 0, 1, 1, 1]])
    f32 = torch.float32
    functions = {
        "rms_norm": (
            lambda x, r, w: ops.rms_norm(x, w, 1e-5, residual=r),
            [rand(5, 8, dtype=f32), rand(5, 8, dtype=f32), rand(8, dtype=f32)],
        ),
        "rope": (lambda q, k: ops.rope(q, k, cos, sin), [rand(1, 5, 4, 8, dtype=f32), rand(1, 5, 2, 8, dtype=f32)]),
        "glu": (lambda g, u: ops.glu(g, u, "swiglu"), [rand(5, 8, dtype=f32), rand(5, 8, dtype=f32)]),
        "attention": (
            lambda q, k, v: ops.attention(q, k, v, causal=True, document_BT=document_BT),
            [rand(1, 5, h, 8, dtype=f32) for h in (4, 2, 2)],
        ),
        "loss": (lambda h, w: ops.linear_cross_entropy(h, w, target)[0], [rand(5, 8, dtype=f32), rand(6, 8, dtype=f32)]),
    }
    function, inputs = functions[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    same(compiled, function, inputs, rtol=1e-5, atol=1e-5)


def test_unknown_names_are_refused():
    for call in (
        lambda: ops.resolve_backends("cpu", "cuda"),
        lambda: ops.resolve_backends("cuda", "torch", {"norm": "fused"}),
        lambda: ops.resolve_backends("cuda", "torch", {"mpl": "torch"}),
        lambda: reference.activation(torch.ones(1), "swiglu"),
        lambda: reference.glu(torch.ones(1), torch.ones(1), "gelu"),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


def test_backends(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert ops.resolve_backends("cpu") == ops.resolve_backends("cpu", "torch") == ops.Backends()
    assert set(ops.resolve_backends("cuda")) == {"triton"}
    mixed = ops.resolve_backends("cuda", "triton", {"loss": "torch"})
    assert mixed.loss == "torch" and mixed.attention == "triton" and "loss torch" in str(mixed) and str(ops.Backends()) == "torch"
    for call in (lambda: ops.resolve_backends("cpu", "triton"), lambda: ops.resolve_backends("cpu", "auto", {"norm": "triton"})):
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            call()


def test_package_stands_alone():
    folder = Path(ops.__file__).parent
    # transformers probes for a package called `kernels`; a regular one of that name breaks its import.
    assert not (folder.parent / "__init__.py").exists()
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
                assert all(n.split(".")[0] in {"torch", "triton", "numpy", *sys.stdlib_module_names} for n in names), (file.name, names)
