"""Kimi Delta Attention in Triton: the twin of `reference.py`, for CUDA.

    chunk_kda ─► op kimi_mm::chunk_kda ─► inside, scan            (chunk_forward)
      backward ─► op kimi_mm::chunk_kda_backward ─► scan_back, gradients    (chunk_backward)

Both are torch custom operators, so torch.compile keeps its graph whole; nothing is read back from the device, so a
step can be captured in a CUDA graph. Operands of the tensor cores are bfloat16 for 16-bit values and fp32 (as three
tf32 products) for fp32 values; the gate, the norms, the inverse and the state are fp32 throughout.

Shapes: as in `reference.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_mm.kernels.kda.checks import check_chunk_inputs
from kimi_mm.kernels.kda.chunk_launch import (
    Chunks,
    Plan,
    find_places,
    make_plan,
    rows_of,
    run_gradients,
    run_inside,
    run_scan,
    run_scan_back,
)
from kimi_mm.kernels.launch import on_device
from kimi_mm.kernels.operator import operator
from kimi_mm.kernels.precision import without_autocast

# Bytes of intermediates a call may keep for its backward; beyond them the backward computes them again.
KEEP_BYTES = 512 * 2**20


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
    """Runs KDA over whole sequences, chunk by chunk; see `reference.chunk_kda` for the meaning of every argument.

    Differs from the reference in what it leaves undefined there: rows past `lengths` give zeros and take no gradient.

    Args:
        q, k: [B, T, H, K], bfloat16, float16 or float32; K up to 256.
        v: [B, T, HV, V]. g: [B, T, HV, K]. beta: [B, T, HV].
        gate, A_log, dt_bias, lower_bound, scale, qk_l2norm, beta_sigmoid, initial_state, output_final_state,
            cu_seqlens, lengths, chunk_size: as in the reference. g > 0 under gate "given" is not looked for.

    Returns:
        o [B, T, HV, V] in the dtype of v, and the final state [N, HV, V, K] in fp32, or None unless asked for.

    Raises:
        ValueError: if a shape, dtype, device or option does not fit, before anything is launched.
    """
    cu_seqlens, lengths = check_chunk_inputs(
        q, k, v, g, beta, gate, A_log, dt_bias, lower_bound, initial_state, cu_seqlens, lengths, chunk_size
    )
    if initial_state is not None:
        initial_state = initial_state.to(torch.float32).contiguous()
    wanted = (q, k, v, g, beta, A_log, dt_bias, initial_state)
    train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in wanted)
    outputs = _forward(
        *(rows_of(x, x.shape[2]) for x in (q, k, v, g, beta)),
        None if gate == "given" else A_log,
        None if gate == "given" else dt_bias,
        initial_state,
        cu_seqlens,
        lengths,
        gate,
        gate == "bounded" or lower_bound is not None,
        -5.0 if lower_bound is None else lower_bound,
        q.shape[-1] ** -0.5 if scale is None else scale,
        qk_l2norm,
        beta_sigmoid,
        output_final_state,
        chunk_size or 0,
        train,
    )
    return outputs[0], outputs[1] if output_final_state else None


OPTIONS = (
    "Tensor? A_log, Tensor? dt_bias, Tensor? initial, Tensor? cu_seqlens, Tensor? lengths, str gate, bool bounded, "
    "float lower, float scale, bool norm, bool sigmoid"
)
KEPT = 8  # w kg qg P fade X states deltas


@operator(
    "kimi_mm::chunk_kda",
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, {OPTIONS}, bool want_final, int chunk, bool train)"
    f" -> ({', '.join(['Tensor'] * (2 + KEPT))})",
)
def _forward(q, k, v, g, beta, A_log, dt_bias, initial, cu_seqlens, lengths, *options):  # type: ignore[no-untyped-def]
    *options, want_final, chunk, train = options
    plan = _plan(q, v, cu_seqlens, options, chunk, train)
    if plan.NC == 0:
        final = (
            v.new_zeros(plan.N, plan.HV, plan.V, plan.K, dtype=torch.float32) if initial is None else initial.clone()
        )
        return torch.empty(v.shape, dtype=v.dtype, device=v.device), final, *(q.new_empty(0) for _ in range(KEPT))
    keep = train and _kept_bytes(plan) <= KEEP_BYTES
    with on_device(q), without_autocast(q.device):
        places = find_places(plan, cu_seqlens, lengths)
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        final = torch.empty(plan.N, plan.HV, plan.V, plan.K, device=v.device) if want_final else None
        chunks = run_inside(plan, (q, k, v, g, beta), A_log, dt_bias, places, keep_X=keep)
        states, deltas = run_scan(plan, chunks, initial, places, out=out, final=final, keep_states=keep)
    kept = [None] * KEPT
    if keep:
        kept = [chunks.w, chunks.kg, chunks.qg, chunks.P, chunks.fade, chunks.X, states, deltas]
    return out, *(q.new_empty(0) if x is None else x for x in (final, *kept))


@_forward.register_fake
def _forward_fake(q, k, v, g, beta, A_log, dt_bias, initial, cu_seqlens, lengths, *options):  # type: ignore[no-untyped-def]
    *options, want_final, chunk, train = options
    plan = _plan(q, v, cu_seqlens, options, chunk, train)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = torch.empty(plan.N, plan.HV, plan.V, plan.K, device=v.device) if want_final else q.new_empty(0)
    if not (train and _kept_bytes(plan) <= KEEP_BYTES):
        return out, final, *(q.new_empty(0) for _ in range(KEPT))
    lead = (plan.NC, plan.HV)
    wide = [q.new_empty(*lead, plan.BT, plan.BK, dtype=plan.kind) for _ in range(3)]
    P, X = (q.new_empty(*lead, plan.BT, plan.BT, dtype=plan.kind) for _ in range(2))
    fade = q.new_empty(*lead, plan.BK, dtype=torch.float32)
    states = q.new_empty(*lead, plan.BK, plan.VP, dtype=plan.kind)
    deltas = q.new_empty(*lead, plan.BT, plan.VP, dtype=plan.kind)
    return out, final, *wide, P, fade, X, states, deltas


@operator(
    "kimi_mm::chunk_kda_backward",
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, {OPTIONS}, int chunk, Tensor out, Tensor d_out, "
    f"Tensor? d_final, {', '.join(f'Tensor kept_{n}' for n in range(KEPT))}) -> ({', '.join(['Tensor'] * 8)})",
)
def _backward(q, k, v, g, beta, A_log, dt_bias, initial, cu_seqlens, lengths, *rest):  # type: ignore[no-untyped-def]
    options, (chunk, out, d_out, d_final, *kept) = rest[:6], rest[6:]
    plan = _plan(q, v, cu_seqlens, options, chunk, train=True)
    inputs = (q, k, v, g, beta)
    if plan.NC == 0:
        nothing = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs)
        rest = (None if x is None else torch.zeros_like(x) for x in (A_log, dt_bias))
        d_initial = None if initial is None else torch.zeros_like(initial) if d_final is None else d_final.clone()
        return tuple(q.new_empty(0) if x is None else x for x in (*nothing, *rest, d_initial))
    with on_device(q), without_autocast(q.device):
        places = find_places(plan, cu_seqlens, lengths)
        d_initial = None if initial is None else torch.empty_like(initial)
        if kept[0].numel():
            w, kg, qg, P, fade, X, states, deltas = kept
            chunks = Chunks(w=w, kg=kg, qg=qg, P=P, fade=fade, X=X, u=w)
        else:
            chunks = run_inside(plan, inputs, A_log, dt_bias, places, keep_X=True)
            states, deltas = run_scan(plan, chunks, initial, places, out=None, final=None, keep_states=True)
        d_out = d_out.contiguous()
        d_states, ys = run_scan_back(plan, chunks, d_out, d_final, d_initial, places)
        assert states is not None
        assert deltas is not None
        gradients = run_gradients(plan, inputs, A_log, dt_bias, places, out, (states, deltas, d_states, ys), d_out)
    return tuple(q.new_empty(0) if x is None else x for x in (*gradients, d_initial))


@_backward.register_fake
def _backward_fake(q, k, v, g, beta, A_log, dt_bias, initial, *rest):  # type: ignore[no-untyped-def]
    whole = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, g, beta))
    return *whole, *(q.new_empty(0) if x is None else torch.empty_like(x) for x in (A_log, dt_bias, initial))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, gate, bounded, lower, scale, norm, sigmoid, want_final, chunk, _ = inputs
    ctx.save_for_backward(*tensors, output[0], *output[2:])
    ctx.options = (gate, bounded, lower, scale, norm, sigmoid, chunk)
    ctx.want_final = want_final
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    tensors, out, kept = saved[:10], saved[10], saved[11:]
    *options, chunk = ctx.options
    v = tensors[2]
    if d_out is None:
        d_out = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    if d_final is not None:
        d_final = d_final.contiguous() if ctx.want_final else None
    gradients = _backward(*tensors, *options, chunk, out, d_out, d_final, *kept)
    known = (None if x is None else d for x, d in zip(tensors[:8], gradients, strict=True))
    return (*known, *(None,) * 11)


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def _plan(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, options: Any, chunk: int, train: bool) -> Plan:
    gate, bounded, lower, scale, norm, sigmoid = options
    return make_plan(
        q,
        v,
        gate=gate,
        bounded=bounded,
        lower=lower,
        scale=scale,
        norm=norm,
        sigmoid=sigmoid,
        chunk=chunk,
        train=train,
        sequences=None if cu_seqlens is None else cu_seqlens.shape[0] - 1,
    )


def _kept_bytes(plan: Plan) -> int:
    per_chunk = 3 * plan.BT * plan.BK + 2 * plan.BT * plan.BT + plan.BK * plan.VP + plan.BT * plan.VP
    return plan.NC * plan.HV * per_chunk * plan.bits // 8
