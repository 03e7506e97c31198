"""Slow, literal forms of the kernels, written from the equations, for float64 comparison."""

import torch
from torch import Tensor


def recurrent_kda(q, k, v, g, beta, scale, state=None) -> tuple[Tensor, Tensor]:
    """Kimi Linear, equation 1, row by row. q, k [B,T,H,K]; v [B,T,HV,V]; g <= 0; returns o and S [B,HV,V,K]."""
    B, T, HV, V = v.shape
    repeat = HV // q.shape[2]
    q, k = q.repeat_interleave(repeat, 2), k.repeat_interleave(repeat, 2)
    S = torch.zeros(B, HV, k.shape[-1], V, dtype=v.dtype) if state is None else state.transpose(-1, -2)
    rows = []
    for t in range(T):
        S = g[:, t].exp()[..., None] * S
        remembered = torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - remembered))
        rows.append(torch.einsum("bhkv,bhk->bhv", S, scale * q[:, t]))
    out = torch.stack(rows, 1) if rows else v.clone()
    return out, S.transpose(-1, -2)


def relative_rms(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
