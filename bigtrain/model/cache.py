"""Keys and values of the positions already read, so that generation computes each position once."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of every layer: 2 x [layers, B, length, kv_heads, head_dim].

    `filled` positions hold values; the model adds those of each forward pass. A longer sequence raises ValueError.
    """

    def __init__(self, layers: int, batch: int, length: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        self.k_LBSGD, self.v_LBSGD = torch.empty(2, layers, batch, length, kv_heads, head_dim, dtype=dtype, device=device)
        self.filled = 0

    @property
    def length(self) -> int:
        return self.k_LBSGD.shape[2]

    def check(self, new: int) -> None:
        if self.filled + new > self.length:
            raise ValueError(f"cache of {self.length} positions holds {self.filled} and cannot take {new} more")

    def extend(self, layer: int, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values after the filled positions; returns all of that layer's so far."""
        end = self.filled + k_BTGD.shape[1]
        self.k_LBSGD[layer, :, self.filled : end] = k_BTGD
        self.v_LBSGD[layer, :, self.filled : end] = v_BTGD
        return self.k_LBSGD[layer, :, :end], self.v_LBSGD[layer, :, :end]
