"""The transformer: embeddings, blocks, head, and the arithmetic of their size.

B batch, T sequence length, S cached positions, E width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigtrain import config as schema
from bigtrain_kernels import ops

from .cache import KVCache
from .layers import Block, Context, Embedding, Head, Norm


class Transformer(nn.Module):
    """A transformer of the shape that `config` gives, with `vocab_size` rows in the embedding and the head.

    Its parameters are empty until `initialise.initialise` or a checkpoint fills them. `backends` is what
    `bigtrain_kernels.ops.resolve_backends` returned.
    """

    def __init__(self, config: schema.Model, vocab_size: int, backends: ops.Backends | None = None):
        super().__init__()
        backends = backends or ops.Backends()
        self.config, self.vocab_size, self.backends = config, vocab_size, backends
        self.embedding = Embedding(vocab_size, config.width)
        self.positions = Embedding(config.max_positions, config.width) if config.positions == "learned" else None
        self.token_types = Embedding(config.token_types, config.width) if config.token_types else None
        self.embedding_norm = Norm(config, backends) if config.embedding_norm else None
        self.layers = nn.ModuleList(Block(config, layer, backends) for layer in range(config.layers))
        self.final_norm = Norm(config, backends) if config.norm_position == "pre" else None
        self.head = Head(config, vocab_size, self.embedding.weight if config.tied_embeddings else None, backends)
        if config.tied_embeddings:
            self.register_state_dict_post_hook(_drop_tied)
            self.register_load_state_dict_pre_hook(_add_tied)

    def _apply(self, fn, recurse: bool = True):
        # Moving a model off the meta device makes new parameters, one for each place where a shared one is registered.
        super()._apply(fn, recurse)
        if self.config.tied_embeddings:
            self.head.weight = self.embedding.weight
        return self

    def forward(
        self,
        token_BT: Tensor,
        *,
        position_BT: Tensor | None = None,
        document_BT: Tensor | None = None,
        target_BT: Tensor | None = None,
        token_type_BT: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ):
        """With targets: (loss summed over them, float32; their number, int64). Without: logits_BTV, or [B, 1, V] with `last_only`.

        position_BT    position of each token, restarting in each document; left out: 0 ... T-1, after what a cache holds
        document_BT    int32 ids: attention stays between equal ids; padding has an id of its own
        target_BT      the token that each position should predict, already shifted; -100: none
        token_type_BT  left out: 0
        cache          past positions (see `new_cache`); takes those of this call. Not together with document_BT
        """
        T = token_BT.shape[1]
        past = 0
        if cache is not None:
            if document_BT is not None:
                raise ValueError("a cache holds one document per row: give cache or document_BT, not both")
            cache.check(T)
            past = cache.filled
        if position_BT is None:
            position_BT = torch.arange(past, past + T, device=token_BT.device)[None]
        x_BTE = self._embed(token_BT, position_BT, token_type_BT)
        rope = None
        if self.config.positions == "rope":
            rope = ops.rope_angles(position_BT, self.config.head_dim_, self.config.rope_theta)
        mask = ops.attention_mask(
            T,
            past + T,
            causal=self.config.causal,
            document_BT=document_BT,
            dtype=x_BTE.dtype,
            device=x_BTE.device,
            backend=self.backends.attention,
        )
        context = Context(rope, document_BT, mask, cache)
        for index, layer in enumerate(self.layers):
            if self._recomputes(index):
                x_BTE = checkpoint(layer, x_BTE, context, use_reentrant=False)
            else:
                x_BTE = layer(x_BTE, context)
        if cache is not None:
            cache.filled += T
        if last_only:
            x_BTE = x_BTE[:, -1:]
        if self.final_norm is not None:
            x_BTE = self.final_norm(x_BTE)
        return self.head(x_BTE, target_BT)

    def _embed(self, token_BT: Tensor, position_BT: Tensor, token_type_BT: Tensor | None) -> Tensor:
        x_BTE = self.embedding(token_BT)
        if self.positions is not None:
            x_BTE = x_BTE + self.positions(position_BT)
        if self.token_types is not None:
            x_BTE = x_BTE + self.token_types(torch.zeros_like(token_BT) if token_type_BT is None else token_type_BT)
        if self.embedding_norm is not None:
            x_BTE = self.embedding_norm(x_BTE)
        return F.dropout(x_BTE, self.config.dropout, self.training) if self.config.dropout else x_BTE

    def _recomputes(self, layer: int) -> bool:
        every = {"none": 0, "full": 1}.get(self.config.activation_checkpointing, self.config.activation_checkpointing)
        return self.training and torch.is_grad_enabled() and every > 0 and layer % every == 0

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` sequences of up to `length` positions, in the weights' dtype and on their device."""
        config, weight = self.config, self.embedding.weight
        return KVCache(config.layers, batch, length, config.kv_heads_, config.head_dim_, weight.dtype, weight.device)

    def count_parameters(self) -> int:
        """Parameters of the whole model, the tied head counted once, however they are partitioned."""
        return sum(math.prod(shape) for shape in parameter_shapes(self.config, self.vocab_size).values())

    def flops_per_token(self, sequence_length: int) -> int:
        """FLOPs of the forward and backward pass for one token of a sequence (Chowdhery et al. 2022, PaLM, appendix B).

        6 N + 12 layers heads head_dim sequence_length, where N counts every parameter but the embedding tables, and the
        head's weight also where it is tied (it is multiplied). Attention counts whole although a causal mask hides half,
        and activation checkpointing's recomputation does not count: so model FLOPs utilisation compares across projects.
        """
        config = self.config
        tables = ("embedding.weight", "positions.weight", "token_types.weight")
        shapes = parameter_shapes(config, self.vocab_size)
        n = sum(math.prod(shape) for name, shape in shapes.items() if name not in tables)
        if config.tied_embeddings:
            n += self.vocab_size * config.width
        return 6 * n + 12 * config.layers * config.heads * config.head_dim_ * sequence_length


def parameter_shapes(config: schema.Model, vocab_size: int) -> dict[str, torch.Size]:
    """Name and shape of every parameter, in the model's order, without memory for their values."""
    with torch.device("meta"):
        return {name: p.shape for name, p in Transformer(config, vocab_size).named_parameters()}


def _drop_tied(model: Transformer, state: dict, prefix: str, _) -> None:
    state.pop(f"{prefix}head.weight", None)


def _add_tied(model: Transformer, state: dict, prefix: str, *_) -> None:
    if f"{prefix}embedding.weight" in state:
        state.setdefault(f"{prefix}head.weight", state[f"{prefix}embedding.weight"])
