"""The loss's kernels against float64 and plain torch, in the interpreter. N tokens, E width, V vocabulary."""

import proof
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bigtrain_kernels import checks, cross_entropy, reference
from bigtrain_kernels.cross_entropy import linear_cross_entropy, loss_and_gradients

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPTIONS = ({}, {"z_loss": 0.01}, {"cap": 3.0}, {"cap": 50.0}, {"smoothing": 0.1}, {"z_loss": 0.01, "cap": 3.0, "smoothing": 0.1})


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """A vocabulary of 320 is two chunks then; three stripes it always is."""
    monkeypatch.setattr(cross_entropy, "SMALLEST_CHUNK", 256)


def inputs_of(N, E, V, dtype, *, bias=True, ignored=0.2):
    """Hidden states, weight (and bias) whose logits spread by about 2, and targets."""
    hidden, weight = torch.randn(N, E), torch.randn(V, E) * 2 / max(E, 1) ** 0.5
    target = torch.randint(V, (N,)).masked_fill(torch.rand(N) < ignored, -100)
    return [t.to(dtype) for t in (hidden, weight, torch.randn(V))[: 2 + bias]], target


def plain_torch(hidden, weight, bias, target, *, z_loss=0.0, cap=0.0, smoothing=0.0):
    """What a model does without us: logits in its own dtype, the loss of them in float32; in float64 the exact values."""
    logits = F.linear(hidden, weight, bias)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    logits = reference.wide(logits)
    loss = F.cross_entropy(logits, target.long(), ignore_index=-100, reduction="sum", label_smoothing=smoothing)
    return loss + z_loss * logits.logsumexp(-1).square().where(target != -100, 0).sum() if z_loss else loss


def run(function, inputs, target, options, scale=0.7):
    leaves = [t.detach().requires_grad_() for t in inputs]
    loss = function(*leaves, *(None,) * (3 - len(leaves)), target, **options)
    return loss, torch.autograd.grad(scale * loss, leaves)


def kernels(hidden, weight, bias, target, **options):
    loss, count = linear_cross_entropy(hidden, weight, target, bias, **options)
    assert loss.dtype == torch.float32 and count.dtype == torch.int64 and count == (target != -100).sum()
    return loss


def prove(inputs, target, options, leaves=None):
    found = run(kernels, leaves or inputs, target, options)
    plain = run(plain_torch, inputs, target, options)
    exact = run(plain_torch, [t.double() for t in inputs], target, options)
    proof.check(found[0], plain[0], exact[0], limit=proof.FORWARD)
    if options.get("smoothing") and inputs[0].dtype != torch.float32:
        # Where the model does not foresee a target, dloss / dlogit is near smoothing - 1, which rounds to one side everywhere: in bf16
        # plain torch's gradients shrink by 18 standard errors, as ours do. So no test of the bias here.
        for ours, other, ref in zip(found[1], plain[1], exact[1], strict=True):
            error, allowed = (float((x.double() - ref).norm()) for x in (ours, other))
            assert error <= proof.BACKWARD * allowed and error <= 0.005 * float(ref.norm())
    else:
        proof.check(found[1], plain[1], exact[1], limit=proof.BACKWARD, zero=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "plain")
def test_values_and_gradients(dtype, options, checked):
    prove(*inputs_of(70, 48, 320, dtype), options)


@pytest.mark.parametrize(("N", "E", "V"), [(1, 16, 97), (63, 97, 130), (97, 63, 257), (130, 33, 1), (33, 1, 700)])
def test_sizes(N, E, V, checked):
    prove(*inputs_of(N, E, V, torch.bfloat16, bias=False), {})


def test_target_in_the_first_and_last_row(checked):
    inputs, target = inputs_of(66, 32, 290, torch.float32)
    target[:33], target[33:] = 0, 289
    prove(inputs, target.int(), {"smoothing": 0.2})


def test_strided(checked):
    inputs, target = inputs_of(35, 40, 150, torch.bfloat16)
    strided = [proof.strided(t) for t in inputs[:2]] + [torch.stack([inputs[2]] * 2, 1)[:, 0]]
    assert not any(t.is_contiguous() for t in strided)
    prove(inputs, torch.stack([target] * 3, 1)[:, 1], {}, strided)
    transposed = [t.t().contiguous().t() for t in inputs[:2]]
    prove(inputs, target, {}, [*transposed, inputs[2]])


def test_order_of_programs_does_not_matter():
    inputs, target = inputs_of(70, 33, 320, torch.bfloat16)
    with checks.checked(shuffle=1):
        found = run(kernels, inputs, target, {})
    expected = run(kernels, inputs, target, {})
    assert torch.equal(found[0], expected[0]) and all(map(torch.equal, found[1], expected[1]))


@settings(max_examples=8, deadline=None)
@given(
    N=st.integers(0, 70), E=st.integers(1, 70), V=st.integers(1, 400), dtype=st.sampled_from(DTYPES), bias=st.booleans(),
    ignored=st.sampled_from([0.0, 0.5, 1.0]), z_loss=st.sampled_from([0.0, 1e-3]), cap=st.sampled_from([0.0, 2.0]),
    smoothing=st.sampled_from([0.0, 0.25]),
)  # fmt: skip
def test_any(N, E, V, dtype, bias, ignored, z_loss, cap, smoothing):
    if dtype != torch.float32:
        smoothing = 0.0  # the test above proves it
    prove(*inputs_of(N, E, V, dtype, bias=bias, ignored=ignored), {"z_loss": z_loss, "cap": cap, "smoothing": smoothing})


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "plain")
def test_finite_differences(options):
    inputs, target = inputs_of(5, 7, 11, torch.float32)
    functions = (
        lambda h, w, b: linear_cross_entropy(h, w, target, b, **options)[0],
        lambda h, w, b: reference.linear_cross_entropy(h, w, target, b, **options)[0],
    )
    proof.differences(*functions, inputs)


@pytest.mark.parametrize("N", [0, 5])
def test_loss_of_nothing_is_zero(N, checked):
    inputs, target = inputs_of(N, 24, 70, torch.bfloat16, ignored=1.0)
    leaves = [t.requires_grad_() for t in inputs]
    loss, count = linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], z_loss=0.1)
    loss.backward()
    assert loss == 0 and count == 0 and all((t.grad == 0).all() for t in leaves)


def test_large_logits_do_not_overflow(checked):
    (hidden, weight), target = inputs_of(40, 32, 130, torch.bfloat16, bias=False)
    inputs = hidden * 1000, weight * 1000
    loss, grads = run(kernels, inputs, target, {})
    exact, exact_grads = run(plain_torch, [t.double() for t in inputs], target, {})
    assert exact > 1e6 and all(g.isfinite().all() for g in grads)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    for grad, ref in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad.double(), ref, rtol=0.02, atol=0.02 * float(ref.abs().max()))


def test_columns_masked_by_a_bias(checked):
    """-inf for the rows of a padded vocabulary, here the first ones too, which an online softmax meets before any other."""
    (hidden, weight, bias), target = inputs_of(40, 32, 300, torch.float32, ignored=0)
    bias[:80] = bias[280:] = float("-inf")
    target = target.clamp(80, 279)
    prove((hidden, weight, bias), target, {"z_loss": 0.01})


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "plain")
@pytest.mark.parametrize("wrong", [320, -1, 1 << 40])
def test_a_target_outside_the_vocabulary_is_no_silent_loss(wrong, options):
    inputs, target = inputs_of(5, 16, 320, torch.bfloat16, ignored=0)
    target[3], target[4] = wrong, -100
    loss, grads = run(kernels, inputs, target, options)
    assert loss.isnan() and grads[0][3].isnan().all() and all(g.isnan().all() for g in grads[1:])
    assert grads[0][:3].isfinite().all() and not grads[0][4].any()


def test_only_what_is_needed(monkeypatch):
    inputs, target = inputs_of(20, 16, 300, torch.float32)
    expected = run(plain_torch, [t.double() for t in inputs], target, {})[1]
    for i, ref in enumerate(expected):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)]
        (0.7 * kernels(*leaves, target)).backward()
        torch.testing.assert_close(leaves[i].grad.double(), ref, rtol=1e-4, atol=1e-5)
        assert all(t.grad is None for j, t in enumerate(leaves) if i != j)
    monkeypatch.setattr(cross_entropy, "logit_gradients_", None)  # not called without gradients
    loss, _ = linear_cross_entropy(*inputs[:2], target, inputs[2])
    torch.testing.assert_close(loss, plain_torch(*inputs, target))
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(*(t.requires_grad_() for t in inputs[:2]), target, inputs[2])[0], loss)


def test_weight_of_another_dtype():
    (hidden, weight, bias), target = inputs_of(20, 16, 40, torch.float32)
    leaves = hidden.bfloat16(), weight.requires_grad_(), bias.requires_grad_()
    linear_cross_entropy(leaves[0], leaves[1], target, leaves[2])[0].backward()
    (_, grad, _) = run(kernels, [t.bfloat16() for t in leaves], target, {})[1]
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(0.7 * weight.grad, grad.float(), rtol=0.01, atol=0.01)


def test_weight_is_not_needed_in_backward():
    inputs, target = inputs_of(20, 16, 40, torch.float32)
    expected = run(kernels, inputs, target, {})[1]
    leaves = [t.requires_grad_() for t in inputs]
    loss = kernels(*leaves, target)
    leaves[1].data.fill_(float("nan"))  # as a released ZeRO-3 parameter would be
    for grad, ref in zip(torch.autograd.grad(0.7 * loss, leaves), expected, strict=True):
        assert torch.equal(grad, ref)


def test_second_backward_is_refused():
    inputs, target = inputs_of(5, 16, 40, torch.float32)
    loss = kernels(*(t.requires_grad_() for t in inputs), target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()


@pytest.mark.parametrize("hooks", [torch.autograd.graph.save_on_cpu, lambda: saved_tensors_hooks(lambda x: x, lambda x: x)])
def test_second_backward_is_refused_under_hooks(hooks):
    """They hand autograd the saved tensor without its version: it would not notice that the gradients are scaled already."""
    inputs, target = inputs_of(5, 16, 40, torch.float32)
    leaves = [t.requires_grad_() for t in inputs]
    with hooks():
        loss = 0.5 * kernels(*leaves, target)
    loss.backward(retain_graph=True)
    for leaf, grad in zip(leaves, run(kernels, inputs, target, {})[1]):
        torch.testing.assert_close(leaf.grad, grad * (0.5 / 0.7))
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()


def test_small_fp16_gradients_are_there_for_the_loss_scale():
    """A mean over 256 tokens under a loss scale of 65,536: plain torch has no row of a rare token that we have not."""
    (hidden, weight), target = inputs_of(256, 32, 4096, torch.float16, bias=False, ignored=0)
    inputs, mean = (hidden, weight * 8), {"scale": 65536 / 256}
    found, plain = run(kernels, inputs, target, {}, **mean)[1][1], run(plain_torch, inputs, target, {}, **mean)[1][1]
    exact = run(plain_torch, [t.double() for t in inputs], target, {}, **mean)[1][1]
    assert 0 < int((found == 0).all(1).sum()) <= int((plain == 0).all(1).sum())
    assert float(((found.double() - exact).norm(dim=1) / exact.norm(dim=1)).median()) < 1e-3


def test_fp16_gradients_of_a_frequent_token_do_not_overflow(checked):
    """512 tokens of one target, and hidden states of 200: their sum is beyond fp16, their mean is not."""
    (hidden, weight, bias), target = inputs_of(512, 16, 300, torch.float16, ignored=0)
    inputs = hidden + 200, weight / 1000, bias
    found = run(kernels, inputs, target.fill_(7), {}, scale=1 / 512)[1]
    exact = run(plain_torch, [t.double() for t in inputs], target, {}, scale=1 / 512)[1]
    assert float(exact[1].abs().max()) * 512 > torch.finfo(torch.float16).max
    for grad, ref in zip(found[1:], exact[1:]):
        assert float((grad.double() - ref).norm() / ref.norm()) < 1e-3


def test_checkpointing():
    inputs, target = inputs_of(20, 16, 40, torch.float32)

    def function(*args, **options):
        return checkpoint(kernels, *args, use_reentrant=False, **options)

    found, expected = (run(f, inputs, target, {}) for f in (function, kernels))
    assert torch.equal(found[0], expected[0]) and all(map(torch.equal, found[1], expected[1]))


@pytest.mark.parametrize("bias", [True, False])
def test_operator(bias):
    (hidden, weight, *rest), target = inputs_of(20, 16, 40, torch.float32, bias=bias)
    for need in (True, False):
        tensors = [t.detach().requires_grad_(need) for t in (hidden, weight, *rest)]
        arguments = *tensors[:2], target, tensors[2] if bias else None, 0.01, 3.0, 0.1, need, need, need and bias
        torch.library.opcheck(loss_and_gradients, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compile(dtype):
    inputs, target = inputs_of(20, 16, 40, dtype)

    def function(hidden, weight, bias, target):
        return linear_cross_entropy(2 * hidden, weight, target, bias)[0]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, expected = (run(f, inputs, target, {}) for f in (compiled, function))
    assert torch.equal(found[0], expected[0]) and all(map(torch.equal, found[1], expected[1]))


def test_many_chunks_cost_no_accuracy(monkeypatch):
    """The hidden states' gradient grows chunk by chunk; rounding it each time would double the error of 20 chunks and more."""
    inputs, target = inputs_of(30, 32, 5000, torch.bfloat16, bias=False)
    exact = run(plain_torch, [t.double() for t in inputs], target, {})[1]
    errors = []
    for columns in (8192, 256):
        monkeypatch.setattr(cross_entropy, "SMALLEST_CHUNK", columns)
        grads = run(kernels, inputs, target, {})[1]
        errors.append([float((grad.double() - ref).norm() / ref.norm()) for grad, ref in zip(grads, exact)])
    assert cross_entropy.chunk_columns(5000, 32, 2) == 256
    assert errors[1][0] < 1.02 * errors[0][0] and errors[1][1] == errors[0][1], errors


class Live(TorchDispatchMode):
    """Bytes of the tensors that operators have made and that are still there; `given` were there before."""

    def __init__(self, *given):
        super().__init__()
        self.given, self.storages, self.peak = {t.untyped_storage()._cdata for t in given}, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.given:  # a view
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: (ref, size) for key, (ref, size) in self.storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_workspace_is_a_sixteenth_of_the_logits(bias, dtype, monkeypatch):
    """8,192 tokens, Llama 3's vocabulary and width, on tensors without memory and with launches that do nothing."""

    class Absent:
        def __getitem__(self, grid):
            return lambda *args, **options: None

    monkeypatch.undo()
    for kernel in ("statistics", "logit_gradients", "add_hidden_gradients"):
        monkeypatch.setattr(cross_entropy.kernels, kernel, Absent())
    N, V, E = 8192, 128256, 4096
    hidden, weight, bias_V = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((N, E), (V, E), (V,)))
    target = torch.empty(N, dtype=torch.int64, device="meta")
    options = {"z_loss": 1e-4, "cap": 30.0, "smoothing": 0.1, "need_hidden": True, "need_weight": True, "need_bias": bias}
    with Live(hidden, weight, bias_V, target) as live:
        results = cross_entropy.forward(hidden, weight, target, bias_V if bias else None, **options)
    returned = sum(t.untyped_storage().nbytes() for t in results)
    logits = N * V * 2
    assert returned >= 2 * (N + V) * E
    print(f"workspace {live.peak - returned:,} bytes, 1/{logits / (live.peak - returned):.2f} of the logits")
    assert 0 < live.peak - returned <= logits // 16
