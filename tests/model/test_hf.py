"""The model equals transformers' GPT-2, Llama and BERT on copied weights, and their configs and names survive the round trip."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig

from bigtrain.config import Model
from bigtrain.errors import UserError
from bigtrain.model.hf import config_from_hf, config_to_hf, family_of, register_attention, state_from_hf, state_to_hf
from bigtrain.model.transformer import Transformer

B, T, V = 2, 12, 61
NO_DROP = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)


def llama(**extra):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=16, initializer_range=0.2, bos_token_id=None, eos_token_id=None, **extra,
        )
    )  # fmt: skip


def gpt2(**extra):
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=16, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
            **NO_DROP, **extra,
        )
    )  # fmt: skip


def bert(**extra):
    return BertForMaskedLM(
        BertConfig(
            vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16,
            initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **extra,
        )
    )  # fmt: skip


MODELS = {
    "llama": llama,
    "llama-biased-tied": lambda: llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=12),
    "gpt2": gpt2,
    "gpt2-untied": lambda: gpt2(tie_word_embeddings=False, n_inner=40, activation_function="gelu"),
    "bert": bert,
}


def make_pair(name):
    """(theirs, ours) with the same weights, biases and norms made non-trivial."""
    torch.manual_seed(0)
    hf = MODELS[name]()
    with torch.no_grad():
        for p in hf.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p), alpha=0.2)
    config = config_from_hf(hf.config)
    model = Transformer(config, V)
    model.load_state_dict(state_from_hf(hf.state_dict(), config))
    return hf.train(), model.train()


@pytest.fixture(params=MODELS)
def pair(request):
    return make_pair(request.param)


def close(ours, theirs, scale=1.0):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * scale)


def test_logits_loss_and_every_gradient(pair):
    hf, model = pair
    token = torch.randint(V, (B, T))
    extra, ours_extra = {}, {}
    if not model.config.causal:
        extra["token_type_ids"] = ours_extra["token_type_BT"] = torch.randint(2, (B, T))
    target = torch.randint(V, (B, T)).where(torch.rand(B, T) < 0.7, -100)
    logits = hf(input_ids=token, **extra).logits
    close(model(token, **ours_extra), logits)
    close(model(token, **ours_extra, last_only=True), logits[:, -1:])

    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    loss.backward()
    total, count = model(token, target_BT=target, **ours_extra)
    assert count == (target != -100).sum()
    close(total / count, loss)
    (total / count).backward()
    theirs = state_from_hf({name: p.grad for name, p in hf.named_parameters()}, model.config)
    ours = {name: p.grad for name, p in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name in ours:
        close(ours[name], theirs[name])


@pytest.mark.parametrize("name", [name for name in MODELS if name != "bert"])
def test_loss_of_shifted_labels_is_theirs(name):
    hf, model = make_pair(name)
    token = torch.randint(V, (B, T))
    total, count = model(token[:, :-1], target_BT=token[:, 1:])
    close(total / count, hf(input_ids=token, labels=token).loss)


def test_padding_is_their_attention_mask(pair):
    hf, model = pair
    token = torch.randint(V, (B, T))
    keep = torch.ones(B, T, dtype=torch.int32)
    keep[0, :5] = 0  # a causal model would not see what lies behind
    keep[1, 7:] = 0
    theirs = hf(input_ids=token, attention_mask=keep.long()).logits
    ours = model(token, document_BT=keep)
    close(ours[keep.bool()], theirs[keep.bool()])


def test_state_survives_the_round_trip(pair):
    hf, model = pair
    back = state_to_hf(model.state_dict(), model.config)
    theirs = hf.state_dict()
    assert back.keys() <= theirs.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, theirs[name]), name
    fresh = type(hf)(config_to_hf(model.config, V))
    missing, unexpected = fresh.load_state_dict(back, strict=False)
    assert not unexpected
    fresh.tie_weights()
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), theirs.values(), strict=True)), missing


def test_config_survives_the_round_trip(pair):
    _, model = pair
    assert config_from_hf(config_to_hf(model.config, V)) == model.config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "rope_type is 'linear'"),
        (lambda: LlamaConfig(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (lambda: GPT2Config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
        (lambda: BertConfig(is_decoder=True), "is_decoder is True"),
        (MistralConfig, "model_type is 'mistral'"),
    ],
)
def test_what_cannot_be_computed_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(config())


def test_a_shape_without_family_is_refused():
    config = Model(layers=1, width=8, heads=2, mlp_width=8, max_positions=8, mlp="relu2")
    with pytest.raises(UserError, match="nearest is llama, but model has mlp relu2"):
        family_of(config)


def test_weights_that_do_not_fit_are_named():
    hf = llama()
    config = config_from_hf(hf.config)
    state = hf.state_dict()
    state["model.layers.0.extra.weight"] = state.pop("model.norm.weight")
    state["lm_head.weight"] = state["lm_head.weight"][:-1]
    with pytest.raises(UserError) as error:
        state_from_hf(state, config)
    for part in ("model.norm.weight is missing", "lm_head.weight has shape [60, 32]", "model.layers.0.extra.weight has no place"):
        assert part in str(error.value)
    with pytest.raises(UserError, match="language-model head"):
        state_from_hf({}, config)


@pytest.mark.parametrize("padding", [0, 5])
def test_attention_is_registered_with_transformers(padding):
    """On a CPU it is torch's; tests/interpreted/test_transformers.py has the kernels, and more models."""
    register_attention()
    model = llama()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :padding] = 0
    logits = []
    for implementation in ("eager", "bigtrain"):
        model.set_attn_implementation(implementation)
        logits.append(model(input_ids=torch.arange(24).view(2, 12), attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
