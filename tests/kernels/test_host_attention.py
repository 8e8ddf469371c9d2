"""The bf16 attention of the host: its gradients against float64, beside those of plain torch operations in bf16."""

import pytest
import torch

from bigtrain_kernels import host, ops, reference

F64 = torch.float64
CASES = {
    "one block": dict(T=97),
    "blocks that do not divide": dict(T=600),
    "not causal": dict(T=300, causal=False),
    "grouped heads": dict(T=130, G=1),
    "documents": dict(T=300, documents=5),
    "documents, not causal": dict(T=270, documents=3, causal=False),
    "one token": dict(T=1),
    "heads in chunks": dict(T=2048, H=5, G=5, B=1),
    "large scores": dict(T=300, spread=6.0),
}


def run(attend, inputs, weight, dtype):
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    out = attend(*leaves)
    return [t.detach().to(F64) for t in (out, *torch.autograd.grad(out, leaves, weight.to(dtype)))]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_as_good_as_plain_torch(case):
    shape = dict(B=2, H=4, G=2, D=32, causal=True, documents=0, spread=1.0) | CASES[case]
    T, B, H, G, D = (shape[key] for key in "TBHGD")
    torch.manual_seed(0)
    inputs = [torch.randn(B, T, n, D).bfloat16() for n in (H, G, G)]
    inputs[0] *= shape["spread"]
    weight = torch.randn(B, T, H, D).bfloat16()
    document_BT = torch.randint(shape["documents"], (B, T)).sort().values if shape["documents"] else None
    kind = dict(causal=shape["causal"], document_BT=document_BT)
    exact = run(lambda *x: reference.attention(*x, **kind), inputs, weight, F64)
    ours = run(lambda *x: ops.attention(*x, **kind), inputs, weight, torch.bfloat16)
    hidden = ~reference.visible(T, T, shape["causal"], document_BT, "cpu")

    def plain(q, k, v):
        q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(H // G, 1) for x in (k, v))
        p = torch.softmax((q @ k.mT * D**-0.5).masked_fill(hidden, float("-inf")).float(), -1).bfloat16()
        return (p @ v).transpose(1, 2)

    theirs = run(plain, inputs, weight, torch.bfloat16)
    size = exact[-1].norm()  # one token's scores have no gradient: rounding of what cancels is all there is
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        error, bound = ((x - true).norm() / true.norm().clamp_min(0.1 * size) for x in (mine, other))
        assert error < 1.5 * bound + 1e-3, (error, bound)
        assert error < 0.03


def test_a_query_that_sees_no_key_has_no_gradient():
    q, k, v = (torch.randn(1, 2, 4, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16)
    mask[..., 1, :] = float("-inf")
    out = host.Attention.apply(q, k, v, mask, False, 0.25)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in (out, *gradients))
    assert not out[:, :, 1].any() and not gradients[0][:, :, 1].any()


def test_a_bf16_model_in_training_uses_it(monkeypatch):
    used = []
    real = host.Attention.apply
    monkeypatch.setattr(host.Attention, "apply", lambda *x: used.append(1) or real(*x))
    x = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    ops.attention(x, x, x, causal=True)
    with torch.no_grad():
        ops.attention(x, x, x, causal=True)
    assert used == [1]
