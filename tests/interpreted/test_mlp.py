"""The elementwise MLP kernels in the interpreter: values and gradients against float64, strides, and the checks on their memory."""

import proof
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain_kernels import mlp
from bigtrain_kernels.checks import checked, huge

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [BF16, F16, F32]
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


def plain_glu(gate, up, kind):
    return ACTIVATIONS[mlp.GLU[kind]](gate) * up


def plain_activation(x, kind):
    return ACTIVATIONS[kind](x)


def results(function, tensors, weight):
    """The output and the gradients of the inputs under a weight of the output."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype))]


def compare(ours, plain, tensors, kind):
    weight = torch.randn(tensors[0].shape).to(tensors[0].dtype)
    with checked():
        found = results(lambda *x: ours(*x, kind), tensors, weight)
    same = results(lambda *x: plain(*x, kind), tensors, weight)
    exact = results(lambda *x: plain(*x, kind), [x.to(F64) for x in tensors], weight)
    proof.check(found[0], same[0], exact[0], limit=proof.FORWARD)
    proof.check(found[1:], same[1:], exact[1:], limit=proof.BACKWARD)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", mlp.GLU)
def test_glu(kind, dtype):
    compare(mlp.glu, plain_glu, [3 * torch.randn(130, 63).to(dtype) for _ in range(2)], kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", mlp.ACTIVATIONS)
def test_activation(kind, dtype):
    compare(mlp.activation, plain_activation, [3 * torch.randn(130, 63).to(dtype)], kind)


@pytest.mark.parametrize("width", [1, 63, 97, 130, 257, 512])
def test_halves_of_a_projection(width):
    """Both inputs lie in one tensor; a block of 256 columns begins and ends inside a row."""
    joint = torch.randn(2, 3, 2 * width).to(BF16)
    compare(mlp.glu, plain_glu, joint.chunk(2, -1), "swiglu")


@pytest.mark.parametrize("strided", [(0,), (1,), (0, 1)])
def test_gaps_between_rows(strided):
    tensors = [torch.randn(2, 5, 97) for _ in range(2)]
    compare(mlp.glu, plain_glu, [proof.strided(x) if i in strided else x for i, x in enumerate(tensors)], "geglu")
    compare(mlp.activation, plain_activation, [proof.strided(tensors[0])], "gelu")


def test_no_dimension_is_contiguous():
    gate, up = (torch.randn(40, 3, 6).permute(2, 1, 0)[:, :, ::2] for _ in range(2))
    compare(mlp.glu, plain_glu, [gate, up], "geglu_tanh")
    compare(mlp.activation, plain_activation, [gate], "gelu_tanh")


@pytest.mark.parametrize("make", [torch.zeros, torch.ones], ids=["zeros", "ones"])
def test_broadcast_gradient(make):
    """What `sum` hands back: one element, seen everywhere."""
    gate, up = (torch.randn(4, 30, requires_grad=True) for _ in range(2))
    weight = make(()).expand(4, 30)
    ours = torch.autograd.grad(mlp.glu(gate, up, "swiglu"), (gate, up), weight)
    plain = torch.autograd.grad(F.silu(gate) * up, (gate, up), weight)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8), (0,)], ids=str)
def test_nothing_to_do(shape):
    gate, up = (torch.randn(shape, requires_grad=True) for _ in range(2))
    for out, leaves in ((mlp.glu(gate, up, "swiglu"), (gate, up)), (mlp.activation(gate, "gelu"), (gate,))):
        assert out.shape == shape
        assert all(g.shape == shape for g in torch.autograd.grad(out, leaves, torch.empty(shape)))


@pytest.mark.parametrize("kind", ["silu", *mlp.ACTIVATIONS])
def test_extremes(kind):
    """Far tails, overflow, infinity and NaN come out as they should: 1 + erf(-5) has few digits left, but none that are wrong by 1e-6."""
    x = torch.tensor(
        [0.0, 1e-30, -1e-30, 5.0, -5.0, 12.0, -12.0, 90.0, -90.0, 1e5, -1e5, 1e18, -1e18, 3e38, -3e38, float("inf"), float("nan")]
    )
    wide = x.to(F64).requires_grad_()
    out = ACTIVATIONS[kind](wide)
    exact = torch.autograd.grad(out, wide, torch.ones_like(out))[0]
    torch.testing.assert_close(mlp.forward(x, None, kind), out.detach().to(F32), rtol=1e-5, atol=1e-6, equal_nan=True)
    slope, _ = mlp.backward(torch.ones_like(x), x, None, kind)
    moderate = x.abs() <= 1e18  # the square of larger ones overflows in the derivative of gelu_tanh, as in plain torch
    torch.testing.assert_close(slope[moderate], exact[moderate].to(F32), rtol=1e-5, atol=1e-6)
    assert slope[-1].isnan()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=0, max_size=2),
    st.integers(1, 300),
    st.sampled_from(list(mlp.GLU)),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_any_shape(leading, width, kind, dtype, halves):
    joint = torch.randn(*leading, 2 * width).to(dtype)
    tensors = joint.chunk(2, -1) if halves else [x.contiguous() for x in joint.chunk(2, -1)]
    compare(mlp.glu, plain_glu, tensors, kind)


@pytest.mark.parametrize("kind", mlp.GLU)
def test_differences_glu(kind):
    proof.differences(lambda g, u: mlp.glu(g, u, kind), lambda g, u: plain_glu(g, u, kind), [torch.randn(7, 33) for _ in range(2)])


@pytest.mark.parametrize("kind", mlp.ACTIVATIONS)
def test_differences_activation(kind):
    proof.differences(lambda x: mlp.activation(x, kind), lambda x: plain_activation(x, kind), [torch.randn(7, 33)])


def test_any_order_of_programs():
    gate, up = torch.randn(9, 600).chunk(2, -1)
    proof.same_in_any_order(lambda: (mlp.forward(gate, up, "silu"), *mlp.backward(gate, gate, up, "silu")))
    proof.same_in_any_order(lambda: (mlp.forward(gate, None, "gelu"), mlp.backward(up, gate, None, "gelu")[0]))


@pytest.mark.parametrize("halves", [True, False])
def test_beyond_int32(halves):
    """The last programs of more than 2^31 elements: rows with gaps, and dense ones that are taken as a single row."""
    x = huge((1 << 20, 1 << 12), BF16)
    x = x[:, 1 << 11 :] if halves else x
    tail = torch.randn(64).to(BF16)
    x[-1, -64:] = tail
    with checked(programs=lambda grid: [(grid[0] - 1, 0, 0)]):
        ours = mlp.forward(x, x, "silu"), *mlp.backward(x, x, x, "silu")
    tail = tail.to(F64)
    s = tail.sigmoid()
    exact = s * tail * tail, s * (1 + tail * (1 - s)) * tail * tail, s * tail * tail
    for found, wanted in zip(ours, exact):
        torch.testing.assert_close(found[-1, -64:], wanted.to(BF16), rtol=0.01, atol=1e-6)


def test_registered():
    gate, up = (proof.strided(torch.randn(3, 40)).requires_grad_() for _ in range(2))
    torch.library.opcheck(mlp.glu, (gate, up, "geglu"))
    torch.library.opcheck(mlp.activation, (gate, "relu2"))
    torch.library.opcheck(mlp.glu_backward, (torch.randn(3, 40), gate.detach(), up.detach(), "geglu"))
    torch.library.opcheck(mlp.activation_backward, (torch.randn(3, 40), gate.detach(), "relu2"))


def test_compiles_into_one_graph():
    def block(x):
        gate, up = (x * 2).chunk(2, -1)
        return mlp.activation(mlp.glu(gate, up, "swiglu"), "gelu_tanh")

    x, weight = torch.randn(5, 40), torch.randn(5, 20)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(results(compiled, [x], weight), results(block, [x], weight)):
        assert torch.equal(ours, eager)


def test_keeps_its_inputs_and_nothing_else():
    gate, up = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    for out, inputs in ((mlp.glu(gate, up, "swiglu"), (gate, up)), (mlp.activation(gate, "gelu"), (gate,))):
        kept = out.grad_fn.saved_tensors
        assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in inputs]


def test_bad_input():
    """Also by the registered operators, which `torch.ops` has for everybody; test_kernel_errors.py has the rest."""
    x = torch.randn(2, 4)
    for call in (
        lambda: mlp.glu(x, x[:, :3], "swiglu"),
        lambda: mlp.glu_backward(x, x, x[:, :3], "swiglu"),
        lambda: mlp.glu_backward(x, x, x.to(BF16), "swiglu"),
    ):
        with pytest.raises(ValueError, match="glu: up is"):
            call()
