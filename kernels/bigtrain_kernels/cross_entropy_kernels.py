"""The kernels of the loss; cross_entropy.py says what they compute and why in this order, and launches them.

N flattened tokens, V vocabulary, E width, C columns of a chunk of the vocabulary, S stripes of the vocabulary.
"""

import triton
import triton.language as tl

from .tile import grouped, halves, tanh


@triton.jit
def _product(
    HIDDEN, WEIGHT, m, n, N, V, E, stride_h, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden weight^T, the tile at row m and column n. Rows and columns that do not exist repeat the last: no mask in the loop."""
    rows = tl.minimum(tl.arange(0, BLOCK_M), N - 1 - m)
    columns = tl.minimum(tl.arange(0, BLOCK_N), V - 1 - n)
    inner = tl.arange(0, BLOCK_K)
    h = HIDDEN + tl.cast(m, tl.int64) * stride_h + rows[:, None] * stride_h + inner[None, :]
    w = WEIGHT + tl.cast(n, tl.int64) * stride_w + columns[None, :] * stride_w + inner[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for e in range(0, E, BLOCK_K):
        if EVEN:
            total = tl.dot(tl.load(h), tl.load(w), total, input_precision=PRECISION)
        else:
            h_tile = tl.load(h, mask=inner[None, :] < E - e, other=0.0)
            total = tl.dot(h_tile, tl.load(w, mask=inner[:, None] < E - e, other=0.0), total, input_precision=PRECISION)
        h += BLOCK_K
        w += BLOCK_K
    return total


@triton.jit
def _logits(product, columns, BIAS, V, cap, BIASED: tl.constexpr, CAP: tl.constexpr, EXACT: tl.constexpr):
    if BIASED:
        product += tl.load(BIAS + tl.minimum(columns, V - 1)).to(tl.float32)[None, :]
    if CAP:
        product = cap * tanh(product, 1.0 / cap, EXACT)
    return product


@triton.jit
def _observe(
    peak, weight, total, product, rows, n, TARGET, BIAS, PICKED, N, V, cap,
    BIASED: tl.constexpr, CAP: tl.constexpr, SMOOTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Online softmax: the highest logit, the sum of exp(logit - highest) and that of logits, with the columns from n on."""
    columns = n + tl.arange(0, product.shape[1])
    logits = _logits(product, columns, BIAS, V, cap, BIASED, CAP, EXACT)
    # The one tile that holds a row's target writes it: nothing to carry along, and registers are scarce in the product.
    # Targets are signed: -1 keeps rows that do not exist from storing, where a mask of them would spill on sm_90.
    target = tl.load(TARGET + rows, mask=rows < N, other=-1)
    picked = tl.sum(tl.where(columns[None, :] == target[:, None], logits, 0.0), 1)
    tl.store(PICKED + rows, picked, mask=(target >= n) & (target < tl.minimum(n + product.shape[1], V)))
    if SMOOTH:
        total += tl.sum(tl.where(columns[None, :] < V, logits, 0.0), 1)
    logits = tl.where(columns[None, :] < V, logits, float("-inf"))
    new = tl.maximum(peak, tl.max(logits, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # no column so far, or only such as have a bias of -inf
    weight = weight * tl.exp(peak - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
    return new, weight, total


@triton.jit
def statistics(
    HIDDEN, WEIGHT, BIAS, TARGET, LSE, TOTAL, PICKED, N, V, E, stripes, stride_h, stride_w, cap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr,
    BIASED: tl.constexpr, CAP: tl.constexpr, SMOOTH: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of each row: the target's logit, and over the columns of a stripe the log of the sum of exponentials and the sum of logits."""
    block, stripe = grouped(tl.cdiv(N, BLOCK_M), stripes, GROUP)
    m = block * BLOCK_M
    rows = m + tl.arange(0, BLOCK_M)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    start = stripe * TILES * BLOCK_N
    EXACT: tl.constexpr = HIDDEN.dtype.element_ty == tl.float32
    for n in range(start, tl.minimum(start + TILES * BLOCK_N, V), BLOCK_N):
        left, right = halves(_product(HIDDEN, WEIGHT, m, n, N, V, E, stride_h, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, PRECISION))
        peak, weight, total = _observe(
            peak, weight, total, left, rows, n, TARGET, BIAS, PICKED, N, V, cap, BIASED, CAP, SMOOTH, EXACT
        )  # fmt: skip
        peak, weight, total = _observe(
            peak, weight, total, right, rows, n + BLOCK_N // 2, TARGET, BIAS, PICKED, N, V, cap, BIASED, CAP, SMOOTH, EXACT
        )  # fmt: skip
    tl.store(LSE + stripe * N + rows, peak + tl.log(weight), mask=rows < N)
    if SMOOTH:
        tl.store(TOTAL + stripe * N + rows, total, mask=rows < N)


@triton.jit
def _store_gradients(
    product, target, lse, GRAD, BIAS, n, height, width, V, stride_g, cap, on_target, on_all, z_loss,
    BIASED: tl.constexpr, CAP: tl.constexpr, IGNORED: tl.constexpr, LIFT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """LIFT dloss / dlogits of the columns from n of the vocabulary on, at GRAD: room there for `height` rows and `width` columns.

    on_target, on_all and z_loss have LIFT in them already."""
    rows, columns = tl.arange(0, product.shape[0]), tl.arange(0, product.shape[1])
    logits = _logits(product, n + columns, BIAS, V, cap, BIASED, CAP, EXACT)
    grad = tl.exp(logits - lse[:, None]) * (LIFT + 2.0 * z_loss * lse)[:, None] - on_all
    grad -= tl.where((n + columns)[None, :] == target[:, None], on_target, 0.0)
    if CAP:
        share = logits * (1.0 / cap)
        grad *= 1.0 - share * share
    grad = tl.where(target[:, None] == IGNORED, 0.0, grad)
    mask = (rows < height)[:, None] & (columns < width)[None, :]
    tl.store(GRAD + rows[:, None] * stride_g + columns[None, :], grad.to(GRAD.dtype.element_ty), mask=mask)


@triton.jit
def logit_gradients(
    HIDDEN, WEIGHT, BIAS, TARGET, LSE, GRAD, start, columns, N, V, E, stride_h, stride_w, stride_g, cap, on_target, on_all, z_loss,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    BIASED: tl.constexpr, CAP: tl.constexpr, IGNORED: tl.constexpr, LIFT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of LIFT dloss / dlogits, for the columns from `start` of the vocabulary on."""
    block_m, block_n = grouped(tl.cdiv(N, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    EXACT: tl.constexpr = HIDDEN.dtype.element_ty == tl.float32
    m, n = block_m * BLOCK_M, block_n * BLOCK_N
    product = _product(HIDDEN, WEIGHT, m, start + n, N, V, E, stride_h, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, PRECISION)
    left, right = halves(product)
    rows = m + tl.arange(0, BLOCK_M)
    target = tl.load(TARGET + rows, mask=rows < N, other=IGNORED)
    lse = tl.load(LSE + rows, mask=rows < N, other=0.0)
    GRAD += tl.cast(m, tl.int64) * stride_g + n
    _store_gradients(
        left, target, lse, GRAD, BIAS, start + n, N - m, columns - n, V, stride_g, cap, on_target, on_all, z_loss,
        BIASED, CAP, IGNORED, LIFT, EXACT,
    )  # fmt: skip
    GRAD += BLOCK_N // 2
    n += BLOCK_N // 2
    _store_gradients(
        right, target, lse, GRAD, BIAS, start + n, N - m, columns - n, V, stride_g, cap, on_target, on_all, z_loss,
        BIASED, CAP, IGNORED, LIFT, EXACT,
    )  # fmt: skip


@triton.jit
def _add(GRAD, REST, part, m, n, N, E, FIRST: tl.constexpr, HALVES: tl.constexpr):
    """grad + rest += part, at row m and column n of [N, E]; the sum is split between them again."""
    rows, columns = m + tl.arange(0, part.shape[0]), n + tl.arange(0, part.shape[1])
    at = tl.cast(m, tl.int64) * E + n + (rows - m)[:, None] * E + (columns - n)[None, :]
    valid = (rows < N)[:, None] & (columns < E)[None, :]
    if not FIRST:
        part += tl.load(GRAD + at, mask=valid, other=0.0).to(tl.float32)
        if HALVES:
            part += tl.load(REST + at, mask=valid, other=0.0).to(tl.float32)
    grad = part.to(GRAD.dtype.element_ty)
    tl.store(GRAD + at, grad, mask=valid)
    if HALVES:
        tl.store(REST + at, (part - grad.to(tl.float32)).to(REST.dtype.element_ty), mask=valid)


@triton.jit
def add_hidden_gradients(
    GRAD_LOGITS, WEIGHT, GRAD, REST, N, E, columns, stride_l, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    FIRST: tl.constexpr, HALVES: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad + rest += grad_logits weight, a tile [tokens, width]; WEIGHT points at the chunk's first row. FIRST: they are 0 so far."""
    block_m, block_n = grouped(tl.cdiv(N, BLOCK_M), tl.cdiv(E, BLOCK_N), GROUP)
    m, n = block_m * BLOCK_M, block_n * BLOCK_N
    rows, inside, inner = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    g = GRAD_LOGITS + tl.cast(m, tl.int64) * stride_l + tl.minimum(rows, N - 1 - m)[:, None] * stride_l + inner[None, :]
    w = WEIGHT + n + inner[:, None] * stride_w + inside[None, :]
    in_width = (n + inside < E)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for c in range(0, columns, BLOCK_K):
        if EVEN:
            total = tl.dot(tl.load(g), tl.load(w), total, input_precision=PRECISION)
        else:
            g_tile = tl.load(g, mask=inner[None, :] < columns - c, other=0.0)
            w_tile = tl.load(w, mask=(inner[:, None] < columns - c) & in_width, other=0.0)
            total = tl.dot(g_tile, w_tile, total, input_precision=PRECISION)
        g += BLOCK_K
        w += BLOCK_K * stride_w
    left, right = halves(total)
    _add(GRAD, REST, left, m, n, N, E, FIRST, HALVES)
    _add(GRAD, REST, right, m, n + BLOCK_N // 2, N, E, FIRST, HALVES)
