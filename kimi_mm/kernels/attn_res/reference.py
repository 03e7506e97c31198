"""Attention over depth: a sublayer reads a softmax-weighted mean of earlier outputs (Attention Residuals, eq. 2-4).

    logit_i = (query * norm_weight) . v_i / rms(v_i)        h = sum_i softmax(logit)_i v_i

`attn_res_mix` does it in one go. `attn_res_begin` and `attn_res_finish` split it: the finished blocks are read once
for all sublayers of the coming block, and the running partial sum is merged in afterwards by online softmax.
`attn_res_mix_norm` and `attn_res_finish_norm` go on with the RMS norm of the next sublayer.

Shapes:  n sources  S queries  D channels  ... any leading shape (batch, time)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attn_res_mix(sources: Sequence[Tensor], query: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    """Mixes the sources, per token, with softmax weights from one learned query.

    Args:
        sources: n tensors [..., D].
        query: [D], zero at initialisation (then the result is the plain mean).
        norm_weight: [D], weight of the RMS norm on the keys; the values are the raw sources.
        eps: added to the mean square.

    Returns:
        [..., D] in the dtype of the sources; fp32 inside.

    Raises:
        ValueError: without a source.
    """
    if not sources:
        raise ValueError("attn_res_mix needs at least one source.")
    if torch.is_grad_enabled():
        return _Mix.apply(query, norm_weight, eps, *sources)  # type: ignore[return-value]
    return _mix(torch.stack(list(sources)), query, norm_weight, eps)[0].to(sources[0].dtype)


def attn_res_mix_norm(
    sources: Sequence[Tensor],
    query: Tensor,
    norm_weight: Tensor,
    eps: float,
    out_weight: Tensor,
    out_eps: float,
) -> Tensor:
    """`attn_res_mix` and the RMS norm that stands before the next sublayer.

    Args:
        sources, query, norm_weight, eps: as in `attn_res_mix`.
        out_weight: [D], weight of the norm of the result. out_eps: added to its mean square.

    Returns:
        [..., D] in the dtype of the sources; the norm is fp32 inside.

    Raises:
        ValueError: without a source.
    """
    return _rms_norm(attn_res_mix(sources, query, norm_weight, eps), out_weight, out_eps, sources[0].dtype)


def attn_res_begin(
    sources: Sequence[Tensor], queries: Tensor, norm_weights: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """First phase: the finished blocks against all queries of the coming block.

    Args:
        sources: n tensors [..., D]. queries, norm_weights: [S, D]. eps: added to the mean square.

    Returns:
        Unnormalised sums [S, ..., D], and the running maxima and sums of exponentials of the softmax, both [S, ...].
    """
    stacked = _inner(torch.stack(list(sources)))
    folded = (queries * norm_weights).to(stacked.dtype)
    logits = torch.einsum("n...d,sd->sn...", stacked, folded) * _inverse_rms(stacked, eps)
    peak = logits.amax(1)
    weights = (logits - peak[:, None]).exp()
    return torch.einsum("sn...,n...d->s...d", weights, stacked), peak, weights.sum(1)


def attn_res_finish(
    mixed: Tensor, peak: Tensor, total: Tensor, partial: Tensor | None, query: Tensor, norm_weight: Tensor, eps: float
) -> Tensor:
    """Second phase: merges the block's partial sum into one slice of `attn_res_begin`.

    Args:
        mixed: [..., D]. peak, total: [...]. partial: [..., D], or None for the first sublayer of a block.
        query, norm_weight: [D], those of the slice. eps: added to the mean square.

    Returns:
        [..., D], fp32, equal to `attn_res_mix` of all sources.
    """
    if partial is None:
        return mixed / total[..., None]
    last = _inner(partial)
    logit = (last @ (query * norm_weight).to(last.dtype)) * _inverse_rms(last, eps)
    top = torch.maximum(peak, logit)
    old, new = (peak - top).exp(), (logit - top).exp()
    return (old[..., None] * mixed + new[..., None] * last) / (old * total + new)[..., None]


def attn_res_finish_norm(
    mixed: Tensor,
    peak: Tensor,
    total: Tensor,
    partial: Tensor | None,
    query: Tensor,
    norm_weight: Tensor,
    eps: float,
    out_weight: Tensor,
    out_eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`attn_res_finish` and the RMS norm that stands before the next sublayer.

    Args:
        mixed, peak, total, partial, query, norm_weight, eps: as in `attn_res_finish`.
        out_weight: [D], weight of the norm of the result. out_eps: added to its mean square.
        dtype: of the result; None is that of mixed.

    Returns:
        [..., D] in `dtype`.
    """
    result = attn_res_finish(mixed, peak, total, partial, query, norm_weight, eps)
    return _rms_norm(result, out_weight, out_eps, dtype or mixed.dtype)


class _Mix(torch.autograd.Function):
    """Keeps the sources themselves and two numbers per source and token; the stacked copy is rebuilt in backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, norm_weight: Tensor, eps: float, *sources: Tensor) -> Tensor:  # type: ignore[override]
        out, weights, inverse_rms = _mix(torch.stack(sources), query, norm_weight, eps)
        ctx.save_for_backward(query, norm_weight, weights, inverse_rms, *sources)
        return out.to(sources[0].dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, norm_weight, weights, inverse_rms, *sources = ctx.saved_tensors
        V = _inner(torch.stack(sources))  # [n, ..., D]
        dout = dout.to(V.dtype)
        folded = (query * norm_weight).to(V.dtype)
        keys = V * inverse_rms[..., None]
        dweights = (V * dout).sum(-1)
        dlogits = weights * (dweights - (weights * dweights).sum(0))
        dfolded = torch.einsum("nr,nrd->d", dlogits.flatten(1), keys.flatten(1, -2))
        unit = (keys @ folded) / V.shape[-1]
        dV = folded - keys * unit[..., None]
        dV = dV.mul_((dlogits * inverse_rms)[..., None]).add_(weights[..., None] * dout)
        return (
            (dfolded * norm_weight).to(query.dtype),
            (dfolded * query).to(norm_weight.dtype),
            None,
            *(d.to(s.dtype) for d, s in zip(dV.unbind(0), sources, strict=True)),
        )


def _mix(stacked: Tensor, query: Tensor, norm_weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Stacked sources [n, ..., D] -> mixed [..., D], softmax weights [n, ...], inverse RMS [n, ...]."""
    V = _inner(stacked)
    inverse_rms = _inverse_rms(V, eps)
    weights = torch.softmax((V @ (query * norm_weight).to(V.dtype)).mul_(inverse_rms), 0)
    if weights.numel() == weights.shape[0]:  # one token: a single product beats two passes
        return torch.mv(V.view(V.shape[0], -1).t(), weights.flatten()).view(V.shape[1:]), weights, inverse_rms
    return (V * weights[..., None]).sum(0), weights, inverse_rms


def _rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    x = _inner(x)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return x.square().sum(-1).mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()


def _inner(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
