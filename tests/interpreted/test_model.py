"""The whole transformer on Triton kernels, in the interpreter, beside the same model on plain torch."""

import pytest
import torch

from bigtrain.config import Model
from bigtrain.model.initialise import initialise
from bigtrain.model.transformer import Transformer
from bigtrain_kernels.ops import Backends, resolve_backends

TRITON = Backends(*["triton"] * len(Backends._fields))
SIZE = dict(vocab_size=61, layers=2, width=64, heads=2, mlp_width=48, max_positions=40)
MODELS = {
    "llama": dict(kv_heads=1),
    "gpt2": dict(norm="layernorm", positions="learned", mlp="gelu_tanh", attention_bias=True, mlp_bias=True, tied_embeddings=True),
    "bert": dict(
        causal=False, norm="layernorm", norm_position="post", positions="learned", mlp="gelu", attention_bias=True, mlp_bias=True,
        embedding_norm=True, token_types=2, head="transform", tied_embeddings=True,
    ),
}  # fmt: skip


def twins(name, triton=TRITON, **more):
    """The model on plain torch and on Triton, with the same weights."""
    config = Model.model_validate(SIZE | MODELS[name] | more)
    models = [Transformer(config, config.vocab_size, backends) for backends in (Backends(), triton)]
    for model in models:
        initialise(model, seed=1)
    return models


def batch(seed=0, T=40):
    generator = torch.Generator().manual_seed(seed)
    token_BT = torch.randint(61, (2, T), generator=generator)
    document_BT = torch.randint(3, (2, T), generator=generator).sort().values.int()
    target_BT = token_BT.roll(-1, 1).masked_fill(torch.rand(2, T, generator=generator) < 0.2, -100)
    return dict(token_BT=token_BT, target_BT=target_BT, document_BT=document_BT)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("name", "triton"), [*((name, TRITON) for name in MODELS), ("llama", TRITON._replace(mlp="fused"))])
def test_same_loss_and_gradients(name, triton, recompute):
    outcomes = []
    for model in twins(name, triton, activation_checkpointing=recompute):
        loss, count = model(**batch())
        (loss / count).backward()
        outcomes.append((loss.detach(), count, {n: p.grad for n, p in model.named_parameters()}))
    (loss, count, gradients), (our_loss, our_count, our_gradients) = outcomes
    assert count == our_count
    torch.testing.assert_close(our_loss, loss, rtol=1e-6, atol=1e-6)
    for key, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[key], gradient, rtol=1e-4, atol=1e-6, msg=key)


def test_generation_with_a_cache():
    plain, ours = (model.eval() for model in twins("llama"))
    token_BT = batch()["token_BT"][:, :9]
    with torch.no_grad():
        expected = plain(token_BT)
        cache = ours.new_cache(2, 9)
        pieces = [ours(token_BT[:, part], cache=cache) for part in (slice(0, 5), slice(5, 6), slice(6, 9))]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-5, atol=1e-5)


def test_compiles_into_one_graph():
    ours = twins("llama")[1]
    loss, _ = ours(**batch())
    compiled, _ = torch.compile(ours, fullgraph=True, backend="aot_eager")(**batch())
    torch.testing.assert_close(compiled, loss)


def test_thirty_steps_stay_together():
    """Triton and torch take the same path down the loss: within 1e-5 after 30 steps in float32."""
    losses = []
    for model in twins("llama"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append([])
        for _ in range(30):
            loss, count = model(**batch(T=24))
            (loss / count).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach() / count))
    plain, ours = losses
    assert plain[-1] < 0.8 * plain[0], "the model learns nothing: its losses prove nothing"
    assert max(abs(a - b) for a, b in zip(plain, ours)) < 1e-5


def test_interpreted_on_request_only():
    assert resolve_backends("cpu", "triton") == TRITON
    assert resolve_backends("cpu", "triton", {"mlp": "fused"}).mlp == "fused"
    assert resolve_backends("cpu") == Backends(), "on a CPU the interpreter is never chosen by itself"
