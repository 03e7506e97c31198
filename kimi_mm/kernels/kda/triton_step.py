"""One token of KDA in Triton, for decoding: the twins of `kda_step` and `kda_decode` of `reference.py`.

    S <- S diag(exp g),   delta = beta (v - S k),   S <- S + delta k^T,   o = S q        with S [V, K], in place

A program holds BV rows of one head's state in registers: it reads them, takes S k and S q in one sweep (the output
needs no second one: o = S_decayed q + delta (k.q)), and writes them back. The gate, the norms of q and k and the
sigmoid of beta are computed inside. `kda_decode` gives a program all value heads of a key head, so that it alone moves
that head's convolution window on, and goes over a head's rows tile by tile before it normalises.

Bytes: 8 B HV V K for the fp32 state; everything else is below 3 % of that at K = V = 128. FLOPs: 7 B HV V K.
Floor: the copy time of the state, 0.089 ms at B 64, HV 32, K = V = 128 on an H100. Neither is differentiable.

Shapes:  B batch  H key heads  HV value heads  K key channels  V value channels  W convolution width
         C = 2 * H * K + HV * V convolved channels  P places of the state (B without slots)
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_mm.kernels.kda import reference
from kimi_mm.kernels.kda.chunk_ops import GATE_CODES, gate_rate, log_decay
from kimi_mm.kernels.launch import cdiv, check_index, check_tensors, on_device, power_of_two
from kimi_mm.kernels.operator import operator

# Rows of the state a program holds at a time.
CONFIGS = {"step": {"BV": 32, "num_warps": 4}, "decode": {"BV": 64, "num_warps": 8}}
MAX_K = 256
MAX_WIDTH = 8


def kda_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    gate: str = "given",
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
    beta_sigmoid: bool = False,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advances the recurrence by one token; `state` is updated in place and returned; see `reference.kda_step`.

    Float64 takes the reference. Slots are trusted to lie below P and to differ: they are not read back.

    Args:
        q, k: [B, H, K], K up to 256. v: [B, HV, V]. g: [B, HV, K]. beta: [B, HV].
        state: [B, HV, V, K], contiguous fp32; with `slots` [P, HV, V, K].
        gate, A_log, dt_bias, lower_bound, scale, qk_l2norm, beta_sigmoid: as in the reference. g > 0 under gate
            "given" is not looked for.
        slots: [B] int32 or int64, the place of every row's state; -1 skips the row, whose o is zero.

    Returns:
        o [B, HV, V] in the dtype of v, and `state`.

    Raises:
        ValueError: if a shape, dtype, device or option does not fit.
    """
    options: dict[str, Any] = {"gate": gate, "A_log": A_log, "dt_bias": dt_bias, "lower_bound": lower_bound}
    options |= {"scale": scale, "slots": slots}
    if state.dtype == torch.float64:
        norms = {"qk_l2norm": qk_l2norm, "beta_sigmoid": beta_sigmoid}
        return reference.kda_step(q, k, v, g, beta, state, **options, **norms)
    if q.dim() != 3 or v.dim() != 3:
        raise ValueError(f"q {list(q.shape)} and v {list(v.shape)} must be [B, heads, channels].")
    B, HV, V = v.shape
    H, K = q.shape[1:]
    if HV % H:
        raise ValueError(f"v has {HV} heads, which must be a multiple of the {H} heads of q and k.")
    slots = _checked_options(state, (B, HV, V, K), **options)
    check_tensors(state, {"q": (q, (B, H, K)), "k": (k, (B, H, K)), "v": (v, (B, HV, V))})
    check_tensors(state, {"g": (g, (B, HV, K)), "beta": (beta, (B, HV))})
    rows = (_rows(x) for x in (q, k, v, g, beta))
    factor = K**-0.5 if scale is None else scale
    lower = -5.0 if lower_bound is None else lower_bound
    A_log, dt_bias = (None, None) if gate == "given" else (A_log, dt_bias)
    return _step(*rows, state, A_log, dt_bias, slots, gate, lower, factor, qk_l2norm, beta_sigmoid), state


def kda_decode(
    qkv: Tensor,
    conv_weight: Tensor,
    conv_state: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    out_gate: Tensor,
    norm_weight: Tensor,
    eps: float,
    *,
    gate: str = "bounded",
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    scale: float | None = None,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution, KDA step and gated norm of one token in one kernel; see `reference.kda_decode`.

    `state` and `conv_state` are updated in place and returned. Float64 takes the reference. Slots are trusted.

    Args:
        qkv: [B, C], raw projections of q, k and v.
        conv_weight: [C, W], W from 2 to 8. conv_state: [P, W - 1, C], contiguous.
        g: [B, HV, K] decay logits, K up to 256. beta: [B, HV] logits. state: [P, HV, V, K], contiguous fp32.
        out_gate: [B, HV, V] logits. norm_weight: [V]. eps: of the norm, added to the mean square.
        gate, A_log, dt_bias, lower_bound, scale, slots: as in `kda_step`.

    Returns:
        y [B, HV, V] in the dtype of qkv, `state` and `conv_state`.

    Raises:
        ValueError: if a shape, dtype, device or option does not fit.
    """
    options: dict[str, Any] = {"gate": gate, "A_log": A_log, "dt_bias": dt_bias, "lower_bound": lower_bound}
    options |= {"scale": scale, "slots": slots}
    if state.dtype == torch.float64:
        tensors = (qkv, conv_weight, conv_state, g, beta, state, out_gate, norm_weight)
        return reference.kda_decode(*tensors, eps, **options)
    if qkv.dim() != 2 or out_gate.dim() != 3 or g.dim() != 3 or conv_weight.dim() != 2:
        raise ValueError(
            f"qkv {list(qkv.shape)}, conv_weight {list(conv_weight.shape)}, g {list(g.shape)} and out_gate "
            f"{list(out_gate.shape)} must be [B, C], [C, W], [B, HV, K] and [B, HV, V]."
        )
    B, C = qkv.shape
    HV, V = out_gate.shape[1:]
    K, W = g.shape[2], conv_weight.shape[1]
    H = (C - HV * V) // (2 * K)
    if H < 1 or C != 2 * H * K + HV * V or HV % H:
        raise ValueError(f"qkv has {C} channels, not 2 * H * {K} + {HV} * {V} with {HV} a multiple of H.")
    if not 2 <= W <= MAX_WIDTH:
        raise ValueError(f"conv_weight is {list(conv_weight.shape)} where [{C}, 2 to {MAX_WIDTH}] is expected.")
    slots = _checked_options(state, (B, HV, V, K), **options)
    check_tensors(state, {"qkv": (qkv, (B, C)), "conv_weight": (conv_weight, (C, W)), "g": (g, (B, HV, K))})
    check_tensors(state, {"conv_state": (conv_state, (state.shape[0], W - 1, C)), "beta": (beta, (B, HV))})
    check_tensors(state, {"out_gate": (out_gate, (B, HV, V)), "norm_weight": (norm_weight, (V,))})
    if not conv_state.is_contiguous():
        raise ValueError("conv_state must be contiguous, since it is updated in place.")
    factor = K**-0.5 if scale is None else scale
    lower = -5.0 if lower_bound is None else lower_bound
    A_log, dt_bias = (None, None) if gate == "given" else (A_log, dt_bias)
    rows = (_rows(x) for x in (qkv, g, beta, out_gate))
    vectors = conv_weight.contiguous(), norm_weight.contiguous(), A_log, dt_bias
    y = _decode(*rows, *vectors, conv_state, state, slots, eps, gate, lower, factor)
    return y, state, conv_state


@operator("kimi_mm::kda_step", mutates_args=("state",))
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    slots: Tensor | None,
    gate: str,
    lower: float,
    scale: float,
    norm: bool,
    sigmoid: bool,
) -> Tensor:
    B, HV, V = v.shape
    H, K = q.shape[1:]
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    sizes = _tile("step", V, K)
    tiles = cdiv(V, sizes["BV"])
    if o.numel():
        with on_device(state):
            _step_kernel[(B * HV * tiles,)](
                q, k, v, g, beta, state, o, A_log, dt_bias, slots,
                q.stride(0), k.stride(0), v.stride(0), g.stride(0), beta.stride(0), lower, scale,
                H=H, HV=HV, GATE=GATE_CODES[gate], NORM=norm, SIGMOID=sigmoid, **sizes,
            )  # fmt: skip
    return o


@_step.register_fake
def _(q, k, v, g, beta, state, A_log, dt_bias, slots, gate, lower, scale, norm, sigmoid):  # type: ignore[no-untyped-def]
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


@operator("kimi_mm::kda_decode", mutates_args=("conv_state", "state"))
def _decode(
    qkv: Tensor,
    g: Tensor,
    beta: Tensor,
    out_gate: Tensor,
    conv_weight: Tensor,
    norm_weight: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    conv_state: Tensor,
    state: Tensor,
    slots: Tensor | None,
    eps: float,
    gate: str,
    lower: float,
    scale: float,
) -> Tensor:
    B, C = qkv.shape
    HV, V = out_gate.shape[1:]
    K, W = g.shape[2], conv_weight.shape[1]
    H = (C - HV * V) // (2 * K)
    y = torch.empty(out_gate.shape, dtype=qkv.dtype, device=qkv.device)
    if y.numel():
        with on_device(state):
            _decode_kernel[(B * H,)](
                qkv, g, beta, out_gate, conv_weight, norm_weight, A_log, dt_bias, conv_state, state, slots, y,
                qkv.stride(0), g.stride(0), beta.stride(0), out_gate.stride(0), eps, lower, scale,
                H=H, HV=HV, W=W, WP=power_of_two(W), GATE=GATE_CODES[gate], **_tile("decode", V, K),
            )  # fmt: skip
    return y


@_decode.register_fake
def _(
    qkv, g, beta, out_gate, conv_weight, norm_weight, A_log, dt_bias, conv_state, state, slots, eps, gate, lower, scale
):  # type: ignore[no-untyped-def]
    return torch.empty(out_gate.shape, dtype=qkv.dtype, device=qkv.device)


def _tile(which: str, V: int, K: int) -> dict[str, int]:
    """Rows of the state a program holds, fewer of wider ones, and about 32 numbers of them a thread."""
    config = CONFIGS[which]
    BK = max(16, power_of_two(K))
    BV = min(max(16, config["BV"] * 128 // max(BK, 128)), power_of_two(V))
    return {"V": V, "K": K, "BV": BV, "BK": BK, "num_warps": min(config["num_warps"], max(1, BV * BK // 1024))}


def _rows(x: Tensor) -> Tensor:
    """`x` [B, ...] itself where what belongs to a row lies together, else a copy."""
    return x if x[:1].is_contiguous() else x.contiguous()


def _checked_options(
    state: Tensor,
    shape: tuple[int, int, int, int],
    gate: str,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    scale: float | None,
    slots: Tensor | None,
) -> Tensor | None:
    """Checks what both functions share; returns the slots on the device of the state.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    B, HV, V, K = shape
    if gate not in GATE_CODES:
        raise ValueError(f"gate='{gate}' must be one of {', '.join(GATE_CODES)}.")
    if lower_bound is not None and not -5.0 <= lower_bound < 0.0:
        raise ValueError(f"lower_bound={lower_bound} must lie in [-5, 0).")
    if not 1 <= K <= MAX_K:
        raise ValueError(f"the keys have {K} channels a head; this kernel takes 1 to {MAX_K}.")
    places = B if slots is None or not state.dim() else state.shape[0]
    check_tensors(
        state, {"state": (state, (places, HV, V, K)), "A_log": (A_log, (HV,)), "dt_bias": (dt_bias, (HV * K,))}
    )
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(f"state is {state.dtype}; it must be contiguous float32, since it is updated in place.")
    return None if slots is None else check_index("slots", slots, B, state.device)


@triton.jit
def _place(slots, b):
    """Place of a row's state, and whether it has one."""
    if slots is not None:
        slot = tl.load(slots + b).to(tl.int64)
        return tl.maximum(slot, 0), slot >= 0
    else:
        return b.to(tl.int64), b >= 0


@triton.jit
def _keys(x, NORM: tl.constexpr):
    if NORM:
        return x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)
    else:
        return x


@triton.jit
def _decay(g, A_log, dt_bias, lower, hv, col, mask, K: tl.constexpr, GATE: tl.constexpr):
    """exp of the log-decay [BK] of a value head, from the pointer to its logits."""
    z = tl.load(g + col, mask=mask, other=0.0).to(tl.float32)
    if dt_bias is not None:
        z += tl.load(dt_bias + hv * K + col, mask=mask, other=0.0).to(tl.float32)
    return tl.exp(log_decay(z, gate_rate(A_log, hv), lower, GATE))


@triton.jit
def _advanced(S, decay, q, k, v, beta):
    """The next state [BV, BK] and the output [BV]."""
    S *= decay[None, :]
    delta = beta * (v - tl.sum(S * k[None, :], 1))
    o = tl.sum(S * q[None, :], 1) + delta * tl.sum(k * q, 0)
    return S + delta[:, None] * k[None, :], o


@triton.jit
def _step_kernel(
    q, k, v, g, beta, state, o, A_log, dt_bias, slots, q_row, k_row, v_row, g_row, beta_row, lower, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, NORM: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """BV rows of the state of one value head of one batch row."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    head = tl.program_id(0) // TILES
    b = head // HV
    hv = head % HV
    h = hv // (HV // H)
    place, live = _place(slots, b)
    row = (tl.program_id(0) % TILES) * BV + tl.arange(0, BV)
    col = tl.arange(0, BK)
    rows = (row < V) & live
    cols = col < K
    at = state + (place * HV + hv) * (V * K) + row[:, None] * K + col[None, :]
    S = tl.load(at, mask=rows[:, None] & cols[None, :], other=0.0)
    b = b.to(tl.int64)
    keys = _keys(tl.load(k + b * k_row + h * K + col, mask=cols, other=0.0).to(tl.float32), NORM)
    queries = _keys(tl.load(q + b * q_row + h * K + col, mask=cols, other=0.0).to(tl.float32), NORM) * scale
    values = tl.load(v + b * v_row + hv * V + row, mask=rows, other=0.0).to(tl.float32)
    decay = _decay(g + b * g_row + hv * K, A_log, dt_bias, lower, hv, col, cols, K, GATE)
    rate = tl.load(beta + b * beta_row + hv).to(tl.float32)
    if SIGMOID:
        rate = tl.sigmoid(rate)
    S, out = _advanced(S, decay, queries, keys, values, rate)
    tl.debug_barrier()  # a small tile is held several times over: none may store before all have loaded
    tl.store(at, S, mask=rows[:, None] & cols[None, :])
    tl.store(o + (b * HV + hv) * V + row, out.to(o.dtype.element_ty), mask=row < V)


@triton.jit
def _convolved(x, weight, past, channel, mask, C: tl.constexpr, W: tl.constexpr, WP: tl.constexpr):
    """silu(convolution) of the channels of one row, and the W raw rows it read [WP, .], oldest first."""
    j = tl.arange(0, WP)[:, None]
    at = channel[None, :]
    rows = tl.load(past + j * C + at, mask=(j < W - 1) & mask[None, :], other=0.0).to(tl.float32)
    rows += tl.load(x + j * 0 + at, mask=(j == W - 1) & mask[None, :], other=0.0).to(tl.float32)
    z = tl.sum(rows * tl.load(weight + at * W + j, mask=(j < W) & mask[None, :], other=0.0).to(tl.float32), 0)
    return z * tl.sigmoid(z), rows


@triton.jit
def _move_on(past, rows, channel, mask, C: tl.constexpr, W: tl.constexpr, WP: tl.constexpr):
    """Stores all raw rows but the oldest as the next past."""
    j = tl.arange(0, WP)[:, None]
    at = past + (j - 1) * C + channel[None, :]
    tl.store(at, rows.to(past.dtype.element_ty), mask=(j >= 1) & (j < W) & mask[None, :])


@triton.jit
def _decode_kernel(
    qkv, g, beta, out_gate, conv_weight, norm_weight, A_log, dt_bias, conv_state, state, slots, y,
    qkv_row, g_row, beta_row, gate_row, eps, lower, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    W: tl.constexpr, WP: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """All value heads of one key head of one batch row."""
    GROUP: tl.constexpr = HV // H
    TILES: tl.constexpr = (V + BV - 1) // BV
    C: tl.constexpr = 2 * H * K + HV * V
    b = tl.program_id(0) // H
    h = tl.program_id(0) % H
    place, live = _place(slots, b)
    b = b.to(tl.int64)
    x = qkv + b * qkv_row
    past = conv_state + place * ((W - 1) * C)
    col = tl.arange(0, BK)
    cols = (col < K) & live
    queries, q_rows = _convolved(x, conv_weight, past, h * K + col, cols, C, W, WP)
    keys, k_rows = _convolved(x, conv_weight, past, H * K + h * K + col, cols, C, W, WP)
    queries = _keys(queries, True) * scale
    keys = _keys(keys, True)
    for j in range(GROUP):
        hv = h * GROUP + j
        decay = _decay(g + b * g_row + hv * K, A_log, dt_bias, lower, hv, col, cols, K, GATE)
        rate = tl.sigmoid(tl.load(beta + b * beta_row + hv).to(tl.float32))
        outs = ()
        squares = 0.0
        for t in tl.static_range(TILES):
            row = t * BV + tl.arange(0, BV)
            rows = (row < V) & live
            at = state + (place * HV + hv) * (V * K) + row[:, None] * K + col[None, :]
            S = tl.load(at, mask=rows[:, None] & cols[None, :], other=0.0)
            channel = 2 * H * K + hv * V + row
            values, v_rows = _convolved(x, conv_weight, past, channel, rows, C, W, WP)
            S, out = _advanced(S, decay, queries, keys, values, rate)
            tl.debug_barrier()  # small tiles are held several times over: none may store before all have loaded
            tl.store(at, S, mask=rows[:, None] & cols[None, :])
            _move_on(past, v_rows, channel, rows, C, W, WP)
            outs += (out,)
            squares += tl.sum(out * out, 0)
        inverse = tl.rsqrt(squares / V + eps)
        for t in tl.static_range(TILES):
            row = t * BV + tl.arange(0, BV)
            weight = tl.load(norm_weight + row, mask=row < V, other=0.0).to(tl.float32)
            logits = tl.load(out_gate + b * gate_row + hv * V + row, mask=row < V, other=0.0).to(tl.float32)
            result = outs[t] * inverse * weight * tl.sigmoid(logits)
            tl.store(y + (b * HV + hv) * V + row, result.to(y.dtype.element_ty), mask=row < V)
    _move_on(past, q_rows, h * K + col, cols, C, W, WP)
    _move_on(past, k_rows, H * K + h * K + col, cols, C, W, WP)
