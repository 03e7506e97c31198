"""Cross entropy of a linear head in Triton: the twin of `reference.py`, with the same function and results.

    per chunk of C rows:  z = x W^T (fp32) ─► one kernel: loss, and z overwritten by dloss/dz ─► dx = dz W, dW += dz^T x

The products are cuBLAS's, with fp32 logits from 16-bit operands; the kernel between them reads a row twice (the second
time from cache) and writes its gradient into the memory of its logits. Gradients are kept undivided by the number of
labels, which stays on the device, until backward.

FLOPs: 6 N V D (2 N V D without gradients). Bytes per logit: 4 + 4 + b written and read by the products, 4 b in all for
gradients of b bytes. Memory beyond inputs and gradients: one chunk, 4 C V bytes, and dW in fp32. Floor: 6 N V D over
the matmul rate; 16,384 rows, V 163,840, D 2304: 37 TFLOP, 53 ms at 706 TFLOP/s. A chunk small enough for the L2 cache
(V up to about 8000) hides most bytes as well.

Shapes:  N rows  D width  V vocabulary  C rows of a chunk
"""

# A type checker takes kernels for Python functions and does not know what a launch adds to their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_mm.kernels.cross_entropy import reference
from kimi_mm.kernels.launch import on_device
from kimi_mm.kernels.operator import operator

# The rows of a chunk: enough logits for the products, and so many rows that adding to dW costs little beside them.
CONFIGS = {"chunk": {"logits": 2**23, "rows": 1024}, "loss": {"BLOCK": 4096, "num_warps": 8}}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Mean cross entropy of softmax(hidden @ weight.T) against the labels; see `reference.linear_cross_entropy`.

    Float64 takes the reference. Labels other than -100 are trusted to lie in [0, V); others make the loss NaN.

    Args:
        hidden: [N, D]. weight: [V, D]. labels: [N] int64, -100 to ignore a row.
        label_smoothing: share of the target spread evenly over the vocabulary, in [0, 1).
        z_loss: factor on the squared log of the softmax's denominator.
        softcap: squashes logits to (-softcap, softcap) by tanh; None leaves them alone.

    Returns:
        loss, a scalar in fp32; 0 without a label.

    Raises:
        ValueError: if shapes, dtypes, devices or factors do not fit.
    """
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
    reference.check(hidden, weight, labels, label_smoothing, z_loss, softcap)
    dtype = reference.compute_dtype(hidden, weight)
    if dtype == torch.float64:
        return reference.linear_cross_entropy(hidden, weight, labels, **options)
    if not hidden.device == weight.device == labels.device:
        raise ValueError(
            f"hidden on {hidden.device}, weight on {weight.device} and labels on {labels.device} must meet."
        )
    if hidden.dtype not in DTYPES or weight.dtype not in DTYPES:
        raise ValueError(f"hidden {hidden.dtype} and weight {weight.dtype} must be float32, float16 or bfloat16.")
    grad = torch.is_grad_enabled()
    inputs = (hidden.contiguous(), weight.contiguous(), labels.contiguous())
    wanted = (grad and hidden.requires_grad, grad and weight.requires_grad)
    return _linear_cross_entropy(*inputs, label_smoothing, z_loss, softcap or 0.0, dtype, *wanted)[0]


@operator("kimi_mm::linear_cross_entropy")
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss; number of labels; gradients of the summed loss, empty where not needed."""
    N, D = hidden.shape
    V = weight.shape[0]
    new = {"dtype": torch.float32, "device": hidden.device}
    count = (labels != reference.IGNORE).sum().clamp_min(1).float()
    dhidden = torch.empty(N if need_hidden else 0, D, dtype=hidden.dtype, device=hidden.device)
    total_dweight = torch.zeros(V if need_weight else 0, D, **new)
    if not N:
        return torch.zeros((), **new), count, dhidden, total_dweight.to(weight.dtype)
    table = weight.to(dtype)
    C = min(N, max(CONFIGS["chunk"]["rows"], CONFIGS["chunk"]["logits"] // V, D))
    logits = torch.empty(C, V, **new)
    losses = torch.empty(N, **new)
    for start in range(0, N, C):
        x = hidden[start : start + C].to(dtype)
        z = logits[: x.shape[0]]
        _multiply(x, table.t(), z)
        # The gradient of a row takes the first bytes of its logits.
        dz = z.view(dtype)[:, :V]
        _launch(z, dz, labels[start:], losses[start:], label_smoothing, z_loss, softcap, need_hidden or need_weight)
        if need_hidden:
            _multiply(dz, table, dhidden[start : start + C])
        if need_weight:
            _multiply(dz.t(), x, total_dweight, add=True)
    return losses.sum() / count, count, dhidden, total_dweight.to(weight.dtype)


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scalar = hidden.new_empty((), dtype=torch.float32)
    dhidden = hidden.new_empty(hidden.shape[0] if need_hidden else 0, hidden.shape[1])
    return scalar, scalar.clone(), dhidden, weight.new_empty(weight.shape[0] if need_weight else 0, weight.shape[1])


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.needed = inputs[7:]
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    count, dhidden, dweight = ctx.saved_tensors
    factor = dloss / count
    need_hidden, need_weight = ctx.needed
    return (dhidden * factor if need_hidden else None, dweight * factor if need_weight else None, *[None] * 7)


_linear_cross_entropy.register_autograd(_gradients, setup_context=_keep)


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, in the dtype of `out` without rounding to that of the operands first."""
    if out.dtype != a.dtype and not a.is_cuda:
        a, b = a.to(out.dtype), b.to(out.dtype)
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _launch(
    z: Tensor,
    dz: Tensor,
    labels: Tensor,
    losses: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    gradient: bool,
) -> None:
    rows, V = z.shape
    with on_device(z):
        _loss_kernel[(rows,)](
            z,
            dz,
            labels,
            losses,
            V,
            z.stride(0),
            dz.stride(0),
            label_smoothing,
            z_loss,
            softcap,
            SOFTCAP=softcap > 0.0,
            GRADIENT=gradient,
            IGNORE=reference.IGNORE,
            BLOCK=min(CONFIGS["loss"]["BLOCK"], triton.next_power_of_2(V)),
            num_warps=CONFIGS["loss"]["num_warps"],
        )


@triton.jit
def _logits(z, v, V, softcap, SOFTCAP: tl.constexpr):
    x = tl.load(z + v, mask=v < V, other=float("-inf"))
    if SOFTCAP:
        squashed = 1.0 - 2.0 / (tl.exp(2.0 / softcap * x) + 1.0)  # tanh, right at both infinities
        x = tl.where(v < V, squashed * softcap, float("-inf"))
    return x


@triton.jit
def _loss_kernel(
    z,
    dz,
    labels,
    losses,
    V,
    z_stride,
    dz_stride,
    label_smoothing,
    z_loss,
    softcap,
    SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its loss, and its gradient over its logits. `dz` may share the memory of `z`."""
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    dz += row * dz_stride
    label = tl.load(labels + row)
    lane = tl.arange(0, BLOCK)
    if label == IGNORE:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for start in range(0, V, BLOCK):
                v = start + lane
                tl.store(dz + v, tl.zeros((BLOCK,), tl.float32), mask=v < V)
        return
    peak = float("-inf")
    total = 0.0
    plain = 0.0
    right = float("nan")
    for start in range(0, V, BLOCK):
        v = start + lane
        x = _logits(z, v, V, softcap, SOFTCAP)
        top = tl.maximum(peak, tl.max(x, 0))
        total = total * tl.exp(peak - top) + tl.sum(tl.exp(x - top), 0)
        peak = top
        plain += tl.sum(tl.where(v < V, x, 0.0), 0)
        hit = (v == label) & (v < V)
        right = tl.where(tl.max(hit.to(tl.int32), 0) > 0, tl.sum(tl.where(hit, x, 0.0), 0), right)
    lse = peak + tl.log(total)
    loss = lse - (1.0 - label_smoothing) * right - label_smoothing * (plain / V) + z_loss * lse * lse
    tl.store(losses + row, loss)
    if GRADIENT:
        factor = 1.0 + 2.0 * z_loss * lse
        for start in range(0, V, BLOCK):
            v = start + lane
            x = _logits(z, v, V, softcap, SOFTCAP)
            d = tl.exp(x - lse) * factor - label_smoothing / V
            d = tl.where(v == label, d - (1.0 - label_smoothing), d)
            if SOFTCAP:
                d *= 1.0 - (x / softcap) * (x / softcap)
            # Narrow gradients land on logits of this block or earlier ones, which all threads must have read by now.
            tl.debug_barrier()
            tl.store(dz + v, d, mask=v < V)
