"""Attention in bf16 on a CPU, with a backward pass made of matrix products.

The forward pass is torch's own. Its backward takes five times as long where the processor multiplies bf16 fast (27 ms after
5, for 4 x 6 heads x 512 x 64 on one thread of a Xeon with AMX); the one here takes 16. Scores are rounded to bf16, as in
attention written with plain torch operations, so its errors are those of that and not of the fused kernel, a third as large.

B batch, T query length, S key length, H heads, D head dim; C heads of a chunk, X queries from the block's first on, Y keys of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

KEYS = 256
"""Keys of a block: products are large enough to be fast, and a causal mask still skips most of what it hides."""
SCORES = 1 << 20
"""Scores of a chunk: a few of its buffers fit in a core's second-level cache."""


class Attention(torch.autograd.Function):
    """(q_BHTD, k_BHSD, v_BHSD, mask [1 or B, 1, T, S] or None, causal, scale) -> out_BHTD. Causal needs T == S and no mask."""

    @staticmethod
    def forward(ctx, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        out_BHTD, lse_BHT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHTD, k_BHSD, v_BHSD, 0.0, causal, attn_mask=mask, scale=scale
        )
        ctx.save_for_backward(q_BHTD, k_BHSD, v_BHSD, out_BHTD, lse_BHT, mask)
        ctx.causal, ctx.scale = causal, scale
        return out_BHTD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BHTD: Tensor):
        # With P = exp(scale Q K^T - lse) and delta = rowsum(dO * O): dV = P^T dO, dS = P * (dO V^T - delta),
        # dQ = scale dS K, dK = scale dS^T Q (Dao 2023, FlashAttention-2, algorithm 2). The two subtractions ride along in
        # the products, as columns that meet a column of ones; each takes two, which together keep 16 bits of the subtrahend.
        q_BHTD, k_BHSD, v_BHSD, out_BHTD, lse_BHT, mask = ctx.saved_tensors
        B, H, T, D = q_BHTD.shape
        S = k_BHSD.shape[2]
        delta_BHT = torch.linalg.vecdot(grad_BHTD.float(), out_BHTD.float())
        seen_BHT = lse_BHT.isfinite()  # a query that sees no key has no score to subtract from
        q, k = _extended(q_BHTD, -lse_BHT.where(seen_BHT, 0), ctx.scale), _extended(k_BHSD, None)
        g, v = _extended(grad_BHTD, -delta_BHT), _extended(v_BHSD, None)
        grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q_BHTD, k_BHSD, v_BHSD))
        above = torch.full((KEYS, KEYS), float("-inf"), dtype=q.dtype).triu_(1) if ctx.causal else None
        heads = max(1, SCORES // (T * KEYS))
        for b in range(B):
            for h in range(0, H, heads):
                chunk = b, slice(h, h + heads)
                grad_q_CTD = torch.zeros(grad_q[chunk].shape, dtype=torch.float32)
                for start in range(0, S, KEYS):
                    keys = slice(start, start + KEYS)
                    rows = slice(start if ctx.causal else 0, T)
                    q_CXD, k_CYD, g_CXD, v_CYD = q[chunk][:, rows], k[chunk][:, keys], g[chunk][:, rows], v[chunk][:, keys]
                    p_CXY = q_CXD @ k_CYD.mT
                    if above is not None:
                        Y = k_CYD.shape[1]
                        p_CXY[:, :Y] += above[:Y, :Y]
                    elif mask is not None:
                        p_CXY += mask[b if len(mask) > 1 else 0, :, rows, keys]
                    p_CXY.exp_()
                    ds_CXY = (g_CXD @ v_CYD.mT).mul_(p_CXY)
                    grad_v[chunk][:, keys] = p_CXY.mT @ g_CXD[..., :D]
                    grad_k[chunk][:, keys] = ds_CXY.mT @ q_CXD[..., :D]
                    grad_q_CTD[:, rows] += ds_CXY @ k_CYD[..., :D]
                grad_q[chunk] = grad_q_CTD.mul_(ctx.scale)
        return grad_q, grad_k, grad_v, None, None, None


def _extended(x_BHTD: Tensor, column_BHT: Tensor | None, scale: float = 1.0) -> Tensor:
    """scale * x with two more columns, [B, H, T, D + 2]: their sum is `column_BHT`, or each is one."""
    B, H, T, D = x_BHTD.shape
    y = torch.ones(B, H, T, D + 2, dtype=x_BHTD.dtype)
    torch.mul(x_BHTD, scale, out=y[..., :D])
    if column_BHT is not None:
        y[..., D] = column_BHT
        y[..., D + 1] = column_BHT - y[..., D]
    return y
