"""Mixture of experts in plain PyTorch: sigmoid routing with a selection bias, and SwiGLU experts by grouped products.

    logits ─► sigmoid ─► + bias (choice only) ─► groups ─► top k ─► weights ─► experts, sorted by id ─► weighted sum

DeepSeek-V3, section 2.1.2; Kimi K2 and Kimi Linear use the same router. No path on a GPU reads anything back.

Shapes:  N tokens  D width  E experts  k experts per token  I expert width  R = N * k routed rows
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_mm.kernels.precision import autocast_enabled, without_autocast

FEW_ROWS = 4  # up to here picking experts one by one costs less than sorting


def moe_route(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    *,
    num_groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Picks experts per token.

    Args:
        logits: [N, E], fp32.
        bias: [E], added for the choice only; it never weighs an output.
        top_k: experts per token.
        num_groups, top_groups: experts form `num_groups` equal groups; only the `top_groups` with the largest sum of
            their two best choices stay.
        normalize: divides the k weights by their sum + 1e-20.
        scaling: factor on the weights.

    Returns:
        indices [N, k] int64 in no particular order, and weights [N, k].
    """
    scores = logits.sigmoid()
    choice = scores.detach() + bias
    if num_groups > 1:
        grouped = choice.view(choice.shape[0], num_groups, -1)
        best = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(top_groups, -1).indices, True)
        choice = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)
    indices = choice.topk(top_k, -1, sorted=False).indices
    weights = scores.gather(1, indices)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return indices, weights * scaling if scaling != 1.0 else weights


def moe_experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Applies the picked SwiGLU experts to every token and sums their outputs with the given weights.

    Args:
        x: [N, D].
        indices: [N, k] int64. weights: [N, k].
        gate_up: [E, 2 * I, D], gate rows first. down: [E, D, I].

    Returns:
        [N, D] in the dtype of x (under autocast, of autocast).
    """
    if autocast_enabled(x.device):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
    with without_autocast(x.device):
        weights = weights.to(x.dtype)
        if x.device.type == "cpu" and 0 < indices.numel() <= FEW_ROWS and not torch.is_grad_enabled():
            return _one_by_one(x, indices, weights, gate_up, down)
        if x.device.type != "cpu" and not _can_group(x, gate_up, down):
            return _all_experts(x, indices, weights, gate_up, down)
        return _sorted_experts(x, indices, weights, gate_up, down)


def _sorted_experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    N, k = indices.shape
    ids, order = indices.flatten().sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(gate_up.shape[0], device=ids.device), right=True, out_int32=True)
    # index_select: the backward of advanced indexing sorts, this one adds.
    rows = x.index_select(0, order // k)  # [R, D]
    if _can_group(x, gate_up, down):
        hidden = _swiglu(F.grouped_mm(rows, gate_up.mT, offs=ends))
        out = F.grouped_mm(hidden, down.mT, offs=ends)
    else:
        sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        parts = [
            F.linear(_swiglu(F.linear(part, gate_up[e])), down[e])
            for e, part in enumerate(rows.split(sizes))
            if sizes[e]
        ]
        out = torch.cat(parts) if parts else rows
    back = torch.empty_like(order).scatter_(0, order, torch.arange(N * k, device=order.device))
    return (out[back].view(N, k, x.shape[1]) * weights[..., None]).sum(1)


def _one_by_one(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """A handful of matrix-vector products, for decoding: no sort, no gather, few operations."""
    out = torch.zeros_like(x)
    for row, total, picked, shares in zip(x.unbind(0), out.unbind(0), indices.tolist(), weights.tolist(), strict=True):
        for expert, share in zip(picked, shares, strict=True):
            hidden = _swiglu(torch.mv(gate_up.select(0, expert), row))
            total.addmv_(down.select(0, expert), hidden, alpha=share)
    return out


def _all_experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Every expert on every token, masked by weight: costs E / k times more, but fits any dtype without a readback."""
    dense = weights.new_zeros(x.shape[0], gate_up.shape[0]).scatter(1, indices, weights)  # [N, E]
    hidden = _swiglu(x @ gate_up.mT) * dense.t()[..., None]  # [E, N, I]
    return (hidden @ down.mT).sum(0)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def _can_group(x: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """`grouped_mm` wants rows of whole 16 bytes; on a GPU only its bf16 form works without a readback."""
    if not hasattr(F, "grouped_mm") or x.dtype != gate_up.dtype:  # older torch has no public grouped product
        return False
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    if x.device.type != "cpu" and x.dtype != torch.bfloat16:
        return False
    size = x.element_size()
    return x.shape[1] * size % 16 == 0 and down.shape[2] * size % 16 == 0 and x.shape[0] > 0
