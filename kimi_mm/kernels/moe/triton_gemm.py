"""Grouped matrix products: the rows of expert e, which lie together, times the matrix of expert e.

    up        hidden = w * silu(x Wg^T) * (x Wu^T)    rows of x gathered by the loads, gate and up in one accumulator
    plain     rows W^T, or rows W
    dhidden   dout W (rows gathered), then the gradients of gate, up and w, and the hidden rows once more
    dweight   (rows of A)^T (rows of B) of every expert; either side may be gathered

FLOPs: 2 R D 2I (up), 2 R I D (down), the same again for dhidden and dx, and for the two dweights. Bytes: each operand
once, rows and weights being shared through the L2 cache by programs that run side by side. Floor: FLOPs over the dense
matmul rate for wide experts; bytes over copy bandwidth for narrow ones; weight bytes alone when decoding.

Shapes:  R routed rows  N tokens  k experts per token  E experts  D width  I expert width
         B* block sizes: BM rows, BN columns, BK depth of one step
"""

# A type checker takes kernels for Python functions and does not know what a launch adds to their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_mm.kernels.launch import on_device
from kimi_mm.kernels.moe.triton_rows import Places

# Size class -> kind of product -> block sizes. `rows` is BM of all products over rows, since they share their tiles.
# "wide" suits the 227 KiB of shared memory of Hopper, "wide, small memory" the 99 KiB of an RTX 30 or 40. "odd" is for
# widths that are no multiples of 16: Triton then knows nothing of their alignment, and every number is an access.
CONFIGS: dict[str, dict[str, dict[str, int]]] = {
    "decode": {
        "rows": {"BM": 16},
        "up": {"BN": 32, "BK": 128, "num_warps": 4, "num_stages": 4},
        "down": {"BN": 32, "BK": 128, "num_warps": 4, "num_stages": 4},
        "dhidden": {"BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
        "dx": {"BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
        "dweight": {"BM": 64, "BN": 64, "BK": 16, "num_warps": 4, "num_stages": 3},
    },
    "narrow": {
        "rows": {"BM": 64},
        "up": {"BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
        "down": {"BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
        "dhidden": {"BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
        "dx": {"BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
        "dweight": {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
    },
    "wide": {
        "rows": {"BM": 128},
        "up": {"BN": 128, "BK": 64, "num_warps": 8, "num_stages": 4},
        "down": {"BN": 256, "BK": 64, "num_warps": 8, "num_stages": 4},
        "dhidden": {"BN": 64, "BK": 64, "num_warps": 8, "num_stages": 4},
        "dx": {"BN": 256, "BK": 64, "num_warps": 8, "num_stages": 4},
        "dweight": {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 3},
    },
    "wide, small memory": {
        "rows": {"BM": 128},
        "up": {"BN": 64, "BK": 32, "num_warps": 8, "num_stages": 4},
        "down": {"BN": 128, "BK": 32, "num_warps": 8, "num_stages": 4},
        "dhidden": {"BN": 64, "BK": 32, "num_warps": 8, "num_stages": 4},
        "dx": {"BN": 128, "BK": 32, "num_warps": 8, "num_stages": 4},
        "dweight": {"BM": 128, "BN": 128, "BK": 32, "num_warps": 8, "num_stages": 4},
    },
    "odd": {
        "rows": {"BM": 32},
        "up": {"BN": 16, "BK": 32, "num_warps": 4, "num_stages": 2},
        "down": {"BN": 32, "BK": 32, "num_warps": 4, "num_stages": 2},
        "dhidden": {"BN": 32, "BK": 32, "num_warps": 4, "num_stages": 2},
        "dx": {"BN": 32, "BK": 32, "num_warps": 4, "num_stages": 2},
        "dweight": {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2},
    },
    "fp32": {
        "rows": {"BM": 64},
        "up": {"BN": 32, "BK": 32, "num_warps": 4, "num_stages": 3},
        "down": {"BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3},
        "dhidden": {"BN": 32, "BK": 32, "num_warps": 4, "num_stages": 3},
        "dx": {"BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3},
        "dweight": {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3},
    },
}
GROUP = 8  # row tiles that share their columns of weights in the cache
WIDE = 512  # from this width on, and with that many rows per expert, the large blocks pay
DWEIGHT_PROGRAMS = 528  # four to each of 132 multiprocessors; fewer tiles than that split their rows


def size_class(R: int, E: int, D: int, I: int, dtype: torch.dtype, device: torch.device) -> str:
    """Name of the row of CONFIGS for this problem."""
    if D % 16 or I % 16:
        return "odd"
    if dtype == torch.float32:
        return "fp32"
    if R <= 16 * E:
        return "decode"
    if min(D, I) < WIDE or R < WIDE * E // 4:
        return "narrow"
    large = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return "wide" if large else "wide, small memory"


def up(
    x: Tensor, weights: Tensor, gate_up: Tensor, places: Places, config: dict[str, dict[str, int]], keep: bool
) -> tuple[Tensor, Tensor]:
    """Weighted hidden rows [R, I], and gate and up before the activation [R, 2 * I] (empty unless `keep`)."""
    R, k = places.source.shape[0], weights.shape[1]
    I, D = gate_up.shape[1] // 2, x.shape[1]
    hidden = gate_up.new_empty(R, I)
    saved = gate_up.new_empty(R if keep else 0, 2 * I)
    with on_device(x):
        _up_kernel[_grid(places, I, config["up"])](
            x,
            places.source,
            weights,
            gate_up,
            hidden,
            saved,
            places.tiles,
            places.num_tiles,
            I,
            D,
            TOP_K=k,
            KEEP=keep,
            **_common(gate_up, D, config, "up"),
        )
    return hidden, saved


def plain(
    rows: Tensor, matrices: Tensor, places: Places, config: dict[str, dict[str, int]], kind: str, transposed: bool
) -> Tensor:
    """rows [R, K] times matrices [E, K, N], or their transposes when stored as [E, N, K]: [R, N]."""
    R, K = rows.shape
    N = matrices.shape[1 if transposed else 2]
    out = matrices.new_empty(R, N)
    with on_device(rows):
        _plain_kernel[_grid(places, N, config[kind])](
            rows,
            matrices,
            out,
            places.tiles,
            places.num_tiles,
            N,
            K,
            TRANSPOSED=transposed,
            **_common(matrices, K, config, kind),
        )
    return out


def dhidden(
    dout: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, places: Places, config: dict[str, dict[str, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through the down product and SwiGLU.

    Args:
        dout: [N, D]. weights: [N, k]. gate_up: [R, 2 * I], before the activation. down: [E, D, I].

    Returns:
        gradients of gate and up [R, 2 * I], the weighted hidden rows [R, I], and the gradients of the weights in
        parts to be added up [column blocks, R], in expert order.
    """
    R, k = places.source.shape[0], weights.shape[1]
    D, I = down.shape[1:]
    dgate_up, hidden = torch.empty_like(gate_up), down.new_empty(R, I)
    columns = triton.cdiv(I, config["dhidden"]["BN"])
    parts = torch.empty(columns, R, dtype=torch.float32, device=dout.device)
    with on_device(dout):
        _dhidden_kernel[_grid(places, I, config["dhidden"])](
            dout,
            places.source,
            weights,
            down,
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
            **_common(down, D, config, "dhidden"),
        )
    return dgate_up, hidden, parts


def dweight(
    a: Tensor,
    b: Tensor,
    places: Places,
    config: dict[str, dict[str, int]],
    dtype: torch.dtype,
    *,
    gather_a: int = 0,
    gather_b: int = 0,
) -> Tensor:
    """Sum over the rows of each expert of a_row^T b_row: [E, M, N] in `dtype`.

    Args:
        a: [R, M], or [N, M] in token order with gather_a = k. b: likewise, with N columns.
        dtype: of the result; products are made in the narrower dtype of a and b.
    """
    E, M, N = places.ends.shape[0], a.shape[1], b.shape[1]
    sizes = dict(config["dweight"])
    tiles = triton.cdiv(M, sizes["BM"]) * triton.cdiv(N, sizes["BN"])
    R = places.source.shape[0]
    splits = min(DWEIGHT_PROGRAMS // (tiles * E), R // (E * 8 * sizes["BK"]))
    splits = max(1, min(splits, 8))
    narrow = a if a.element_size() <= b.element_size() else b
    out = torch.empty(splits, E, M, N, dtype=dtype if splits == 1 else torch.float32, device=a.device)
    with on_device(a):
        _dweight_kernel[(tiles, E, splits)](
            a,
            b,
            places.source,
            places.ends,
            out,
            M,
            N,
            GATHER_A=gather_a,
            GATHER_B=gather_b,
            SPLITS=splits,
            COMPUTE=TYPES[narrow.dtype],
            PRECISION=_precision(narrow.dtype),
            **sizes,
        )
    return out[0] if splits == 1 else out.sum(0).to(dtype)


TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _grid(places: Places, columns: int, config: dict[str, int]) -> tuple[int]:
    return (places.num_tiles * -(-columns // config["BN"]),)


def _common(matrices: Tensor, K: int, config: dict[str, dict[str, int]], kind: str) -> dict[str, object]:
    sizes = config["rows"] | config[kind]
    return {
        "EVEN_K": K % sizes["BK"] == 0,
        "COMPUTE": TYPES[matrices.dtype],
        "PRECISION": _precision(matrices.dtype),
        "GROUP": GROUP,
        **sizes,
    }


def _precision(dtype: torch.dtype) -> str:
    """fp32 products keep fp32 accuracy unless the user allowed TF32."""
    return "tf32" if dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


@triton.jit
def cover(item, num_tiles, columns, GROUP: tl.constexpr):
    """Tile and column block of a piece of work; GROUP tiles go through all columns before the next GROUP."""
    first = (item // (GROUP * columns)) * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    inside = item % (GROUP * columns)
    return first + inside % size, inside // size


@triton.jit
def _multiply(
    a,
    b,
    step_b,
    K,
    inside_b,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    MASK_B: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Product of pointer blocks a [BM, BK] and b [BK, BN] along K; inside_b [1, BN] masks columns where MASK_B."""
    depth = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, K, BK):
        if EVEN_K:
            x = tl.load(a)
            if MASK_B:
                w = tl.load(b, mask=inside_b, other=0.0)
            else:
                w = tl.load(b)
        else:
            left = depth < K - first
            x = tl.load(a, mask=left[None, :], other=0.0)
            if MASK_B:
                w = tl.load(b, mask=left[:, None] & inside_b, other=0.0)
            else:
                w = tl.load(b, mask=left[:, None], other=0.0)
        total = tl.dot(x.to(COMPUTE), w.to(COMPUTE), total, input_precision=PRECISION)
        a += BK
        b += step_b
    return total


@triton.jit
def _up_kernel(
    x,
    source,
    weights,
    gate_up,
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
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, column = cover(tl.program_id(0), num_tiles, tl.cdiv(I, BN), GROUP)
    e = tl.load(tiles + tile)
    if e < 0:
        return
    first = tl.load(tiles + num_tiles + tile)
    stop = tl.load(tiles + 2 * num_tiles + tile)
    rows = first + tl.arange(0, BM)
    routed = tl.load(source + tl.minimum(rows, stop - 1))
    # Gate and up columns alternate, so that both values of a pair end up in one thread.
    pair = tl.arange(0, 2 * BN)
    matrix_row = tl.minimum(column * BN + pair // 2, I - 1) + (pair % 2) * I
    depth = tl.arange(0, BK)
    a = x + (routed // TOP_K).to(tl.int64)[:, None] * D + depth[None, :]
    b = gate_up + e.to(tl.int64) * 2 * I * D + matrix_row.to(tl.int64)[None, :] * D + depth[:, None]
    both = _multiply(a, b, BK, D, True, BM, 2 * BN, BK, EVEN_K, False, COMPUTE, PRECISION)
    gate, up = tl.split(tl.reshape(both, (BM, BN, 2)))
    columns = column * BN + tl.arange(0, BN)[None, :]
    mask = (rows < stop)[:, None] & (columns < I)
    w = tl.load(weights + routed).to(tl.float32)
    h = gate * tl.sigmoid(gate) * up * w[:, None]
    tl.store(hidden + rows.to(tl.int64)[:, None] * I + columns, h, mask=mask)
    if KEEP:
        out = saved + rows.to(tl.int64)[:, None] * (2 * I) + columns
        tl.store(out, gate, mask=mask)
        tl.store(out + I, up, mask=mask)


@triton.jit
def _plain_kernel(
    rows_in,
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
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, column = cover(tl.program_id(0), num_tiles, tl.cdiv(N, BN), GROUP)
    e = tl.load(tiles + tile)
    if e < 0:
        return
    first = tl.load(tiles + num_tiles + tile)
    stop = tl.load(tiles + 2 * num_tiles + tile)
    rows = first + tl.arange(0, BM)
    depth = tl.arange(0, BK)
    columns = column * BN + tl.arange(0, BN)
    a = rows_in + tl.minimum(rows, stop - 1).to(tl.int64)[:, None] * K + depth[None, :]
    b = matrices + e.to(tl.int64) * N * K
    if TRANSPOSED:
        b += tl.minimum(columns, N - 1).to(tl.int64)[None, :] * K + depth[:, None]
        total = _multiply(a, b, BK, K, True, BM, BN, BK, EVEN_K, False, COMPUTE, PRECISION)
    else:
        b += depth.to(tl.int64)[:, None] * N + columns[None, :]
        total = _multiply(a, b, BK * N, K, columns[None, :] < N, BM, BN, BK, EVEN_K, True, COMPUTE, PRECISION)
    mask = (rows < stop)[:, None] & (columns < N)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * N + columns[None, :], total, mask=mask)


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
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, column = cover(tl.program_id(0), num_tiles, tl.cdiv(I, BN), GROUP)
    e = tl.load(tiles + tile)
    if e < 0:
        return
    first = tl.load(tiles + num_tiles + tile)
    stop = tl.load(tiles + 2 * num_tiles + tile)
    rows = first + tl.arange(0, BM)
    routed = tl.load(source + tl.minimum(rows, stop - 1))
    depth = tl.arange(0, BK)
    columns = column * BN + tl.arange(0, BN)[None, :]
    a = dout + (routed // TOP_K).to(tl.int64)[:, None] * D + depth[None, :]
    b = down + e.to(tl.int64) * D * I + depth.to(tl.int64)[:, None] * I + columns
    dh = _multiply(a, b, BK * I, D, columns < I, BM, BN, BK, EVEN_K, True, COMPUTE, PRECISION)
    mask = (rows < stop)[:, None] & (columns < I)
    at = rows.to(tl.int64)[:, None] * (2 * I) + columns
    gate = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + I, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    w = tl.load(weights + routed).to(tl.float32)[:, None]
    tl.store(parts + column * R + rows, tl.sum(dh * silu * up, 1), mask=rows < stop)
    tl.store(hidden + rows.to(tl.int64)[:, None] * I + columns, silu * up * w, mask=mask)
    dh *= w
    tl.store(dgate_up + at + I, dh * silu, mask=mask)
    tl.store(dgate_up + at, dh * up * (s + silu * (1.0 - s)), mask=mask)


@triton.jit
def _dweight_kernel(
    a,
    b,
    source,
    ends,
    out,
    M,
    N,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    e = tl.program_id(1)
    stop = tl.load(ends + e)
    start = tl.load(ends + e - 1, mask=e > 0, other=0)
    if SPLITS > 1:  # whole steps each
        share = tl.cdiv(stop - start, SPLITS * BK) * BK
        start += tl.program_id(2) * share
        stop = tl.minimum(stop, start + share)
    m = (tl.program_id(0) // tl.cdiv(N, BN)) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % tl.cdiv(N, BN)) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(start, stop, BK):
        row_a = first + tl.arange(0, BK)
        inside = row_a < stop
        row_b = row_a
        if GATHER_A or GATHER_B:
            routed = tl.load(source + row_a, mask=inside, other=0)
            if GATHER_A:
                row_a = routed // GATHER_A
            if GATHER_B:
                row_b = routed // GATHER_B
        mask_a = inside[:, None] & (m < M)[None, :]
        mask_b = inside[:, None] & (n < N)[None, :]
        x = tl.load(a + row_a.to(tl.int64)[:, None] * M + m[None, :], mask=mask_a, other=0.0)
        y = tl.load(b + row_b.to(tl.int64)[:, None] * N + n[None, :], mask=mask_b, other=0.0)
        total = tl.dot(tl.trans(x.to(COMPUTE)), y.to(COMPUTE), total, input_precision=PRECISION)
    split = (tl.program_id(2) * tl.num_programs(1) + e).to(tl.int64)
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + (split * M + m[:, None]) * N + n[None, :], total, mask=mask)
