"""What the chunk kernels of KDA share: where a chunk lies, its gate, its decay factors, its triangular inverse.

A chunk is BT rows of one sequence and one value head. All of it stays in two-dimensional register tiles of BT rows,
which is what the tensor cores of a Hopper chip want, so anything about smaller blocks is said with masks:

    span s     pairs (row i, column j) with i in the upper and j in the lower half of the same aligned block of s rows
    spans      BT, BT/2, .. 2 and the diagonal cover the lower triangle without overlap
    factor     exp(-|G_i - G_anchor|), anchor the last row of the lower half: every exponent is at or below zero

The factor of a span serves upper rows and lower columns alike, so a span costs one exponential per element and one
product per score matrix. A bounded gate stops at blocks of 16 rows, whose diagonal takes an anchor in the middle
(at most exp(40) on either side); an unbounded gate goes down to pairs of rows. Decays are kept in base 2.

Shapes:  BT chunk rows,  BK, BV padded key and value channels (powers of two),  G running log2-decay of the chunk.
"""

# pyright: reportGeneralTypeIssues=false
# (calling a jitted function from another one looks like a call from Python, which never returns)
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
L2_EPS = tl.constexpr(1e-6)
GIVEN = tl.constexpr(0)
BOUNDED = tl.constexpr(1)
SOFTPLUS = tl.constexpr(2)
GATE_CODES = {"given": 0, "bounded": 1, "softplus": 2}


@triton.jit
def place(chunk, T, per_row, cu_seqlens, lengths, offsets, owner, BT: tl.constexpr, VARLEN: tl.constexpr):
    """Returns batch row, first row, end of the valid rows, end of the rows to write; first is -1 for a spare chunk."""
    if VARLEN:
        n = tl.load(owner + chunk)
        known = tl.maximum(n, 0)
        begin = tl.load(cu_seqlens + known).to(tl.int32)
        end = tl.load(cu_seqlens + known + 1).to(tl.int32)
        first = begin + (chunk - tl.load(offsets + known)) * BT
        return n * 0, tl.where(n < 0, -1, first), end, end
    else:
        b = chunk // per_row
        end = T
        if lengths is not None:
            end = tl.minimum(tl.load(lengths + b).to(tl.int32), T)
        return b, (chunk % per_row) * BT, end, T


@triton.jit
def stretch(n, part, parts, T, per_row, cu_seqlens, offsets, BT: tl.constexpr, VARLEN: tl.constexpr):
    """The chunks of sequence n that are part `part` of `parts`: their first row and chunk, rows left, and number."""
    if VARLEN:
        row = tl.load(cu_seqlens + n).to(tl.int64)
        length = tl.load(cu_seqlens + n + 1).to(tl.int32) - row.to(tl.int32)
        chunk = tl.load(offsets + n).to(tl.int64)
        count = (length + BT - 1) // BT
    else:
        row = n * T
        length = T
        chunk = n * per_row
        count = per_row
    each = (count + parts - 1) // parts
    skipped = part * each
    return row + skipped * BT, chunk + skipped, length - skipped * BT, tl.maximum(tl.minimum(count - skipped, each), 0)


@triton.jit
def row_tile(base, stride, left, width, BT: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr):
    """Pointers and mask of a [BT, BD] tile: rows before `left`, columns before `width`; EVEN: all of them."""
    row = tl.arange(0, BT)[:, None]
    col = tl.arange(0, BD)[None, :]
    at = base + row * stride + col
    if EVEN:
        return at, (row < left) & (col >= 0)
    else:
        return at, (row < left) & (col < width)


@triton.jit
def load_rows(base, stride, left, width, BT: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr):
    at, mask = row_tile(base, stride, left, width, BT, BD, EVEN)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def store_rows(base, stride, left, width, tile, BT: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr):
    at, mask = row_tile(base, stride, left, width, BT, BD, EVEN)
    tl.store(at, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def dense(base, ROWS: tl.constexpr, COLS: tl.constexpr, STRIDE: tl.constexpr):
    """Pointers of a [ROWS, COLS] tile in a dense workspace."""
    return base + tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, COLS)[None, :]


@triton.jit
def inverse_norm(
    x, stride, left, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, KT: tl.constexpr, NORM: tl.constexpr
):
    """1 / |x| for each row of K channels, or ones; [BT]."""
    if NORM:
        total = tl.zeros((BT,), tl.float32)
        for k0 in range(0, BK, KT):
            tile = load_rows(x + k0, stride, left, K - k0, BT, KT, K == BK).to(tl.float32)
            total += tl.sum(tile * tile, 1)
        return tl.rsqrt(total + L2_EPS)
    else:
        return tl.full((BT,), 1.0, tl.float32)


@triton.jit
def gate_logits(raw, dt_bias, width, BD: tl.constexpr, EVEN: tl.constexpr):
    z = raw.to(tl.float32)
    if dt_bias is not None:
        col = tl.arange(0, BD)
        if EVEN:
            z += tl.load(dt_bias + col).to(tl.float32)[None, :]
        else:
            z += tl.load(dt_bias + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def gate_rate(A_log, hv):
    if A_log is not None:
        return tl.exp(tl.load(A_log + hv).to(tl.float32))
    else:
        return 1.0


@triton.jit
def log_decay(z, rate, lower, GATE: tl.constexpr):
    """Natural log-decay of logits: itself, lower * sigmoid(rate z), or -rate * softplus(z)."""
    if GATE == BOUNDED:
        return lower * tl.sigmoid(z * rate)
    elif GATE == SOFTPLUS:
        return -rate * (tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z))))
    else:
        return z


@triton.jit
def running_decay(
    g, stride, left, width, dt_bias, rate, lower, BT: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr,
    GATE: tl.constexpr,
):  # fmt: skip
    """G [BT, BD], inclusive sum of the log2-decay; rows past the end and channels past `width` do not decay."""
    at, mask = row_tile(g, stride, left, width, BT, BD, EVEN)
    z = gate_logits(tl.load(at, mask=mask, other=0.0), dt_bias, width, BD, EVEN)
    if GATE == BOUNDED:
        decay = log_decay(z, rate, lower * LOG2E, GATE)
    else:
        decay = log_decay(z, rate, lower, GATE) * LOG2E
    return tl.cumsum(tl.where(mask, decay, 0.0), 0)


@triton.jit
def last_row(G, BT: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BT)[:, None] == BT - 1, G, 0.0), 0)


@triton.jit
def load_beta(beta, stride, left, BT: tl.constexpr, SIGMOID: tl.constexpr):
    row = tl.arange(0, BT)
    b = tl.load(beta + row * stride, mask=row < left, other=0.0).to(tl.float32)
    if SIGMOID:
        b = tl.where(row < left, tl.sigmoid(b), 0.0)
    return b


@triton.jit
def anchored(G, SPAN: tl.constexpr, PICK: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """G minus its value at row PICK of each aligned block of SPAN rows; [BT / SPAN, SPAN, BK]."""
    blocks = tl.reshape(G, (BT // SPAN, SPAN, BK))
    row = tl.arange(0, SPAN)[None, :, None]
    return blocks - tl.sum(tl.where(row == PICK, blocks, 0.0), 1)[:, None, :]


@triton.jit
def span_factor(G, SPAN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    away = anchored(G, SPAN, SPAN // 2 - 1, BT, BK)
    lower_half = tl.arange(0, SPAN)[None, :, None] < SPAN // 2
    return tl.reshape(tl.exp2(tl.where(lower_half, -away, away)), (BT, BK))


@triton.jit
def span_mask(SPAN: tl.constexpr, BT: tl.constexpr):
    i = tl.arange(0, BT)[:, None]
    j = tl.arange(0, BT)[None, :]
    return (i // SPAN == j // SPAN) & (i % SPAN >= SPAN // 2) & (j % SPAN < SPAN // 2)


@triton.jit
def diagonal_mask(SUB: tl.constexpr, BT: tl.constexpr):
    """Pairs i >= j inside the same aligned block of SUB rows."""
    i = tl.arange(0, BT)[:, None]
    j = tl.arange(0, BT)[None, :]
    return (i // SUB == j // SUB) & (i >= j)


@triton.jit
def unit_lower_inverse(L, BT: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)^-1 for strictly lower L [BT, BT], BT = 2^LEVELS.

    Neighbouring inverted blocks A, B are joined by the corner -B L_21 A, from single rows up to the whole. Every
    factor is an inverse with small entries, so equal consecutive keys cost no digits, as powers of L would.
    """
    i = tl.arange(0, BT)[:, None]
    j = tl.arange(0, BT)[None, :]
    X = tl.where(i == j, 1.0, 0.0) - tl.where(span_mask(2, BT), L, 0.0)
    for level in tl.static_range(2, LEVELS + 1):
        corner = tl.where(span_mask(2**level, BT), L, 0.0)
        X -= tl.dot(X, tl.dot(corner, X, input_precision=PRECISION), input_precision=PRECISION)
    return X
