"""What the Triton kernels of KDA demand of their arguments, checked before anything is launched."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kimi_mm.kernels.kda.reference import GATES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
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
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "q": (q, (B, T, H, K)),
        "k": (k, (B, T, H, K)),
        "g": (g, (B, T, HV, K)),
        "beta": (beta, (B, T, HV)),
        "A_log": (A_log, (HV,)),
        "dt_bias": (dt_bias, (HV * K,)),
        "initial_state": (initial_state, (sequences, HV, V, K)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)} where {shape} is expected beside v {tuple(v.shape)}.")
        if tensor.device != v.device:
            raise ValueError(f"{name} lies on {tensor.device}, v on {v.device}; bring them together.")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; take bfloat16, float16 or float32, or the reference kernels.")
    if v.dtype not in DTYPES:
        raise ValueError(f"v is {v.dtype}; take bfloat16, float16 or float32, or the reference kernels.")
    if cu_seqlens is not None:
        _check_index("cu_seqlens", cu_seqlens, None)
        if B != 1 or lengths is not None:
            raise ValueError("cu_seqlens needs batch size 1 and no lengths; pass one packed row.")
        if cu_seqlens.device.type == "cpu":
            bounds = cu_seqlens.tolist()
            if bounds[0] != 0 or bounds[-1] != T or any(end < start for start, end in pairwise(bounds)):
                raise ValueError(f"cu_seqlens must rise from 0 to {T}, got {bounds[:3]}..{bounds[-1]}.")
        cu_seqlens = cu_seqlens.to(v.device).contiguous()
    if lengths is not None:
        _check_index("lengths", lengths, B)
        lengths = lengths.to(v.device).contiguous()
    return cu_seqlens, lengths


def _check_index(name: str, index: Tensor, size: int | None) -> None:
    wanted = "[N + 1]" if size is None else f"[{size}]"
    if index.dim() != 1 or index.shape[0] < 1 or (size is not None and index.shape[0] != size):
        raise ValueError(f"{name} is {tuple(index.shape)} where {wanted} is expected.")
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {index.dtype} where int32 or int64 is expected.")
