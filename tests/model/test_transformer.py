"""The transformer against itself: packing, caching, recomputation, tying, size, initialisation, torch.compile."""

from pathlib import Path

import pytest
import torch
import yaml

from bigtrain.config import Model
from bigtrain.model.initialise import initial_value, initialise
from bigtrain.model.transformer import Transformer, parameter_shapes

V = 37
COMMON = dict(layers=3, width=16, heads=4, mlp_width=24, max_positions=32, init_std=0.3)
CONFIGS = {
    "llama": dict(kv_heads=2),
    "gpt2": dict(norm="layernorm", positions="learned", mlp="gelu_tanh", attention_bias=True, mlp_bias=True, tied_embeddings=True),
    "relu2": dict(mlp="relu2", head_dim=6, norm_position="post"),
}


def build(name="llama", seed=0, **extra):
    model = Transformer(Model(**COMMON, **{**CONFIGS[name], **extra}), V)
    initialise(model, seed)
    return model


@pytest.fixture(params=CONFIGS)
def model(request):
    return build(request.param)


def tokens(*shape):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(1))


def gradients(model, *args, seed=0, **kwargs):
    """(loss, gradients by name) of one forward and backward pass."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss, _ = model(*args, **kwargs)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_packed_documents_equal_each_alone(model):
    documents = [tokens(1, 5), tokens(1, 1), tokens(1, 8) + 0]
    target = [t.roll(-1, 1) for t in documents]
    packed = dict(
        token_BT=torch.cat(documents, 1),
        document_BT=torch.tensor([[0] * 5 + [1] + [2] * 8], dtype=torch.int32),
        position_BT=torch.tensor([[*range(5), 0, *range(8)]]),
    )
    alone = torch.cat([model(t) for t in documents], 1)
    torch.testing.assert_close(model(**packed), alone, rtol=1e-5, atol=1e-5)
    loss, grads = gradients(model, **packed, target_BT=torch.cat(target, 1))
    total, sums = 0, {}
    for token, t in zip(documents, target, strict=True):
        one, its = gradients(model, token, target_BT=t)
        total += one
        sums = {name: grad + sums.get(name, 0) for name, grad in its.items()}
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads, sums, rtol=1e-4, atol=1e-4)


def test_documents_matter(model):
    token = tokens(1, 8)
    document_BT = torch.tensor([[0] * 4 + [1] * 4], dtype=torch.int32)
    assert not torch.allclose(model(token), model(token, document_BT=document_BT))


def test_padded_batch_equals_unpadded(model):
    token = tokens(1, 6)
    padded = torch.cat([token, torch.zeros(1, 4, dtype=torch.long)], 1)
    document_BT = torch.tensor([[0] * 6 + [-1] * 4], dtype=torch.int32)
    target = torch.cat([token.roll(-1, 1), torch.full((1, 4), -100)], 1)
    plain = gradients(model, token, target_BT=target[:, :6])
    torch.testing.assert_close(gradients(model, padded, document_BT=document_BT, target_BT=target), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split", [[1] * 9, [5, 1, 1, 2], [9], [3, 6]])
@torch.no_grad()
def test_cache_equals_full(model, split):
    token = tokens(2, 9)
    cache = model.new_cache(2, 9)
    parts = [model(part, cache=cache) for part in token.split(split, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(token), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="cannot take 1 more"):
        model(token[:, :1], cache=cache)


def test_cache_refuses_documents():
    model = build()
    with pytest.raises(ValueError, match="not both"):
        model(tokens(1, 2), cache=model.new_cache(1, 2), document_BT=torch.zeros(1, 2, dtype=torch.int32))


def test_last_only(model):
    token = tokens(2, 6)
    torch.testing.assert_close(model(token, last_only=True), model(token)[:, -1:])


def test_no_target_no_loss(model):
    loss, grads = gradients(model, tokens(2, 4), target_BT=torch.full((2, 4), -100))
    assert loss == 0 and all((g == 0).all() for g in grads.values())


def test_the_future_is_unseen():
    model = build()
    token = tokens(1, 8)
    changed = token.clone()
    changed[0, 5] = (changed[0, 5] + 1) % V
    before, after = model(token), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize(("every", "recomputed"), [("full", [0, 1, 2]), (2, [0, 2]), (3, [0])])
def test_checkpointing_recomputes_the_same(every, recomputed):
    kwargs = dict(target_BT=tokens(2, 8).roll(-1, 1), document_BT=torch.tensor([[0] * 3 + [1] * 5] * 2, dtype=torch.int32))
    plain = gradients(build(dropout=0.2).train(), tokens(2, 8), **kwargs)
    model = build(dropout=0.2, activation_checkpointing=every).train()
    calls = [0] * len(model.layers)
    for index, layer in enumerate(model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    torch.testing.assert_close(gradients(model, tokens(2, 8), **kwargs), plain, rtol=0, atol=0)
    assert calls == [2 if i in recomputed else 1 for i in range(3)]


def test_dropout_only_in_training():
    model, plain = build(dropout=0.5), build()
    token = tokens(1, 6)
    torch.testing.assert_close(model.eval()(token), plain(token))
    model.train()
    assert not torch.allclose(model(token), model(token))


@pytest.mark.parametrize("name", CONFIGS)
def test_block_compiles_whole(name):
    calls = []
    for compiled in (False, True):
        model = build(name)
        if compiled:
            for layer in model.layers:
                layer.compile(fullgraph=True, backend="aot_eager")
        document_BT = torch.tensor([[0] * 3 + [1] * 5] * 2, dtype=torch.int32)
        calls.append(gradients(model, tokens(2, 8), target_BT=tokens(2, 8), document_BT=document_BT))
    torch.testing.assert_close(*calls, rtol=1e-5, atol=1e-5)


def test_parameter_names():
    names = list(parameter_shapes(Model(**COMMON), V))
    assert [n for n in names if not n.startswith("layers")] == ["embedding.weight", "final_norm.weight", "head.weight"]
    block = [f"attention.{p}.weight" for p in "qkvo"] + [f"mlp.{p}.weight" for p in ("gate", "up", "down")]
    block += ["attention_norm.weight", "mlp_norm.weight"]
    assert sorted(n for n in names if n.startswith("layers.2.")) == sorted(f"layers.2.{n}" for n in block)
    bert = list(
        parameter_shapes(
            Model(**COMMON, tied_embeddings=True, head="transform", positions="learned", token_types=2, embedding_norm=True), V
        )
    )
    assert [n for n in bert if not n.startswith("layers")] == [
        "embedding.weight", "positions.weight", "token_types.weight", "embedding_norm.weight", "final_norm.weight", "head.bias",
        "head.transform.weight", "head.transform.bias", "head.norm.weight",
    ]  # fmt: skip


def test_tied_head_is_one_parameter():
    model = build("gpt2")
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters()) and "head.weight" not in model.state_dict()
    other = build("gpt2", seed=1)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(tokens(1, 4)), model(tokens(1, 4)))
    with torch.device("meta"):
        empty = Transformer(model.config, V)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert empty.head.weight is empty.embedding.weight
    torch.testing.assert_close(empty(tokens(1, 4)), model(tokens(1, 4)))


def test_untied_head_is_its_own():
    model = build()
    assert model.head.weight is not model.embedding.weight
    assert "head.weight" in model.state_dict()


def preset(name):
    path = Path(__file__).parents[2] / "configs/models" / f"{name}.yaml"
    document = yaml.safe_load(path.read_text())
    assert list(document) == ["model"]
    return Model(**document["model"])


# Counts of the published models, with their tokenizers' vocabularies.
@pytest.mark.parametrize(
    ("name", "vocab_size", "count"),
    [
        ("gpt2-124m", 50257, 124_439_808),
        ("llama-8b", 128256, 8_030_261_248),
        ("llama-70b", 128256, 70_553_706_496),
        ("bert-base", 30522, 109_514_298),
        ("llama-tiny", 4096, 6_917_376),
    ],
)
def test_presets_have_their_published_size(name, vocab_size, count):
    with torch.device("meta"):
        assert Transformer(preset(name), vocab_size).count_parameters() == count


def test_flops_per_token():
    with torch.device("meta"):
        llama = Transformer(preset("llama-8b"), 128256)
        tied = build("gpt2")
    assert llama.flops_per_token(8192) == 6 * (8_030_261_248 - 128256 * 4096) + 12 * 32 * 4096 * 8192
    assert tied.flops_per_token(8) == 6 * (tied.count_parameters() - 32 * 16) + 12 * 3 * 16 * 8


def test_count_is_of_the_parameters(model):
    assert model.count_parameters() == sum(p.numel() for p in model.parameters())


def test_initial_values_depend_on_name_and_seed_alone():
    config = Model(**COMMON, **CONFIGS["gpt2"])
    model = build("gpt2")
    values = {name: initial_value(name, p.shape, config, 0) for name, p in reversed(list(model.named_parameters()))}
    for name, p in model.named_parameters():
        assert torch.equal(p, values[name])
    torch.manual_seed(5)
    again = build("gpt2", seed=0)
    other = build("gpt2", seed=1)
    assert torch.equal(again.embedding.weight, model.embedding.weight)
    assert not torch.equal(other.embedding.weight, model.embedding.weight)
    assert not torch.equal(model.layers[0].attention.q.weight, model.layers[1].attention.q.weight)


def test_initial_values_are_as_documented():
    config = Model(**{**COMMON, "layers": 8, "init_std": 0.02})
    shape = (256, 256)
    for name, std in [
        ("embedding.weight", 0.02),
        ("positions.weight", 0.02),
        ("head.weight", 0.02),
        ("head.transform.weight", 0.02),
        ("layers.3.attention.q.weight", 0.02),
        ("layers.3.attention.o.weight", 0.005),
        ("layers.3.mlp.down.weight", 0.005),
    ]:
        value = initial_value(name, shape, config, 0)
        assert value.dtype == torch.float32
        assert abs(value.std().item() / std - 1) < 0.02 and abs(value.mean().item()) < 0.02 * std, name
    for name in ("final_norm.weight", "embedding_norm.weight", "layers.0.mlp_norm.weight", "head.norm.weight"):
        assert (initial_value(name, (4,), config, 0) == 1).all()
    for name in ("final_norm.bias", "layers.0.attention.q.bias", "head.bias"):
        assert (initial_value(name, (4,), config, 0) == 0).all()


def test_initialise_fills_another_dtype():
    model = build()
    low = Transformer(model.config, V).bfloat16()
    initialise(low, 0)
    assert torch.equal(low.head.weight, model.head.weight.bfloat16())


def test_bf16_stays_close_to_float32():
    config = Model(**{**COMMON, "init_std": 0.05}, kv_heads=2)
    low, high = Transformer(config, V).bfloat16(), Transformer(config, V)
    initialise(low, 0)
    initialise(high, 0)
    kwargs = dict(target_BT=tokens(2, 8), document_BT=torch.tensor([[0] * 3 + [1] * 5] * 2, dtype=torch.int32))
    (loss, grads), (ref, ref_grads) = gradients(low, tokens(2, 8), **kwargs), gradients(high, tokens(2, 8), **kwargs)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ref, rtol=1e-3, atol=0)
    for name, grad in grads.items():
        assert (grad.float() - ref_grads[name]).norm() < 0.03 * ref_grads[name].norm(), name
