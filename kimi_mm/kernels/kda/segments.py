"""What a stretch of a sequence does to the state before it, so that stretches can be worked on side by side.

    rank r:   transition_r, state_r = segment_summary(k, v, g, beta of its rows)      S_end = S transition_r + state_r
    all:      gather both, S_0, S_1, .. = fold_segments(transitions, states)
    rank r:   o, _ = chunk_kda(q, k, v, g, beta of its rows, initial_state=S_r)

The state is linear in the one before, so its two maps over a stretch are the final state from zero, and the final state
from the identity with all values zero; both come from one run with K more value channels (Kimi Linear, section 3, K3
report, section 5.1.2). What travels between ranks is K (K + V) numbers per head, however long the stretch. Everything
is differentiable: with a differentiable gather the backward needs nothing else. `chunk_kda` does the same by itself,
on one device, for sequences too long for its heads (chunk_launch).

Shapes: as in `reference.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_mm.kernels.dispatch import resolve


def segment_summary(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Maps of the rows given, in fp32 (float64 for float64 inputs).

    Args:
        k, v, g, beta: as in `chunk_kda`; each batch row, or each sequence of `cu_seqlens`, is one stretch.
        options: gate, A_log, dt_bias, lower_bound, qk_l2norm, beta_sigmoid, cu_seqlens, lengths, chunk_size, as there.

    Returns:
        transition [N, HV, K, K] and state [N, HV, V, K], with S_end = S_start @ transition + state.

    Raises:
        ValueError: as `chunk_kda`.
    """
    B, _, HV, V = v.shape
    K = k.shape[-1]
    cu_seqlens = options.get("cu_seqlens")
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    inner = torch.float64 if v.dtype == torch.float64 else torch.float32
    start = torch.eye(V + K, K, dtype=inner, device=v.device).roll(V, 0).expand(N, HV, V + K, K)
    values = torch.cat([v, v.new_zeros(*v.shape[:-1], K)], -1)
    chunk_kda = resolve("chunk_kda", v.device)
    _, final = chunk_kda(k, k, values, g, beta, initial_state=start, output_final_state=True, **options)
    return final[:, :, V:], final[:, :, :V]


def fold_segments(transitions: Tensor, states: Tensor, initial_state: Tensor | None = None) -> Tensor:
    """States at the seams of R consecutive stretches.

    Args:
        transitions: [R, N, HV, K, K]. states: [R, N, HV, V, K].
        initial_state: [N, HV, V, K] before the first, or None for zeros.

    Returns:
        [R + 1, N, HV, V, K]: entry r is what stretch r starts from, the last one the final state.
    """
    seams = [torch.zeros_like(states[0]) if initial_state is None else initial_state.to(states.dtype)]
    for transition, state in zip(transitions, states, strict=True):
        seams.append(seams[-1] @ transition + state)
    return torch.stack(seams)
