"""The kernels of flash attention; attention.py says what they are for, and launches them.

Scores are kept in units of log 2, so that exponentials are the hardware's exp2: a product times `rate`, which is scale * log2(e).
With a cap it is cap * log2(e), and what it multiplies tanh(product * slope), for a `slope` of scale / cap. In the backward pass LSE
is in those units too. A block of rows sees a range of blocks, of which the first and the last few may need
a mask: see `_bounds`.

Strides of what a loop loads are compiled in: a thread's rows are then one address and constants. The loops carry pointers rather
than multiply their counter in 64 bits: its widening leaves a block between a loop and the wait for its last product that sets the
accumulators, for which NVIDIA's assembler lets no HGMMA of the kernel overlap the next (its advisory C7515).

The tile that stays with a program may come by a descriptor (TMA): a copy in two boxes asks for the number of the warp at the start of
the kernel, and the loops share it. Without, each works out the addresses of its products' left operand again, every time around.
So may keys and values in the forward pass: a thread has no addresses for them then. In the backward pass that costs more than it saves.

B batch, T query length, S key length, H query heads, G key and value heads, D head dim; M queries and N keys of a block.
"""

import triton
import triton.language as tl

from .tile import tanh

LANES: tl.constexpr = tl.constexpr(8)
"""Sums that a row of weights is kept in: tensor cores leave every eighth column with the same thread, which can add those alone."""


@triton.jit
def _load(base, left, stride, rows, columns, D: tl.constexpr, WHOLE: tl.constexpr, JOINT: tl.constexpr = False):
    """These rows of [left, D] at `base`, beyond them and beyond D zeros. WHOLE: all of them are there. JOINT: one offset an element."""
    at = base + (rows[:, None] * stride + columns[None, :]) if JOINT else base + rows[:, None] * stride + columns[None, :]
    if WHOLE:
        return tl.load(at) if columns.shape[0] == D else tl.load(at, mask=columns[None, :] < D, other=0.0)
    inside = rows[:, None] < left
    return tl.load(at, mask=inside if columns.shape[0] == D else inside & (columns[None, :] < D), other=0.0)


@triton.jit
def _stay(X, b, h, row, stride_b, stride, stride_h, length, rows, columns, D: tl.constexpr):
    """The rows of head h from `row` on that a program keeps. X is a pointer, or a descriptor of [B, H, length, D]."""
    if isinstance(X, tl.tensor_descriptor):
        return tl.reshape(X.load([b.to(tl.int32), h.to(tl.int32), row, 0]), [rows.shape[0], columns.shape[0]])
    else:
        base = X + b * stride_b + h * stride_h + row.to(tl.int64) * stride
        return _load(base, length - row, stride, rows, columns, D, False)


@triton.jit
def _come(X, b, h, row, left, stride, rows, columns, D: tl.constexpr, WHOLE: tl.constexpr):
    """The rows of head h from `row` on that a loop has come to. X is a descriptor, or a pointer to the first of them."""
    if isinstance(X, tl.tensor_descriptor):
        return tl.reshape(X.load([b, h, row, 0]), [rows.shape[0], columns.shape[0]])
    else:
        return _load(X, left, stride, rows, columns, D, WHOLE)


@triton.jit
def _store(base, left, stride, rows, columns, value, D: tl.constexpr):
    inside = rows[:, None] < left
    if columns.shape[0] > D:
        inside = inside & (columns[None, :] < D)
    tl.store(base + rows[:, None] * stride + columns[None, :], value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _bounds(first, end, valid, length, BLOCK: tl.constexpr):
    """For rows that see [first, end): where the blocks to visit begin, where those that need no mask begin and end, where all end."""
    start = tl.min(tl.where(valid, first, length)) // BLOCK * BLOCK
    whole = tl.cdiv(tl.max(tl.where(valid, first, 0)), BLOCK) * BLOCK
    stop = tl.max(tl.where(valid, end, 0))
    whole_end = tl.maximum(whole, tl.min(tl.where(valid, end, length)) // BLOCK * BLOCK)
    return start, tl.minimum(whole, tl.maximum(stop, start)), tl.minimum(whole_end, tl.maximum(stop, start)), stop


@triton.jit
def _phase(phase: tl.constexpr, start, whole, whole_end, stop):
    """The blocks to visit come in three phases: 0 and 2 need a mask, 1 does not."""
    if phase == 0:
        return start, whole
    elif phase == 1:
        return whole, whole_end
    else:
        return whole_end, stop


@triton.jit
def _attend(
    total, weight, peak, q, K, V, b, g, start, stop, first, end, S, stride_k: tl.constexpr, stride_v: tl.constexpr, rate, slope,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, RANGES: tl.constexpr, CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys from start to stop."""
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    if not isinstance(K, tl.tensor_descriptor):
        K += tl.cast(start, tl.int64) * stride_k
        V += tl.cast(start, tl.int64) * stride_v
    for n in range(start, stop, BLOCK_N):
        k = _come(K, b, g, n, S - n, stride_k, rows, columns, D, not MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if CAP:
            s = tanh(s, slope, q.dtype == tl.float32)
        if MASKED:
            seen = n + rows[None, :] < end[:, None]
            if RANGES:
                seen &= rows[None, :] >= (first - n)[:, None]
            s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(peak, tl.max(s, 1) * rate)
        base = tl.where(new == float("-inf"), 0.0, new) if MASKED else new  # a row that has seen no key yet
        p = tl.exp2(s * rate - base[:, None])
        decay = tl.exp2(peak - base)
        weight = weight * decay[:, None] + tl.sum(tl.reshape(p, [p.shape[0], BLOCK_N // LANES, LANES]), 1)
        v = _come(V, b, g, n, S - n, stride_v, rows, columns, D, not MASKED)
        total = tl.dot(p.to(v.dtype), v, total * decay[:, None], input_precision=PRECISION)
        peak = new
        if not isinstance(K, tl.tensor_descriptor):
            K += BLOCK_N * stride_k
            V += BLOCK_N * stride_v
    return total, weight, peak


@triton.jit
def forward(
    Q, K, V, OUT, LSE, FIRST, END, SINK,
    qb, qt, qh, kb, ks: tl.constexpr, kg, vb, vs: tl.constexpr, vg, ob, ot, oh, range_b, T, S, H, group, rate, slope,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, RANGES: tl.constexpr, EVEN: tl.constexpr, CAP: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The last blocks of a causal mask have the most keys: they go first, so that the short ones fill the gaps at the end.
    m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    row = m.to(tl.int64)
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    valid = m + rows < T
    if not isinstance(K, tl.tensor_descriptor):
        K += b * kb + h // group * kg
        V += b * vb + h // group * vg
    if RANGES:
        first = tl.load(FIRST + b * range_b + m + rows, mask=valid, other=0)
        end = tl.load(END + b * range_b + m + rows, mask=valid, other=0)
        start, whole, whole_end, stop = _bounds(first, end, valid, S, BLOCK_N)
    else:
        first, start, whole = 0, 0, 0
        end = m + rows + 1 + S - T if CAUSAL else tl.zeros([BLOCK_M], tl.int32) + S
        whole_end = (tl.maximum(m + 1 + S - T, 0) if CAUSAL else S) // BLOCK_N * BLOCK_N
        stop = tl.maximum(tl.minimum(m + BLOCK_M, T) + S - T, 0) if CAUSAL else S
    q = _stay(Q, b, h, m, qb, qt, qh, T, rows, columns, D)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    weight = tl.zeros([BLOCK_M, LANES], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for phase in tl.static_range(3):
        if (phase == 0 and RANGES) or phase == 1 or (phase == 2 and (RANGES or CAUSAL or not EVEN)):
            begin, until = _phase(phase, start, whole, whole_end, stop)
            total, weight, peak = _attend(
                total, weight, peak, q, K, V, b.to(tl.int32), (h // group).to(tl.int32), begin, until, first, end, S, ks, vs, rate, slope,
                D, BLOCK_D, BLOCK_N, phase != 1, RANGES, CAP, PRECISION,
            )  # fmt: skip
    weight = tl.sum(weight, 1)
    if SINKS:
        sink = tl.load(SINK + h).to(tl.float32) * 1.4426950408889634
        new = tl.maximum(peak, sink)
        base = tl.where(new == float("-inf"), 0.0, new)  # no key and a sink of no weight
        decay = tl.exp2(peak - base)
        weight = weight * decay + tl.exp2(sink - base)
        total, peak = total * decay[:, None], new
    total = total * tl.where(weight > 0, 1.0 / weight, 0.0)[:, None]
    _store(OUT + b * ob + h * oh + row * ot, T - m, ot, rows, columns, total, D)
    lse = tl.where(weight > 0, (peak + tl.log2(weight)) * 0.6931471805599453, float("-inf"))
    tl.store(LSE + (b * H + h) * T + m + rows, lse, mask=valid)


@triton.jit
def row_sums(
    OUT, GRAD, GRAD_LSE, DELTA, ob, ot, oh, gb, gt, gh, T, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O) - dLSE: what every score's gradient has subtracted."""
    m = tl.program_id(0) * BLOCK_M
    row = m.to(tl.int64)
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    out = _load(OUT + b * ob + h * oh + row * ot, T - m, ot, rows, columns, D, False).to(tl.float32)
    grad = _load(GRAD + b * gb + h * gh + row * gt, T - m, gt, rows, columns, D, False).to(tl.float32)
    delta = tl.sum(out * grad, 1)
    at = (b * H + h) * T + m + rows
    if HAS_LSE:
        delta -= tl.load(GRAD_LSE + at, mask=m + rows < T, other=0.0)
    tl.store(DELTA + at, delta, mask=m + rows < T)


@triton.jit
def _add_kv(
    dk, dv, k, v, Q, GRAD, LSE, DELTA, start, stop, first, end, T, group, stride_q: tl.constexpr, head_q, stride_g: tl.constexpr, head_g,
    rate, slope,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, RANGES: tl.constexpr, CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries from start to stop of all heads of a group add to the gradients of a block of keys. Scores are [N, M] here."""
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    Q += tl.cast(start, tl.int64) * stride_q
    GRAD += tl.cast(start, tl.int64) * stride_g
    # One loop over heads and blocks: a loop within a loop costs the compiler 60 registers, and spills.
    blocks = tl.maximum(tl.cdiv(stop - start, BLOCK_M), 0)
    turn_q = head_q - tl.cast(blocks - 1, tl.int64) * BLOCK_M * stride_q  # from the last block of a head to the first of the next
    turn_g = head_g - tl.cast(blocks - 1, tl.int64) * BLOCK_M * stride_g
    m, at = start, start
    for _ in range(0, group * blocks):
        q = _load(Q, T - m, stride_q, rows, columns, D, not MASKED)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if MASKED:
            lse = tl.load(LSE + at + rows, mask=m + rows < T, other=0.0)
            delta = tl.load(DELTA + at + rows, mask=m + rows < T, other=0.0)
        else:
            lse, delta = tl.load(LSE + at + rows), tl.load(DELTA + at + rows)
        if CAP:
            s = tanh(s, slope, k.dtype == tl.float32)
        p = tl.exp2(s * rate - lse[None, :])
        if MASKED:
            seen = rows[None, :] >= (first - m)[:, None]
            if RANGES:  # without, what is beyond the last query has no gradient
                seen &= rows[None, :] < (end - m)[:, None]
            p = tl.where(seen, p, 0.0)
        grad = _load(GRAD, T - m, stride_g, rows, columns, D, not MASKED)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
        if CAP:
            ds *= 1.0 - s * s
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        m += BLOCK_M
        turn = m >= stop
        m = tl.where(turn, start, m)
        Q += tl.where(turn, turn_q, BLOCK_M * stride_q)
        GRAD += tl.where(turn, turn_g, BLOCK_M * stride_g)
        at += tl.where(turn, T - (blocks - 1) * BLOCK_M, BLOCK_M)
    return dk, dv


@triton.jit
def backward_kv(
    Q, K, V, GRAD, LSE, DELTA, DK, DV, FIRST, END,
    qb, qt: tl.constexpr, qh, kb, ks, kg, vb, vs, vg, gb, gt: tl.constexpr, gh, dkb, dks, dkg, dvb, dvs, dvg, range_b, T, S, H, group,
    scale, rate, slope,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, RANGES: tl.constexpr, EVEN: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N
    row = n.to(tl.int64)
    b, g = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    valid = n + rows < S
    if RANGES:
        first = tl.load(FIRST + b * range_b + n + rows, mask=valid, other=0)
        end = tl.load(END + b * range_b + n + rows, mask=valid, other=0)
        start, whole, whole_end, stop = _bounds(first, end, valid, T, BLOCK_M)
    else:
        first = n + rows - (S - T) if CAUSAL else tl.zeros([BLOCK_N], tl.int32)
        end, stop = T, T
        start = tl.maximum(n - (S - T), 0) // BLOCK_M * BLOCK_M if CAUSAL else 0
        whole = tl.minimum(tl.cdiv(tl.maximum(tl.minimum(n + BLOCK_N, S) - 1 - (S - T), 0), BLOCK_M) * BLOCK_M, T) if CAUSAL else 0
        whole_end = tl.maximum(whole, T // BLOCK_M * BLOCK_M)
    k = _stay(K, b, g, n, kb, ks, kg, S, rows, columns, D)
    v = _stay(V, b, g, n, vb, vs, vg, S, rows, columns, D)
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    Q += b * qb + g * group * qh
    GRAD += b * gb + g * group * gh
    LSE += (b * H + g * group) * T
    DELTA += (b * H + g * group) * T
    for phase in tl.static_range(3):
        if (phase == 0 and (RANGES or CAUSAL)) or phase == 1 or (phase == 2 and (RANGES or not EVEN)):
            begin, until = _phase(phase, start, whole, whole_end, stop)
            dk, dv = _add_kv(
                dk, dv, k, v, Q, GRAD, LSE, DELTA, begin, until, first, end, T, group, qt, qh, gt, gh, rate, slope,
                D, BLOCK_D, BLOCK_M, phase != 1, RANGES, CAP, PRECISION,
            )  # fmt: skip
    _store(DK + b * dkb + g * dkg + row * dks, S - n, dks, rows, columns, dk * scale, D)
    _store(DV + b * dvb + g * dvg + row * dvs, S - n, dvs, rows, columns, dv, D)


@triton.jit
def _add_q(
    dq, q, grad, lse, delta, K, V, start, stop, first, end, S, stride_k: tl.constexpr, stride_v: tl.constexpr, rate, slope,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, RANGES: tl.constexpr, CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the keys from start to stop add to the gradient of a block of queries."""
    JOINT: tl.constexpr = not RANGES and BLOCK_D <= 128  # saves addresses here, with ranges and wider heads it costs some
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    K += tl.cast(start, tl.int64) * stride_k
    V += tl.cast(start, tl.int64) * stride_v
    for n in range(start, stop, BLOCK_N):
        k = _load(K, S - n, stride_k, rows, columns, D, not MASKED, JOINT)
        v = _load(V, S - n, stride_v, rows, columns, D, not MASKED, JOINT)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if CAP:
            s = tanh(s, slope, k.dtype == tl.float32)
        p = tl.exp2(s * rate - lse[:, None])
        if MASKED:
            seen = n + rows[None, :] < end[:, None]
            if RANGES:
                seen &= rows[None, :] >= (first - n)[:, None]
            p = tl.where(seen, p, 0.0)
        ds = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        if CAP:
            ds *= 1.0 - s * s
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        K += BLOCK_N * stride_k
        V += BLOCK_N * stride_v
    return dq


@triton.jit
def backward_q(
    Q, K, V, GRAD, LSE, DELTA, DQ, FIRST, END,
    qb, qt, qh, kb, ks: tl.constexpr, kg, vb, vs: tl.constexpr, vg, gb, gt, gh, dqb, dqt, dqh, range_b, T, S, H, group, scale, rate, slope,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, RANGES: tl.constexpr, EVEN: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    row = m.to(tl.int64)
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    valid = m + rows < T
    K += b * kb + h // group * kg
    V += b * vb + h // group * vg
    if RANGES:
        first = tl.load(FIRST + b * range_b + m + rows, mask=valid, other=0)
        end = tl.load(END + b * range_b + m + rows, mask=valid, other=0)
        start, whole, whole_end, stop = _bounds(first, end, valid, S, BLOCK_N)
    else:
        first, start, whole = 0, 0, 0
        end = m + rows + 1 + S - T if CAUSAL else tl.zeros([BLOCK_M], tl.int32) + S
        whole_end = (tl.maximum(m + 1 + S - T, 0) if CAUSAL else S) // BLOCK_N * BLOCK_N
        stop = tl.maximum(tl.minimum(m + BLOCK_M, T) + S - T, 0) if CAUSAL else S
    q = _stay(Q, b, h, m, qb, qt, qh, T, rows, columns, D)
    grad = _stay(GRAD, b, h, m, gb, gt, gh, T, rows, columns, D)
    lse = tl.load(LSE + (b * H + h) * T + m + rows, mask=valid, other=0.0)
    delta = tl.load(DELTA + (b * H + h) * T + m + rows, mask=valid, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for phase in tl.static_range(3):
        if (phase == 0 and RANGES) or phase == 1 or (phase == 2 and (RANGES or CAUSAL or not EVEN)):
            begin, until = _phase(phase, start, whole, whole_end, stop)
            dq = _add_q(
                dq, q, grad, lse, delta, K, V, begin, until, first, end, S, ks, vs, rate, slope,
                D, BLOCK_D, BLOCK_N, phase != 1, RANGES, CAP, PRECISION,
            )  # fmt: skip
    _store(DQ + b * dqb + h * dqh + row * dqt, T - m, dqt, rows, columns, dq * scale, D)
