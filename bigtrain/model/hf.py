"""Shapes and weights from and to Hugging Face: Llama, GPT-2 and BERT (masked language model), by explicit name maps.

Where a tensor is shared (a tied head, BERT's two names for the vocabulary's bias), the state dict that goes out names it
once, as safetensors files of transformers do.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigtrain.config import Model
from bigtrain.errors import UserError
from bigtrain_kernels.ops import attention, range_mask, resolve_backends

from .transformer import parameter_shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    fields: dict[str, Any]
    """What the fields of our config must be; everything else may vary."""
    modules: dict[str, str]
    """Our module, or parameter, -> theirs; {} is the layer."""
    ignore: str = "$^"
    """Regular expression of their names that hold no weight of their own: buffers, and second names of shared tensors."""


LLAMA = Family(
    fields=dict(
        causal=True, norm="rmsnorm", norm_position="pre", positions="rope", mlp="swiglu", embedding_norm=False, token_types=0,
        head="linear", dropout=0.0,
    ),
    modules={
        "embedding": "model.embed_tokens",
        "layers.{}.attention_norm": "model.layers.{}.input_layernorm",
        "layers.{}.attention.q": "model.layers.{}.self_attn.q_proj",
        "layers.{}.attention.k": "model.layers.{}.self_attn.k_proj",
        "layers.{}.attention.v": "model.layers.{}.self_attn.v_proj",
        "layers.{}.attention.o": "model.layers.{}.self_attn.o_proj",
        "layers.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
        "layers.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
        "layers.{}.mlp.up": "model.layers.{}.mlp.up_proj",
        "layers.{}.mlp.down": "model.layers.{}.mlp.down_proj",
        "final_norm": "model.norm",
        "head": "lm_head",
    },
    ignore=r".*rotary_emb\.inv_freq",
)  # fmt: skip

# The query, key and value projections are one tensor there, c_attn, and matrices are stored transposed: see _unfuse.
GPT2 = Family(
    fields=dict(
        causal=True, norm="layernorm", norm_position="pre", positions="learned", attention_bias=True, mlp_bias=True, embedding_norm=False,
        token_types=0, head="linear",
    ),
    modules={
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "layers.{}.attention_norm": "transformer.h.{}.ln_1",
        "layers.{}.attention.q": "transformer.h.{}.attn.q",
        "layers.{}.attention.k": "transformer.h.{}.attn.k",
        "layers.{}.attention.v": "transformer.h.{}.attn.v",
        "layers.{}.attention.o": "transformer.h.{}.attn.c_proj",
        "layers.{}.mlp_norm": "transformer.h.{}.ln_2",
        "layers.{}.mlp.up": "transformer.h.{}.mlp.c_fc",
        "layers.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    ignore=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
)  # fmt: skip

BERT = Family(
    fields=dict(
        causal=False, norm="layernorm", norm_position="post", positions="learned", mlp="gelu", attention_bias=True, mlp_bias=True,
        embedding_norm=True, head="transform", tied_embeddings=True,
    ),
    modules={
        "embedding": "bert.embeddings.word_embeddings",
        "positions": "bert.embeddings.position_embeddings",
        "token_types": "bert.embeddings.token_type_embeddings",
        "embedding_norm": "bert.embeddings.LayerNorm",
        "layers.{}.attention.q": "bert.encoder.layer.{}.attention.self.query",
        "layers.{}.attention.k": "bert.encoder.layer.{}.attention.self.key",
        "layers.{}.attention.v": "bert.encoder.layer.{}.attention.self.value",
        "layers.{}.attention.o": "bert.encoder.layer.{}.attention.output.dense",
        "layers.{}.attention_norm": "bert.encoder.layer.{}.attention.output.LayerNorm",
        "layers.{}.mlp.up": "bert.encoder.layer.{}.intermediate.dense",
        "layers.{}.mlp.down": "bert.encoder.layer.{}.output.dense",
        "layers.{}.mlp_norm": "bert.encoder.layer.{}.output.LayerNorm",
        "head.transform": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
        "head": "cls.predictions",  # the bias; the weight is the embedding's
    },
    ignore=r"bert\.embeddings\.(position_ids|token_type_ids)|cls\.predictions\.decoder\.(weight|bias)",
)  # fmt: skip

FAMILIES = {"llama": LLAMA, "gpt2": GPT2, "bert": BERT}
GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu2"}


def family_of(config: Model) -> str:
    """The Hugging Face family that has the shape of `config`; UserError where none has."""
    differs = {}
    for name, family in FAMILIES.items():
        differs[name] = [
            f"{key} {getattr(config, key)}, not {value}" for key, value in family.fields.items() if getattr(config, key) != value
        ]
    if config.kv_heads_ != config.heads:
        for name in ("gpt2", "bert"):
            differs[name].append(f"kv_heads {config.kv_heads}, not {config.heads}")
    if config.head_dim_ * config.heads != config.width:
        for name in ("gpt2", "bert"):
            differs[name].append(f"head_dim {config.head_dim_}, not width / heads")
    if config.mlp not in GELU.values():
        differs["gpt2"].append(f"mlp {config.mlp}")
    if config.token_types == 0:
        differs["bert"].append("token_types 0")
    name = min(differs, key=lambda family: len(differs[family]))
    if differs[name]:
        raise UserError(f"no Hugging Face model has this shape; the nearest is {name}, but model has {'; '.join(differs[name])}")
    return name


def config_from_hf(hf: PretrainedConfig) -> Model:
    """Our config of a Hugging Face Llama, GPT-2 or BERT. Raises UserError for what this model cannot compute.

    Dropout is their dropout on the residual stream; we have none on attention probabilities.
    """

    def need(key: str, *allowed: Any) -> Any:
        value = getattr(hf, key, allowed[0])
        if value not in allowed:
            raise UserError(f"Hugging Face config: {key} is {value!r}; supported: {', '.join(map(repr, allowed))}")
        return value

    family = need("model_type", *FAMILIES)
    fields = dict(FAMILIES[family].fields, vocab_size=hf.vocab_size, init_std=hf.initializer_range)
    if family == "llama":
        rope = hf.rope_parameters
        if rope.get("rope_type", "default") != "default":
            raise UserError(f"Hugging Face config: rope_parameters.rope_type is {rope['rope_type']!r}; supported: 'default' (no scaling)")
        need("hidden_act", "silu", "swish")
        fields |= dict(
            layers=hf.num_hidden_layers, width=hf.hidden_size, heads=hf.num_attention_heads, kv_heads=hf.num_key_value_heads,
            head_dim=hf.head_dim, mlp_width=hf.intermediate_size, max_positions=hf.max_position_embeddings, norm_eps=hf.rms_norm_eps,
            rope_theta=float(rope["rope_theta"]), attention_bias=hf.attention_bias, mlp_bias=hf.mlp_bias,
            tied_embeddings=hf.tie_word_embeddings,
        )  # fmt: skip
    elif family == "gpt2":
        need("scale_attn_weights", True)
        need("scale_attn_by_inverse_layer_idx", False)
        need("add_cross_attention", False)
        fields |= dict(
            layers=hf.n_layer, width=hf.n_embd, heads=hf.n_head, mlp_width=hf.n_inner or 4 * hf.n_embd, max_positions=hf.n_positions,
            norm_eps=hf.layer_norm_epsilon, mlp=GELU[need("activation_function", *GELU)], dropout=hf.resid_pdrop,
            tied_embeddings=hf.tie_word_embeddings,
        )  # fmt: skip
    else:
        need("hidden_act", "gelu")
        need("is_decoder", False)
        need("tie_word_embeddings", True)
        need("position_embedding_type", "absolute")
        fields |= dict(
            layers=hf.num_hidden_layers, width=hf.hidden_size, heads=hf.num_attention_heads, mlp_width=hf.intermediate_size,
            max_positions=hf.max_position_embeddings, norm_eps=hf.layer_norm_eps, token_types=hf.type_vocab_size,
            dropout=hf.hidden_dropout_prob,
        )  # fmt: skip
    return Model(**fields)


def config_to_hf(config: Model, vocab_size: int) -> PretrainedConfig:
    """The Hugging Face config of a model of this shape; UserError where none exists."""
    from transformers import BertConfig, GPT2Config, LlamaConfig

    family = family_of(config)
    common = dict(vocab_size=vocab_size, initializer_range=config.init_std, tie_word_embeddings=config.tied_embeddings)
    if family == "gpt2":
        hf_activation = {ours: theirs for theirs, ours in reversed(GELU.items())}
        return GPT2Config(
            n_layer=config.layers, n_embd=config.width, n_head=config.heads, n_inner=config.mlp_width, n_positions=config.max_positions,
            layer_norm_epsilon=config.norm_eps, activation_function=hf_activation[config.mlp], resid_pdrop=config.dropout,
            embd_pdrop=config.dropout, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, **common,
        )  # fmt: skip
    common |= dict(
        num_hidden_layers=config.layers, hidden_size=config.width, num_attention_heads=config.heads, intermediate_size=config.mlp_width,
        max_position_embeddings=config.max_positions,
    )  # fmt: skip
    if family == "bert":
        return BertConfig(
            layer_norm_eps=config.norm_eps, type_vocab_size=config.token_types, hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=0.0, **common,
        )  # fmt: skip
    return LlamaConfig(
        num_key_value_heads=config.kv_heads_, head_dim=config.head_dim_, rms_norm_eps=config.norm_eps, attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias, rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, bos_token_id=None,
        eos_token_id=None, **common,
    )  # fmt: skip


def state_from_hf(hf_state: dict[str, Tensor], config: Model) -> dict[str, Tensor]:
    """A Hugging Face state dict (of the model with its language-model head) under our names, for a `Transformer` of `config`.

    Raises UserError that names what is missing, left over or of another shape.
    """
    name = family_of(config)
    family = FAMILIES[name]
    theirs = _unfuse(hf_state) if name == "gpt2" else dict(hf_state)
    table = _hf_name("embedding.weight", family)
    if table not in theirs:
        raise UserError(f"Hugging Face weights: no {table}; expected the state dict of a {name} model with its language-model head")
    ours, problems = {}, []
    for key, shape in parameter_shapes(config, theirs[table].shape[0]).items():
        tensor = theirs.pop(_hf_name(key, family), None)
        if tensor is None:
            problems.append(f"{_hf_name(key, family)} is missing")
        elif tensor.shape != shape:
            problems.append(f"{_hf_name(key, family)} has shape {list(tensor.shape)}, the config says {list(shape)}")
        else:
            ours[key] = tensor
    if config.tied_embeddings:
        theirs.pop("lm_head.weight", None)
    problems += [f"{key} has no place in this model" for key in theirs if not re.fullmatch(family.ignore, key)]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"Hugging Face weights do not fit this {name} config: {'; '.join(problems[:4])}{more}")
    return ours


def state_to_hf(state: dict[str, Tensor], config: Model) -> dict[str, Tensor]:
    """Our state dict under Hugging Face's names; UserError where no family has this shape."""
    name = family_of(config)
    theirs = {_hf_name(key, FAMILIES[name]): tensor for key, tensor in state.items()}
    return _fuse(theirs) if name == "gpt2" else theirs


def _hf_name(key: str, family: Family) -> str:
    module, _, leaf = key.rpartition(".")
    layer = re.match(r"layers\.(\d+)\.", module)
    template = re.sub(r"^layers\.\d+", "layers.{}", module)
    return f"{family.modules[template].format(*layer.groups() if layer else ())}.{leaf}"


_CONV1D = re.compile(r"(.*\.h\.\d+\.(?:attn|mlp)\.(?:q|k|v|c_attn|c_proj|c_fc))\.(weight|bias)")


def _unfuse(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's Conv1D ([in, out]) as linear weights ([out, in]), and c_attn as q, k and v."""
    out = {}
    for key, tensor in state.items():
        match = _CONV1D.fullmatch(key)
        if match is None:
            out[key] = tensor
            continue
        tensor = tensor.t().contiguous() if match[2] == "weight" else tensor
        if match[1].endswith("c_attn"):
            out |= {f"{match[1].removesuffix('c_attn')}{p}.{match[2]}": t.clone() for p, t in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            out[key] = tensor
    return out


def _fuse(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_unfuse`."""
    out = {}
    for key, tensor in state.items():
        match = _CONV1D.fullmatch(key)
        if match is None:
            out[key] = tensor
        elif match[1].endswith(".q"):
            parts = torch.cat([state[f"{match[1][:-1]}{p}.{match[2]}"] for p in "qkv"])
            out[f"{match[1][:-1]}c_attn.{match[2]}"] = parts.t().contiguous() if match[2] == "weight" else parts
        elif not match[1].endswith((".k", ".v")):
            out[key] = tensor.t().contiguous() if match[2] == "weight" else tensor
    return out


def register_attention(name: str = "bigtrain") -> None:
    """Make bigtrain's attention one of transformers': `from_pretrained(..., attn_implementation="bigtrain")`.

    It runs the Triton kernels on a GPU and torch's attention on a CPU. Causal, bidirectional, padded, packed and sliding-window
    models work, with grouped heads, soft-capped scores and sinks: whatever mask shows each query one run of keys, with neither end
    of it ever going back. Static caches work, and 4-d masks of one's own, which every layer then converts again. What else a
    model asks of its attention, such as T5's position bias, is refused. torch.compile finds one graph.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    chosen = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "auto"
    backends = {device: resolve_backends(device, chosen).attention for device in ("cpu", "cuda")}
    AttentionInterface.register(name, partial(_attend, backends))
    AttentionMaskInterface.register(name, _seen_keys)


_WITHOUT_EFFECT = frozenset({
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "logits_to_keep", "max_length_k", "max_length_q",
    "num_items_in_batch", "output_hidden_states", "output_router_logits", "position_ids", "return_dict", "seq_idx", "sliding_window",
    "use_cache",
})  # fmt: skip
"""Keywords of attention functions that are meant for others or that the mask has in it already: windows and packed sequences."""

_HIDDEN = -1e4
"""What a mask adds to a score from here down hides the key: exp gives 0."""


def _attend(
    backends: dict[str, str], module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function: query [B, H, T, D], key and value [B, G, S, D] -> [B, T, H, D].

    Raises ValueError for a keyword that would change the result, and for a mask that is no range of keys for each query.
    """
    if dropout:
        raise ValueError("bigtrain's attention has no dropout: set the model's attention dropout to 0")
    unknown = [name for name, given in others.items() if name not in _WITHOUT_EFFECT and given is not None and given is not False]
    if unknown:
        raise _refusal(f"does not compute {', '.join(unknown)}")
    T, S = query.shape[2], key.shape[2]
    causal = attention_mask is None and T > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if causal and T < S:  # the first tokens of a static cache, which is empty beyond them
        key, value = key[:, :, :T], value[:, :, :T]
    q_BTHD, k_BSGD, v_BSGD = (x.transpose(1, 2) for x in (query, key, value))
    backend, mask = backends.get(query.device.type, "torch"), None
    if attention_mask is not None:
        prepared = attention_mask.dtype == torch.int32 and attention_mask.shape[1:] == (2, T, 1)
        ranges_B2T1 = attention_mask if prepared else _ranges(_shown(attention_mask, T, S))
        mask = range_mask(*ranges_B2T1.squeeze(-1).unbind(1), S, query.dtype, backend)
    options = {"scale": scaling, "cap": softcap or 0.0, "sink_H": s_aux}
    return attention(q_BTHD, k_BSGD, v_BSGD, causal=causal, mask=mask, backend=backend, **options), None


def _seen_keys(*positions: Any, **options: Any) -> Tensor | None:
    """transformers' mask function: `_ranges`, in four dimensions, which transformers takes for a mask that is ready; None where the
    model's own order says it. Raises ValueError as `_ranges` does."""
    from transformers.masking_utils import sdpa_mask

    seen_B1TS = sdpa_mask(*positions, **options)
    return None if seen_B1TS is None else _ranges(seen_B1TS[:, 0])


def _shown(mask: Tensor, T: int, S: int) -> Tensor:
    """Which keys a mask shows that transformers passes on as it is, [1 or B, T, S]; ValueError where it is none of that kind."""
    shape = tuple(mask.shape)
    if mask.dim() != 4 or shape[2] not in (1, T) or shape[3] < S or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise _refusal(f"needs a boolean or floating-point mask [batch, heads, {T}, {S}], found {mask.dtype} {list(shape)}")
    mask = mask[..., :S].expand(-1, -1, T, -1)
    if mask.dtype != torch.bool:
        _require(((mask == 0) | (mask <= _HIDDEN)).all(), f"takes masks of 0 and of {_HIDDEN:.0f} or less, and adds no bias to a score")
        mask = mask == 0
    if shape[1] > 1:
        _require((mask == mask[:, :1]).all(), "needs one mask for all heads")
    return mask[:, 0]


def _ranges(seen_BTS: Tensor) -> Tensor:
    """The first key that each query sees and the end of those: int32 [B, 2, T, 1], neither ever decreasing along T.

    Raises ValueError for a mask that has no such ranges; in a graph of torch.compile they are asserted.
    """
    count_BT, first_BT = seen_BTS.sum(-1), seen_BTS.int().argmax(-1)
    end_BT = first_BT + count_BT
    key = torch.arange(seen_BTS.shape[-1], device=seen_BTS.device)
    run_BTS = (key >= first_BT[..., None]) & (key < end_BT[..., None])
    _require((seen_BTS == run_BTS).all(), "needs masks in which the keys that a query sees follow one another")
    # A query that sees nothing has an empty range where those before it end.
    last_BT = end_BT.where(count_BT > 0, 0).cummax(-1).values
    first_BT, end_BT = (x.where(count_BT > 0, last_BT) for x in (first_BT, end_BT))
    ordered = (first_BT.diff() >= 0).all() & (end_BT.diff() >= 0).all()
    _require(ordered, "needs masks in which neither the first nor the last key that a query sees lies before that of the query before it")
    return torch.stack([first_BT, end_BT], 1)[..., None].int()


def _require(holds: Tensor, what: str) -> None:
    """ValueError unless it holds; where torch.compile is tracing, which cannot look, an assertion in the graph."""
    if torch.compiler.is_compiling():
        torch._assert_async(holds, str(_refusal(what)))
    elif not holds:
        raise _refusal(what)


def _refusal(what: str) -> ValueError:
    # No double quotes: torch.compile's C++ writes the message into a string as it is.
    return ValueError(f"bigtrain's attention {what}; use attn_implementation='eager', or 'sdpa' where that computes it")
