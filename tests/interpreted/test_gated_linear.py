"""The fused gate-and-up product in the interpreter: values and gradients against float64, odd shapes, and the checks on its memory."""

import proof
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain_kernels import gated_linear as fused
from bigtrain_kernels import mlp, ops
from bigtrain_kernels.checks import checked, huge
from bigtrain_kernels.gated_linear import gated_linear

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
GATES = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def plain(x, gate, up, kind):
    return GATES[kind](F.linear(x, gate)) * F.linear(x, up)


def inputs(N, E, F, dtype):
    return [torch.randn(N, E).to(dtype), *((torch.randn(F, E) * max(E, 1) ** -0.5).to(dtype) for _ in range(2))]


def results(function, tensors, weight):
    """The output and the gradients of the inputs under a weight of the output."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype))]


def compare(tensors, kind):
    """Values, gradients of the two products and gradients of the inputs, in that order."""
    x, gate, up = tensors
    weight = torch.randn(len(x), len(gate)).to(x.dtype)
    with checked():
        ours = results(lambda *t: gated_linear(*t, kind), tensors, weight)
        products = fused.backward(weight, x, gate, up, kind)
    same, same_products = plain_results(tensors, kind, weight)
    exact, exact_products = plain_results([t.to(F64) for t in tensors], kind, weight)
    zero = 1e-7 if x.dtype == F32 else 0.0
    proof.check(ours[0], same[0], exact[0], limit=proof.FORWARD, zero=zero)
    proof.check(products, same_products, exact_products, limit=proof.BACKWARD, zero=zero)
    for three in zip(ours[1:], same[1:], exact[1:]):
        # The errors of one row of a gradient stem from the same few roundings: half of one may be common to them all.
        common = torch.finfo(x.dtype).eps / 4 * float(three[2].square().mean().sqrt())
        proof.check(*three, limit=proof.BACKWARD, zero=max(zero, common))


def plain_results(tensors, kind, weight):
    """What `results` gives for plain torch, and the gradients of the two products."""
    found = results(lambda *t: plain(*t, kind), tensors, weight)
    x, gate, up = tensors
    products = [(x @ w.t()).requires_grad_() for w in (gate, up)]
    return found, torch.autograd.grad(GATES[kind](products[0]) * products[1], products, weight.to(x.dtype))


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("kind", mlp.GLU)
def test_kinds(kind, dtype):
    compare(inputs(70, 96, 80, dtype), kind)


@pytest.mark.parametrize("N", [1, 63, 97, 130, 257])
def test_tokens(N):
    compare(inputs(N, 64, 48, BF16), "swiglu")


@pytest.mark.parametrize(("E", "F"), [(1, 1), (17, 63), (32, 130), (97, 32), (130, 97)])
def test_widths(E, F):
    compare(inputs(40, E, F, BF16), "swiglu")


def test_alignment():
    """Rows that begin anywhere take the small tile; a view that begins between two multiples of 16 bytes does too."""
    aligned = torch.empty(8, 32, dtype=BF16)
    large = fused._launch(fused.FORWARD, aligned)
    assert large != fused.SMALL
    assert fused._launch(fused.FORWARD, aligned[:, 1:]) == fused.SMALL
    assert fused._launch(fused.FORWARD, aligned, torch.empty(8, 33, dtype=BF16)) == fused.SMALL
    compare([t[:, 1:17] for t in inputs(40, 32, 40, BF16)], "swiglu")


def test_width_zero():
    """A sum of nothing."""
    x, gate, up = inputs(5, 0, 7, F32)
    with checked():
        assert torch.equal(gated_linear(x, gate, up, "swiglu"), torch.zeros(5, 7))


@pytest.mark.parametrize(("N", "F"), [(0, 8), (3, 0), (0, 0)])
def test_nothing_to_do(N, F):
    out, *gradients = results(lambda *t: gated_linear(*t, "geglu"), inputs(N, 16, F, F32), torch.randn(N, F))
    assert out.shape == (N, F)
    assert [g.shape for g in gradients] == [(N, 16), (F, 16), (F, 16)]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (0, 3, 16)])
def test_no_tokens(shape):
    _, gate, up = inputs(1, 16, 20, F32)
    tensors = torch.randn(shape), gate, up
    for backend in ("triton", "torch"):
        out, *gradients = results(lambda *t, b=backend: ops.gated_linear(*t, "geglu", backend=b), tensors, torch.zeros(*shape[:-1], 20))
        assert out.shape == (*shape[:-1], 20)
        assert [g.shape for g in gradients] == [t.shape for t in tensors] and not any(g.any() for g in gradients)


def test_strides():
    """Rows with gaps are read where they are; a transposed weight is copied."""
    compare([proof.strided(t) for t in inputs(35, 40, 33, BF16)], "swiglu")
    compare([t.t().contiguous().t() for t in inputs(35, 40, 33, BF16)], "swiglu")
    x = torch.randn(35, 40).to(BF16)
    compare([x, *torch.randn(66, 40).to(BF16).chunk(2)], "swiglu")


def test_broadcast_gradient():
    """What `sum` hands back: one element, seen everywhere."""
    tensors = inputs(5, 16, 20, F32)
    ones = torch.ones(()).expand(5, 20)
    ours = results(lambda *t: gated_linear(*t, "swiglu"), tensors, ones)
    torch.testing.assert_close(ours, results(lambda *t: plain(*t, "swiglu"), tensors, ones), rtol=1e-4, atol=1e-6)


def test_one_rounding():
    """Products large enough that rounding them to bf16 first would show: ours is several times closer."""
    tensors = inputs(64, 256, 64, BF16)
    exact = plain(*(t.to(F64) for t in tensors), "swiglu")
    ours, rounded = (f(*tensors, "swiglu").to(F64) - exact for f in (gated_linear, plain))
    assert ours.norm() < 0.7 * rounded.norm()


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), st.sampled_from(list(mlp.GLU)), st.sampled_from([BF16, F16, F32]))
def test_any_shape(N, E, F, kind, dtype):
    compare(inputs(N, E, F, dtype), kind)


@pytest.mark.parametrize("kind", mlp.GLU)
def test_differences(kind):
    proof.differences(lambda *t: gated_linear(*t, kind), lambda *t: plain(*t, kind), inputs(9, 20, 13, F32))


def test_any_order_of_programs():
    x, gate, up = inputs(70, 40, 70, BF16)
    grad = torch.randn(70, 70).to(BF16)
    proof.same_in_any_order(lambda: (fused.forward(x, gate, up, "swiglu"), *fused.backward(grad, x, gate, up, "swiglu")))


@pytest.mark.parametrize(("N", "F"), [(1, 1), (33, 1000), (320, 40), (300, 300)])
def test_every_tile_once(N, F):
    """The grouped order visits each tile, also where the last group is short (`checked` finds tiles that are missed or doubled)."""
    x, gate, up = inputs(N, 16, F, F32)
    with checked() as launches:
        fused.forward(x, gate, up, "swiglu")
    assert launches[0].grid[0] == -(-N // 32) * -(-F // 32)


def test_beyond_int32():
    """The last tile of an output of more than 2^31 elements, from inputs as large."""
    N, E, width = 70_000, 32_768, 70_000
    x, gate, up = huge((N, E), BF16), huge((width, E), BF16), huge((width, E), BF16)
    for t in (x, gate, up):
        t[-8:, :64] = torch.randn(8, 64).to(BF16)
    with checked(programs=lambda grid: [(grid[0] - 1, 0, 0)]):
        out = fused.forward(x, gate, up, "swiglu")
        dgate, dup = fused.backward(out, x, gate, up, "swiglu")
    small = [t[-8:, :64].to(F64) for t in (x, gate, up)]
    exact = results(lambda g, u: F.silu(g) * u, [small[0] @ small[1].t(), small[0] @ small[2].t()], out[-8:, -8:])
    for ours, wanted in zip((out, dgate, dup), exact):
        assert (ours[-8:, -8:].to(F64) - wanted).norm() < 0.005 * wanted.norm()


def test_only_the_gradients_asked_for():
    """A frozen weight or input costs no product; what is kept for the backward pass is the inputs."""
    x, gate, up = inputs(5, 16, 20, F32)
    up.requires_grad_()
    out = gated_linear(x, gate, up, "swiglu")
    assert [t.data_ptr() for t in out.grad_fn.saved_tensors] == [t.data_ptr() for t in (x, gate, up)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out.sum().backward()
    assert sum(e.count for e in profile.key_averages() if e.key == "aten::mm") == 1
    torch.testing.assert_close(up.grad, torch.autograd.grad(plain(x, gate, up, "swiglu").sum(), up)[0])


def test_registered():
    leaves = [t.requires_grad_() for t in inputs(10, 16, 12, F32)]
    torch.library.opcheck(gated_linear, (*leaves, "swiglu"))
    torch.library.opcheck(fused.gated_linear_backward, (torch.randn(10, 12), *(t.detach() for t in leaves), "swiglu"))


def test_compiles_into_one_graph():
    tensors, weight = inputs(10, 16, 12, F32), torch.randn(10, 12)

    def block(x, gate, up):
        return gated_linear(x * 2, gate, up, "swiglu")

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(results(compiled, tensors, weight), results(block, tensors, weight)):
        assert torch.equal(ours, eager)


def test_bad_input():
    """By the registered operator, which `torch.ops` has for everybody; test_kernel_errors.py has the rest."""
    x, gate, up = inputs(5, 16, 20, F32)
    for bad, message in (((x[None], gate, up), "x_NE is"), ((x[:, 1:], gate, up), "gate_FE is"), ((x, gate, up[1:]), "up_FE is")):
        with pytest.raises(ValueError, match=f"gated_linear: {message}"):
            gated_linear(*bad, "swiglu")
