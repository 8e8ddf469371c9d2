"""The torch backend: operators whose backward pass is written by hand.

Eager autograd writes every intermediate of a formula to memory in float32 and keeps most of them. These functions keep
their inputs, recompute what is cheap, work in their own buffers and round once. On a CPU, where bf16 matrix products are
fast, such passes would otherwise be half of a training step. All of them can be traced by torch.compile.

B batch, T sequence length, H heads, D head dim, R = D / 2, N flattened tokens, E width, F mlp width, V vocabulary,
C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import IGNORE, wide, wide_dtype

GELU = {"geglu": "none", "geglu_tanh": "tanh"}
"""torch's name for the form of GELU in each."""


def _own(x: Tensor) -> Tensor:
    """A wide copy, to be worked on in place."""
    return x.to(wide_dtype(x), copy=True)


class RmsNorm(torch.autograd.Function):
    """(x [..., E], residual or None, weight_E, eps) -> (normed sum, sum). Keeps the sum and one number a row."""

    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor | None, weight_E: Tensor, eps: float):
        total = x if residual is None else x + residual
        w = _own(total)
        rstd = torch.linalg.vector_norm(w, dim=-1, keepdim=True).square().div(w.shape[-1]).add(eps).rsqrt()
        ctx.save_for_backward(total, weight_E, rstd)
        ctx.has_residual = residual is not None
        normed = w.mul_(rstd).mul_(wide(weight_E)).to(x.dtype)
        return normed, total if ctx.has_residual else None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_sum: Tensor | None):
        # With u = x * rstd and s = weight: dx = rstd * (g s - u mean(g s u)), ds = sum over rows of g u.
        total, weight_E, rstd = ctx.saved_tensors
        sum_NE, grad_NE, rstd_N1 = (t.reshape(-1, t.shape[-1]) for t in (total, grad, rstd))
        x_NE, g_NE = wide(sum_NE), _own(grad_NE)
        scale_E = weight_E.to(x_NE.dtype)
        gx_NE = g_NE * x_NE
        grad_weight_E = (rstd_N1.t() @ gx_NE).squeeze(0).to(weight_E.dtype)
        mean_N1 = (gx_NE @ scale_E).div(scale_E.shape[0]).unsqueeze(-1) * rstd_N1.square()
        grad_x = g_NE.mul_(scale_E).addcmul_(x_NE, mean_N1, value=-1).mul_(rstd_N1).to(grad.dtype).view(total.shape)
        if grad_sum is not None:
            grad_x += grad_sum
        # One tensor object for both: autograd copies it for a leaf while another holds it. Two views of it would be stolen as two
        # gradients in the same memory: so this function takes x in its own shape.
        return grad_x, grad_x if ctx.has_residual else None, grad_weight_E, None


def _rotate(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool) -> Tensor:
    R = cos_BTR.shape[-1]
    out_BTHD = torch.empty_like(x_BTHD, memory_format=torch.contiguous_format)
    cos_BT1R, sin_BT1R = (angle.unsqueeze(2).expand(len(x_BTHD), -1, -1, -1) for angle in (cos_BTR, sin_BTR))
    # On a CPU a sequence at a time: its float32 scratch fits in a core's cache.
    step = max(1, len(x_BTHD)) if x_BTHD.is_cuda else 1
    for start in range(0, len(x_BTHD), step):
        rows = slice(start, start + step)
        x, out = wide(x_BTHD[rows, ..., : 2 * R]), out_BTHD[rows, ..., : 2 * R]
        (a, b), (out_a, out_b) = (t.unflatten(-1, (R, 2)).unbind(-1) if interleaved else t.chunk(2, -1) for t in (x, out))
        cos, sin = cos_BT1R[rows], sin_BT1R[rows]
        out_a.copy_((a * cos).addcmul_(b, sin, value=-1))
        out_b.copy_((b * cos).addcmul_(a, sin))
    if x_BTHD.shape[-1] > 2 * R:
        out_BTHD[..., 2 * R :] = x_BTHD[..., 2 * R :]
    return out_BTHD


class Rope(torch.autograd.Function):
    """(x, cos, sin, interleaved) -> x rotated. Keeps only the angles: the gradient is rotated back."""

    @staticmethod
    def forward(ctx, x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos_BTR, sin_BTR)
        ctx.interleaved = interleaved
        return _rotate(x_BTHD, cos_BTR, sin_BTR, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTHD: Tensor):
        cos_BTR, sin_BTR = ctx.saved_tensors
        return _rotate(grad_BTHD, cos_BTR, -sin_BTR, ctx.interleaved), None, None, None


class Glu(torch.autograd.Function):
    """(gate_NF, up_NF, kind) -> act(gate) * up. Keeps its inputs, not act(gate)."""

    @staticmethod
    def forward(ctx, gate_NF: Tensor, up_NF: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF)
        ctx.kind = kind
        out_NF = torch.empty_like(gate_NF, memory_format=torch.contiguous_format)
        for gate, up, out in _rows(gate_NF, up_NF, out_NF):
            torch.mul(F.silu(gate) if kind == "swiglu" else F.gelu(gate, approximate=GELU[kind]), up, out=out)
        return out_NF

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NF: Tensor):
        gate_NF, up_NF = ctx.saved_tensors
        grad_gate_NF, grad_up_NF = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate_NF, up_NF))
        for grad, gate, up, grad_gate, grad_up in _rows(grad_NF, gate_NF, up_NF, grad_gate_NF, grad_up_NF):
            torch.mul(grad, up, out=grad_gate)
            if ctx.kind == "swiglu":
                torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
                torch.mul(grad, F.silu(gate), out=grad_up)
            else:
                form = GELU[ctx.kind]
                torch.ops.aten.gelu_backward.grad_input(grad_gate, gate, approximate=form, grad_input=grad_gate)
                torch.mul(grad, F.gelu(gate, approximate=form), out=grad_up)
        return grad_gate_NF, grad_up_NF, None


def _rows(*xs_NF: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of several tensors at a time: on a CPU so few that what is made of them stays in a core's cache."""
    step = 1 << 30 if xs_NF[0].is_cuda else max(1, (1 << 17) // max(1, xs_NF[0].shape[-1]))
    return zip(*(flat(x).split(step) for x in xs_NF), strict=True)


def flat(x: Tensor) -> Tensor:
    """[..., F] as [N, F], of no elements too."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden_NE, weight_VE, bias_V or None, target_N, need_grad, z_loss, cap, smoothing) -> (summed loss, count of targets).

    Goes over the tokens in chunks, so that the logits of one chunk are all that ever exists, turns them into their own
    gradient in place, and forms the gradients of the inputs in the same pass (Hsu et al. 2024, Liger Kernel, section 3.2).
    What is kept for the backward pass is as large as the hidden states and the weight; the weight itself is not touched
    again, since ZeRO-3 may have released it by then.
    """

    @staticmethod
    def forward(
        ctx,
        hidden_NE: Tensor,
        weight_VE: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        need_grad: bool,
        z_loss: float = 0.0,
        cap: float = 0.0,
        smoothing: float = 0.0,
    ):
        N, E = hidden_NE.shape
        C = chunk_tokens(N, E, weight_VE.shape[0])
        ctx.lift = lift(hidden_NE.dtype)
        keep_N1 = target_N[:, None] != IGNORE
        index_N1 = target_N[:, None].long().where(keep_N1, 0)
        loss = hidden_NE.new_zeros((), dtype=wide_dtype(hidden_NE))
        grad_hidden_NE = torch.empty_like(hidden_NE) if need_grad else None
        grad_weight_VE = grad_bias_V = None
        for start in range(0, N, C):
            rows = slice(start, start + C)
            h_CE, keep_C1 = hidden_NE[rows], keep_N1[rows]
            logits_CV = F.linear(h_CE, weight_VE, bias_V)
            loss += _cross_entropy_(logits_CV, index_N1[rows], keep_C1, need_grad, z_loss, cap, smoothing)
            if need_grad:
                # Ignored tokens leave through the narrow side of each product.
                grad_hidden_NE[rows] = (logits_CV @ weight_VE).where(keep_C1, 0)
                lift_V = lift_columns_(logits_CV, peak(h_CE)) if ctx.lift > 1 else None
                grad_weight_VE = _accumulate(grad_weight_VE, logits_CV.t() @ h_CE.where(keep_C1, 0), lift_V)
                if bias_V is not None:
                    grad_bias_V = _accumulate(grad_bias_V, (keep_C1.t().to(logits_CV.dtype) @ logits_CV).squeeze(0), lift_V)
        if need_grad:
            grads = (grad_hidden_NE, grad_weight_VE, grad_bias_V)
            ctx.dtype = hidden_NE.dtype
            ctx.save_for_backward(*(g if g is None or ctx.lift > 1 else g.to(ctx.dtype) for g in grads))
        count = keep_N1.sum()
        ctx.mark_non_differentiable(count)
        return loss, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, _):
        begin_backward(ctx)
        factor = grad_loss / ctx.lift
        return *(None if saved is None else scale_(saved, factor).to(ctx.dtype) for saved in ctx.saved_tensors), *(None,) * 5


def begin_backward(ctx) -> None:
    """Raises RuntimeError the second time. The gradients are scaled in place, so that the weight's is never there twice, and under
    hooks on saved tensors, such as those that offload them, autograd does not notice."""
    if getattr(ctx, "begun", False):
        raise RuntimeError("linear_cross_entropy: backward runs once, it scales the gradients in place; compute the loss again for another")
    ctx.begun = True


def scale_(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor, computed in float32 and rounded once; in place, but for a graph that is being traced, whose compiler decides."""
    # Without a dimension the factor is first rounded to the gradient's dtype on a GPU; on a CPU one with dimensions widens the gradient.
    if factor.dim() == 0 and grad.device.type != "cpu":
        factor = factor.unsqueeze(0)
    return grad.mul_(factor) if type(grad) is Tensor else (grad * factor).to(grad.dtype)


def lift(dtype: torch.dtype) -> float:
    """What the gradients of logits are multiplied by before they are rounded to `dtype`; the backward pass takes it back.

    fp16 ends at 2^-24, and the loss scale multiplies the finished gradients of a loss of weight 1. 256 is what a loss scale of 65,536
    lends to a mean over 256 tokens. The gradients of a token's logits are 1 at most (and 2 z_loss lse) and sum to 2 at most, so the
    hidden states' stays in fp16's range (65,504) for weights up to 127.
    """
    return 256.0 if dtype == torch.float16 else 1.0


def peak(x: Tensor) -> Tensor:
    """The largest magnitude, 1 at least, float32."""
    return torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32).clamp(min=1)


def lift_columns_(grad_NC: Tensor, largest: Tensor) -> Tensor:
    """Multiplies each column by the largest power of two with which no sum of it over tokens, times values up to `largest` (1 at
    least), reaches 2^15: float32 [C], returned."""
    bound_C = torch.linalg.vector_norm(grad_NC, 1, 0, dtype=torch.float32) * largest
    lift_C = torch.ldexp(torch.ones_like(bound_C), 15 - torch.frexp(bound_C).exponent)
    grad_NC.mul_(lift_C)
    return lift_C


def chunk_tokens(N: int, E: int, V: int) -> int:
    """Tokens in a chunk of the loss: its logits take 4 M elements, or twice as many as the hidden states if that is more."""
    return 1 << max(0, max(2 * N * E, 1 << 22) // V - 1).bit_length()


def _cross_entropy_(
    logits_CV: Tensor, index_C1: Tensor, keep_C1: Tensor, need_grad: bool, z_loss: float, cap: float, smoothing: float
) -> Tensor:
    """Summed loss of the kept rows; with `need_grad`, replaces the logits by its gradient: softmax - onehot, without options; lifted."""
    C, V = logits_CV.shape
    # On a CPU a few rows at a time: float32 scratch that fits in a core's cache instead of a pass over memory an operation.
    step = C if logits_CV.is_cuda else max(1, (1 << 19) // V)
    loss = logits_CV.new_zeros((), dtype=wide_dtype(logits_CV))
    for start in range(0, C, step):
        rows = slice(start, start + step)
        logits, index_R1 = logits_CV[rows], index_C1[rows]
        if cap:
            logits = _own(logits).div_(cap).tanh_().mul_(cap)
        logp = torch.log_softmax(logits, -1, dtype=loss.dtype)
        picked_R1 = logp.gather(1, index_R1)
        loss_R1 = -picked_R1
        if smoothing:
            loss_R1 = loss_R1.lerp(-logp.mean(-1, keepdim=True), smoothing)
        if z_loss:
            lse_R1 = logits.gather(1, index_R1) - picked_R1
            loss_R1 = loss_R1 + z_loss * lse_R1.square()
        loss += loss_R1.where(keep_C1[rows], 0).sum()
        if need_grad:
            grad = logp.exp_()
            if z_loss:
                grad.mul_(1 + 2 * z_loss * lse_R1)
            if smoothing:
                grad.sub_(smoothing / V)
            grad.scatter_add_(1, index_R1, grad.new_full((len(grad), 1), smoothing - 1))
            if cap:
                grad.mul_(1 - (logits / cap).square_())
            logits_CV[rows] = grad if lift(logits_CV.dtype) == 1 else grad.mul_(lift(logits_CV.dtype))
    return loss


def _accumulate(total: Tensor | None, part: Tensor, lift_V: Tensor | None) -> Tensor:
    """Sum of the chunks, their rows' lift taken back, in at least float32; a single chunk without one stays as it is."""
    if lift_V is not None:
        part = wide(part).div_(lift_V if part.dim() == 1 else lift_V[:, None])
    return part if total is None else wide(total).add_(part)
