"""transformers' models with bigtrain's attention give the logits and gradients that they give with their own."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GptOssConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM

from bigtrain.model.hf import register_attention

SHAPE = dict(
    vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
)  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=7)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SHAPE, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)),
    "gpt-oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SHAPE, num_key_value_heads=2, head_dim=32, sliding_window=7, num_local_experts=2, num_experts_per_tok=1)
    ),
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_attention()


def outcome(model, implementation, padding):
    model.set_attn_implementation(implementation)
    model.zero_grad()
    tokens = torch.arange(2 * 33).view(2, 33) % 50
    mask = torch.ones(2, 33, dtype=torch.long)
    if padding == "left":
        mask[1, :9] = 0
    if padding == "right":
        mask[1, -9:] = 0
    logits = model(input_ids=tokens, attention_mask=mask).logits
    logits = logits[mask.bool()]
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_same_logits_and_gradients(name, padding):
    torch.manual_seed(0)
    model = MODELS[name]().float()
    logits, gradients = outcome(model, "eager", padding)
    ours, our_gradients = outcome(model, "bigtrain", padding)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)
    assert our_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[key], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max()) + 1e-6, msg=key)


def test_a_mask_with_gaps_is_refused():
    model = MODELS["llama"]()
    model.set_attn_implementation("bigtrain")
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[0, 4] = 0
    with pytest.raises(ValueError, match="follow one another"):
        model(input_ids=torch.zeros(1, 9, dtype=torch.long), attention_mask=mask)


def test_dropout_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.1)).train()
    model.set_attn_implementation("bigtrain")
    with pytest.raises(ValueError, match="no dropout"):
        model(input_ids=torch.zeros(1, 9, dtype=torch.long))
