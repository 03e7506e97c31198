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

# pyright: reportGeneralTypeIssues=false
# (calling a jitted function from another one looks like a call from Python, which never returns)
from __future__ import annotations

import triton
import triton.language as tl

from kimi_mm.kernels.kda.chunk_ops import (
    BOUNDED,
    GIVEN,
    anchored,
    dense,
    diagonal_mask,
    gate_logits,
    gate_rate,
    inverse_norm,
    last_row,
    load_beta,
    load_rows,
    place,
    row_tile,
    running_decay,
    span_factor,
    span_mask,
    store_rows,
    stretch,
)


@triton.jit
def scan_back_kernel(
    w, kg, qg, P, X, fade, d_out, d_final, cu_seqlens, lengths, offsets,
    d_states, ys, d_initial,
    T, per_row, HV, parts,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VP: tl.constexpr,
    VARLEN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of BV value channels of one head through one part of a sequence, from its last chunk to its first.

    d_final, the gradient of the state the part ends with, and d_initial, of the one it starts from, are
    [N * parts, HV, V, K] or None. d_states [NC, HV, BK, VP], the gradient of the state each chunk ends with, and ys
    [NC, HV, BT, VP], Y, are both None where only d_initial is wanted.
    """
    v0 = tl.program_id(0) % (VP // BV) * BV
    walker = tl.program_id(0) // (VP // BV)
    hv = walker % HV
    n = (walker // HV // parts).to(tl.int64)
    part = walker // HV % parts
    row, chunk, left, count = stretch(n, part, parts, T, per_row, cu_seqlens, offsets, BT, VARLEN)
    if lengths is not None:
        left -= T - tl.minimum(tl.load(lengths + n).to(tl.int32), T)
    KIND = w.dtype.element_ty
    key = tl.arange(0, BK)
    value = v0 + tl.arange(0, BV)
    d_state = tl.zeros((BK, BV), tl.float32)
    at_state = ((n * parts + part) * HV + hv) * V * K + value[None, :] * K + key[:, None]
    inside = (key[:, None] < K) & (value[None, :] < V)
    if d_final is not None:
        d_state += tl.load(d_final + at_state, mask=inside, other=0.0)

    tile = (chunk + count - 1) * HV + hv
    left -= (count - 1) * BT
    rows = tl.arange(0, BT)[:, None]
    wide = rows * BK + key[None, :]
    inner = rows * BT + tl.arange(0, BT)[None, :]
    p_w = w + tile * BT * BK + wide
    p_kg = kg + tile * BT * BK + wide
    p_qg = qg + tile * BT * BK + wide
    p_P = P + tile * BT * BT + inner
    p_fade = fade + tile * BK + key
    p_out = d_out + ((row + (count - 1) * BT) * HV + hv) * V + rows * (HV * V) + value[None, :]
    if ys is not None:
        p_X = X + tile * BT * BT + inner
        p_states = d_states + tile * BK * VP + key[:, None] * VP + value[None, :]
        p_y = ys + tile * BT * VP + rows * VP + value[None, :]
    for _ in tl.range(0, count, num_stages=STAGES):
        after = d_state.to(KIND)
        d_o = tl.load(p_out, mask=(rows < left) & (value[None, :] < V), other=0.0).to(KIND)
        d_delta = tl.dot(tl.trans(tl.load(p_P)), d_o, input_precision=PRECISION)
        d_delta = tl.dot(tl.load(p_kg), after, d_delta, input_precision=PRECISION).to(KIND)
        if ys is not None:
            tl.store(p_states, after)
            tl.store(p_y, tl.dot(tl.trans(tl.load(p_X)), d_delta, input_precision=PRECISION).to(KIND))
            p_X -= HV * BT * BT
            p_states -= HV * BK * VP
            p_y -= HV * BT * VP
        d_state = tl.dot(tl.trans(tl.load(p_qg)), d_o, d_state * tl.load(p_fade)[:, None], input_precision=PRECISION)
        d_state -= tl.dot(tl.trans(tl.load(p_w)), d_delta, input_precision=PRECISION)
        p_w -= HV * BT * BK
        p_kg -= HV * BT * BK
        p_qg -= HV * BT * BK
        p_P -= HV * BT * BT
        p_fade -= HV * BK
        p_out -= BT * HV * V
        left += BT
    if d_initial is not None:
        tl.store(d_initial + at_state, d_state, mask=inside)


@triton.jit
def add_pairs(d_row_q, d_row_k, d_col, dG, dP, dL, mask, qf, bkf, kf, row_factor, col_factor, PRECISION: tl.constexpr):
    """Adds what the pairs under `mask` give, from rows qf, bkf (with beta) and columns kf, factors included.

    dP and dL are pointers. dG takes the very numbers that were multiplied, rounded as they were: what a pair of rows
    adds to one and takes from the other then cancels to fp32 in the sums that follow, and bfloat16 costs dg nothing.
    """
    part = tl.where(mask, tl.load(dP), 0.0)
    product = tl.dot(part, kf, input_precision=PRECISION)
    d_row_q += row_factor * product
    dG += qf * product
    columns = tl.dot(tl.trans(part), qf, input_precision=PRECISION)
    part = tl.where(mask, tl.load(dL), 0.0)
    product = tl.dot(part, kf, input_precision=PRECISION)
    d_row_k += row_factor * product
    dG += bkf * product
    columns = tl.dot(tl.trans(part), bkf, columns, input_precision=PRECISION)
    d_col += col_factor * columns
    dG -= kf * columns
    return d_row_q, d_row_k, d_col, dG


@triton.jit
def add_score_gradients(
    d_q, d_kg, zr, dG, dP, dL, q, k, bt, G, BT: tl.constexpr, KT: tl.constexpr, LEVELS: tl.constexpr, SUB: tl.constexpr,
    KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what dP and dL [BT, BT], given as pointers, mean for KT channels; the mirror of `add_scores`."""
    i = tl.arange(0, BT)[:, None]
    j = tl.arange(0, BT)[None, :]
    for level in tl.static_range(LEVELS):
        factor = span_factor(G, BT >> level, BT, KT)
        mask = span_mask(BT >> level, BT)
        qf = (q * factor).to(KIND)
        kf = (k * factor).to(KIND)
        bkf = (k * factor * bt[:, None]).to(KIND)
        d_q, zr, d_kg, dG = add_pairs(d_q, zr, d_kg, dG, dP, dL, mask, qf, bkf, kf, factor, factor, PRECISION)
    if SUB == 1:
        diagonal = tl.sum(tl.where(i == j, tl.load(dP), 0.0).to(tl.float32), 1)[:, None]
        d_q += diagonal * k
        d_kg += diagonal * q
    else:
        away = tl.reshape(anchored(G, SUB, SUB // 2, BT, KT), (BT, KT))
        rise = tl.exp2(away)
        fall = tl.exp2(-away)
        qf = (q * rise).to(KIND)
        kf = (k * fall).to(KIND)
        bkf = (k * rise * bt[:, None]).to(KIND)
        mask = diagonal_mask(SUB, BT)
        d_q, zr, d_kg, dG = add_pairs(d_q, zr, d_kg, dG, dP, dL, mask, qf, bkf, kf, rise, fall, PRECISION)
    return d_q, d_kg, zr, dG


@triton.jit
def gradients_kernel(
    q, k, v, g, beta, A_log, dt_bias, cu_seqlens, lengths, offsets, owner,
    out, states, deltas, d_states, ys, d_out,
    dq, dk, dv, dg, dbeta, dA_part, dbias_part, pairs,
    q_b, q_t, k_b, k_t, v_b, v_t, g_b, g_t, beta_b, beta_t,
    scale, lower, T, per_row, HV,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, VP: tl.constexpr,
    KT: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr, SUB: tl.constexpr, GATE: tl.constexpr,
    NORM: tl.constexpr, SIGMOID: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk of one head; dq, dk, dg, dbeta are [B, T, HV, .], the parts [NC, HV(, K)].

    Value channels first, for dP, dL, dv and the row sums that the norms of q and k take (q dq = dO o and
    k dk = 2 Y D - beta Y v, summed over the head), then KT key channels at a time, each on its own. dP and dL wait in
    `pairs` [NC, HV, 2, BT, BT]: their masked parts, kept in registers, would be more than a program has.
    """
    chunk = tl.program_id(0) // HV
    hv = tl.program_id(0) % HV
    b, first, end, stop = place(chunk, T, per_row, cu_seqlens, lengths, offsets, owner, BT, VARLEN)
    if VARLEN and first < 0:
        return
    KIND = states.dtype.element_ty
    EVEN: tl.constexpr = K == BK
    h = hv // (HV // H)
    left = end - first
    to_write = stop - first
    row = first.to(tl.int64)
    b = b.to(tl.int64)
    tile = chunk.to(tl.int64) * HV + hv
    flat = (b * T + row) * HV + hv  # row of the contiguous [B, T, HV] gradients
    q += b * q_b + row * q_t + h * K
    k += b * k_b + row * k_t + h * K
    v += b * v_b + row * v_t + hv * V
    g += b * g_b + row * g_t + hv * K
    d_out += flat * V
    deltas += tile * BT * VP
    ys += tile * BT * VP
    states += tile * BK * VP
    d_states += tile * BK * VP

    bt = load_beta(beta + b * beta_b + row * beta_t + hv, beta_t, left, BT, SIGMOID)
    dP = tl.zeros((BT, BT), tl.float32)
    dL = tl.zeros((BT, BT), tl.float32)
    d_beta = tl.zeros((BT,), tl.float32)
    q_dq = tl.zeros((BT,), tl.float32)
    k_dk = tl.zeros((BT,), tl.float32)
    for v0 in range(0, VP, BV):
        delta = tl.load(dense(deltas + v0, BT, BV, VP))
        Y = tl.load(dense(ys + v0, BT, BV, VP))
        d_o = load_rows(d_out + v0, HV * V, left, V - v0, BT, BV, V == VP).to(KIND)
        dP = tl.dot(d_o, tl.trans(delta), dP, input_precision=PRECISION)
        dL = tl.dot(Y, tl.trans(delta), dL, input_precision=PRECISION)
        wide_Y = Y.to(tl.float32)
        value = load_rows(v + v0, v_t, left, V - v0, BT, BV, V == VP).to(tl.float32)
        d_beta += tl.sum(wide_Y * value, 1)
        if NORM:
            o = load_rows(out + flat * V + v0, HV * V, left, V - v0, BT, BV, V == VP).to(tl.float32)
            q_dq += tl.sum(d_o.to(tl.float32) * o, 1)
            k_dk += tl.sum(wide_Y * delta.to(tl.float32), 1)
        store_rows(dv + flat * V + v0, HV * V, to_write, V - v0, wide_Y * bt[:, None], BT, BV, V == VP)
    k_dk = 2.0 * k_dk - bt * d_beta
    i = tl.arange(0, BT)[:, None]
    j = tl.arange(0, BT)[None, :]
    pairs += tile * 2 * BT * BT
    p_dP = dense(pairs, BT, BT, BT)
    p_dL = dense(pairs + BT * BT, BT, BT, BT)
    tl.store(p_dP, dP.to(KIND))
    tl.store(p_dL, tl.where(i > j, -dL, 0.0).to(KIND))
    tl.debug_barrier()  # below, threads read what others of this program wrote here

    rate = gate_rate(A_log, hv)
    k_norm = inverse_norm(k, k_t, left, K, BT, BK, KT, NORM)
    q_norm = inverse_norm(q, q_t, left, K, BT, BK, KT, NORM)
    if dt_bias is not None:
        dt_bias += hv * K
    d_rate = 0.0
    for k0 in range(0, BK, KT):
        d_q = tl.zeros((BT, KT), tl.float32)
        d_kg = tl.zeros((BT, KT), tl.float32)
        zr = tl.zeros((BT, KT), tl.float32)
        d_last = tl.zeros((KT,), tl.float32)
        for v0 in range(0, VP, BV):
            before = tl.load(dense(states + k0 * VP + v0, KT, BV, VP))
            after = tl.load(dense(d_states + k0 * VP + v0, KT, BV, VP))
            d_last += tl.sum(before.to(tl.float32) * after.to(tl.float32), 1)
            d_o = load_rows(d_out + v0, HV * V, left, V - v0, BT, BV, V == VP).to(KIND)
            d_q = tl.dot(d_o, tl.trans(before), d_q, input_precision=PRECISION)
            Y = tl.load(dense(ys + v0, BT, BV, VP))
            zr = tl.dot(Y, tl.trans(before), zr, input_precision=PRECISION)
            delta = tl.load(dense(deltas + v0, BT, BV, VP))
            d_kg = tl.dot(delta, tl.trans(after), d_kg, input_precision=PRECISION)

        bias = dt_bias
        if dt_bias is not None:
            bias = dt_bias + k0
        G = running_decay(g + k0, g_t, left, K - k0, bias, rate, lower, BT, KT, EVEN, GATE)
        kt = load_rows(k + k0, k_t, left, K - k0, BT, KT, EVEN).to(tl.float32) * k_norm[:, None]
        qt = load_rows(q + k0, q_t, left, K - k0, BT, KT, EVEN).to(tl.float32) * (q_norm * scale)[:, None]
        decay = tl.exp2(G)
        last = last_row(G, BT)
        d_q *= decay
        zr *= -decay
        d_kg *= tl.exp2(last[None, :] - G)
        d_last = d_last * tl.exp2(last) + tl.sum(kt * d_kg, 0)
        dG = qt * d_q + kt * (zr * bt[:, None] - d_kg)
        d_q, d_kg, zr, dG = add_score_gradients(
            d_q, d_kg, zr, dG, p_dP, p_dL, qt, kt, bt, G, BT, KT, LEVELS, SUB, KIND, PRECISION
        )
        d_beta += tl.sum(kt * zr, 1)
        d_k = d_kg + zr * bt[:, None]
        d_q *= scale
        if NORM:
            d_q = q_norm[:, None] * (d_q - qt * (q_dq / scale)[:, None])
            d_k = k_norm[:, None] * (d_k - kt * k_dk[:, None])
        store_rows(dq + flat * K + k0, HV * K, to_write, K - k0, d_q, BT, KT, EVEN)
        store_rows(dk + flat * K + k0, HV * K, to_write, K - k0, d_k, BT, KT, EVEN)

        at, mask = row_tile(g + k0, g_t, left, K - k0, BT, KT, EVEN)
        d_decay = tl.where(mask, tl.cumsum(dG, 0, reverse=True) + d_last[None, :], 0.0)
        if GATE != GIVEN:
            z = gate_logits(tl.load(at, mask=mask, other=0.0), bias, K - k0, KT, EVEN)
            if GATE == BOUNDED:
                s = tl.sigmoid(z * rate)
                d_decay *= lower * rate * s * (1.0 - s)
                d_rate += tl.sum(tl.sum(d_decay * z, 1), 0)
            else:
                soft = tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z)))
                d_rate -= rate * tl.sum(tl.sum(d_decay * soft, 1), 0)
                d_decay *= -rate * tl.sigmoid(z)
        store_rows(dg + flat * K + k0, HV * K, to_write, K - k0, d_decay, BT, KT, EVEN)
        if dbias_part is not None:
            key = k0 + tl.arange(0, KT)
            tl.store(dbias_part + tile * K + key, tl.sum(d_decay, 0), mask=key < K)

    if SIGMOID:
        d_beta *= bt * (1.0 - bt)
    rows = tl.arange(0, BT)
    tl.store(dbeta + flat + rows * HV, d_beta.to(dbeta.dtype.element_ty), mask=rows < to_write)
    if dA_part is not None:
        tl.store(dA_part + tile, d_rate)
