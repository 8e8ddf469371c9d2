"""transformers' models with bigtrain's attention give the logits and gradients that they give with their own."""

from functools import partial

import pytest
import torch
from transformers import (
    AttentionInterface,
    BeitConfig,
    BeitModel,
    BertConfig,
    BertForMaskedLM,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
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


TOKENS = torch.arange(2 * 33).view(2, 33) % 50


def outcome(model, implementation, padding, compiled=False):
    model.set_attn_implementation(implementation)
    model.zero_grad()
    mask = torch.ones(2, 33, dtype=torch.long)
    if padding == "left":
        mask[1, :9] = 0
    if padding == "right":
        mask[1, -9:] = 0
    options = {} if model.config.model_type == "bert" else {"use_cache": False}
    function = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    logits = function(input_ids=TOKENS, attention_mask=None if padding == "none" else mask, **options).logits
    logits = logits[mask.bool()]
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CASES = [(name, padding, False) for name in MODELS for padding in ("none", "left", "right")] + [
    ("llama", "none", True),
    ("mistral", "right", True),
    ("bert", "right", True),
]


@pytest.mark.parametrize(("name", "padding", "compiled"), CASES)
def test_same_logits_and_gradients(name, padding, compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MODELS[name]().float()
    logits, gradients = outcome(model, "eager", padding)
    ours, our_gradients = outcome(model, "bigtrain", padding, compiled)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)
    assert our_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[key], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max()) + 1e-6, msg=key)


@pytest.mark.parametrize(("name", "padding"), [("llama", 5), ("mistral", 0)])
def test_generates_the_same_in_a_static_cache(name, padding):
    torch.manual_seed(0)
    model, mask = MODELS[name]().eval(), torch.ones(2, 15, dtype=torch.long)
    mask[1, :padding] = 0
    options = dict(max_new_tokens=4, do_sample=False, cache_implementation="static", pad_token_id=0, eos_token_id=None)
    found = []
    for implementation in ("eager", "bigtrain"):
        model.set_attn_implementation(implementation)
        scored = model.generate(input_ids=TOKENS[:, :15], attention_mask=mask, output_scores=True, return_dict_in_generate=True, **options)
        found.append(scored)
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(found[1].scores, found[0].scores, rtol=1e-4, atol=1e-5)


CAUSAL = torch.ones(9, 9).tril().bool()


def logits_under(mask, implementation, name="llama"):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(input_ids=TOKENS[:, :9], attention_mask=mask).logits


@pytest.mark.parametrize("lowest", [None, float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("batch_heads", [(1, 1), (2, 1), (2, 4)])
def test_a_mask_of_four_dimensions(lowest, batch_heads):
    """A prefix of 4 that all see, and behind it a window of 3."""
    shown = torch.ones(9, 9).tril().triu(-2).bool()
    shown[:4, :4] = True
    mask = torch.zeros(9, 9).masked_fill(~shown, torch.finfo(torch.float32).min if lowest is None else lowest).expand(*batch_heads, 9, 9)
    torch.testing.assert_close(logits_under(mask == 0 if lowest is None else mask, "bigtrain"), logits_under(mask, "eager"))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (CAUSAL & ~torch.eye(9, dtype=torch.bool).roll(-1, 1), "follow one another"),
        (CAUSAL.flip(0), "before that of the query before it"),
        (CAUSAL.float(), "adds no bias"),
        (torch.randn(9, 9), "adds no bias"),
        (CAUSAL.long(), r"mask \[batch, heads, 9, 9\], found torch.int64"),
        (CAUSAL[:, :8], r"mask \[batch, heads, 9, 9\], found torch.bool \[2, 1, 9, 8\]"),
        (torch.stack([CAUSAL] * 3 + [CAUSAL | True]), "one mask for all heads"),
    ],
)
def test_a_mask_that_is_no_range_of_keys_is_refused(mask, message):
    with pytest.raises(ValueError, match=message + ".*use attn_implementation='eager'"):
        logits_under(mask.expand(2, 1 if mask.dim() == 2 else 4, *mask.shape[-2:]), "bigtrain")


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_with_gaps_is_refused(compiled):
    model = MODELS["llama"]()
    model.set_attn_implementation("bigtrain")
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[0, 4] = 0
    function = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with pytest.raises(RuntimeError if compiled else ValueError, match="follow one another"):
        function(input_ids=torch.zeros(1, 9, dtype=torch.long), attention_mask=mask, use_cache=False)


def test_a_position_bias_is_refused():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0))
    t5.set_attn_implementation("bigtrain")
    with pytest.raises(ValueError, match="does not compute position_bias; use attn_implementation='eager'"):
        t5(input_ids=TOKENS, decoder_input_ids=TOKENS)
    shape = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8)
    beit = BeitModel(BeitConfig(**shape, use_relative_position_bias=True, attention_probs_dropout_prob=0.0))
    for name, parameter in beit.named_parameters():
        if "relative_position_bias" in name:
            torch.nn.init.normal_(parameter)
    beit.set_attn_implementation("bigtrain")
    with pytest.raises(ValueError, match="adds no bias"):
        beit(pixel_values=torch.randn(1, 3, 32, 32))


def test_keywords_that_change_the_result_are_refused():
    attend = AttentionInterface()["bigtrain"]
    q = torch.randn(1, 2, 5, 32)
    call = partial(attend, torch.nn.Module(), q, q, q, None)
    plain = call()[0]
    assert torch.equal(call(sliding_window=7, position_ids=torch.arange(5), output_attentions=False, position_bias=None)[0], plain)
    for name, given in {"indices": q, "sinks": q, "output_attentions": True, "cache": object(), "head_mask": q}.items():
        with pytest.raises(ValueError, match=f"does not compute {name}; use"):
            call(**{name: given})


def test_dropout_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.1)).train()
    model.set_attn_implementation("bigtrain")
    with pytest.raises(ValueError, match="no dropout"):
        model(input_ids=torch.zeros(1, 9, dtype=torch.long))
