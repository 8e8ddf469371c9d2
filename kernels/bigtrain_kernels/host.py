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
        *inputs, lse_BHT, mask = ctx.saved_tensors
        B, H, T, D = inputs[0].shape
        S = inputs[1].shape[2]
        grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype) for x in inputs[:3])
        heads = max(1, SCORES // (T * KEYS))
        for b in range(B):
            for h in range(0, H, heads):
                chunk = b, slice(h, h + heads)
                q_CTD, k_CSD, v_CSD, out_CTD = (x[chunk] for x in inputs)
                g_CTD, lse_CT = grad_BHTD[chunk], lse_BHT[chunk]
                lse_CT = lse_CT.where(lse_CT.isfinite(), 0)  # a query that sees no key has no score to subtract from
                delta_CT = torch.linalg.vecdot(g_CTD.float(), out_CTD.float())
                q_CTD, k_CSD = _extended(q_CTD * ctx.scale, -lse_CT), _extended(k_CSD, None)
                g_CTD, v_CSD = _extended(g_CTD, -delta_CT), _extended(v_CSD, None)
                grad_q_CTD = None
                for start in range(0, S, KEYS):
                    keys = slice(start, start + KEYS)
                    rows = slice(start if ctx.causal else 0, T)
                    q_CXD, k_CYD, g_CXD, v_CYD = q_CTD[:, rows], k_CSD[:, keys], g_CTD[:, rows], v_CSD[:, keys]
                    p_CXY = torch.bmm(q_CXD, k_CYD.mT)
                    if mask is not None:
                        p_CXY += mask[b if len(mask) > 1 else 0, :, rows, keys]
                    p_CXY.exp_()
                    if ctx.causal:
                        p_CXY[:, : k_CYD.shape[1]].tril_()
                    ds_CXY = torch.bmm(g_CXD, v_CYD.mT).mul_(p_CXY)
                    torch.bmm(p_CXY.mT, g_CXD[..., :D], out=grad_v[chunk][:, keys])
                    torch.bmm(ds_CXY.mT, q_CXD[..., :D], out=grad_k[chunk][:, keys])
                    part_CXD = torch.bmm(ds_CXY, k_CYD[..., :D])
                    if grad_q_CTD is None:
                        grad_q_CTD = part_CXD.float()
                    else:
                        grad_q_CTD[:, rows] += part_CXD
                grad_q[chunk] = grad_q_CTD.mul_(ctx.scale)
        return grad_q, grad_k, grad_v, None, None, None


def _extended(x_CTD: Tensor, column_CT: Tensor | None) -> Tensor:
    """`x` with two more columns, [C, T, D + 2]: their sum is `column_CT`, or each is one."""
    C, T, D = x_CTD.shape
    y = torch.ones(C, T, D + 2, dtype=x_CTD.dtype)
    y[..., :D] = x_CTD
    if column_CT is not None:
        y[..., D] = column_CT
        y[..., D + 1] = column_CT - y[..., D]
    return y
