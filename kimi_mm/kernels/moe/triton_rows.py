"""Kernels that move rows between token order and expert order, without a sort and without atomics.

    indices ─► counts per program ─► places (counting sort, stable) ─► rows in expert order ─► sums in token order

A routed row r = token * k + j gets the place `slots[r]`; `source[slots[r]] = r`. Rows of expert e lie in
[ends[e - 1], ends[e]). `tiles` lists the experts of all tiles of `rows` rows, then their first rows, then the ends of
their experts, and last how many tiles are live; those that the bound on their number allows but the loads do not need
have expert -1.

Bytes: places 16 R + 4 E per program; `gather_rows` and `sum_rows` one read and one write of what they move.
Floor: the copy time of those bytes.

Shapes:  N tokens  k experts per token  R = N * k routed rows  E experts  D width  I expert width
"""

# A type checker takes kernels for Python functions and does not know what a launch adds to their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_mm.kernels.launch import on_device

CONFIGS = {
    "place": {"elements": 2048, "programs": 256, "num_warps": 8},
    "gather": {"rows": 4, "num_warps": 4},
    "sum": {"rows": 4, "num_warps": 4},
    "swiglu": {"rows": 4, "num_warps": 4},
}


class Places(NamedTuple):
    """Where every routed row goes; see the top of this file."""

    slots: Tensor  # [R] int32
    source: Tensor  # [R] int32
    ends: Tensor  # [E] int32
    tiles: Tensor  # [3 * tiles + 1] int32

    @property
    def num_tiles(self) -> int:
        """Tiles there may be; the last number of `tiles` says how many there are."""
        return self.tiles.shape[0] // 3


def tile_bound(R: int, E: int, rows: int) -> int:
    """Most tiles of `rows` rows that R rows spread over E experts can need."""
    return R // rows + min(E, R)


def place_rows(indices: Tensor, E: int, rows: int) -> Places:
    """Counting sort of the routed rows by expert. indices [N, k] int64, all in [0, E)."""
    R = indices.numel()
    config = CONFIGS["place"]
    E_PAD = triton.next_power_of_2(E)
    BLOCK = max(1, config["elements"] // E_PAD)
    steps = triton.cdiv(triton.cdiv(R, BLOCK), config["programs"])  # blocks a program walks through
    programs = triton.cdiv(R, BLOCK * steps)
    new = {"dtype": torch.int32, "device": indices.device}
    counts = torch.empty(programs, E_PAD, **new)
    slots, source = torch.empty(R, **new), torch.empty(R, **new)
    ends, tiles = torch.empty(E, **new), torch.empty(3 * tile_bound(R, E, rows) + 1, **new)
    sizes = {"STEPS": steps, "BLOCK": BLOCK, "E_PAD": E_PAD, "num_warps": config["num_warps"]}
    with on_device(indices):
        _count_kernel[(programs,)](indices, counts, R, **sizes)
        _place_kernel[(programs,)](
            indices,
            counts,
            slots,
            source,
            ends,
            tiles,
            R,
            E,
            programs,
            tiles.shape[0] // 3,
            TILE=rows,
            WALK=BLOCK,
            **sizes,
        )
    return Places(slots, source, ends, tiles)


def gather_rows(x: Tensor, source: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """Rows of x [N, D] in expert order, [R, D] in `dtype`."""
    R, D = source.shape[0], x.shape[1]
    out = torch.empty(R, D, dtype=dtype, device=x.device)
    config, BLOCK = CONFIGS["gather"], _columns(D)
    with on_device(x):
        _gather_kernel[(triton.cdiv(R, config["rows"]), triton.cdiv(D, BLOCK))](
            x, source, out, R, D, K=k, ROWS=config["rows"], BLOCK=BLOCK, num_warps=config["num_warps"]
        )
    return out


def sum_rows(
    rows: Tensor,
    slots: Tensor,
    k: int,
    dtype: torch.dtype,
    parts: Tensor | None = None,
    totals: Tensor | None = None,
) -> Tensor:
    """Adds the k rows of every token, in fp32.

    Args:
        rows: [R, D], in expert order. slots: [R]. dtype: of the result.
        parts: [P, R] fp32, in expert order; their sums over P go to `totals` [N, k], in token order.

    Returns:
        [N, D] in `dtype`.
    """
    D = rows.shape[1]
    N = slots.shape[0] // k
    out = torch.empty(N, D, dtype=dtype, device=rows.device)
    config, BLOCK = CONFIGS["sum"], _columns(D)
    with on_device(rows):
        _sum_kernel[(triton.cdiv(N, config["rows"]), triton.cdiv(D, BLOCK))](
            rows,
            slots,
            out,
            parts,
            totals,
            N,
            D,
            K=k,
            PARTS=0 if parts is None else parts.shape[0],
            ROWS=config["rows"],
            BLOCK=BLOCK,
            num_warps=config["num_warps"],
        )
    return out


def swiglu(gate_up: Tensor, weights: Tensor, source: Tensor) -> Tensor:
    """Weighted hidden rows w * silu(gate) * up: gate_up [R, 2 * I], weights [N, k] -> [R, I]."""
    R, I = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(R, I)
    config, BLOCK = CONFIGS["swiglu"], _columns(I)
    with on_device(gate_up):
        _swiglu_kernel[(triton.cdiv(R, config["rows"]), triton.cdiv(I, BLOCK))](
            gate_up, weights, source, out, R, I, ROWS=config["rows"], BLOCK=BLOCK, num_warps=config["num_warps"]
        )
    return out


def swiglu_backward(dhidden: Tensor, gate_up: Tensor, weights: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up [R, 2 * I], the weighted hidden rows again [R, I], and those of the weights [N, k]."""
    R, I = dhidden.shape
    dgate_up, hidden = torch.empty_like(gate_up), torch.empty_like(dhidden)
    dweights = torch.empty_like(weights)
    with on_device(dhidden):
        _swiglu_backward_kernel[(R,)](
            dhidden,
            gate_up,
            weights,
            source,
            dgate_up,
            hidden,
            dweights,
            I,
            BLOCK=min(1024, triton.next_power_of_2(I)),
            num_warps=CONFIGS["swiglu"]["num_warps"],
        )
    return dgate_up, hidden, dweights


def _columns(D: int) -> int:
    """The widest column block, of 64 to 512, that wastes no more than an eighth of its lanes."""
    fitting = (block for block in (512, 256, 128) if D % 8 == 0 and triton.cdiv(D, block) * block <= 1.125 * D)
    return next(fitting, 64)


@triton.jit
def _count_kernel(indices, counts, R, STEPS: tl.constexpr, BLOCK: tl.constexpr, E_PAD: tl.constexpr):
    """counts [programs, E_PAD]: how many rows of its own stretch each program sends to each expert."""
    program = tl.program_id(0)
    experts = tl.arange(0, E_PAD)
    total = tl.zeros((E_PAD,), tl.int32)
    for step in range(STEPS):
        r = (program * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        e = tl.load(indices + r, mask=r < R, other=-1).to(tl.int32)
        total += tl.sum((e[:, None] == experts[None, :]).to(tl.int32), 0)
    tl.store(counts + program * E_PAD + experts, total)


@triton.jit
def _place_kernel(
    indices,
    counts,
    slots,
    source,
    ends,
    tiles,
    R,
    E,
    programs,
    num_tiles,
    TILE: tl.constexpr,
    WALK: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    E_PAD: tl.constexpr,
):
    """Every program sums the counts of all programs, and those before it, and so knows its first place per expert."""
    program = tl.program_id(0)
    experts = tl.arange(0, E_PAD)
    total = tl.zeros((E_PAD,), tl.int32)
    before = tl.zeros((E_PAD,), tl.int32)
    for first in range(0, programs, WALK):
        p = first + tl.arange(0, WALK)[:, None]
        count = tl.load(counts + p * E_PAD + experts[None, :], mask=p < programs, other=0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where(p < program, count, 0), 0)
    end = tl.cumsum(total, 0)
    free = end - total + before
    for step in range(STEPS):
        r = (program * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        e = tl.load(indices + r, mask=r < R, other=-1).to(tl.int32)
        mine = (e[:, None] == experts[None, :]).to(tl.int32)
        slot = tl.sum(mine * (free[None, :] + tl.cumsum(mine, 0) - mine), 1)
        tl.store(slots + r, slot, mask=r < R)
        tl.store(source + slot, r, mask=r < R)
        free += tl.sum(mine, 0)
    if program == 0:
        tl.store(ends + experts, end, mask=experts < E)
    tile_end = tl.cumsum((total + TILE - 1) // TILE, 0)
    if program == 0:
        tl.store(tiles + 3 * num_tiles, tl.max(tile_end, 0))
    for first in range(program * BLOCK, num_tiles, programs * BLOCK):
        t = first + tl.arange(0, BLOCK)
        e = tl.sum((tile_end[None, :] <= t[:, None]).to(tl.int32), 1)
        mine = (e[:, None] == experts[None, :]).to(tl.int32)
        back = tl.sum(mine * tile_end[None, :], 1) - t  # tiles of the expert from this one on
        count = tl.sum(mine * total[None, :], 1)
        stop = tl.sum(mine * end[None, :], 1)
        row = stop - count + ((count + TILE - 1) // TILE - back) * TILE
        tl.store(tiles + t, tl.where(e < E_PAD, e, -1), mask=t < num_tiles)
        tl.store(tiles + num_tiles + t, row, mask=t < num_tiles)
        tl.store(tiles + 2 * num_tiles + t, stop, mask=t < num_tiles)


@triton.jit
def _gather_kernel(x, source, out, R, D, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    token = tl.load(source + p, mask=p < R, other=0) // K
    mask = (p < R)[:, None] & (d < D)
    row = tl.load(x + token.to(tl.int64)[:, None] * D + d, mask=mask)
    tl.store(out + p.to(tl.int64)[:, None] * D + d, row, mask=mask)


@triton.jit
def _sum_kernel(
    rows,
    slots,
    out,
    parts,
    totals,
    N,
    D,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (n < N)[:, None] & (d < D)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for j in tl.static_range(K):
        p = tl.load(slots + n * K + j, mask=n < N, other=0)
        total += tl.load(rows + p.to(tl.int64)[:, None] * D + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + n.to(tl.int64)[:, None] * D + d, total, mask=mask)
    if PARTS > 0 and tl.program_id(1) == 0:
        for j in tl.static_range(K):
            p = tl.load(slots + n * K + j, mask=n < N, other=0)
            part = tl.zeros((ROWS,), tl.float32)
            for c in range(PARTS):
                part += tl.load(parts + c * (N * K) + p, mask=n < N, other=0.0)
            tl.store(totals + n * K + j, part, mask=n < N)


@triton.jit
def _swiglu_kernel(gate_up, weights, source, out, R, I, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (p < R)[:, None] & (i < I)
    w = tl.load(weights + tl.load(source + p, mask=p < R, other=0), mask=p < R, other=0.0).to(tl.float32)
    base = gate_up + p.to(tl.int64)[:, None] * (2 * I) + i
    gate = tl.load(base, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(base + I, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + p.to(tl.int64)[:, None] * I + i, gate * tl.sigmoid(gate) * up * w[:, None], mask=mask)


@triton.jit
def _swiglu_backward_kernel(dhidden, gate_up, weights, source, dgate_up, hidden, dweights, I, BLOCK: tl.constexpr):
    p = tl.program_id(0).to(tl.int64)
    r = tl.load(source + p)
    w = tl.load(weights + r).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, I, BLOCK):
        i = first + tl.arange(0, BLOCK)
        dh = tl.load(dhidden + p * I + i, mask=i < I, other=0.0).to(tl.float32)
        gate = tl.load(gate_up + p * 2 * I + i, mask=i < I, other=0.0).to(tl.float32)
        up = tl.load(gate_up + p * 2 * I + I + i, mask=i < I, other=0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        h = gate * s * up
        dw += dh * h
        dh *= w
        tl.store(hidden + p * I + i, h * w, mask=i < I)
        tl.store(dgate_up + p * 2 * I + i, dh * up * s * (1.0 + gate * (1.0 - s)), mask=i < I)
        tl.store(dgate_up + p * 2 * I + I + i, dh * gate * s, mask=i < I)
    tl.store(dweights + r, tl.sum(dw))
