"""Kimi Delta Attention in plain PyTorch: the specification, and the path a CPU takes.

    S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T (scale q_t)

    chunk_kda:  inputs ─► gate, norms ─► chunks of C rows ─► P, A, X ─► scan over chunks ─► o, final state
    kda_step:   one row of the recurrence, for decoding
    kda_decode: the same with the convolution before it and the gated norm after it

Kimi Linear, equation 1 and section 3. The work inside chunks is batched over all chunks and heads; the only Python
loop runs over the chunks of the longest sequence, three small operations each. Without `cu_seqlens` nothing is read
back from the device, so a training step can be captured in a CUDA graph.

Shapes:  B batch  T time  H key heads  HV value heads (a multiple of H)  K key channels  V value channels
         N sequences (B, or those of cu_seqlens)  C chunk rows  M = chunks * HV
States are V-first, [N, HV, V, K], fp32 (float64 for float64 inputs), as are all inner computations.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_mm.kernels.conv.reference import short_conv
from kimi_mm.kernels.kda.blocks import DecayedScores, UnitLowerInverse
from kimi_mm.kernels.norm.reference import gated_rms_norm
from kimi_mm.kernels.precision import without_autocast

GATES = ("given", "bounded", "softplus")
L2_EPS = 1e-6


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    gate: str = "given",
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
    beta_sigmoid: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Runs KDA over whole sequences, chunk by chunk.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, HV, V].
        g: [B, T, HV, K]; the log-decay itself (<= 0) when `gate` is "given", else its raw logits.
        beta: [B, T, HV]; logits when `beta_sigmoid`.
        gate: "given"; "bounded": lower_bound * sigmoid(exp(A_log) * (g + dt_bias)); or "softplus":
            -exp(A_log) * softplus(g + dt_bias).
        A_log: [HV] or None for 0. dt_bias: [HV * K], head-major, or None for 0.
        lower_bound: least log-decay of a step, in [-5, 0). None is -5 for "bounded"; with "given" it promises that g
            stays above it, which permits the faster form.
        scale: factor on q; None is K ** -0.5.
        qk_l2norm: divides q and k by sqrt(sum of squares + 1e-6), per head.
        initial_state: [N, HV, V, K] or None for zeros.
        cu_seqlens: [N + 1] int, starts of the sequences packed in one row (B = 1) and the total; empty ones allowed.
        lengths: [B] int, valid rows of right-padded sequences; rows past them leave the state alone (their outputs
            are meaningless, their inputs must be finite).
        chunk_size: 16, 32 or 64; None picks by length.

    Returns:
        o [B, T, HV, V] in the dtype of v, and the final state [N, HV, V, K], or None unless asked for.

    Raises:
        ValueError: if shapes or options contradict each other.
    """
    _check(q, k, v, g, beta, gate, lower_bound)
    if cu_seqlens is not None and (q.shape[0] != 1 or lengths is not None):
        raise ValueError("cu_seqlens needs batch size 1 and no lengths; pass one packed row.")
    with without_autocast(q.device):
        out_dtype = v.dtype
        q, k, v, g, beta = _prepare(q, k, v, g, beta, gate, A_log, dt_bias, lower_bound, scale, qk_l2norm, beta_sigmoid)
        bounded = gate == "bounded" or lower_bound is not None
        B, T, HV, V = v.shape
        K = q.shape[-1]
        if lengths is not None:
            valid = (torch.arange(T, device=v.device) < lengths[:, None])[:, :, None]
            g = g * valid[..., None]
            beta = beta * valid
        if cu_seqlens is None:
            C = chunk_size or _pick_chunk(T)
            steps = -(-T // C)
            active = [B] * steps
            qc, kc, vc, gc, bc = (_to_chunks(x, steps, C) for x in (q, k, v, g, beta[..., None]))
            N, order = B, None
        else:
            bounds = cu_seqlens.tolist()
            sizes = [end - start for start, end in pairwise(bounds)]
            C = chunk_size or _pick_chunk(max(sizes, default=0))
            active, order, gather, scatter = _pack(bounds, sizes, C, T, v.device)
            qc, kc, vc, gc, bc = (_gather_chunks(x[0], gather, C) for x in (q, k, v, g, beta[..., None]))
            N = len(sizes)
        if initial_state is None:
            state = v.new_zeros(N, HV, V, K)
        else:
            state = initial_state.to(v.dtype)
        if order is not None:
            state = state[order]
        out, state = _run_chunks(qc, kc, vc, gc, bc, state.reshape(N * HV, V, K), active, HV, bounded)
        out = out.view(-1, HV, C, V)
        if order is None:
            out = out.view(len(active), B, HV, C, V).permute(1, 0, 3, 2, 4).reshape(B, len(active) * C, HV, V)[:, :T]
            final = state.view(N, HV, V, K)
        else:
            out = out.transpose(1, 2).reshape(-1, HV, V)[scatter][None]
            final = state.view(N, HV, V, K)[torch.argsort(order)]
        return out.to(out_dtype), final if output_final_state else None


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
    """Advances the recurrence by one token; `state` is updated in place and returned.

    Args:
        q, k: [B, H, K]. v: [B, HV, V]. g: [B, HV, K]. beta: [B, HV].
        state: [B, HV, V, K], contiguous, fp32 (float64 for float64 inputs); overwritten. With `slots` its first
            dimension is any number of places.
        gate, A_log, dt_bias, lower_bound, scale, qk_l2norm, beta_sigmoid: as in `chunk_kda`.
        slots: [B] int32, the place of every row's state, none twice; -1 skips the row, whose o is zero. None: row b
            has place b. (This reference reads them back from the device.)

    Returns:
        o [B, HV, V] in the dtype of v, and `state`.

    Raises:
        ValueError: if shapes or options contradict each other.
    """
    _check(q, k, v, g, beta, gate, lower_bound)
    if slots is not None:
        live, places = _live_slots(slots)
        part = state[places]
        rows, _ = kda_step(
            q[live],
            k[live],
            v[live],
            g[live],
            beta[live],
            part,
            gate=gate,
            A_log=A_log,
            dt_bias=dt_bias,
            lower_bound=lower_bound,
            scale=scale,
            qk_l2norm=qk_l2norm,
            beta_sigmoid=beta_sigmoid,
        )
        state[places] = part
        return torch.zeros_like(v).index_copy(0, live, rows), state
    B, HV, V, K = state.shape
    with without_autocast(q.device):
        out_dtype = v.dtype
        if qk_l2norm:  # both at once: at this size every operation costs its launch, not its work
            both = torch.stack([q, k]).to(state.dtype)
            q, k = (both * both.square().sum(-1, keepdim=True).add_(L2_EPS).rsqrt_()).unbind(0)
        factor = K**-0.5 if scale is None else scale
        q, k, v, g, beta = _prepare(q, k, v, g, beta, gate, A_log, dt_bias, lower_bound, 1.0, False, beta_sigmoid)
        flat = state.view(B * HV, V, K)
        key = k.reshape(B * HV, 1, K)
        flat.mul_(g.exp().view(B * HV, 1, K))
        error = torch.baddbmm(v.reshape(B * HV, V, 1), flat, key.mT, alpha=-1)
        flat.baddbmm_(error.mul_(beta.reshape(B * HV, 1, 1)), key)
        out = torch.bmm(flat, (q * factor).reshape(B * HV, 1, K).mT)
        return out.view(B, HV, V).to(out_dtype), state


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
    """One token from raw projections to the input of the output projection: convolution, KDA step, gated norm.

    q and k are L2-normalised and beta is a logit; `state` and `conv_state` are updated in place and returned.

    Args:
        qkv: [B, C], raw projections of q, k [H * K] and v [HV * V], one after the other: C = 2 * H * K + HV * V.
        conv_weight: [C, W]. conv_state: [B, W - 1, C], the raw projections before this token, oldest first.
        g: [B, HV, K] decay logits. beta: [B, HV] logits.
        state: [B, HV, V, K], contiguous, fp32 (float64 for float64 inputs).
        out_gate: [B, HV, V] logits. norm_weight: [V]. eps: of the norm, added to the mean square.
        gate, A_log, dt_bias, lower_bound, scale, slots: as in `kda_step`; slots choose the conv_state as well.

    Returns:
        y [B, HV, V] in the dtype of qkv, `state` and `conv_state`.

    Raises:
        ValueError: if shapes or options contradict each other.
    """
    B, C = qkv.shape
    HV, V, K = state.shape[1:]
    H = (C - HV * V) // (2 * K)
    if H < 1 or C != 2 * H * K + HV * V:
        raise ValueError(f"qkv has {C} channels, not 2 * H * {K} + {HV} * {V} as the state {tuple(state.shape)} asks.")
    live, places = (None, None) if slots is None else _live_slots(slots)
    past = conv_state if places is None else conv_state[places]
    rows = qkv if live is None else qkv[live]
    rows, moved = short_conv(rows[:, None], conv_weight, initial_state=past, output_final_state=True)
    assert moved is not None
    if live is None or places is None:
        conv_state.copy_(moved)
        rows = rows[:, 0]
    else:
        conv_state[places] = moved.to(conv_state.dtype)
        rows = torch.zeros_like(qkv).index_copy(0, live, rows[:, 0])
    q, k, v = rows.split([H * K, H * K, HV * V], -1)
    o, _ = kda_step(
        q.reshape(B, H, K),
        k.reshape(B, H, K),
        v.reshape(B, HV, V),
        g,
        beta,
        state,
        gate=gate,
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        scale=scale,
        qk_l2norm=True,
        beta_sigmoid=True,
        slots=slots,
    )
    return gated_rms_norm(o, out_gate, norm_weight, eps), state, conv_state


def kda_gate(
    logits: Tensor, kind: str, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> Tensor:
    """Turns decay logits [..., HV, K] into the log-decay g <= 0 of a step; see `chunk_kda` for the two formulas."""
    HV, K = logits.shape[-2:]
    z = logits if dt_bias is None else logits + dt_bias.to(logits.dtype).view(HV, K)
    rate = None if A_log is None else A_log.to(logits.dtype).exp().view(HV, 1)
    if kind == "bounded":
        return torch.sigmoid(z if rate is None else z * rate) * (-5.0 if lower_bound is None else lower_bound)
    return -F.softplus(z) if rate is None else F.softplus(z) * -rate


def _run_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, active: list[int], HV: int, bounded: bool
) -> tuple[Tensor, Tensor]:
    """Chunk form on step-major chunks [M, C, .]: step s holds the s-th chunk of the first active[s] sequences."""
    G = g.cumsum(1)
    total = G[:, -1:]
    P, A = DecayedScores.apply(q, k, G, bounded)  # type: ignore[misc]
    X = UnitLowerInverse.apply(A * beta)
    decay = G.exp()
    U, W = (X @ torch.cat([v * beta, k * decay * beta], -1)).split([v.shape[-1], k.shape[-1]], -1)
    sizes = [n * HV for n in active]
    parts = zip(*(x.split(sizes) for x in (U, W, k * (total - G).exp(), total.exp())), strict=True)
    finished: list[Tensor] = []
    states: list[Tensor] = []
    deltas: list[Tensor] = []
    for size, (u, w, kg, fade) in zip(sizes, parts, strict=True):
        if size < state.shape[0]:
            finished.append(state[size:])
            state = state[:size]
        delta = torch.baddbmm(u, w, state.mT, alpha=-1)
        states.append(state)
        deltas.append(delta)
        state = torch.baddbmm(state * fade, delta.mT, kg)
    state = torch.cat([state, *reversed(finished)]) if finished else state
    if not deltas:
        return v, state
    out = torch.baddbmm(P @ torch.cat(deltas), q * decay, torch.cat(states).mT)
    return out, state


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    gate: str,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    scale: float | None,
    qk_l2norm: bool,
    beta_sigmoid: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inputs in the inner dtype: q scaled, q and k normalised and repeated per value head, g <= 0, beta in [0, 1]."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v, g, beta = q.to(dtype), k.to(dtype), v.to(dtype), g.to(dtype), beta.to(dtype)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if qk_l2norm:
        q = q * ((q.square().sum(-1, keepdim=True) + L2_EPS).rsqrt() * factor)
        k = k * (k.square().sum(-1, keepdim=True) + L2_EPS).rsqrt()
    elif factor != 1.0:
        q = q * factor
    repeat = v.shape[-2] // k.shape[-2]
    if repeat > 1:
        q, k = q.repeat_interleave(repeat, -2), k.repeat_interleave(repeat, -2)
    if gate != "given":
        g = kda_gate(g, gate, A_log, dt_bias, lower_bound)
    return q, k, v, g, beta.sigmoid() if beta_sigmoid else beta


def _live_slots(slots: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that have a place, and their places, both int64."""
    live = (slots >= 0).nonzero()[:, 0]
    return live, slots[live].long()


def _pick_chunk(length: int) -> int:
    return 64 if length > 32 else 32 if length > 16 else 16


def _to_chunks(x_BTHD: Tensor, steps: int, C: int) -> Tensor:
    """[B, T, H, D] -> [steps * B * H, C, D], zero rows at the end."""
    B, T, H, D = x_BTHD.shape
    padded = F.pad(x_BTHD, (0, 0, 0, 0, 0, steps * C - T))
    return padded.view(B, steps, C, H, D).permute(1, 0, 3, 2, 4).reshape(steps * B * H, C, D)


def _gather_chunks(x_THD: Tensor, gather: Tensor, C: int) -> Tensor:
    """[T, H, D] -> [chunks * H, C, D]; index T is a zero row."""
    _, H, D = x_THD.shape
    rows = F.pad(x_THD, (0, 0, 0, 0, 0, 1))[gather]
    return rows.view(-1, C, H, D).transpose(1, 2).reshape(-1, C, D)


def _pack(
    bounds: list[int], sizes: list[int], C: int, T: int, device: torch.device
) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Lays packed sequences out as step-major chunks, the longest sequence first.

    Returns:
        active: sequences that still have a chunk at each step.
        order [N]: the sequences by falling length.
        gather [chunks * C]: source row of every chunk row, T where there is none.
        scatter [T]: chunk row of every source row.
    """
    if any(size < 0 for size in sizes) or bounds[0] != 0 or bounds[-1] != T:
        raise ValueError(f"cu_seqlens must rise from 0 to {T}, got {bounds[:3]}..{bounds[-1]}.")
    order = sorted(range(len(sizes)), key=lambda n: -sizes[n])
    steps = -(-max(sizes, default=0) // C)
    active = [sum(size > step * C for size in sizes) for step in range(steps)]
    gather = torch.full((sum(active) * C,), T, dtype=torch.int64)
    scatter = torch.empty(T, dtype=torch.int64)
    row = 0
    for step, count in enumerate(active):
        for n in order[:count]:
            start = bounds[n] + step * C
            end = min(start + C, bounds[n + 1])
            gather[row : row + end - start] = torch.arange(start, end)
            scatter[start:end] = torch.arange(row, row + end - start)
            row += C
    return active, torch.tensor(order, device=device), gather.to(device), scatter.to(device)


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, gate: str, lower_bound: float | None) -> None:
    if gate not in GATES:
        raise ValueError(f"gate='{gate}' must be one of {', '.join(GATES)}.")
    if lower_bound is not None and not -5.0 <= lower_bound < 0.0:
        raise ValueError(f"lower_bound={lower_bound} must lie in [-5, 0).")
    if q.shape != k.shape or q.shape[:-2] != v.shape[:-2] or v.shape[-2] % k.shape[-2]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together.")
    if g.shape != (*v.shape[:-1], k.shape[-1]) or beta.shape != v.shape[:-1]:
        raise ValueError(f"g {tuple(g.shape)} or beta {tuple(beta.shape)} does not fit v {tuple(v.shape)}.")
