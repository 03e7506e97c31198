"""Forward kernels of chunked KDA: everything inside a chunk at once, then a serial scan over the chunks.

    inside   chunk, head             q k v g beta ─► w u kg qg P X fade
    scan     V tile, head, sequence   D = u - w S     o = qg S + P D     S <- fade * S + kg^T D

with S [K, V] the state a chunk starts from and, for one chunk (facts of Kimi Linear, section 3; G = running log-decay),

    P = tril(q k^T decayed)       X = (I + stril(beta k k^T decayed))^-1      u = X (beta v)
    w = X (beta k e^G)            qg = q e^G        kg = k e^(G_last - G)     fade = e^G_last

Cost per head and chunk of 64 rows at K = V = 128: `inside` reads 64 KiB, writes 72 KiB and does about 10 MFLOP on
tensor cores; `scan` reads 72 KiB, writes 16 KiB, 7 MFLOP. At T = 8192, 32 heads both move 0.9 GB: 0.3 ms at 3 TB/s,
where inputs and output alone would take 0.11 ms.

Shapes:  B batch  T time  H key heads  HV value heads  NC chunks of all sequences  N sequences
         BT chunk rows  BK, BV padded key channels and a tile of VP padded value channels
"""

# pyright: reportGeneralTypeIssues=false
# (calling a jitted function from another one looks like a call from Python, which never returns)
from __future__ import annotations

import triton
import triton.language as tl

from kimi_mm.kernels.kda.chunk_ops import (
    anchored,
    dense,
    diagonal_mask,
    gate_rate,
    inverse_norm,
    last_row,
    load_beta,
    load_rows,
    place,
    running_decay,
    span_factor,
    span_mask,
    stretch,
    unit_lower_inverse,
)


@triton.jit
def places_kernel(cu_seqlens, offsets, owner, N, NC, BT: tl.constexpr, BLOCK: tl.constexpr):
    """Program n counts the chunks before sequence n and signs those of n; program N marks the spare ones with -1."""
    n = tl.program_id(0)
    before = 0
    for m0 in range(0, n, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        start = tl.load(cu_seqlens + m, mask=m < n, other=0)
        size = tl.load(cu_seqlens + m + 1, mask=m < n, other=0) - start
        before += tl.sum((size + BT - 1) // BT, 0).to(tl.int32)
    tl.store(offsets + n, before)
    count = NC - before
    name = -1
    if n < N:
        size = tl.load(cu_seqlens + n + 1) - tl.load(cu_seqlens + n)
        count = ((size + BT - 1) // BT).to(tl.int32)
        name = n
    for c0 in range(0, count, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        tl.store(owner + before + c, name, mask=c < count)


@triton.jit
def add_scores(
    P, A, q, k, G, BT: tl.constexpr, KT: tl.constexpr, LEVELS: tl.constexpr, SUB: tl.constexpr, KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what KT channels give to P (diagonal kept) and A (strictly lower), [BT, BT] fp32.

    LEVELS spans from BT down to 2 SUB are taken, then the diagonal blocks of SUB rows (16 for a bounded gate, 1
    otherwise). Operands q, k [BT, KT] times their factors are rounded to KIND.
    """
    for level in tl.static_range(LEVELS):
        factor = span_factor(G, BT >> level, BT, KT)
        kf = (k * factor).to(KIND)
        qf = (q * factor).to(KIND)
        mask = span_mask(BT >> level, BT)
        P += tl.where(mask, tl.dot(qf, tl.trans(kf), input_precision=PRECISION), 0.0)
        A += tl.where(mask, tl.dot(kf, tl.trans(kf), input_precision=PRECISION), 0.0)
    mask = diagonal_mask(SUB, BT)
    if SUB == 1:
        P += tl.where(mask, tl.sum(q * k, 1)[:, None], 0.0)
    else:
        i = tl.arange(0, BT)[:, None]
        j = tl.arange(0, BT)[None, :]
        away = tl.reshape(anchored(G, SUB, SUB // 2, BT, KT), (BT, KT))
        rise = tl.exp2(away)
        columns = tl.trans((k * tl.exp2(-away)).to(KIND))
        P += tl.where(mask, tl.dot((q * rise).to(KIND), columns, input_precision=PRECISION), 0.0)
        A += tl.where(mask & (i > j), tl.dot((k * rise).to(KIND), columns, input_precision=PRECISION), 0.0)
    return P, A


@triton.jit
def inside_kernel(
    q, k, v, g, beta, A_log, dt_bias, cu_seqlens, lengths, offsets, owner,
    w, u, kg, qg, P, X, fade,
    q_b, q_t, k_b, k_t, v_b, v_t, g_b, g_t, beta_b, beta_t,
    scale, lower, T, per_row, HV,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, VP: tl.constexpr,
    KT: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr, SUB: tl.constexpr, LOG_BT: tl.constexpr,
    GATE: tl.constexpr, NORM: tl.constexpr, SIGMOID: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head, KT channels at a time: gate, norms, P, X, and from them w, u, kg, qg; see the module."""
    chunk = tl.program_id(0) // HV
    hv = tl.program_id(0) % HV
    b, first, end, _ = place(chunk, T, per_row, cu_seqlens, lengths, offsets, owner, BT, VARLEN)
    if VARLEN and first < 0:
        return
    KIND = w.dtype.element_ty
    EVEN: tl.constexpr = K == BK
    h = hv // (HV // H)
    left = end - first
    row = first.to(tl.int64)
    b = b.to(tl.int64)
    tile = chunk.to(tl.int64) * HV + hv
    q += b * q_b + row * q_t + h * K
    k += b * k_b + row * k_t + h * K
    v += b * v_b + row * v_t + hv * V
    g += b * g_b + row * g_t + hv * K
    w += tile * BT * BK
    kg += tile * BT * BK
    qg += tile * BT * BK
    u += tile * BT * VP

    bt = load_beta(beta + b * beta_b + row * beta_t + hv, beta_t, left, BT, SIGMOID)
    rate = gate_rate(A_log, hv)
    k_norm = inverse_norm(k, k_t, left, K, BT, BK, KT, NORM)
    q_norm = inverse_norm(q, q_t, left, K, BT, BK, KT, NORM) * scale
    if dt_bias is not None:
        dt_bias += hv * K
    scores_P = tl.zeros((BT, BT), tl.float32)
    scores_A = tl.zeros((BT, BT), tl.float32)
    for k0 in range(0, BK, KT):
        bias = dt_bias
        if dt_bias is not None:
            bias = dt_bias + k0
        G = running_decay(g + k0, g_t, left, K - k0, bias, rate, lower, BT, KT, EVEN, GATE)
        kt = load_rows(k + k0, k_t, left, K - k0, BT, KT, EVEN).to(tl.float32) * k_norm[:, None]
        qt = load_rows(q + k0, q_t, left, K - k0, BT, KT, EVEN).to(tl.float32) * q_norm[:, None]
        decay = tl.exp2(G)
        last = last_row(G, BT)
        tl.store(dense(w + k0, BT, KT, BK), (kt * decay).to(KIND))
        tl.store(dense(qg + k0, BT, KT, BK), (qt * decay).to(KIND))
        tl.store(dense(kg + k0, BT, KT, BK), (kt * tl.exp2(last[None, :] - G)).to(KIND))
        tl.store(fade + tile * BK + k0 + tl.arange(0, KT), tl.exp2(last))
        scores_P, scores_A = add_scores(scores_P, scores_A, qt, kt, G, BT, KT, LEVELS, SUB, KIND, PRECISION)

    tl.store(dense(P + tile * BT * BT, BT, BT, BT), scores_P.to(KIND))
    inverse = unit_lower_inverse(scores_A * bt[:, None], BT, LOG_BT, PRECISION)
    if X is not None:
        tl.store(dense(X + tile * BT * BT, BT, BT, BT), inverse.to(KIND))
    inverse = (inverse * bt[None, :]).to(KIND)
    for v0 in range(0, VP, BV):
        value = load_rows(v + v0, v_t, left, V - v0, BT, BV, V == VP).to(KIND)
        tl.store(dense(u + v0, BT, BV, VP), tl.dot(inverse, value, input_precision=PRECISION).to(KIND))
    tl.debug_barrier()  # below, threads read what others of this program wrote above
    for k0 in range(0, BK, KT):
        decayed = tl.load(dense(w + k0, BT, KT, BK))
        tl.debug_barrier()
        tl.store(dense(w + k0, BT, KT, BK), tl.dot(inverse, decayed, input_precision=PRECISION).to(KIND))


@triton.jit
def scan_kernel(
    w, u, kg, qg, P, fade, initial, cu_seqlens, offsets,
    o, final, states, deltas,
    T, per_row, HV, parts,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VP: tl.constexpr,
    VARLEN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of BV value channels of one head through the chunks of one part of a sequence, state in registers.

    `initial` [N * parts, HV, V, K] or None. Each output may be None: o; final, the last state [N, HV, V, K]; states
    [NC, HV, BK, VP], what each chunk starts from, with deltas [NC, HV, BT, VP], both for the backward.
    """
    v0 = tl.program_id(0) % (VP // BV) * BV
    walker = tl.program_id(0) // (VP // BV)
    hv = walker % HV
    n = (walker // HV // parts).to(tl.int64)
    part = walker // HV % parts
    row, chunk, left, count = stretch(n, part, parts, T, per_row, cu_seqlens, offsets, BT, VARLEN)
    KIND = w.dtype.element_ty
    key = tl.arange(0, BK)
    value = v0 + tl.arange(0, BV)
    state = tl.zeros((BK, BV), tl.float32)
    at_state = value[None, :] * K + key[:, None]
    inside = (key[:, None] < K) & (value[None, :] < V)
    if initial is not None:
        state += tl.load(initial + ((n * parts + part) * HV + hv) * V * K + at_state, mask=inside, other=0.0)

    tile = chunk * HV + hv
    rows = tl.arange(0, BT)[:, None]
    wide = rows * BK + key[None, :]
    narrow = rows * VP + value[None, :]
    p_w = w + tile * BT * BK + wide
    p_kg = kg + tile * BT * BK + wide
    p_u = u + tile * BT * VP + narrow
    p_fade = fade + tile * BK + key
    if o is not None:
        p_qg = qg + tile * BT * BK + wide
        p_P = P + tile * BT * BT + rows * BT + tl.arange(0, BT)[None, :]
        p_o = o + (row * HV + hv) * V + rows * (HV * V) + value[None, :]
    if states is not None:
        p_states = states + tile * BK * VP + key[:, None] * VP + value[None, :]
        p_deltas = deltas + tile * BT * VP + narrow
    for _ in tl.range(0, count, num_stages=STAGES):
        start = state.to(KIND)
        delta = (tl.load(p_u).to(tl.float32) - tl.dot(tl.load(p_w), start, input_precision=PRECISION)).to(KIND)
        if o is not None:
            out = tl.dot(tl.load(p_qg), start, input_precision=PRECISION)
            out = tl.dot(tl.load(p_P), delta, out, input_precision=PRECISION)
            tl.store(p_o, out.to(o.dtype.element_ty), mask=(rows < left) & (value[None, :] < V))
            p_qg += HV * BT * BK
            p_P += HV * BT * BT
            p_o += BT * HV * V
        if states is not None:
            tl.store(p_states, start)
            tl.store(p_deltas, delta)
            p_states += HV * BK * VP
            p_deltas += HV * BT * VP
        state = tl.dot(tl.trans(tl.load(p_kg)), delta, state * tl.load(p_fade)[:, None], input_precision=PRECISION)
        p_w += HV * BT * BK
        p_kg += HV * BT * BK
        p_u += HV * BT * VP
        p_fade += HV * BK
        left -= BT
    if final is not None and part == parts - 1:
        tl.store(final + (n * HV + hv) * V * K + at_state, state, mask=inside)


@triton.jit
def summary_kernel(
    w, u, kg, fade, cu_seqlens, offsets,
    summary,
    T, per_row, HV, parts, first_tile,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VP: tl.constexpr,
    VARLEN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a part of a sequence does to any state: S_end = M S + S_ext (the product of its chunks' maps).

    Writes summary [N * parts, HV, VP + BK, BK], transposed: S_ext from a zero state, then M from the identity with all
    values zero. Per chunk of 64 rows at K = V = 128 it reads 48 KiB and does 8 MFLOP.
    """
    tiles = (VP + BK) // BV - first_tile
    c0 = (tl.program_id(0) % tiles + first_tile) * BV
    walker = tl.program_id(0) // tiles
    hv = walker % HV
    n = (walker // HV // parts).to(tl.int64)
    part = walker // HV % parts
    _, chunk, _, count = stretch(n, part, parts, T, per_row, cu_seqlens, offsets, BT, VARLEN)
    KIND = w.dtype.element_ty
    key = tl.arange(0, BK)
    column = c0 + tl.arange(0, BV)
    state = tl.where(column[None, :] - VP == key[:, None], 1.0, 0.0)
    tile = chunk * HV + hv
    rows = tl.arange(0, BT)[:, None]
    wide = rows * BK + key[None, :]
    p_w = w + tile * BT * BK + wide
    p_kg = kg + tile * BT * BK + wide
    p_u = u + tile * BT * VP + rows * VP + column[None, :]
    p_fade = fade + tile * BK + key
    for _ in tl.range(0, count, num_stages=STAGES):
        given = tl.load(p_u, mask=(column[None, :] < VP) & (rows >= 0), other=0.0).to(tl.float32)
        delta = (given - tl.dot(tl.load(p_w), state.to(KIND), input_precision=PRECISION)).to(KIND)
        state = tl.dot(tl.trans(tl.load(p_kg)), delta, state * tl.load(p_fade)[:, None], input_precision=PRECISION)
        p_w += HV * BT * BK
        p_kg += HV * BT * BK
        p_u += HV * BT * VP
        p_fade += HV * BK
    to = summary + ((n * parts + part) * HV + hv) * (VP + BK) * BK
    tl.store(to + column[None, :] * BK + key[:, None], state)
