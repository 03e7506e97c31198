"""The grouped products of wide experts on Hopper: persistent programs that fetch matrices by TMA.

As `triton_gemm`, but each of the multiprocessors keeps one program that walks over many tiles, and the loads of its
next tile run during the last steps of the present one. Weights come by TMA; a block of gate and up weights arrives
with their rows alternating, since the descriptor sees [E, I, 2, D], so that one product of twice the width makes both.
Rows of x are gathered by ordinary asynchronous copies, which TMA of Hopper cannot do.

Shapes:  R routed rows  k experts per token  E experts  D width  I expert width  B* block sizes as in `triton_gemm`
"""

# A type checker takes kernels for Python functions and does not know what a launch adds to their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kimi_mm.kernels.launch import on_device
from kimi_mm.kernels.moe.triton_gemm import GROUP, cover
from kimi_mm.kernels.moe.triton_rows import Places

CONFIGS: dict[str, dict[str, int]] = {
    "up": {"BN": 128, "BK": 64, "num_warps": 8, "num_stages": 4},
    "down": {"BN": 256, "BK": 64, "num_warps": 8, "num_stages": 3},
    "dhidden": {"BN": 128, "BK": 64, "num_warps": 8, "num_stages": 4},
    "dx": {"BN": 256, "BK": 64, "num_warps": 8, "num_stages": 3},
}


def up(x: Tensor, weights: Tensor, gate_up: Tensor, places: Places, rows: int, keep: bool) -> tuple[Tensor, Tensor]:
    """As `triton_gemm.up`, with tiles of `rows` rows; x and gate_up share a 16-bit dtype."""
    R, k = places.source.shape[0], weights.shape[1]
    E, I, D = gate_up.shape[0], gate_up.shape[1] // 2, x.shape[1]
    config = CONFIGS["up"]
    hidden, saved = gate_up.new_empty(R, I), gate_up.new_empty(R if keep else 0, 2 * I)
    block = [1, config["BN"], 2, config["BK"]]
    matrices = TensorDescriptor(gate_up, [E, I, 2, D], [2 * I * D, D, I * D, 1], block)
    with on_device(x):
        _up_kernel[_grid(places, I, config)](
            x,
            places.source,
            weights,
            matrices,
            hidden,
            saved,
            places.tiles,
            places.num_tiles,
            I,
            D,
            TOP_K=k,
            KEEP=keep,
            BM=rows,
            EVEN_K=D % config["BK"] == 0,
            GROUP=GROUP,
            **config,
        )
    return hidden, saved


def plain(inputs: Tensor, matrices: Tensor, places: Places, rows: int, kind: str, transposed: bool) -> Tensor:
    """As `triton_gemm.plain`, with tiles of `rows` rows."""
    R, K = inputs.shape
    N = matrices.shape[1 if transposed else 2]
    config = CONFIGS[kind]
    BN, BK = config["BN"], config["BK"]
    out = matrices.new_empty(R, N)
    block = [1, BN, BK] if transposed else [1, BK, BN]
    with on_device(inputs):
        _plain_kernel[_grid(places, N, config)](
            TensorDescriptor(inputs, [R, K], [K, 1], [rows, BK]),
            TensorDescriptor(matrices, list(matrices.shape), [N * K, matrices.shape[2], 1], block),
            out,
            places.tiles,
            places.num_tiles,
            N,
            K,
            TRANSPOSED=transposed,
            BM=rows,
            GROUP=GROUP,
            **config,
        )
    return out


def dhidden(
    dout: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, places: Places, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `triton_gemm.dhidden`, with tiles of `rows` rows; dout and down share a 16-bit dtype."""
    R, k = places.source.shape[0], weights.shape[1]
    E, D, I = down.shape
    config = CONFIGS["dhidden"]
    dgate_up, hidden = torch.empty_like(gate_up), down.new_empty(R, I)
    parts = torch.empty(-(-I // config["BN"]), R, dtype=torch.float32, device=dout.device)
    with on_device(dout):
        _dhidden_kernel[_grid(places, I, config)](
            dout,
            places.source,
            weights,
            TensorDescriptor(down, [E, D, I], [D * I, I, 1], [1, config["BK"], config["BN"]]),
            gate_up,
            dgate_up,
            hidden,
            parts,
            places.tiles,
            places.num_tiles,
            R,
            I,
            D,
            TOP_K=k,
            BM=rows,
            EVEN_K=D % config["BK"] == 0,
            GROUP=GROUP,
            **config,
        )
    return dgate_up, hidden, parts


def _grid(places: Places, columns: int, config: dict[str, int]) -> tuple[int]:
    return (min(places.num_tiles * -(-columns // config["BN"]), _multiprocessors(places.tiles.device)),)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@triton.jit
def _up_kernel(
    x,
    source,
    weights,
    matrices,
    hidden,
    saved,
    tiles,
    num_tiles,
    I,
    D,
    TOP_K: tl.constexpr,
    KEEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    columns = tl.cdiv(I, BN)
    live = tl.load(tiles + 3 * num_tiles)
    depth = tl.arange(0, BK)
    for item in tl.range(tl.program_id(0), live * columns, tl.num_programs(0), flatten=True):
        tile, column = cover(item, live, columns, GROUP)
        e = tl.load(tiles + tile)
        stop = tl.load(tiles + 2 * num_tiles + tile)
        rows = tl.load(tiles + num_tiles + tile) + tl.arange(0, BM)
        routed = tl.load(source + tl.minimum(rows, stop - 1))
        a = x + (routed // TOP_K).to(tl.int64)[:, None] * D + depth[None, :]
        both = tl.zeros((BM, 2 * BN), tl.float32)
        for step in range(0, tl.cdiv(D, BK)):
            w = matrices.load([e, column * BN, 0, step * BK]).reshape(2 * BN, BK)
            if EVEN_K:
                rows_x = tl.load(a)
            else:
                rows_x = tl.load(a, mask=(depth < D - step * BK)[None, :], other=0.0)
            both = tl.dot(rows_x, w.T, both)
            a += BK
        gate, up = tl.split(tl.reshape(both, (BM, BN, 2)))
        i = column * BN + tl.arange(0, BN)[None, :]
        mask = (rows < stop)[:, None] & (i < I)
        share = tl.load(weights + routed).to(tl.float32)
        tl.store(hidden + rows.to(tl.int64)[:, None] * I + i, gate * tl.sigmoid(gate) * up * share[:, None], mask=mask)
        if KEEP:
            out = saved + rows.to(tl.int64)[:, None] * (2 * I) + i
            tl.store(out, gate, mask=mask)
            tl.store(out + I, up, mask=mask)


@triton.jit
def _plain_kernel(
    inputs,
    matrices,
    out,
    tiles,
    num_tiles,
    N,
    K,
    TRANSPOSED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    columns = tl.cdiv(N, BN)
    live = tl.load(tiles + 3 * num_tiles)
    for item in tl.range(tl.program_id(0), live * columns, tl.num_programs(0), flatten=True):
        tile, column = cover(item, live, columns, GROUP)
        e = tl.load(tiles + tile)
        first = tl.load(tiles + num_tiles + tile)
        total = tl.zeros((BM, BN), tl.float32)
        for step in range(0, tl.cdiv(K, BK)):
            a = inputs.load([first, step * BK])
            if TRANSPOSED:
                w = matrices.load([e, column * BN, step * BK]).reshape(BN, BK).T
            else:
                w = matrices.load([e, step * BK, column * BN]).reshape(BK, BN)
            total = tl.dot(a, w, total)
        stop = tl.load(tiles + 2 * num_tiles + tile)
        rows = first + tl.arange(0, BM)
        n = column * BN + tl.arange(0, BN)[None, :]
        mask = (rows < stop)[:, None] & (n < N)
        tl.store(out + rows.to(tl.int64)[:, None] * N + n, total, mask=mask)


@triton.jit
def _through_swiglu(dh, gate_up, dgate_up, hidden, rows, stop, w, i, I):
    """Gradients of gate and up, and the hidden rows, for columns i; returns its part of the weights' gradients."""
    mask = (rows < stop)[:, None] & (i < I)[None, :]
    at = rows.to(tl.int64)[:, None] * (2 * I) + i[None, :]
    gate = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + I, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    part = tl.sum(dh * silu * up, 1)
    tl.store(hidden + rows.to(tl.int64)[:, None] * I + i[None, :], silu * up * w[:, None], mask=mask)
    dh *= w[:, None]
    tl.store(dgate_up + at + I, dh * silu, mask=mask)
    tl.store(dgate_up + at, dh * up * (s + silu * (1.0 - s)), mask=mask)
    return part


@triton.jit
def _halves(x, BM: tl.constexpr, BN: tl.constexpr):
    """Left and right half of the columns of x [BM, BN]."""
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _dhidden_kernel(
    dout,
    source,
    weights,
    down,
    gate_up,
    dgate_up,
    hidden,
    parts,
    tiles,
    num_tiles,
    R,
    I,
    D,
    TOP_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    columns = tl.cdiv(I, BN)
    live = tl.load(tiles + 3 * num_tiles)
    depth = tl.arange(0, BK)
    for item in tl.range(tl.program_id(0), live * columns, tl.num_programs(0), flatten=True):
        tile, column = cover(item, live, columns, GROUP)
        e = tl.load(tiles + tile)
        stop = tl.load(tiles + 2 * num_tiles + tile)
        rows = tl.load(tiles + num_tiles + tile) + tl.arange(0, BM)
        routed = tl.load(source + tl.minimum(rows, stop - 1))
        a = dout + (routed // TOP_K).to(tl.int64)[:, None] * D + depth[None, :]
        dh = tl.zeros((BM, BN), tl.float32)
        for step in range(0, tl.cdiv(D, BK)):
            m = down.load([e, step * BK, column * BN]).reshape(BK, BN)
            if EVEN_K:
                rows_d = tl.load(a)
            else:
                rows_d = tl.load(a, mask=(depth < D - step * BK)[None, :], other=0.0)
            dh = tl.dot(rows_d, m, dh)
            a += BK
        w = tl.load(weights + routed).to(tl.float32)
        # Quarter by quarter, to hold few values at a time.
        i = column * BN + tl.arange(0, BN // 4)
        left, right = _halves(dh, BM, BN)
        first, second = _halves(left, BM, BN // 2)
        part = _through_swiglu(first, gate_up, dgate_up, hidden, rows, stop, w, i, I)
        part += _through_swiglu(second, gate_up, dgate_up, hidden, rows, stop, w, i + BN // 4, I)
        third, fourth = _halves(right, BM, BN // 2)
        part += _through_swiglu(third, gate_up, dgate_up, hidden, rows, stop, w, i + BN // 2, I)
        part += _through_swiglu(fourth, gate_up, dgate_up, hidden, rows, stop, w, i + 3 * (BN // 4), I)
        tl.store(parts + column * R + rows, part, mask=rows < stop)
