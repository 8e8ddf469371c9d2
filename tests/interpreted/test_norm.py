"""RMSNorm and LayerNorm kernels against float64 and plain torch, in the interpreter. N rows, E width."""

from functools import partial

import proof
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain_kernels import interpreter, norm, reference

EPS = 1e-5
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = ("rms_norm", "layer_norm")


def inputs_of(kind, shape, dtype, *, residual=True, weight_dtype=None):
    """x, residual (if any), weight, bias (for LayerNorm): rows of different size and mean."""
    x = [torch.randn(shape) * torch.rand(*shape[:-1], 1) * 3 + torch.randn(*shape[:-1], 1) for _ in range(1 + residual)]
    affine = [1 + 0.3 * torch.randn(shape[-1]) for _ in range(1 + (kind == "layer_norm"))]
    return [t.to(dtype) for t in x] + [t.to(weight_dtype or dtype) for t in affine]


def ours(kind, residual, *inputs):
    x, *rest = inputs
    return getattr(norm, kind)(x, *rest[residual:], EPS, *rest[:residual])


def torch_norm(kind, residual, *inputs):
    """Plain torch: add, then its own norm; in float64 the exact values."""
    total, affine = sum(inputs[: 1 + residual]), inputs[1 + residual :]
    if kind == "rms_norm":
        normed = F.rms_norm(total, total.shape[-1:], affine[0].to(total.dtype), EPS)
    else:
        normed = F.layer_norm(total, total.shape[-1:], *(t.to(total.dtype) for t in affine), EPS)
    return (normed, total) if residual else normed


def run(function, inputs, cotangents):
    """Outputs and gradients."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    return list(outs), torch.autograd.grad(outs, leaves, [c.to(o.dtype) for c, o in zip(cotangents, outs)])


def prove(kind, residual, inputs, leaves=None):
    dtype = inputs[0].dtype
    cotangents = [torch.randn(inputs[0].shape).to(dtype) for _ in range(1 + residual)]
    function = partial(torch_norm, kind, residual)
    found = run(partial(ours, kind, residual), leaves or inputs, cotangents)
    plain = run(function, inputs, cotangents)
    # The sum is rounded before the norm is taken of it: exact is what follows from the rounded sum.
    wide = [t.double() for t in inputs]
    if residual:
        wide[0] = wide[0] + wide[1] + ((inputs[0] + inputs[1]).double() - wide[0] - wide[1])
        wide[1] = torch.zeros_like(wide[1])
    exact = run(function, wide, cotangents)
    # A row's 1 / std is rounded once for all of it: over a few rows plain torch may be right by luck, in float32.
    for results, limit in zip((0, 1), (proof.FORWARD, proof.BACKWARD)):
        for three in zip(found[results], plain[results], exact[results]):
            proof.check(*three, limit=limit, zero=2**-22 * float(three[2].detach().square().mean().sqrt().nan_to_num()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("N", "E"), [(1, 130), (97, 63), (63, 97), (5, 257)])
def test_values_and_gradients(kind, residual, dtype, N, E, checked):
    prove(kind, residual, inputs_of(kind, (N, E), dtype, residual=residual))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_weights_of_another_dtype(kind, weight_dtype, checked):
    dtype = torch.float32 if weight_dtype == torch.bfloat16 else torch.bfloat16
    prove(kind, True, inputs_of(kind, (5, 97), dtype, weight_dtype=weight_dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_with_gaps(kind, checked):
    """A column of a matrix, and one number for all."""
    x, *affine = inputs_of(kind, (5, 97), torch.float32, residual=False)
    columns = [torch.stack([t, 99 * t], 1)[:, 0] for t in affine]
    prove(kind, False, [x, *affine], [x, *columns])
    prove(kind, False, [x, *(t[:1].repeat(97) for t in affine)], [x, *(t[:1].expand(97) for t in affine)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("E", [63, 257])
def test_strided_and_many_dimensions(kind, E, checked):
    inputs = inputs_of(kind, (2, 3, 5, E), torch.bfloat16)
    strided = [proof.strided(t) for t in inputs]
    assert not any(t.is_contiguous() for t in strided[:2])
    prove(kind, True, inputs, strided)
    prove(kind, False, inputs[::2] if kind == "rms_norm" else [inputs[0], *inputs[2:]])


@settings(max_examples=6, deadline=None)
@given(
    N=st.integers(0, 20), E=st.integers(4, 200), kind=st.sampled_from(KINDS), residual=st.booleans(), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_any_shape(N, E, kind, residual, dtype, seed):
    torch.manual_seed(seed)
    with interpreter.checked(shuffle=seed):
        prove(kind, residual, inputs_of(kind, (N, E), dtype, residual=residual))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("E", [40, 200])
def test_no_order_of_programs_changes_a_bit(kind, E):
    inputs = inputs_of(kind, (17, E), torch.float32)
    cotangents = torch.randn(2, 17, E)
    runs = []
    for seed in (None, 1, 2):
        with interpreter.checked(shuffle=seed) as launches:
            runs.append(run(partial(ours, kind, True), inputs, cotangents))
    assert launches[-1].grid[0] > 1
    for outs, grads in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip([*outs, *grads], [*runs[0][0], *runs[0][1]]))


@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences(kind):
    inputs = inputs_of(kind, (5, 140), torch.float32)
    mathematics = getattr(reference, kind)

    def exact(x, residual, *affine):
        return mathematics(x + residual, *affine, EPS), x + residual

    proof.differences(partial(ours, kind, True), exact, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_is_that_of_the_rounded_sum(kind, checked):
    x, residual, *affine = inputs_of(kind, (9, 40), torch.bfloat16)
    normed, total = ours(kind, True, x, residual, *affine)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, ours(kind, False, x + residual, *affine))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("used", [0, 1])
def test_only_one_output_is_used(kind, used, checked):
    inputs = inputs_of(kind, (7, 33), torch.float32)
    leaves = [t.clone().requires_grad_() for t in inputs]
    wanted = torch.autograd.grad(torch_norm(kind, True, *leaves)[used].square().sum(), leaves, materialize_grads=True)
    found = torch.autograd.grad(ours(kind, True, *leaves)[used].square().sum(), leaves, materialize_grads=True)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_both_leaves_accumulate(kind, compiled):
    """x and the residual have one gradient: in one memory, the second backward pass would add to it twice."""
    inputs = inputs_of(kind, (2, 3, 33), torch.float32)
    leaves, others = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    function = partial(ours, kind, True)
    function = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    for cotangent in torch.randn(3, 2, 3, 33):
        (function(*leaves)[0] * cotangent).sum().backward()
        (torch_norm(kind, True, *others)[0] * cotangent).sum().backward()
    torch.testing.assert_close([t.grad for t in leaves], [t.grad for t in others])


@pytest.mark.parametrize("kind", KINDS)
def test_constant_rows_and_large_values(kind, checked):
    """Nothing to divide by but eps; and squares beyond the range of bf16's neighbour fp16."""
    x = torch.stack([torch.zeros(50), torch.ones(50), 1000 * torch.ones(50), 3e4 * torch.randn(50).clamp(-1, 1)]).half()
    affine = [torch.ones(50).half() for _ in range(1 + (kind == "layer_norm"))]
    out = ours(kind, False, x, *affine)
    torch.testing.assert_close(out.double(), getattr(reference, kind)(x.double(), *(t.double() for t in affine), EPS), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("E", [64, 200])
def test_offsets_beyond_31_bits(kind, E):
    rows = interpreter.huge((5, 1 << 29), torch.float32)
    inputs = inputs_of(kind, (5, E), torch.float32, residual=False)
    x = rows[:, :E].copy_(inputs[0])
    with interpreter.checked():
        prove(kind, False, inputs, [x, *inputs[1:]])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_operator_is_registered_well(kind, residual):
    inputs = [t.requires_grad_() for t in inputs_of(kind, (6, 20), torch.float32, residual=residual)]
    x, *rest = inputs
    args = (x, rest[0] if residual else None, *rest[residual:], EPS)
    torch.library.opcheck(getattr(torch.ops.bigtrain, kind).default, args)
    statistics = torch.rand(1 + (kind == "layer_norm"), 6)
    grads = torch.randn(2, 6, 20)
    args = (grads[0], grads[1] if residual else None, x.detach(), *(t.detach() for t in rest[residual:]), statistics)
    torch.library.opcheck(getattr(torch.ops.bigtrain, f"{kind}_backward").default, args)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole(kind):
    inputs = inputs_of(kind, (2, 6, 20), torch.float32)
    cotangents = torch.randn(2, 2, 6, 20)
    function = partial(ours, kind, True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(run(compiled, inputs, cotangents), run(function, inputs, cotangents)):
        torch.testing.assert_close(list(found), list(wanted), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.ones(3, 20000), weight_E=torch.ones(20000), bias_E=torch.ones(20000)), "20000 elements: at most 16384"),
    ],
)
def test_refuses(change, message):
    arguments = dict(x=torch.ones(3, 8), weight_E=torch.ones(8), bias_E=torch.ones(8), eps=EPS, residual=None)
    with pytest.raises(ValueError, match=message):
        norm.layer_norm(**arguments | change)


def test_cases_cover_the_tables():
    for architecture in norm.MULTIPROCESSORS:
        names = [case.name for case in norm.cases(architecture)]
        assert len(names) == len(set(names)) == sum({2: 8, 4: 4}[size] for arch, _, size in norm.FORWARD if arch == architecture)
