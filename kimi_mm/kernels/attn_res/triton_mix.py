"""The kernels of attention over depth: every source row is read once, through its own pointer.

    forward    x_i = f.v_i r_i,  r_i = 1 / rms(v_i),  f = query * norm_weight;  h = sum_i softmax(x)_i v_i, online
    backward   c_i = v_i.dh,  s_i = p_i (c_i - sum_j p_j c_j)
               dv_i = p_i dh + s_i r_i (f - v_i r_i x_i / D),  df = sum over tokens and i of s_i r_i v_i
               which walks the sources twice, backwards the second time, when a token's rows are still cached

The first source may have a dtype of its own (an fp32 embedding before bf16 sublayer outputs). The others are picked
from a tuple of pointers, padded to a power of two, by a loop that does not depend on their number: few variants to
compile, no stacked copy, no table to upload. A row is CH chunks of BC channels, so that D need not be padded to a
power of two; the next rows are on their way to shared memory while one is worked on.

Bytes a token, b a number: forward b (n + 1) D; backward b (2 n + 1) D. FLOPs: about 6 n D and 12 n D.
Floor: the copy time of the bytes. At 8192 tokens of 2304 channels in bf16 on an H100: 0.125 ms forward and 0.237 ms
backward with 9 sources, 0.41 ms and 0.81 ms with 32.

Shapes:  R tokens  n sources  D channels  S queries, SB of them a program
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_row(base, row, live, D: tl.constexpr, BC: tl.constexpr, CH: tl.constexpr):
    """Row of D channels as CH chunks [BC], zeros past the end or where not live."""
    parts = ()
    for c in tl.static_range(CH):
        col = c * BC + tl.arange(0, BC)
        parts += (tl.load(base + row * D + col, mask=(col < D) & live, other=0.0),)
    return parts


@triton.jit
def store_row(base, row, live, parts, D: tl.constexpr, BC: tl.constexpr, CH: tl.constexpr):
    for c in tl.static_range(CH):
        col = c * BC + tl.arange(0, BC)
        tl.store(base + row * D + col, parts[c].to(base.dtype.element_ty), mask=(col < D) & live)


@triton.jit
def wide(parts, CH: tl.constexpr):
    """The chunks in fp32."""
    result = ()
    for c in tl.static_range(CH):
        result += (parts[c].to(tl.float32),)
    return result


@triton.jit
def zeros(BC: tl.constexpr, count: tl.constexpr):
    result = ()
    for _c in tl.static_range(count):
        result += (tl.zeros([BC], dtype=tl.float32),)
    return result


@triton.jit
def dot(a, b, CH: tl.constexpr, skip: tl.constexpr = 0):
    """a . b, with b's chunks from number `skip` on."""
    product = a[0] * b[skip]
    for c in tl.static_range(1, CH):
        product += a[c] * b[skip + c]
    return tl.sum(product, 0)


@triton.jit
def blend(a, alpha, b, beta, CH: tl.constexpr):
    """alpha a + beta b."""
    result = ()
    for c in tl.static_range(CH):
        result += (a[c] * alpha + b[c] * beta,)
    return result


@triton.jit
def times(a, b, CH: tl.constexpr):
    result = ()
    for c in tl.static_range(CH):
        result += (a[c] * b[c],)
    return result


@triton.jit
def scaled(a, alpha, CH: tl.constexpr):
    result = ()
    for c in tl.static_range(CH):
        result += (a[c] * alpha,)
    return result


@triton.jit
def inverse_rms(parts, eps, D: tl.constexpr, CH: tl.constexpr):
    return tl.rsqrt(dot(parts, parts, CH) / D + eps)


@triton.jit
def folded_queries(
    queries, norm_weights, first, live, D: tl.constexpr, BC: tl.constexpr, CH: tl.constexpr, SB: tl.constexpr
):  # fmt: skip
    """query * norm_weight of SB queries from number `first` on, SB * CH chunks."""
    folded = ()
    for s in tl.static_range(SB):
        query = wide(load_row(queries, first + s, live, D, BC, CH), CH)
        weight = wide(load_row(norm_weights, first + s, live, D, BC, CH), CH)
        folded += times(query, weight, CH)
    return folded


@triton.jit
def pick(pointers, index, ARITY: tl.constexpr):
    """pointers[index] for an index that is known at run time only."""
    chosen = pointers[0]
    for j in tl.static_range(1, ARITY):
        chosen = tl.where(index == j, pointers[j], chosen)
    return chosen


@triton.jit
def scores(parts, folded, inverse, CH: tl.constexpr, SB: tl.constexpr):
    """Logits of one source under SB queries."""
    result = ()
    for s in tl.static_range(SB):
        result += (dot(parts, folded, CH, s * CH) * inverse,)
    return result


@triton.jit
def merged(sums, peaks, totals, parts, logits, CH: tl.constexpr, SB: tl.constexpr):
    """One step of online softmax: sums of SB * CH chunks, SB maxima and SB sums of exponentials."""
    new_sums = ()
    new_peaks = ()
    new_totals = ()
    for s in tl.static_range(SB):
        peak = tl.maximum(peaks[s], logits[s])
        old = tl.exp(peaks[s] - peak)
        new = tl.exp(logits[s] - peak)
        for c in tl.static_range(CH):
            new_sums += (sums[s * CH + c] * old + parts[c] * new,)
        new_peaks += (peak,)
        new_totals += (totals[s] * old + new,)
    return new_sums, new_peaks, new_totals


@triton.jit(do_not_specialize=["R", "n", "steps", "programs"])
def mix_kernel(
    first, rest, queries, norm_weights, out_weight, out, hidden, kept, peaks, totals,
    R, n, steps, programs, eps, out_eps,
    D: tl.constexpr, BC: tl.constexpr, CH: tl.constexpr, SB: tl.constexpr, ARITY: tl.constexpr,
    NORM: tl.constexpr, KEEP: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Forward for `steps` tokens, `programs` apart, and SB queries.

    WHOLE: one query; writes h to `out`, or with NORM rms_norm(h) * out_weight; with KEEP also what backward needs:
    logits and inverse RMS to `kept` [2, R, n], and with NORM h to `hidden`. Else: SB unnormalised sums to `out`
    [S, R, D], with peaks and totals [S, R].
    """
    query = tl.program_id(1) * SB
    folded = folded_queries(queries, norm_weights, query, query >= 0, D, BC, CH, SB)
    for step in range(steps):
        row = tl.program_id(0).to(tl.int64) + step * programs
        live = row < R
        parts = wide(load_row(first, row, live, D, BC, CH), CH)
        inverse = inverse_rms(parts, eps, D, CH)
        tops = scores(parts, folded, inverse, CH, SB)
        if KEEP:
            tl.store(kept + row * n, tops[0], mask=live)
            tl.store(kept + (row + R) * n, inverse, mask=live)
        sums = ()
        counts = ()
        for s in tl.static_range(SB):
            sums += parts
            counts += (tops[s] * 0.0 + 1.0,)
        for i in tl.range(1, n, num_stages=STAGES):
            parts = wide(load_row(pick(rest, i - 1, ARITY), row, live, D, BC, CH), CH)
            inverse = inverse_rms(parts, eps, D, CH)
            found = scores(parts, folded, inverse, CH, SB)
            if KEEP:
                tl.store(kept + row * n + i, found[0], mask=live)
                tl.store(kept + (row + R) * n + i, inverse, mask=live)
            sums, tops, counts = merged(sums, tops, counts, parts, found, CH, SB)
        if WHOLE:
            h = scaled(sums, 1.0 / counts[0], CH)
            if NORM:
                if KEEP:
                    store_row(hidden, row, live, h, D, BC, CH)
                weight = wide(load_row(out_weight, row * 0, live, D, BC, CH), CH)
                h = times(scaled(h, inverse_rms(h, out_eps, D, CH), CH), weight, CH)
            store_row(out, row, live, h, D, BC, CH)
        else:
            for s in tl.static_range(SB):
                at = (query + s).to(tl.int64) * R + row
                for c in tl.static_range(CH):
                    col = c * BC + tl.arange(0, BC)
                    tl.store(out + at * D + col, sums[s * CH + c], mask=(col < D) & live)
                tl.store(peaks + at, tops[s], mask=live)
                tl.store(totals + at, counts[s], mask=live)


@triton.jit
def at_index(values, index, NP: tl.constexpr):
    """values[index] of a tensor [NP]."""
    return tl.sum(tl.where(tl.arange(0, NP) == index, values, 0.0), 0)


@triton.jit(do_not_specialize=["R", "n", "steps", "programs"])
def mix_backward_kernel(
    d_out, first, rest, query, norm_weight, out_weight, hidden, kept, d_first, d_rest, partial,
    R, n, steps, programs, out_eps,
    D: tl.constexpr, BC: tl.constexpr, CH: tl.constexpr, ARITY: tl.constexpr, NP: tl.constexpr, NORM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Backward for `steps` tokens, `programs` apart; their part of df, and with NORM of out_weight's gradient."""
    pid = tl.program_id(0).to(tl.int64)
    folded = folded_queries(query, norm_weight, pid * 0, pid >= 0, D, BC, CH, 1)
    d_folded = zeros(BC, CH)
    d_weight = zeros(BC, CH)
    number = tl.arange(0, NP)
    for step in range(steps):
        row = pid + step * programs
        live = row < R
        dh = wide(load_row(d_out, row, live, D, BC, CH), CH)
        x = tl.load(kept + row * n + number, mask=(number < n) & live, other=float("-inf"))
        x = tl.where(live, x, 0.0)
        r = tl.load(kept + (row + R) * n + number, mask=(number < n) & live, other=0.0)
        p = tl.exp(x - tl.max(x, 0))
        p = p / tl.sum(p, 0)
        if NORM:
            h = wide(load_row(hidden, row, live, D, BC, CH), CH)
            weight = wide(load_row(out_weight, row * 0, live, D, BC, CH), CH)
            inverse = inverse_rms(h, out_eps, D, CH)
            h = scaled(h, inverse, CH)
            d_weight = blend(d_weight, 1.0, times(dh, h, CH), 1.0, CH)
            dh = times(dh, weight, CH)
            dh = blend(dh, inverse, h, -inverse * dot(dh, h, CH) / D, CH)
        parts = wide(load_row(first, row, live, D, BC, CH), CH)
        c = tl.where(number == 0, dot(parts, dh, CH), 0.0)
        for i in tl.range(1, n, num_stages=STAGES):
            parts = wide(load_row(pick(rest, i - 1, ARITY), row, live, D, BC, CH), CH)
            c = tl.where(number == i, dot(parts, dh, CH), c)
        s = p * (c - tl.sum(p * c, 0)) * r
        curl = tl.where(number < n, x, 0.0) * r / D  # v's own factor inside the bracket of dv
        for back in tl.range(1, n, num_stages=STAGES):
            i = n - back
            parts = wide(load_row(pick(rest, i - 1, ARITY), row, live, D, BC, CH), CH)
            s_i = at_index(s, i, NP)
            dv = blend(folded, s_i, dh, at_index(p, i, NP), CH)
            dv = blend(dv, 1.0, parts, -s_i * at_index(curl, i, NP), CH)
            store_row(pick(d_rest, i - 1, ARITY), row, live, dv, D, BC, CH)
            d_folded = blend(d_folded, 1.0, parts, s_i, CH)
        parts = wide(load_row(first, row, live, D, BC, CH), CH)
        s_i = at_index(s, 0, NP)
        dv = blend(folded, s_i, dh, at_index(p, 0, NP), CH)
        dv = blend(dv, 1.0, parts, -s_i * at_index(curl, 0, NP), CH)
        store_row(d_first, row, live, dv, D, BC, CH)
        d_folded = blend(d_folded, 1.0, parts, s_i, CH)
    store_row(partial, pid, pid >= 0, d_folded, D, BC, CH)
    if NORM:
        store_row(partial, pid + tl.num_programs(0), pid >= 0, d_weight, D, BC, CH)


@triton.jit(do_not_specialize=["programs"])
def sum_partials_kernel(
    partial, query, norm_weight, d_query, d_norm_weight, d_out_weight, programs, D,
    BR: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters from the programs' parts [1 or 2, programs, D]."""
    col = tl.program_id(0) * BD + tl.arange(0, BD)
    folded = column_sums(partial, programs, D, col, BR, BD)
    q = tl.load(query + col, mask=col < D, other=0.0).to(tl.float32)
    w = tl.load(norm_weight + col, mask=col < D, other=0.0).to(tl.float32)
    tl.store(d_query + col, (folded * w).to(d_query.dtype.element_ty), mask=col < D)
    tl.store(d_norm_weight + col, (folded * q).to(d_norm_weight.dtype.element_ty), mask=col < D)
    if NORM:
        d_out = column_sums(partial + programs * D, programs, D, col, BR, BD)
        tl.store(d_out_weight + col, d_out.to(d_out_weight.dtype.element_ty), mask=col < D)


@triton.jit
def column_sums(partial, programs, D, col, BR: tl.constexpr, BD: tl.constexpr):
    total = tl.zeros([BR, BD], dtype=tl.float32)
    for step in range(tl.cdiv(programs, BR)):
        row = step * BR + tl.arange(0, BR)[:, None]
        total += tl.load(partial + row * D + col[None, :], mask=(row < programs) & (col < D)[None, :], other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["R"])
def finish_kernel(
    mixed, peaks, totals, last, query, norm_weight, out_weight, out, R, eps, out_eps,
    D: tl.constexpr, BC: tl.constexpr, CH: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Merges the partial sum of the open block into sums, maxima and totals; `last` None: only divides."""
    row = tl.program_id(0).to(tl.int64)
    live = row < R
    sums = load_row(mixed, row, live, D, BC, CH)
    total = tl.load(totals + row)
    if last is not None:
        parts = wide(load_row(last, row, live, D, BC, CH), CH)
        folded = folded_queries(query, norm_weight, row * 0, live, D, BC, CH, 1)
        logit = dot(parts, folded, CH) * inverse_rms(parts, eps, D, CH)
        peak = tl.load(peaks + row)
        top = tl.maximum(peak, logit)
        old = tl.exp(peak - top)
        new = tl.exp(logit - top)
        total = old * total + new
        sums = blend(sums, old, parts, new, CH)
    h = scaled(sums, 1.0 / total, CH)
    if NORM:
        weight = wide(load_row(out_weight, row * 0, live, D, BC, CH), CH)
        h = times(scaled(h, inverse_rms(h, out_eps, D, CH), CH), weight, CH)
    store_row(out, row, live, h, D, BC, CH)
