"""Flash attention in the interpreter: values and gradients against float64 for every mask and option, and the checks on its memory."""

import math

import proof
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.tools.tensor_descriptor import TensorDescriptor

from bigtrain_kernels import attention as flash
from bigtrain_kernels import ops, reference
from bigtrain_kernels.checks import checked, huge

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def inputs(B, T, S, H, G, D, dtype):
    return [torch.randn(B, *shape, D).to(dtype) for shape in ((T, H), (S, G), (S, G))]


def results(attend, tensors, weights):
    """Outputs and gradients of `attend` under random weights of its outputs."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outs = attend(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    total = sum((out.nan_to_num(neginf=0) * w.to(out.dtype)).sum() for out, w in zip(outs, weights))
    return [t.detach() for t in (*outs, *torch.autograd.grad(total, leaves))]


def compare(tensors, *, sink=None, zero=1e-7, **kind):
    """The three of `proof.check`: triton, plain torch in the same dtype, and float64; forward and gradients separately."""
    dtype = tensors[0].dtype
    B, T, H, D = tensors[0].shape
    several = [*tensors] if sink is None else [*tensors, sink]
    count = 2 if kind.get("return_lse") else 1
    weights = [torch.randn(B, T, H, D), torch.randn(B, H, T)][:count]

    def call(function, **more):
        return lambda q, k, v, *sinks: function(q, k, v, **kind, **more, **({"sink_H": sinks[0]} if sinks else {}))

    def plain(q, k, v, *sinks):
        return narrow_attention(q, k, v, *sinks, **kind)

    ours = results(call(ops.attention, backend="triton"), several, weights)
    theirs = results(plain, several, weights)
    exact = results(call(reference.attention), [x.to(F64) for x in several], weights)
    zero = max(zero, {F32: 0.0, F16: 1e-5, BF16: 1e-4}[dtype])
    proof.check(ours[:count], theirs[:count], exact[:count], limit=proof.FORWARD, zero=zero)
    proof.check(ours[count:], theirs[count:], exact[count:], limit=proof.BACKWARD, zero=zero)


def narrow_attention(q, k, v, sink=None, *, causal, document_BT=None, window=None, scale=None, cap=0.0, return_lse=False):
    """Attention as one writes it in plain torch, in the dtype of its inputs."""
    T, S, H, D = q.shape[1], k.shape[1], q.shape[2], q.shape[3]
    q, k, v = (x.transpose(1, 2) for x in (q, *(x.repeat_interleave(H // k.shape[2], 2) for x in (k, v))))
    s = q @ k.mT * (D**-0.5 if scale is None else scale)
    if cap:
        s = cap * torch.tanh(s / cap)
    hidden = ~reference.visible(T, S, causal, document_BT, q.device, window)
    s = s.masked_fill(hidden, torch.finfo(s.dtype).min)
    if sink is not None:
        s = torch.cat([s, sink.to(s.dtype)[None, :, None, None].expand(*s.shape[:3], 1)], -1)
    p = torch.softmax(s.float(), -1).to(s.dtype)[..., :S].masked_fill(hidden, 0)
    lse = s.float().logsumexp(-1)
    if sink is None:
        lse = lse.masked_fill(hidden.all(-1), -math.inf)
    out = (p @ v).transpose(1, 2)
    return (out, lse) if return_lse else out


def documents(B, T, count):
    return torch.randint(count, (B, T)).sort().values


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("D", [64, 128])
def test_head_dimensions(D, causal, dtype):
    compare(inputs(1, 97, 97, 2, 1, D, dtype), causal=causal)


@pytest.mark.parametrize("D", [32, 80, 96, 112, 256])
def test_other_head_dimensions(D):
    compare(inputs(1, 63, 63, 2, 1, D, BF16), causal=True)


@pytest.mark.parametrize(("T", "S"), [(1, 1), (63, 63), (130, 130), (257, 257), (1, 97), (63, 130), (130, 63), (97, 33)])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(T, S, causal):
    compare(inputs(1, T, S, 2, 1, 32, F32), causal=causal, zero=1e-6 if S == 1 else 1e-7)


@pytest.mark.parametrize(("H", "G"), [(1, 1), (4, 4), (4, 2), (6, 1)])
def test_heads(H, G):
    compare(inputs(2, 65, 65, H, G, 32, F32), causal=True)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_documents(causal, dtype):
    compare(inputs(2, 130, 130, 2, 2, 64 if dtype == BF16 else 32, dtype), causal=causal, document_BT=documents(2, 130, 5))


@pytest.mark.parametrize(
    "kind", [dict(window=1), dict(window=40), dict(window=40, causal=False), dict(window=33, document_BT=True)], ids=str
)
def test_window(kind):
    kind = dict(causal=True) | kind
    if "document_BT" in kind:
        kind["document_BT"] = documents(1, 130, 3)
    compare(inputs(1, 130, 130, 2, 1, 32, F32), **kind, zero=1e-6 if kind["window"] == 1 else 1e-7)  # of one key: cancels to 0


@pytest.mark.parametrize(
    "kind",
    [dict(cap=2.0), dict(cap=50.0), dict(cap=50.0, scale=0.02), dict(scale=0.5), dict(cap=5.0, window=20), dict(return_lse=True)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_options(kind, dtype):
    compare(inputs(1, 97, 97, 2, 1, 32, dtype), causal=True, **kind)


@pytest.mark.parametrize("kind", [dict(), dict(return_lse=True), dict(window=9, cap=3.0)], ids=str)
def test_sink(kind):
    compare(inputs(2, 65, 65, 4, 2, 32, F32), causal=True, sink=torch.randn(4), **kind)


def test_sinks_with_gaps():
    """A column of a matrix, and one number for all heads."""
    tensors, sink = inputs(1, 20, 20, 4, 2, 32, F32), torch.randn(4)
    for gaps, dense in ((torch.stack([sink, 9 * sink], 1)[:, 0], sink), (sink[:1].expand(4), sink[:1].repeat(4))):
        ours, true = (
            results(
                lambda q, k, v, s: ops.attention(q, k, v, causal=True, sink_H=s, backend="triton"),
                [*tensors, s],
                [torch.ones(1, 20, 4, 32)],
            )
            for s in (gaps, dense)
        )
        assert all(map(torch.equal, ours, true))


def test_queries_that_see_nothing():
    tensors = inputs(1, 97, 33, 2, 1, 32, F32)
    out, lse = ops.attention(*tensors, causal=True, return_lse=True, backend="triton")
    assert not out[:, :64].any() and (lse[..., :64] == -math.inf).all() and lse[..., 64:].isfinite().all()
    compare(tensors, causal=True, return_lse=True)


@pytest.mark.parametrize("causal", [True, False])
def test_sequences_end_to_end(causal):
    queries, keys = [5, 0, 64, 33, 7], [5, 3, 64, 40, 0]
    end_query, end_key = (torch.tensor([0, *n]).cumsum(0).int() for n in (queries, keys))
    tensors = inputs(1, sum(queries), sum(keys), 2, 1, 32, F32)
    weights = [torch.randn(1, sum(queries), 2, 32)]
    mask = ops.packed_mask(end_query, end_key, causal=causal, dtype=F32, backend="triton")
    ours = results(lambda q, k, v: ops.attention(q, k, v, causal=causal, mask=mask, backend="triton"), tensors, weights)
    torch_mask = ops.packed_mask(end_query, end_key, causal=causal, dtype=F32)
    theirs = results(lambda q, k, v: ops.attention(q, k, v, causal=causal, mask=torch_mask).nan_to_num(), tensors, weights)

    def apart(q, k, v):
        parts = zip(q.split(queries, 1), k.split(keys, 1), v.split(keys, 1))
        return torch.cat(
            [reference.attention(*part, causal=causal) if part[1].shape[1] else torch.zeros_like(part[0]) for part in parts], 1
        )

    exact = results(apart, [x.to(F64) for x in tensors], weights)
    proof.check(ours, theirs, exact, limit=proof.BACKWARD, zero=1e-7)


def test_parts_of_the_keys_combine():
    """As context parallelism does it: attention over halves of the keys, joined by their log-sum-exps, forward and backward."""
    tensors = inputs(1, 40, 80, 2, 2, 32, F32)

    def joined(q, k, v):
        halves = [
            ops.attention(q, k[:, part], v[:, part], causal=False, return_lse=True, backend="triton") for part in (slice(40), slice(40, 80))
        ]
        lse = torch.logaddexp(halves[0][1], halves[1][1])
        return sum(out * torch.exp(part - lse).transpose(1, 2)[..., None] for out, part in halves)

    weights = [torch.randn(1, 40, 2, 32)]
    exact = results(lambda *x: reference.attention(*x, causal=False), [x.to(F64) for x in tensors], weights)
    for ours, true in zip(results(joined, tensors, weights), exact, strict=True):
        torch.testing.assert_close(ours, true.float(), rtol=2e-5, atol=2e-6)


def test_gradients_against_differences():
    document_BT = documents(1, 40, 3)
    q, k, v = inputs(1, 40, 40, 2, 1, 32, F32)
    proof.differences(
        lambda *x: ops.attention(*x, causal=True, document_BT=document_BT, cap=3.0, backend="triton"),
        lambda *x: reference.attention(*x, causal=True, document_BT=document_BT, cap=3.0),
        [q, k, v],
    )


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize(
    "kind", [dict(causal=True), dict(causal=False, window=20), dict(causal=True, window=9), dict(causal=True, document_BT=True)], ids=str
)
def test_blocks_that_a_mask_empties_are_skipped(kind):
    """NaN in a block that a program has no business in reaches its results if it computes that block, masked or not: 0 * NaN."""
    T, block = 96, 32
    if "document_BT" in kind:
        kind = kind | {"document_BT": torch.tensor([[0] * 40 + [1] * 30 + [2] * 26])}
    tensors = inputs(1, T, T, 1, 1, 32, F32)
    weight = [torch.randn(1, T, 1, 32)]
    attend = lambda q, k, v: ops.attention(q, k, v, **kind, backend="triton")  # noqa: E731
    clean = results(attend, tensors, weight)
    visible = reference.visible(T, T, kind["causal"], kind.get("document_BT"), tensors[0].device, kind.get("window"))
    visible = visible.expand(1, 1, T, T)[0, 0].view(T // block, block, T // block, block).any(3).any(1)
    assert not visible.all()
    for i in range(T // block):
        rows = slice(i * block, (i + 1) * block)
        for queries, hidden in ((True, ~visible[i]), (False, ~visible[:, i])):
            elsewhere = hidden.repeat_interleave(block)[None, :, None, None]
            q, k, v = (x.masked_fill(elsewhere, math.nan) if queries == bool(place) else x for place, x in enumerate(tensors))
            out, dq, dk, dv = results(attend, [q, k, v], weight)
            compared = [(out, clean[0]), (dq, clean[1])] if queries else [(dk, clean[2]), (dv, clean[3])]
            for found, right in compared:
                assert torch.equal(found[:, rows], right[:, rows]), f"block {i} of {'queries' if queries else 'keys'}"


def both_passes(tensors, **kind):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = ops.attention(*leaves, **kind, backend="triton")
    return (out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out)))


@pytest.mark.parametrize("kind", [dict(causal=True), dict(causal=False, window=20), dict(causal=True, document_BT=True)], ids=str)
def test_memory(kind):
    """No lane out of bounds, no element with two writers, none without; the same bits in any order of the programs."""
    tensors = inputs(1, 50, 50, 2, 1, 40, F32)
    if "document_BT" in kind:
        kind = kind | {"document_BT": documents(1, 50, 3)}
    proof.same_in_any_order(lambda: both_passes(tensors, **kind), orders=1)


def test_strides():
    tensors = inputs(2, 50, 50, 4, 2, 32, F32)
    apart = [proof.strided(x) for x in tensors]
    with checked():
        for ours, true in zip(both_passes(apart, causal=True), both_passes(tensors, causal=True), strict=True):
            assert torch.equal(ours, true)
    joint = torch.randn(2, 50, 8, 32)  # a projection that makes queries, keys and values at once
    parts = joint.split([4, 2, 2], 2)
    for ours, true in zip(both_passes(parts, causal=True), both_passes([x.contiguous() for x in parts], causal=True), strict=True):
        assert torch.equal(ours, true)
    inner = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in tensors]  # the last dimension is not contiguous
    assert torch.equal(both_passes(inner, causal=True)[0], both_passes(tensors, causal=True)[0])


def test_what_stays_comes_by_descriptor_or_by_pointer():
    """Rows of 80 in memory as TMA wants it, and one element too wide for it: the same bits."""
    tensors = inputs(2, 50, 50, 2, 1, 80, BF16)
    odd = [torch.nn.functional.pad(x, (0, 1))[..., :80] for x in tensors]
    assert isinstance(flash._described(tensors[0], 32), TensorDescriptor) and flash._described(odd[0], 32) is odd[0]
    with checked():
        for ours, true in zip(both_passes(tensors, causal=True), both_passes(odd, causal=True), strict=True):
            assert torch.equal(ours, true)


def test_a_sink_of_no_weight_where_nothing_is_seen():
    tensors = [*inputs(1, 50, 20, 2, 1, 32, F32), torch.tensor([-math.inf, 0.5])]
    leaves = [x.requires_grad_() for x in tensors]
    out, lse = ops.attention(*leaves[:3], causal=True, sink_H=leaves[3], return_lse=True, backend="triton")
    assert not out[:, :30].any() and (lse[:, 0, :30] == -math.inf).all() and (lse[:, 1, :30] == 0.5).all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum() + lse[:, 1].sum(), leaves))


@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 8), (1, 8, 0)])
def test_empty(shape):
    B, T, S = shape
    out, *gradients = both_passes(inputs(B, T, S, 2, 1, 32, F32), causal=False)
    assert out.shape == (B, T, 2, 32) and not out.any() and not any(g.any() for g in gradients)


def test_far_offsets():
    """Rows beyond 2^31 elements of their tensor: the last block of queries reads the last keys."""
    T, H, D = 70_000, 1024, 32
    with checked(programs=lambda grid: [(0, H - 1, 0)]):
        q = huge((1, T, H, D), BF16)
        k, v = (torch.randn(1, 64, 1, D).to(BF16) for _ in range(2))
        q[0, -16:, -1] = torch.randn(16, D).to(BF16)
        seen = flash.ranges(torch.zeros(1, T, dtype=torch.int32), torch.full((1, T), 64, dtype=torch.int32), 64)
        out, _ = flash.forward(q, k, v, flash.Mask(False, D**-0.5, seen=seen))
        exact = reference.attention(q[:, -16:, -1:].to(F64), k.to(F64), v.to(F64), causal=False)
        assert (out[:, -16:, -1:].to(F64) - exact).norm() < 0.005 * exact.norm()


def test_wide_heads_are_refused():
    with pytest.raises(ValueError, match="up to 256, found 288; use kernels.attention=torch"):
        ops.attention(*inputs(1, 4, 4, 1, 1, 288, F32), causal=True, backend="triton")


def test_registered():
    q, k, v = inputs(1, 20, 20, 2, 1, 32, F32)
    seen = flash.ranges(*reference.seen_keys(20, 20, True, documents(1, 20, 2), None, "cpu"), 20)
    for ranges in ((None,) * 4, tuple(seen)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        torch.library.opcheck(flash.attention, (*leaves, torch.randn(2), *ranges, ranges[0] is None, 0.2, 0.0))


def test_compiles_into_one_graph():
    tensors = inputs(1, 20, 20, 2, 1, 32, F32)
    document_BT = documents(1, 20, 2)
    weights = [torch.randn(1, 20, 2, 32)]

    def attend(q, k, v):
        return ops.attention(q * 2, k, v, causal=True, document_BT=document_BT, backend="triton")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for ours, true in zip(results(compiled, tensors, weights), results(attend, tensors, weights), strict=True):
        torch.testing.assert_close(ours, true)


@settings(max_examples=12, deadline=None)
@given(  # below five positions gradients in 16 bits are what cancellation leaves; test_lengths has those in float32
    st.integers(5, 70), st.integers(5, 70), st.sampled_from([(1, 1), (2, 1), (3, 3)]), st.sampled_from([BF16, F16, F32]),
    st.booleans(), st.none() | st.integers(1, 40), st.integers(0, 4), st.integers(0, 2**31),
)  # fmt: skip
def test_any_mask(T, S, heads, dtype, causal, window, count, seed):
    torch.manual_seed(seed)
    if count:
        S = T
    document_BT = documents(1, T, count) if count else None
    # In 16 bits a row's gradients share the error of the output that delta is taken of: few rows look like a bias.
    zero = 1e-6 if dtype == F32 else 1e-3
    compare(inputs(1, T, S, *heads, 32, dtype), causal=causal, window=window, document_BT=document_BT, zero=zero)
