"""Mixture of experts in Triton: the twin of `reference.py`, with the same functions and results.

    logits ─► route ─► indices, weights
    indices ─► place (counting sort) ─► up: gather, gate, up, SwiGLU, weight ─► down ─► sum of k rows per token

The weight is applied to the hidden row, before the down product, so un-permutation is a plain sum of k rows and the
gradient of the weight needs no output row. Backward keeps x and gate_up [R, 2 * I]; hidden rows are made again.
Nothing depends on values on the device: buffers and grids follow from shapes, empty experts cost nothing.

FLOPs: 6 R D I forward, 12 R D I backward. Bytes forward, b bytes a number: b (N D + 3 E D I + 2 R I + 2 R D + N D).
Floor at 16,384 tokens, 64 experts top 8, 2304 -> 1024: 1.86 TFLOP, 2.6 ms at 706 TFLOP/s.
The products run on our kernels, or, where ENGINES says so and shapes allow, on torch's `grouped_mm`.

Shapes:  N tokens  D width  E experts  k experts per token  I expert width  R = N * k routed rows
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_mm.kernels.moe import reference
from kimi_mm.kernels.moe import triton_gemm as gemm
from kimi_mm.kernels.moe import triton_route as routing
from kimi_mm.kernels.moe import triton_tma as tma
from kimi_mm.kernels.moe.triton_rows import (
    Places,
    gather_rows,
    place_rows,
    sum_rows,
    swiglu,
    swiglu_backward,
    tile_bound,
)
from kimi_mm.kernels.operator import operator

# Who multiplies when experts are wide and of 16 bits, on Hopper: "triton" (triton_gemm, as everywhere else), "tma"
# (triton_tma), or "torch" (grouped_mm with our kernels around it; bf16 alone, "tma" or "triton" otherwise).
ENGINES = {"up": "tma", "down": "torch", "dhidden": "tma", "dx": "torch", "dweight": "torch"}
CHOICES = {kind: ("triton", "torch") if kind == "dweight" else ("triton", "tma", "torch") for kind in ENGINES}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    """Picks experts per token (DeepSeek-V3, section 2.1.2), in one kernel; see `reference.moe_route`.

    Float64, and more than 1024 experts, take the reference.

    Args:
        logits: [N, E].
        bias: [E], added for the choice only.
        top_k: experts per token.
        num_groups, top_groups: experts form equal groups, of which the best ones stay.
        normalize: divides the k weights by their sum + 1e-20.
        scaling: factor on the weights.

    Returns:
        indices [N, k] int64, best first, and weights [N, k] in the dtype of the logits.

    Raises:
        ValueError: if shapes, dtypes, devices or numbers of experts do not fit together.
    """
    if logits.ndim != 2 or bias.shape != logits.shape[1:]:
        raise ValueError(f"logits {_s(logits)} must be [N, E] and bias {_s(bias)} [E].")
    E = logits.shape[1]
    if num_groups < 1 or E % num_groups or not 1 <= top_groups <= num_groups:
        raise ValueError(
            f"{E} experts do not form num_groups={num_groups} groups of which top_groups={top_groups} stay."
        )
    if not 1 <= top_k <= top_groups * (E // num_groups):
        raise ValueError(
            f"top_k={top_k} must lie in [1, {top_groups * (E // num_groups)}], the experts to choose from."
        )
    if torch.float64 in (logits.dtype, bias.dtype) or E > routing.MAX_EXPERTS:
        options = {"num_groups": num_groups, "top_groups": top_groups, "normalize": normalize, "scaling": scaling}
        return reference.moe_route(logits, bias, top_k, **options)
    _check_tensors({"logits": logits, "bias": bias})
    return _route(logits.contiguous(), bias.detach().contiguous(), top_k, num_groups, top_groups, normalize, scaling)


def moe_experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Applies the picked SwiGLU experts and sums their outputs with the given weights; see `reference.moe_experts`.

    Float64 takes the reference. Indices are trusted to lie in [0, E): they are not read back.

    Args:
        x: [N, D].
        indices: [N, k] int64. weights: [N, k].
        gate_up: [E, 2 * I, D], gate rows first. down: [E, D, I].

    Returns:
        [N, D] in the dtype of x (under autocast, of autocast).

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.
    """
    if x.ndim != 2 or indices.ndim != 2 or indices.shape[0] != x.shape[0] or weights.shape != indices.shape:
        raise ValueError(
            f"x {_s(x)} must be [N, D], indices {_s(indices)} [N, k] and weights {_s(weights)} [N, k], with one N."
        )
    E, D, I = down.shape if down.ndim == 3 else (0, 0, 0)
    if not E or x.shape[1] != D or gate_up.shape != (E, 2 * I, D):
        raise ValueError(
            f"gate_up {_s(gate_up)} must be [E, 2 * I, {x.shape[1]}] and down {_s(down)} [E, {x.shape[1]}, I]."
        )
    if indices.dtype != torch.int64:
        raise ValueError(f"indices must be int64, got {indices.dtype}.")
    autocast = torch.is_autocast_enabled(x.device.type)  # unlike precision.autocast_enabled, torch.compile follows it
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if dtype == torch.float64:
        return reference.moe_experts(x, indices, weights, gate_up, down)
    if not autocast and not x.dtype == gate_up.dtype == down.dtype:
        raise ValueError(f"x {x.dtype}, gate_up {gate_up.dtype} and down {down.dtype} must share one dtype.")
    _check_tensors({"x": x, "weights": weights, "gate_up": gate_up, "down": down, "indices": indices})
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, gate_up, down))
    inputs = (t.contiguous() for t in (x, indices, weights, gate_up, down))
    return _experts(*inputs, dtype, keep)[0]


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the others on {device}; move them to one device.")
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; float32, float16 and bfloat16 are possible.")


def _s(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


@operator("kimi_mm::moe_route")
def _route(
    logits: Tensor, bias: Tensor, top_k: int, num_groups: int, top_groups: int, normalize: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    return routing.route(logits, bias, top_k, num_groups, top_groups, normalize, scaling)


@_route.register_fake
def _(
    logits: Tensor, bias: Tensor, top_k: int, num_groups: int, top_groups: int, normalize: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape)


@operator("kimi_mm::moe_route_backward")
def _route_backward(logits: Tensor, indices: Tensor, dweights: Tensor, normalize: bool, scaling: float) -> Tensor:
    return routing.route_backward(logits, indices, dweights, normalize, scaling)


@_route_backward.register_fake
def _(logits: Tensor, indices: Tensor, dweights: Tensor, normalize: bool, scaling: float) -> Tensor:
    return torch.empty_like(logits)


def _keep_route(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[0])
    ctx.normalize, ctx.scaling = inputs[5:]
    ctx.mark_non_differentiable(output[0])


def _route_gradient(ctx: Any, _: Tensor | None, dweights: Tensor) -> tuple[Tensor | None, ...]:
    logits, indices = ctx.saved_tensors
    dlogits = _route_backward(logits, indices, dweights.contiguous(), ctx.normalize, ctx.scaling)
    return (dlogits, *[None] * 6)


_route.register_autograd(_route_gradient, setup_context=_keep_route)


@operator("kimi_mm::moe_experts")
def _experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output; then, for backward, gate and up before the activation, and the four tensors of `Places`."""
    E, D, I = down.shape
    k, R = indices.shape[1], indices.numel()
    if not R:
        empty = indices.new_empty(0, dtype=torch.int32)
        out, saved = x.new_zeros(x.shape, dtype=dtype), x.new_empty(0, 2 * I, dtype=dtype)
        return out, saved, empty, empty.clone(), empty.clone(), empty.new_empty(1)
    config, engines = _plan(R, E, D, I, dtype, x.device)
    places = place_rows(indices, E, config["rows"]["BM"])
    gate_up, down = _cast(gate_up, down, dtype)
    if engines["up"] == "torch":
        rows = gather_rows(x, places.source, k, dtype)
        saved = F.grouped_mm(rows, gate_up.mT, offs=places.ends)
        hidden = swiglu(saved, weights, places.source)
        saved = saved if keep else saved.new_empty(0, 2 * I)
    elif engines["up"] == "tma":
        hidden, saved = tma.up(x.to(dtype), weights, gate_up, places, config["rows"]["BM"], keep)
    else:
        hidden, saved = gemm.up(x, weights, gate_up, places, config, keep)
    if engines["down"] == "torch":
        rows = F.grouped_mm(hidden, down.mT, offs=places.ends)
    elif engines["down"] == "tma":
        rows = tma.plain(hidden, down, places, config["rows"]["BM"], "down", True)
    else:
        rows = gemm.plain(hidden, down, places, config, "down", True)
    return sum_rows(rows, places.slots, k, dtype), saved, places.slots, places.source, places.ends, places.tiles


@_experts.register_fake
def _(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    E, D, I = down.shape
    R = indices.numel()
    rows = _plan(R, E, D, I, dtype, x.device)[0]["rows"]["BM"]
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(R if keep else 0, 2 * I, dtype=dtype),
        indices.new_empty(R, dtype=torch.int32),
        indices.new_empty(R, dtype=torch.int32),
        indices.new_empty(E if R else 0, dtype=torch.int32),
        indices.new_empty(3 * tile_bound(R, E, rows) + 1, dtype=torch.int32),
    )


@operator("kimi_mm::moe_experts_backward")
def _experts_backward(
    dout: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    saved: Tensor,
    slots: Tensor,
    source: Tensor,
    ends: Tensor,
    tiles: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, gate_up and down."""
    E, D, I = down.shape
    k, R = weights.shape[1], weights.numel()
    if not R:
        return torch.zeros_like(x), torch.zeros_like(weights), torch.zeros_like(gate_up), torch.zeros_like(down)
    types = gate_up.dtype, down.dtype
    places = Places(slots, source, ends, tiles)
    config, engines = _plan(R, E, D, I, saved.dtype, x.device)
    gate_up, down = _cast(gate_up, down, saved.dtype)
    parts = None
    drows = None
    if "torch" in (engines["dhidden"], engines["dweight"]):
        drows = gather_rows(dout, source, k, saved.dtype)
    if engines["dhidden"] == "torch":
        assert drows is not None
        dhidden = F.grouped_mm(drows, down, offs=ends)
        dgate_up, hidden, dweights = swiglu_backward(dhidden, saved, weights, source)
    else:
        dweights = torch.empty_like(weights)
        if engines["dhidden"] == "tma":
            rows = config["rows"]["BM"]
            dgate_up, hidden, parts = tma.dhidden(dout, weights, saved, down, places, rows)
        else:
            dgate_up, hidden, parts = gemm.dhidden(dout, weights, saved, down, places, config)
    if engines["dweight"] == "torch":
        assert drows is not None
        ddown = F.grouped_mm(drows.mT, hidden, offs=ends).to(types[1])
        del drows
        ins = gather_rows(x, source, k, saved.dtype)
        dgate = F.grouped_mm(dgate_up.mT, ins, offs=ends).to(types[0])
        del ins
    else:
        ddown = gemm.dweight(dout, hidden, places, config, types[1], gather_a=k)
        dgate = gemm.dweight(dgate_up, x, places, config, types[0], gather_b=k)
    if engines["dx"] == "torch":
        rows = F.grouped_mm(dgate_up, gate_up, offs=ends)
    elif engines["dx"] == "tma":
        rows = tma.plain(dgate_up, gate_up, places, config["rows"]["BM"], "dx", False)
    else:
        rows = gemm.plain(dgate_up, gate_up, places, config, "dx", False)
    dx = sum_rows(rows, slots, k, x.dtype, parts, dweights)
    return dx, dweights, dgate, ddown


@_experts_backward.register_fake
def _(
    dout: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    saved: Tensor,
    slots: Tensor,
    source: Tensor,
    ends: Tensor,
    tiles: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weights), torch.empty_like(gate_up), torch.empty_like(down)


def _keep_experts(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, _, weights, gate_up, down = inputs[:5]
    ctx.save_for_backward(x, weights, gate_up, down, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _experts_gradient(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 7
    dx, dweights, dgate_up, ddown = _experts_backward(dout.contiguous(), *ctx.saved_tensors)
    return dx, None, dweights, dgate_up, ddown, None, None


_experts.register_autograd(_experts_gradient, setup_context=_keep_experts)


def _plan(
    R: int, E: int, D: int, I: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Block sizes and engines for a problem."""
    name = gemm.size_class(R, E, D, I, dtype, device)
    if name != "wide":
        return gemm.CONFIGS[name], dict.fromkeys(ENGINES, "triton")
    if dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):
        return gemm.CONFIGS[name], ENGINES
    return gemm.CONFIGS[name], {kind: "tma" if "tma" in CHOICES[kind] else "triton" for kind in ENGINES}


def _cast(gate_up: Tensor, down: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both matrices in `dtype`, by one launch where a copy is needed."""
    if gate_up.dtype == dtype and down.dtype == dtype:
        return gate_up, down
    copies = [torch.empty_like(gate_up, dtype=dtype), torch.empty_like(down, dtype=dtype)]
    torch._foreach_copy_(copies, [gate_up, down])  # pyright: ignore[reportPrivateImportUsage]
    return copies[0], copies[1]
