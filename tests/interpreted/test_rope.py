"""The RoPE kernel against float64 and plain torch, in the interpreter. B batch, T length, H and G heads, D head dim, R pairs."""

from functools import partial

import proof
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain_kernels import interpreter, reference
from bigtrain_kernels.rope import TABLE, cases, rope

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def inputs_of(B, T, H, G, D, R, dtype=torch.float32, *, angles=None):
    """Queries and keys; cos and sin of packed positions, a document's beginning at 0."""
    position = torch.arange(T).expand(angles or B, T) % torch.randint(1, T + 2, (angles or B, 1))
    cos, sin = reference.rope_angles(position, 2 * R, 10000.0)
    return torch.randn(B, T, H, D).to(dtype), torch.randn(B, T, G, D).to(dtype), cos, sin


def plain_rope(q, k, cos, sin, interleaved=False):
    """As models write it, in the dtype of the queries."""
    R = cos.shape[-1]
    cos, sin = (x[:, :, None].to(q.dtype) for x in (cos, sin))

    def rotate(x):
        first, rest = x[..., : 2 * R], x[..., 2 * R :]
        a, b = (first[..., 0::2], first[..., 1::2]) if interleaved else first.chunk(2, -1)
        pair = a * cos - b * sin, b * cos + a * sin
        return torch.cat([torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1), rest], -1)

    return rotate(q), rotate(k)


def run(function, q, k, *cotangents):
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    outs = function(*leaves)
    return [*outs, *torch.autograd.grad(outs, leaves, [c.to(o.dtype) for c, o in zip(cotangents, outs)])]


def prove(inputs, interleaved=False, view=lambda x: x):
    q, k, cos, sin = inputs
    cotangents = [torch.randn(x.shape).to(x.dtype) for x in (q, k)]
    found = run(lambda q, k: rope(q, k, cos, sin, interleaved), view(q), view(k), *map(view, cotangents))
    assert all(x.is_contiguous() for x in found)
    function = partial(plain_rope, cos=cos, sin=sin, interleaved=interleaved)
    plain, exact = (run(function, *(x.to(dtype) for x in (q, k)), *cotangents) for dtype in (q.dtype, torch.float64))
    proof.check(found[:2], plain[:2], exact[:2], limit=proof.FORWARD)
    proof.check(found[2:], plain[2:], exact[2:], limit=proof.BACKWARD)
    R = cos.shape[-1]
    assert all(torch.equal(x[..., 2 * R :], y[..., 2 * R :]) for x, y in zip(found[:2], (q, k))), "what is not rotated has changed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("B", "T", "H", "G", "D", "R"),
    [
        (1, 1, 1, 1, 2, 1),
        (2, 63, 4, 2, 16, 8),
        (1, 97, 6, 3, 20, 10),
        (3, 13, 8, 1, 80, 16),
        (1, 130, 2, 2, 48, 20),
        (1, 5, 5, 4, 256, 128),
    ],
)
def test_values_and_gradients(B, T, H, G, D, R, interleaved, dtype, checked):
    prove(inputs_of(B, T, H, G, D, R, dtype), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_angles_shared_by_the_batch(interleaved, checked):
    prove(inputs_of(3, 17, 4, 2, 24, 8, torch.bfloat16, angles=1), interleaved)


def test_half_layout_is_the_reference(checked):
    q, k, cos, sin = inputs_of(2, 9, 4, 2, 16, 8)
    for found, x in zip(rope(q, k, cos, sin), (q, k)):
        torch.testing.assert_close(found, reference.rope(x, cos, sin))


@pytest.mark.parametrize("shared", ["cos", "sin"])
def test_one_angle_shared_by_the_batch(shared, checked):
    q, k, cos, sin = inputs_of(3, 17, 4, 2, 24, 8)
    cos, sin = (cos[:1], sin) if shared == "cos" else (cos, sin[:1])
    prove((q, k, cos, sin))


@pytest.mark.parametrize(("H", "G"), [(0, 2), (2, 0), (0, 0)])
def test_no_heads(H, G, checked):
    q, k, cos, sin = inputs_of(2, 5, H, G, 16, 8)
    out_q, out_k = rope(q, k, cos, sin)
    torch.testing.assert_close((out_q, out_k), (reference.rope(q, cos, sin), reference.rope(k, cos, sin)))


def test_strides(checked):
    prove(inputs_of(2, 11, 4, 2, 24, 8, torch.bfloat16), view=proof.strided)
    prove(inputs_of(2, 11, 4, 2, 24, 12), view=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))
    prove(inputs_of(2, 11, 4, 2, 24, 12), view=lambda x: x.transpose(1, 3).contiguous().transpose(1, 3))  # rows are copied first


def test_joint_projection(checked):
    """Queries, keys and values are slices of one matrix product; its gradient is whole."""
    _, _, cos, sin = inputs_of(2, 7, 4, 2, 16, 8)
    qkv = torch.randn(2, 7, 8, 16, requires_grad=True)
    grads = []
    for function in (rope, plain_rope):
        q, k, v = qkv.split([4, 2, 2], 2)
        grads.append(torch.autograd.grad(sum(x.sin().sum() for x in (*function(q, k, cos, sin), v)), qkv)[0])
    torch.testing.assert_close(*grads)


@settings(max_examples=15, deadline=None)
@given(
    B=st.integers(0, 3), T=st.integers(0, 40), H=st.integers(1, 9), G=st.integers(1, 5), R=st.integers(1, 24), rest=st.integers(0, 20),
    interleaved=st.booleans(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_any_shape(B, T, H, G, R, rest, interleaved, dtype, seed):
    torch.manual_seed(seed)
    with interpreter.checked(shuffle=seed):
        prove(inputs_of(B, T, H, G, 2 * R + rest, R, dtype), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place(interleaved, checked):
    q, k, cos, sin = inputs_of(2, 37, 5, 2, 24, 8, torch.bfloat16)
    wanted = rope(q, k, cos, sin, interleaved)
    q, k = proof.strided(q), proof.strided(k)
    found = rope(q, k, cos, sin, interleaved, inplace=True)
    assert found[0].data_ptr() == q.data_ptr() and found[1].data_ptr() == k.data_ptr()
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(wanted, found, (q, k)))


def test_gradients_in_place_leave_the_callers_alone(checked):
    q, k, cos, sin = inputs_of(2, 7, 4, 2, 16, 8)
    cotangents = torch.randn_like(q), torch.randn_like(k)
    kept = [x.clone() for x in cotangents]
    wanted = run(lambda q, k: rope(q, k, cos, sin), q, k, *cotangents)
    found = run(lambda q, k: rope(q.clone(), k.clone(), cos, sin, inplace=True), q, k, *cotangents)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted))
    assert all(torch.equal(x, y) for x, y in zip(cotangents, kept))


def test_in_place_is_refused_where_values_are_needed():
    q, k, cos, sin = inputs_of(1, 3, 2, 1, 8, 4)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        rope(q.requires_grad_(), k, cos, sin, inplace=True)
    product = q * 1
    squared = product.square()
    rope(product, k, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_orthogonal_and_relative(interleaved):
    """Properties of a rotation: its transpose is its inverse; scores depend on the distance of positions only."""
    q, k, cos, sin = inputs_of(1, 33, 2, 2, 16, 8)
    q, k = q.requires_grad_(), k.requires_grad_()
    out = rope(q, k, cos, sin, interleaved)
    back = torch.autograd.grad(out, (q, k), out)
    torch.testing.assert_close(back, (q.detach(), k.detach()))
    torch.testing.assert_close(out[0].norm(dim=-1), q.norm(dim=-1))
    same = q[:, :1].expand(-1, 33, -1, -1), k[:, :1].expand(-1, 33, -1, -1)
    cos, sin = reference.rope_angles(torch.arange(33)[None], 16, 100.0)
    q, k = rope(*same, cos, sin, interleaved)
    torch.testing.assert_close((q[:, 5:] * k[:, :-5]).sum(-1), (q[:, 5:6] * k[:, :1]).sum(-1).expand(1, 28, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interleaved", [False, True])
def test_finite_differences_of_both_orders(interleaved):
    q, k, cos, sin = inputs_of(1, 5, 2, 1, 10, 4)
    function = partial(rope, cos_BTR=cos, sin_BTR=sin, interleaved=interleaved)
    exact = partial(plain_rope, cos=cos, sin=sin, interleaved=interleaved)
    proof.differences(function, exact, (q, k))

    def slopes(rotate, *qk):
        qk = [x if x.requires_grad else x.requires_grad_() for x in qk]
        return torch.autograd.grad([x.square().sum() for x in rotate(*(x**3 for x in qk))], qk, create_graph=True)

    proof.differences(partial(slopes, function), partial(slopes, exact), (q, k), tolerance=1e-3)


def test_no_order_of_programs_changes_a_bit():
    inputs = inputs_of(2, 40, 3, 2, 16, 8)
    runs = []
    for seed in (None, 1, 2):
        with interpreter.checked(shuffle=seed) as launches:
            runs.append(rope(*inputs))
    assert launches[0].grid[0] > 2
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(other, runs[0]))


def test_offsets_beyond_31_bits():
    q, k, cos, sin = inputs_of(1, 5, 2, 1, 8, 4)
    far = [interpreter.huge((1, 5, 1 << 29), torch.float32)[..., : x[0, 0].numel()].view(x.shape).copy_(x) for x in (q, k)]
    wanted = rope(q, k, cos, sin)
    with interpreter.checked():
        found = rope(*far, cos, sin)
        inplace = rope(*far, cos, sin, inplace=True)
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(wanted, found, inplace))


@pytest.mark.parametrize("interleaved", [False, True])
def test_operators_are_registered_well(interleaved):
    q, k, cos, sin = inputs_of(2, 5, 4, 2, 16, 4)
    torch.library.opcheck(torch.ops.bigtrain.rope.default, (q.requires_grad_(), k.requires_grad_(), cos, sin, interleaved, False))
    torch.library.opcheck(torch.ops.bigtrain.rope_.default, (q.detach(), k.detach(), cos, sin, interleaved))


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_whole(inplace):
    q, k, cos, sin = inputs_of(2, 5, 4, 2, 16, 8)
    cotangents = torch.randn_like(q), torch.randn_like(k)

    def function(q, k):
        return rope(q * 2, k * 2, cos, sin, inplace=inplace)

    wanted = run(function, q, k, *cotangents)
    found = run(torch.compile(function, fullgraph=True, backend="aot_eager"), q, k, *cotangents)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q_BTHD=torch.ones(1, 3, 2, 16)[..., ::2], inplace=True), "must be contiguous"),
        (
            {name: torch.ones(1, 3, n, 258) for name, n in (("q_BTHD", 2), ("k_BTGD", 1))}
            | {name: torch.ones(1, 3, 129) for name in ("cos_BTR", "sin_BTR")},
            r"cos_BTR is \[1, 3, 129\] float32, expected R of 128 at most",
        ),
    ],
)
def test_refuses(change, message):
    q, k, cos, sin = inputs_of(1, 3, 2, 1, 8, 4)
    with pytest.raises(ValueError, match=message):
        rope(**dict(q_BTHD=q, k_BTGD=k, cos_BTR=cos, sin_BTR=sin) | change)


def test_memory_that_would_be_rotated_twice_is_refused():
    q, k, cos, sin = inputs_of(2, 3, 2, 1, 8, 4)
    expanded, overlapping = k.expand(2, 3, 2, 8), q.as_strided((2, 3, 2, 4), (40, 12, 3, 1))
    for name, call in {
        "q_BTHD and k_BTGD are the same memory": lambda: rope(q, q[:, :, :1], cos, sin, inplace=True),
        "q_BTHD has elements that share memory": lambda: rope(expanded, q, cos, sin, inplace=True),
        "k_BTGD has elements that share memory": lambda: rope(k[..., :4], overlapping, cos[..., :2], sin[..., :2], inplace=True),
    }.items():
        before = q.clone(), k.clone()
        with pytest.raises(ValueError, match=name):
            call()
        assert torch.equal(q, before[0]) and torch.equal(k, before[1])
    halves = torch.cat([q, k], 2)  # side by side in a row of one projection
    wanted = rope(q, k, cos, sin)
    assert all(map(torch.equal, rope(halves[:, :, :2], halves[:, :, 2:], cos, sin, inplace=True), wanted))


def test_cases_cover_the_table():
    for architecture in {key[0] for key in TABLE}:
        names = [case.name for case in cases(architecture)]
        assert len(names) == len(set(names)) >= 4 * sum(key[0] == architecture for key in TABLE)
