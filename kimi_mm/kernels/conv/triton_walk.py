"""The kernels of the short convolution: rows of all sequences form one list, programs take runs of it.

A program holds BC channels and walks along its rows with the last W - 1 inputs in registers, so that x is read once.
Backward computes z again on the way; a row of dx is complete W - 1 rows later, until then its sum waits in registers.
Which sequence a row belongs to is a matter of scalars: packed, padded and plain batches run the same code.

Shapes:  T time  C channels  W kernel width  N sequences  R rows (batch * T)
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "N", "steps"])
def sequence_kernel(cu_seqlens, sequence, T, N, steps, BLOCK: tl.constexpr):
    """The last sequence that starts at or before each row, by bisection: empty ones before it are passed over."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], dtype=tl.int32)
    high = tl.zeros([BLOCK], dtype=tl.int32) + N
    for _ in range(steps):
        middle = (low + high) // 2
        right = tl.load(cu_seqlens + middle) <= row
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    tl.store(sequence + row, low, mask=row < T)


@triton.jit
def place_of(row, known, sequence, cu_seqlens, lengths, T):
    """Sequence of a row (rows past the end: that of the last), its first row, and the end of its valid rows."""
    row = tl.maximum(tl.minimum(row, known - 1), 0)
    if sequence is not None:
        n = tl.load(sequence + row)
    else:
        n = row // T
    start, end = span_of(n, cu_seqlens, lengths, T)
    return n, start, end


@triton.jit
def span_of(n, cu_seqlens, lengths, T):
    """First row of a sequence and the end of its valid rows."""
    if cu_seqlens is not None:
        return tl.load(cu_seqlens + n).to(tl.int32), tl.load(cu_seqlens + n + 1).to(tl.int32)
    else:
        length = T
        if lengths is not None:
            length = tl.load(lengths + n).to(tl.int32)
        return n * T, n * T + length


@triton.jit
def load_row(base, row, low, high, c, C):
    """The row [BC], zeros outside [low, high)."""
    mask = (c < C) & (row >= low) & (row < high)
    return tl.load(base + row.to(tl.int64) * C + c, mask=mask, other=0.0)


@triton.jit
def weight_columns(weight, c, C, W: tl.constexpr):
    """The W columns of the weight, [BC] each."""
    columns = ()
    for j in tl.static_range(W):
        columns += (tl.load(weight + c * W + j, mask=c < C, other=0.0).to(tl.float32),)
    return columns


@triton.jit
def zero_sums(count: tl.constexpr, BC: tl.constexpr):
    sums = ()
    for _j in tl.static_range(count):
        sums += (tl.zeros([BC], dtype=tl.float32),)
    return sums


@triton.jit
def all_but_first(window, count: tl.constexpr):
    """All but the first of `count` tensors."""
    rest = ()
    for j in tl.static_range(1, count):
        rest += (window[j],)
    return rest


@triton.jit
def window_before(x, past, n, row, start, c, C, W: tl.constexpr):
    """The W - 1 raw inputs before `row` of the sequence n that starts at `start`, oldest first."""
    window = ()
    for j in tl.static_range(W - 1):
        at = row - (W - 1 - j)
        value = load_row(x, at, start, row, c, C).to(tl.float32)
        if past is not None:
            kept = load_row(past, (n + 1) * (W - 1) + at - start, n * (W - 1), (n + 1) * (W - 1), c, C)
            value += kept.to(tl.float32)
        window += (value,)
    return window


@triton.jit
def renewed(window, past, n, fresh, c, C, W: tl.constexpr):
    """The window, or at the first row of a sequence its past."""
    renewed = ()
    for j in tl.static_range(W - 1):
        value = tl.where(fresh, 0.0, window[j])
        if past is not None:
            at = past + (n.to(tl.int64) * (W - 1) + j) * C + c
            value += tl.load(at, mask=(c < C) & fresh, other=0.0).to(tl.float32)
        renewed += (value,)
    return renewed


@triton.jit
def convolve(w, window, W: tl.constexpr):
    z = w[0] * window[0]
    for j in tl.static_range(1, W):
        z += w[j] * window[j]
    return z


@triton.jit
def silu_slope(dy, z):
    """Gradient through SiLU."""
    s = tl.sigmoid(z)
    return dy * s * (1.0 + z * (1.0 - s))


@triton.jit
def weight_sums(dw, dz, window, W: tl.constexpr):
    sums = ()
    for j in tl.static_range(W):
        sums += (dw[j] + dz * window[j],)
    return sums


@triton.jit
def reach_back(pending, w, dz, local, W: tl.constexpr, CROSS: tl.constexpr):
    """Sums for the rows W - 1 to 0 before this one, which is row `local` of its sequence, with its share added."""
    sums = ()
    for j in tl.static_range(W - 1):
        share = w[j] * dz
        if CROSS:
            share = tl.where(local >= W - 1 - j, share, 0.0)
        sums += (pending[j] + share,)
    sums += (w[W - 1] * dz,)
    return sums


@triton.jit
def forward_rows(
    y, rows, window, w, past, sequence, cu_seqlens, base, R, T, c, C,
    W: tl.constexpr, ROWS: tl.constexpr, CROSS: tl.constexpr,
):  # fmt: skip
    """Writes ROWS rows of y from `base` on and returns the window after them; CROSS: a sequence starts among them."""
    for i in tl.static_range(ROWS):
        row = base + i
        if CROSS:
            n, start, _end = place_of(row, R, sequence, cu_seqlens, None, T)
            window = renewed(window, past, n, row == start, c, C, W)
        window += (rows[i].to(tl.float32),)
        z = convolve(w, window, W)
        window = all_but_first(window, W)
        at = y + row.to(tl.int64) * C + c
        tl.store(at, (z * tl.sigmoid(z)).to(y.dtype.element_ty), mask=(c < C) & (row < R))
    return window


@triton.jit(do_not_specialize=["R", "T", "runs", "steps"])
def forward_kernel(
    x, weight, past, sequence, cu_seqlens, lengths, y, final, R, T, C, runs, steps,
    W: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y = silu(conv(x)), `steps` times ROWS rows a program; programs beyond `runs` copy the final states."""
    columns = tl.cdiv(C, BC)
    run = tl.program_id(0) // columns
    c = (tl.program_id(0) % columns) * BC + tl.arange(0, BC)
    if run < runs:
        first = run * steps * ROWS
        w = weight_columns(weight, c, C, W)
        n, start, _end = place_of(first, R, sequence, cu_seqlens, None, T)
        window = window_before(x, past, n, first, start, c, C, W)
        for step in range(steps):
            base = first + step * ROWS
            rows = ()
            for i in tl.static_range(ROWS):
                rows += (load_row(x, base + i, 0, R, c, C),)
            n, start, _end = place_of(base + ROWS - 1, R, sequence, cu_seqlens, None, T)
            if start >= base:
                window = forward_rows(
                    y, rows, window, w, past, sequence, cu_seqlens, base, R, T, c, C, W, ROWS, True
                )  # fmt: skip
            else:
                window = forward_rows(
                    y, rows, window, w, past, sequence, cu_seqlens, base, R, T, c, C, W, ROWS, False
                )  # fmt: skip
    else:
        n = run - runs
        start, end = span_of(n, cu_seqlens, lengths, T)
        held = window_before(x, past, n, end, start, c, C, W)
        for i in tl.static_range(W - 1):
            at = final + (n.to(tl.int64) * (W - 1) + i) * C + c
            tl.store(at, held[i].to(final.dtype.element_ty), mask=c < C)


@triton.jit
def backward_rows(
    dx, dfinal, rows, slopes, window, pending, dw, w, past, sequence, cu_seqlens, lengths,
    base, first, last, R, T, c, C,
    W: tl.constexpr, ROWS: tl.constexpr, CROSS: tl.constexpr,
):  # fmt: skip
    """Walks ROWS rows from `base` on; CROSS: a sequence starts among them or less than W - 1 rows before.

    Writes the rows of dx that became complete, those in [first, last), and returns window, pending sums and dw.
    """
    for i in tl.static_range(ROWS):
        row = base + i
        local = row
        if CROSS:
            n, start, _end = place_of(row, R, sequence, cu_seqlens, None, T)
            local = row - start
            window = renewed(window, past, n, local == 0, c, C, W)
        window += (rows[i].to(tl.float32),)
        dz = silu_slope(slopes[i].to(tl.float32), convolve(w, window, W))
        dw = weight_sums(dw, tl.where(row < last, dz, 0.0), window, W)
        window = all_but_first(window, W)
        ripe = reach_back(pending, w, dz, local, W, CROSS)
        pending = all_but_first(ripe, W)
        done = ripe[0]
        back = row - (W - 1)
        inside = (back >= first) & (back < last)
        if dfinal is not None:
            n_back, _start_back, end_back = place_of(back, R, sequence, cu_seqlens, lengths, T)
            held = inside & (back >= end_back - (W - 1)) & (back < end_back)
            at = dfinal + (n_back.to(tl.int64) * (W - 1) + (back - end_back + W - 1)) * C + c
            done += tl.load(at, mask=(c < C) & held, other=0.0).to(tl.float32)
        tl.store(dx + back.to(tl.int64) * C + c, done.to(dx.dtype.element_ty), mask=(c < C) & inside)
    return window, pending, dw


@triton.jit(do_not_specialize=["R", "T", "steps"])
def backward_kernel(
    dy, dfinal, x, weight, past, sequence, cu_seqlens, lengths, dx, partial, R, T, C, steps,
    W: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx of `steps` times ROWS rows, and their part of the weight's gradient [C, W]."""
    columns = tl.cdiv(C, BC)
    run = tl.program_id(0) // columns
    c = (tl.program_id(0) % columns) * BC + tl.arange(0, BC)
    w = weight_columns(weight, c, C, W)
    first = run * steps * ROWS
    last = tl.minimum(first + steps * ROWS, R)
    n, start, _end = place_of(first, R, sequence, cu_seqlens, None, T)
    window = window_before(x, past, n, first, start, c, C, W)
    dw = zero_sums(W, BC)
    pending = zero_sums(W - 1, BC)
    for step in range(steps + (W - 1 + ROWS - 1) // ROWS):
        base = first + step * ROWS
        rows = ()
        slopes = ()
        for i in tl.static_range(ROWS):
            rows += (load_row(x, base + i, 0, R, c, C),)
            slopes += (load_row(dy, base + i, 0, R, c, C),)
        n, start, _end = place_of(base + ROWS - 1, R, sequence, cu_seqlens, None, T)
        if start > base - (W - 1):
            window, pending, dw = backward_rows(
                dx, dfinal, rows, slopes, window, pending, dw, w, past, sequence, cu_seqlens, lengths,
                base, first, last, R, T, c, C, W, ROWS, True,
            )  # fmt: skip
        else:
            window, pending, dw = backward_rows(
                dx, dfinal, rows, slopes, window, pending, dw, w, past, sequence, cu_seqlens, lengths,
                base, first, last, R, T, c, C, W, ROWS, False,
            )  # fmt: skip
    for j in tl.static_range(W):
        tl.store(partial + (run.to(tl.int64) * C + c) * W + j, dw[j], mask=c < C)


@triton.jit(do_not_specialize=["T"])
def past_kernel(
    dy, dfinal, x, weight, past, cu_seqlens, lengths, dpast, T, C, W: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Gradient of the past rows of one sequence: through its first W - 1 rows, and where the final state holds them."""
    n = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    start, end = span_of(n, cu_seqlens, None, T)
    start, valid = span_of(n, cu_seqlens, lengths, T)
    w = weight_columns(weight, c, C, W)
    before = window_before(x, past, n, start, start, c, C, W)
    for p in tl.static_range(W - 1):
        value = tl.zeros([BC], dtype=tl.float32)
        window = before
        for i in tl.static_range(p + 1):  # row start + i reads past row p through the weight's column p - i
            window += (load_row(x, start + i, start, end, c, C).to(tl.float32),)
            dz = load_row(dy, start + i, start, end, c, C).to(tl.float32)
            dz = silu_slope(dz, convolve(w, window, W))
            window = all_but_first(window, W)
            value += w[p - i] * dz
        if dfinal is not None:  # final row i holds past row p when valid - start rows lie between
            i = p - (valid - start)
            at = dfinal + (n.to(tl.int64) * (W - 1) + i) * C + c
            value += tl.load(at, mask=(c < C) & (i >= 0), other=0.0).to(tl.float32)
        tl.store(dpast + (n.to(tl.int64) * (W - 1) + p) * C + c, value.to(dpast.dtype.element_ty), mask=c < C)
