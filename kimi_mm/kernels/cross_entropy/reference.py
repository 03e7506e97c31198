"""Cross entropy of a linear head over a large vocabulary, without ever holding all logits.

    z = hidden W^T, or c tanh(hidden W^T / c)            lse = log sum_v exp z_v
    loss = (1 - s) (lse - z_label) + s (lse - mean_v z_v) + a lse^2         averaged over the rows with a label
    dloss/dz_v = p_v (1 + 2 a lse) - (1 - s) [v = label] - s / V

Logits live in chunks of rows. Their gradients are known as soon as they are, so the products that make the gradients
of hidden and weight follow at once, and no logit is computed twice. The memory is one chunk, and the gradients.

Shapes:  N rows  D width  V vocabulary  C rows of a chunk
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_mm.kernels.precision import without_autocast

IGNORE = -100
CHUNK_LOGITS = 2**21  # 8 MiB in fp32: a chunk stays near the caches


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Mean cross entropy of softmax(hidden @ weight.T) against the labels.

    Equals `F.cross_entropy(F.linear(hidden, weight), labels, label_smoothing=...)`, except that it is 0 rather than
    NaN without a single label. On a GPU nothing is read back.

    Args:
        hidden: [N, D].
        weight: [V, D].
        labels: [N] int64; rows with -100 count neither in the loss nor in the mean.
        label_smoothing: share of the target spread evenly over the vocabulary, in [0, 1).
        z_loss: factor on the squared log of the softmax's denominator.
        softcap: squashes logits to (-softcap, softcap) by tanh; None leaves them alone.

    Returns:
        loss, a scalar in fp32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, dtypes or factors do not fit.
    """
    check(hidden, weight, labels, label_smoothing, z_loss, softcap)
    dtype = compute_dtype(hidden, weight)
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with without_autocast(hidden.device):
        options = (label_smoothing, z_loss, softcap, dtype)
        if not keep:
            return _loss(hidden, weight, labels, None, None, *options)[0]
        return _LinearCrossEntropy.apply(hidden, weight, labels, *options)  # type: ignore[return-value]


def check(
    hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float, z_loss: float, softcap: float | None
) -> None:
    """Raises ValueError where the arguments of `linear_cross_entropy` contradict each other."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        shapes = [list(t.shape) for t in (hidden, weight, labels)]
        raise ValueError(f"hidden {shapes[0]} must be [N, D], weight {shapes[1]} [V, D] and labels {shapes[2]} [N].")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}.")
    if not 0.0 <= label_smoothing < 1.0 or z_loss < 0.0 or (softcap is not None and softcap <= 0.0):
        raise ValueError(
            f"label_smoothing={label_smoothing} must lie in [0, 1), z_loss={z_loss} must not be negative and "
            f"softcap={softcap} must be None or positive."
        )


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's, or the one that both share."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden {hidden.dtype} and weight {weight.dtype} must share one dtype outside of autocast.")
    return hidden.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps both gradients, up to the factor that arrives from above."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, *options: Any
    ) -> Tensor:
        inner = _inner(options[-1])
        dhidden = torch.zeros_like(hidden, dtype=inner) if hidden.requires_grad else None
        dweight = torch.zeros_like(weight, dtype=inner) if weight.requires_grad else None
        loss, count = _loss(hidden, weight, labels, dhidden, dweight, *options)
        ctx.save_for_backward(
            count, *(d.to(t.dtype) for d, t in ((dhidden, hidden), (dweight, weight)) if d is not None)
        )
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        count, *kept = ctx.saved_tensors
        gradients = iter([gradient * (dloss / count) for gradient in kept])
        return (*(next(gradients) if needed else None for needed in ctx.needs_input_grad[:2]), *[None] * 5)


def _loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Mean loss and number of labels; adds the gradients of their sum to `dhidden` and `dweight`."""
    inner = _inner(dtype)
    V = weight.shape[0]
    count = (labels != IGNORE).sum().clamp_min(1).to(inner)
    # A CPU may leave rows out; elsewhere their number would have to be read back.
    rows = (labels != IGNORE).nonzero().squeeze(1) if labels.device.type == "cpu" else None
    table = weight.detach().to(dtype)
    total = torch.zeros((), dtype=inner, device=hidden.device)
    N = hidden.shape[0] if rows is None else rows.shape[0]
    C = max(1, min(N, max(16, CHUNK_LOGITS // max(1, V))))
    for start in range(0, N, C):
        part = slice(start, start + C) if rows is None else rows[start : start + C]
        x, label = hidden.detach()[part].to(dtype), labels[part]
        shown = (label != IGNORE).to(inner)[:, None]
        label = label.clamp_min(0)[:, None] if rows is None else label[:, None]
        z = (x @ table.t()).to(inner)
        if softcap is not None:
            z = z.div_(softcap).tanh_().mul_(softcap)
        lse = z.logsumexp(1, keepdim=True)
        losses = lse - (1.0 - label_smoothing) * z.gather(1, label)
        if label_smoothing:
            losses -= label_smoothing * z.mean(1, keepdim=True)
        if z_loss:
            losses += z_loss * lse.square()
        total += (losses * shown).sum()
        if dhidden is None and dweight is None:
            continue
        slope = None if softcap is None else 1.0 - (z / softcap).square_()
        z = z.sub_(lse).exp_()
        if z_loss:
            z *= 1.0 + 2.0 * z_loss * lse
        if label_smoothing:
            z -= label_smoothing / V
        z.scatter_add_(1, label, torch.full_like(lse, label_smoothing - 1.0))
        if slope is not None:
            z *= slope
        if rows is None:
            z *= shown
        z = z.to(dtype)
        if dhidden is not None:
            dhidden[part] = (z @ table).to(inner)
        if dweight is not None:
            if dtype == inner:
                dweight.addmm_(z.t(), x)
            else:
                dweight += z.t() @ x
    return total / count, count


def _inner(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
