"""Backward kernels of chunked KDA: a reverse scan for the state gradient, then everything else chunk by chunk.

    scan_back  (V tile, head, sequence)  dD = P^T dO + kg dS      dS <- fade * dS + qg^T dO - w^T dD
    gradients  (chunk, head)             all of dq dk dv dg dbeta, and partial sums of dA_log and d dt_bias

With S the state a chunk starts from, dS the gradient of the one it ends with, and Y = X^T dD (the gradient of the
right-hand side D was solved from), the two matrices have the gradients

    dP = tril(dO D^T)        dL = -stril(Y D^T)        dA = beta dL

The second is -stril(X^T dX X^T) of the product rule, shortened: dX = dD R^T and X R = D for the right-hand side R.
Likewise the gradient of w needs no product with X of its own, Z = X^T dw = -Y S^T. The rest, channel by channel:

    dq     = (dO S^T) e^G + sum_j dP_ij k_j e^(G_i - G_j)
    dk     = (D dS^T) e^(G_last - G) + beta (Z e^G + r) + sum_i (dP_ij q_i + dA_ij k_i) e^(G_i - G_j)
    r      = sum_j dL_ij k_j e^(G_i - G_j)
    dbeta  = rowsum(Y v) + rowsum(k (Z e^G + r))
    dG     = q dq + k (second term of dk - first and third), the last row more by K dkg and S dS fade summed

and dg is the sum of dG from the row to the chunk's end, the gate's and norms' own backward following in registers.

Cost per head and chunk of 64 rows at K = V = 128: `scan_back` reads 72 KiB, writes 48 KiB, 9 MFLOP; `gradients`
reads 184 KiB, writes 64 KiB, 23 MFLOP. At T = 8192, 16 heads both move 0.75 GB: 0.25 ms at 3 TB/s.

Shapes: as in chunk_forward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_mm.kernels.kda.chunk_ops import (
    BOUNDED,
    SOFTPLUS,
    anchored,
    diagonal_mask,
    gate_logits,
    gate_rate,
    last_row,
    load_beta,
    load_rows,
    place,
    running_decay,
    span_factor,
    span_mask,
    square,
    store_rows,
    unit_rows,
)


@triton.jit
def scan_back_kernel(
    w, kg, qg, P, fade, d_out, d_final, cu_seqlens, lengths, offsets,
    d_states, d_deltas, d_initial,
    T, per_row, HV,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VP: tl.constexpr,
    VARLEN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of BV value channels of one head from the last chunk of a sequence to the first.

    Writes d_states [NC, HV, BK, VP], the gradient of the state each chunk ends with, d_deltas [NC, HV, BT, VP], and
    d_initial [N, HV, V, K] unless it is None.
    """
    v0 = tl.program_id(0) * BV
    hv = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    if VARLEN:
        row = tl.load(cu_seqlens + n).to(tl.int64)
        length = tl.load(cu_seqlens + n + 1).to(tl.int32) - row.to(tl.int32)
        chunk = tl.load(offsets + n).to(tl.int64)
        count = (length + BT - 1) // BT
    else:
        row = n * T
        length = T
        if lengths is not None:
            length = tl.minimum(tl.load(lengths + n).to(tl.int32), T)
        chunk = n * per_row
        count = per_row
    KIND = w.dtype.element_ty
    key = tl.arange(0, BK)
    value = v0 + tl.arange(0, BV)
    d_state = tl.zeros((BK, BV), tl.float32)
    at_state = ((n * HV + hv) * V + value[None, :]) * K + key[:, None]
    inside = (key[:, None] < K) & (value[None, :] < V)
    if d_final is not None:
        d_state += tl.load(d_final + at_state, mask=inside, other=0.0)

    tile = (chunk + count - 1) * HV + hv
    rows = tl.arange(0, BT)[:, None]
    wide = rows * BK + key[None, :]
    narrow = rows * VP + value[None, :]
    p_w = w + tile * BT * BK + wide
    p_kg = kg + tile * BT * BK + wide
    p_qg = qg + tile * BT * BK + wide
    p_P = P + tile * BT * BT + rows * BT + tl.arange(0, BT)[None, :]
    p_fade = fade + tile * BK + key
    p_out = d_out + ((row + (count - 1) * BT) * HV + hv) * V + rows * (HV * V) + value[None, :]
    p_states = d_states + tile * BK * VP + key[:, None] * VP + value[None, :]
    p_deltas = d_deltas + tile * BT * VP + narrow
    left = length - (count - 1) * BT
    for _ in tl.range(0, count, num_stages=STAGES):
        after = d_state.to(KIND)
        d_o = tl.load(p_out, mask=(rows < left) & (value[None, :] < V), other=0.0).to(KIND)
        d_delta = tl.dot(tl.trans(tl.load(p_P)), d_o, input_precision=PRECISION)
        d_delta = tl.dot(tl.load(p_kg), after, d_delta, input_precision=PRECISION).to(KIND)
        tl.store(p_states, after)
        tl.store(p_deltas, d_delta)
        d_state = tl.dot(tl.trans(tl.load(p_qg)), d_o, d_state * tl.load(p_fade)[:, None], input_precision=PRECISION)
        d_state -= tl.dot(tl.trans(tl.load(p_w)), d_delta, input_precision=PRECISION)
        p_w -= HV * BT * BK
        p_kg -= HV * BT * BK
        p_qg -= HV * BT * BK
        p_P -= HV * BT * BT
        p_fade -= HV * BK
        p_out -= BT * HV * V
        p_states -= HV * BK * VP
        p_deltas -= HV * BT * VP
        left += BT
    if d_initial is not None:
        tl.store(d_initial + at_state, d_state, mask=inside)


@triton.jit
def through_norm(x, dx, NORM: tl.constexpr):
    """Gradient of x from that of x / |x|, rows [BT, BK]; x raw."""
    if NORM:
        r = unit_rows(x, NORM)[:, None]
        unit = x * r
        return r * (dx - unit * tl.sum(unit * dx, 1)[:, None])
    else:
        return dx


@triton.jit
def gradients_kernel(
    q, k, v, g, beta, A_log, dt_bias, cu_seqlens, lengths, offsets, owner,
    X, states, deltas, d_states, d_deltas, d_out,
    dq, dk, dv, dg, dbeta, dA_part, dbias_part,
    q_b, q_t, k_b, k_t, v_b, v_t, g_b, g_t, beta_b, beta_t,
    scale, lower, T, per_row, HV,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    VP: tl.constexpr, LEVELS: tl.constexpr, SUB: tl.constexpr, GATE: tl.constexpr,
    NORM: tl.constexpr, SIGMOID: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk of one head; dq, dk, dg, dbeta are [B, T, HV, .], the parts [NC, HV(, K)]."""
    chunk = tl.program_id(0)
    hv = tl.program_id(1)
    b, first, end, stop = place(chunk, T, per_row, cu_seqlens, lengths, offsets, owner, BT, VARLEN)
    if first < 0:
        return
    KIND = X.dtype.element_ty
    h = hv // (HV // H)
    left = end - first
    to_write = stop - first
    row = first.to(tl.int64)
    b = b.to(tl.int64)
    tile = chunk.to(tl.int64) * HV + hv
    flat = (b * T + row) * HV + hv  # row of the contiguous [B, T, HV] gradients
    rows = tl.arange(0, BT)
    i = rows[:, None]
    j = rows[None, :]
    key = tl.arange(0, BK)

    inverse = tl.trans(tl.load(square(X + tile * BT * BT, BT, BT)))
    bt = load_beta(beta + b * beta_b + row * beta_t + hv, beta_t, left, BT, SIGMOID)
    dP = tl.zeros((BT, BT), tl.float32)
    dL = tl.zeros((BT, BT), tl.float32)
    d_q = tl.zeros((BT, BK), tl.float32)
    d_kg = tl.zeros((BT, BK), tl.float32)
    zr = tl.zeros((BT, BK), tl.float32)
    d_beta = tl.zeros((BT,), tl.float32)
    d_last = tl.zeros((BK,), tl.float32)
    p_v = v + b * v_b + row * v_t + hv * V
    for v0 in range(0, VP, BV):
        narrow = i * VP + v0 + tl.arange(0, BV)[None, :]
        value = v0 + tl.arange(0, BV)[None, :]
        valid = (i < left) & (value < V)
        d_o = tl.load(d_out + flat * V + i * (HV * V) + value, mask=valid, other=0.0).to(KIND)
        delta = tl.load(deltas + tile * BT * VP + narrow)
        at = tile * BK * VP + key[:, None] * VP + v0 + tl.arange(0, BV)[None, :]
        before = tl.load(states + at)
        after = tl.load(d_states + at)
        d_last += tl.sum(before.to(tl.float32) * after.to(tl.float32), 1)
        Y = tl.dot(inverse, tl.load(d_deltas + tile * BT * VP + narrow), input_precision=PRECISION)
        vt = tl.load(p_v + i * v_t + value, mask=valid, other=0.0).to(tl.float32)
        d_beta += tl.sum(Y * vt, 1)
        tl.store(
            dv + flat * V + i * (HV * V) + value,
            (Y * bt[:, None]).to(dv.dtype.element_ty),
            mask=(i < to_write) & (value < V),
        )
        Y = Y.to(KIND)
        dP = tl.dot(d_o, tl.trans(delta), dP, input_precision=PRECISION)
        dL = tl.dot(Y, tl.trans(delta), dL, input_precision=PRECISION)
        d_q = tl.dot(d_o, tl.trans(before), d_q, input_precision=PRECISION)
        zr = tl.dot(Y, tl.trans(before), zr, input_precision=PRECISION)
        d_kg = tl.dot(delta, tl.trans(after), d_kg, input_precision=PRECISION)

    G = running_decay(g + b * g_b + row * g_t + hv * K, g_t, left, A_log, dt_bias, hv, lower, K, BT, BK, GATE)
    last = last_row(G, BT)
    raw_k = load_rows(k + b * k_b + row * k_t + h * K, k_t, left, K, BT, BK).to(tl.float32)
    kt = raw_k * unit_rows(raw_k, NORM)[:, None]
    raw_q = load_rows(q + b * q_b + row * q_t + h * K, q_t, left, K, BT, BK).to(tl.float32)
    qt = raw_q * (unit_rows(raw_q, NORM) * scale)[:, None]

    decay = tl.exp2(G)
    d_q *= decay
    zr *= -decay
    d_kg *= tl.exp2(last[None, :] - G)
    d_last = d_last * tl.exp2(last) + tl.sum(kt * d_kg, 0)
    dG = qt * d_q + kt * (zr * bt[:, None] - d_kg)
    dL = -dL
    for level in tl.static_range(LEVELS):
        factor = span_factor(G, BT >> level, BT, BK)
        mask = span_mask(BT >> level, BT)
        part_P = tl.where(mask, dP, 0.0).to(KIND)
        part_L = tl.where(mask, dL, 0.0).to(KIND)
        qf = (qt * factor).to(KIND)
        kf = (kt * factor).to(KIND)
        bkf = (kt * factor * bt[:, None]).to(KIND)
        from_P = tl.dot(part_P, kf, input_precision=PRECISION)
        from_L = tl.dot(part_L, kf, input_precision=PRECISION)
        columns = tl.dot(tl.trans(part_P), qf, input_precision=PRECISION)
        columns = tl.dot(tl.trans(part_L), bkf, columns, input_precision=PRECISION)
        d_q += factor * from_P
        zr += factor * from_L
        d_kg += factor * columns
        dG += qf * from_P + bkf * from_L - kf * columns
    if SUB == 1:
        diagonal = tl.sum(tl.where(i == j, dP, 0.0), 1)[:, None]
        d_q += diagonal * kt
        d_kg += diagonal * qt
    else:
        away = tl.reshape(anchored(G, SUB, SUB // 2, BT, BK), (BT, BK))
        rise = tl.exp2(away)
        fall = tl.exp2(-away)
        mask = diagonal_mask(SUB, BT)
        part_P = tl.where(mask, dP, 0.0).to(KIND)
        part_L = tl.where(mask & (i > j), dL, 0.0).to(KIND)
        qf = (qt * rise).to(KIND)
        kf = (kt * fall).to(KIND)
        bkf = (kt * rise * bt[:, None]).to(KIND)
        from_P = tl.dot(part_P, kf, input_precision=PRECISION)
        from_L = tl.dot(part_L, kf, input_precision=PRECISION)
        columns = tl.dot(tl.trans(part_P), qf, input_precision=PRECISION)
        columns = tl.dot(tl.trans(part_L), bkf, columns, input_precision=PRECISION)
        d_q += rise * from_P
        zr += rise * from_L
        d_kg += fall * columns
        dG += qf * from_P + bkf * from_L - kf * columns

    d_beta += tl.sum(kt * zr, 1)
    if SIGMOID:
        d_beta *= bt * (1.0 - bt)
    tl.store(dbeta + flat + rows * HV, d_beta.to(dbeta.dtype.element_ty), mask=rows < to_write)
    zr *= bt[:, None]
    store_rows(dq + flat * K, HV * K, to_write, through_norm(raw_q, d_q * scale, NORM), K, BT, BK)
    store_rows(dk + flat * K, HV * K, to_write, through_norm(raw_k, d_kg + zr, NORM), K, BT, BK)

    d_decay = tl.cumsum(dG, 0, reverse=True) + d_last[None, :]
    d_decay = tl.where(i < left, d_decay, 0.0)
    z = gate_logits(load_rows(g + b * g_b + row * g_t + hv * K, g_t, left, K, BT, BK), dt_bias, hv, K, BK)
    if GATE == BOUNDED:
        rate = gate_rate(A_log, hv)
        s = tl.sigmoid(z * rate)
        d_decay *= lower * rate * s * (1.0 - s)
        d_rate = tl.sum(tl.sum(d_decay * z, 1), 0)
    elif GATE == SOFTPLUS:
        rate = gate_rate(A_log, hv)
        soft = tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z)))
        d_rate = -rate * tl.sum(tl.sum(d_decay * soft, 1), 0)
        d_decay *= -rate * tl.sigmoid(z)
    store_rows(dg + flat * K, HV * K, to_write, d_decay, K, BT, BK)
    if dA_part is not None:
        tl.store(dA_part + tile, d_rate)
    if dbias_part is not None:
        tl.store(dbias_part + tile * K + key, tl.sum(d_decay, 0), mask=key < K)
