"""What the Triton kernels of KDA demand of their arguments, checked before anything is launched."""

from __future__ import annotations

from torch import Tensor

from kimi_mm.kernels.kda.reference import GATES
from kimi_mm.kernels.launch import check_bounds, check_index, check_tensors

CHUNKS = (16, 32, 64)
MAX_K = 256


def check_chunk_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    gate: str,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Checks the arguments of `chunk_kda`; returns cu_seqlens and lengths on the device of q.

    Raises:
        ValueError: naming the argument, what it is and what it should be.
    """
    if gate not in GATES:
        raise ValueError(f"gate='{gate}' must be one of {', '.join(GATES)}.")
    if lower_bound is not None and not -5.0 <= lower_bound < 0.0:
        raise ValueError(f"lower_bound={lower_bound} must lie in [-5, 0).")
    if chunk_size is not None and chunk_size not in CHUNKS:
        raise ValueError(f"chunk_size={chunk_size} must be one of {CHUNKS} or None.")
    if q.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q {tuple(q.shape)} and v {tuple(v.shape)} must be [B, T, heads, channels].")
    B, T, HV, V = v.shape
    H, K = q.shape[-2:]
    if HV % H:
        raise ValueError(f"v has {HV} heads, which must be a multiple of the {H} heads of q and k.")
    if not 1 <= K <= MAX_K:
        raise ValueError(f"q has {K} channels a head; this kernel takes 1 to {MAX_K}.")
    if cu_seqlens is not None:
        if B != 1 or lengths is not None:
            raise ValueError("cu_seqlens needs batch size 1 and no lengths; pass one packed row.")
        cu_seqlens = check_bounds(cu_seqlens, T, v.device)
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_tensors(
        v,
        {
            "q": (q, (B, T, H, K)),
            "k": (k, (B, T, H, K)),
            "v": (v, (B, T, HV, V)),
            "g": (g, (B, T, HV, K)),
            "beta": (beta, (B, T, HV)),
            "A_log": (A_log, (HV,)),
            "dt_bias": (dt_bias, (HV * K,)),
            "initial_state": (initial_state, (sequences, HV, V, K)),
        },
    )
    if lengths is not None:
        lengths = check_index("lengths", lengths, B, v.device)
    return cu_seqlens, lengths
