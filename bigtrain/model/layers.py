"""The modules of a transformer: each holds its weights under the project's names and calls the kernels.

Parameters are created empty (initialise.py gives them values), so that a model can be built under torch.device("meta") or
while its parameters are being partitioned.

B batch, T sequence length, H query heads, G key and value heads, D head dim, R = D / 2, E width, F mlp width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain import config as schema
from bigtrain_kernels import ops

from .cache import KVCache

GATED = ("swiglu", "geglu", "geglu_tanh")


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Left empty: initialise.py gives the values."""


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Left empty: initialise.py gives the values."""


@dataclass(frozen=True)
class Context:
    """What the layers share in one forward pass."""

    rope: tuple[Tensor, Tensor] | None
    """cos and sin, [1 or B, T, R]; None with learned positions."""
    document_BT: Tensor | None
    mask: Tensor | None
    """What `ops.attention_mask` made."""
    cache: KVCache | None


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the width; with `residual`, of the sum, which is returned too."""

    def __init__(self, config: schema.Model, backends: ops.Backends):
        super().__init__()
        self.eps, self.backend = config.norm_eps, backends.norm
        self.weight = nn.Parameter(torch.empty(config.width))
        self.bias = nn.Parameter(torch.empty(config.width)) if config.norm == "layernorm" else None

    def forward(self, x_BTE: Tensor, residual: Tensor | None = None):
        if self.bias is None:
            return ops.rms_norm(x_BTE, self.weight, self.eps, residual=residual, backend=self.backend)
        return ops.layer_norm(x_BTE, self.weight, self.bias, self.eps, residual=residual, backend=self.backend)


class Attention(nn.Module):
    def __init__(self, config: schema.Model, layer: int, backends: ops.Backends):
        super().__init__()
        self.layer, self.backends = layer, backends
        self.head_dim, self.causal = config.head_dim_, config.causal
        wide, narrow = config.heads * self.head_dim, config.kv_heads_ * self.head_dim
        self.q = Linear(config.width, wide, config.attention_bias)
        self.k = Linear(config.width, narrow, config.attention_bias)
        self.v = Linear(config.width, narrow, config.attention_bias)
        self.o = Linear(wide, config.width, config.attention_bias)

    def forward(self, x_BTE: Tensor, context: Context) -> Tensor:
        q_BTHD, k_BTGD, v_BTGD = (project(x_BTE).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v))
        if context.rope is not None:
            q_BTHD, k_BTGD = ops.rope(q_BTHD, k_BTGD, *context.rope, backend=self.backends.rope)
        if context.cache is not None:
            k_BTGD, v_BTGD = context.cache.extend(self.layer, k_BTGD, v_BTGD)
        out_BTHD = ops.attention(
            q_BTHD, k_BTGD, v_BTGD, causal=self.causal, document_BT=context.document_BT, mask=context.mask, backend=self.backends.attention
        )
        return self.o(out_BTHD.flatten(2))


class Gate(Linear):
    def forward(self, x_BTE: Tensor, up: Up | None = None, kind: str = "") -> Tensor:
        """The projection; with `up`, the whole gated product. It is computed in there so that, under ZeRO-3, both weights are whole."""
        return super().forward(x_BTE) if up is None else up(x_BTE, self.weight, kind)


class Up(Linear):
    def forward(self, x_BTE: Tensor, gate_FE: Tensor | None = None, kind: str = "") -> Tensor:
        return super().forward(x_BTE) if gate_FE is None else ops.gated_linear(x_BTE, gate_FE, self.weight, kind, backend="triton")


class MLP(nn.Module):
    def __init__(self, config: schema.Model, backends: ops.Backends):
        super().__init__()
        self.kind, gated = config.mlp, config.mlp in GATED
        self.fused = backends.mlp == "fused" and gated and not config.mlp_bias
        self.backend = backends.elementwise
        self.gate = Gate(config.width, config.mlp_width, config.mlp_bias) if gated else None
        self.up = Up(config.width, config.mlp_width, config.mlp_bias)
        self.down = Linear(config.mlp_width, config.width, config.mlp_bias)

    def forward(self, x_BTE: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(ops.activation(self.up(x_BTE), self.kind, backend=self.backend))
        if self.fused:
            return self.down(self.gate(x_BTE, self.up, self.kind))
        return self.down(ops.glu(self.gate(x_BTE), self.up(x_BTE), self.kind, backend=self.backend))


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream x_BTE."""

    def __init__(self, config: schema.Model, layer: int, backends: ops.Backends):
        super().__init__()
        self.pre, self.dropout = config.norm_position == "pre", config.dropout
        self.attention_norm = Norm(config, backends)
        self.attention = Attention(config, layer, backends)
        self.mlp_norm = Norm(config, backends)
        self.mlp = MLP(config, backends)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def forward(self, x_BTE: Tensor, context: Context) -> Tensor:
        if self.pre:
            attended_BTE = self._drop(self.attention(self.attention_norm(x_BTE), context))
            normed_BTE, x_BTE = self.mlp_norm(attended_BTE, residual=x_BTE)
            return x_BTE + self._drop(self.mlp(normed_BTE))
        x_BTE, _ = self.attention_norm(self._drop(self.attention(x_BTE, context)), residual=x_BTE)
        x_BTE, _ = self.mlp_norm(self._drop(self.mlp(x_BTE)), residual=x_BTE)
        return x_BTE


class Head(nn.Module):
    """Scores over the vocabulary, or with targets the summed loss and their count.

    The loss belongs here because under ZeRO-3 the weight is whole only while this module's forward runs. `weight` is the
    embedding's when they are tied, which registers the same parameter a second time (named once in named_parameters).
    """

    def __init__(self, config: schema.Model, vocab_size: int, weight: nn.Parameter | None, backends: ops.Backends):
        super().__init__()
        self.backends = backends
        if config.head == "transform":
            self.transform = Linear(config.width, config.width)
            self.norm = Norm(config, backends)
            self.bias = nn.Parameter(torch.empty(vocab_size))
        else:
            self.transform = self.norm = self.bias = None
        self.weight = nn.Parameter(torch.empty(vocab_size, config.width)) if weight is None else weight

    def forward(self, x_BTE: Tensor, target_BT: Tensor | None = None):
        if self.transform is not None:
            x_BTE = self.norm(ops.activation(self.transform(x_BTE), "gelu", backend=self.backends.elementwise))
        if target_BT is None:
            return F.linear(x_BTE, self.weight, self.bias)
        return ops.linear_cross_entropy(x_BTE.flatten(0, 1), self.weight, target_BT.flatten(), self.bias, backend=self.backends.loss)
