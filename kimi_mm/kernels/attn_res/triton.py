"""Attention over depth in Triton: the twin of `reference.py`, for CUDA; the kernels are in `triton_mix.py`.

    attn_res_mix, attn_res_mix_norm ─► op kimi_mm::attn_res_mix ─► mix_kernel
                              backward ─► op kimi_mm::attn_res_mix_backward ─► mix_backward_kernel, sum_partials_kernel
    attn_res_begin                   ─► op kimi_mm::attn_res_begin ─► mix_kernel, all queries of a block
    attn_res_finish, _finish_norm    ─► op kimi_mm::attn_res_finish ─► finish_kernel

Shapes:  R tokens  n sources  S queries  D channels  ... any leading shape (batch, time)
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_mm.kernels.attn_res import reference
from kimi_mm.kernels.attn_res.triton_mix import finish_kernel, mix_backward_kernel, mix_kernel, sum_partials_kernel
from kimi_mm.kernels.launch import cdiv, check_tensors, on_device, power_of_two
from kimi_mm.kernels.operator import operator

# `elements`: most channels of a row that a thread holds. `held`: channels that all programs hold together, which
# bounds their number and with it the partial sums; they then take several tokens each. `queries`: of a program.
CONFIGS = {
    "forward": {"elements": 40, "held": 2**40, "num_stages": 3},
    "backward": {"elements": 40, "held": 660 * 2560, "num_stages": 3},
    "backward_many": {"elements": 24, "held": 396 * 3072, "num_stages": 3},
    "backward_norm": {"elements": 24, "held": 264 * 3072, "num_stages": 3},
    "begin": {"elements": 24, "queries": 2, "num_stages": 3},
    "finish": {"elements": 24},
    "sum": {"BR": 128, "BD": 32, "num_warps": 4},
}
MAX_SOURCES = 129
MAX_CHANNELS = 16384


def attn_res_mix(sources: Sequence[Tensor], query: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    """Mixes the sources, per token, with softmax weights from one learned query; see `reference.attn_res_mix`.

    Float64 takes the reference. The first source may differ in dtype from the others; should the others differ among
    themselves, they are cast to their common dtype first.

    Args:
        sources: 1 to 129 tensors [..., D].
        query: [D], zero at initialisation (then the result is the plain mean).
        norm_weight: [D], weight of the RMS norm on the keys; the values are the raw sources.
        eps: added to the mean square.

    Returns:
        [..., D] in the dtype of the first source; fp32 inside.

    Raises:
        ValueError: without a source, or if a shape, dtype or device does not fit.
    """
    if _needs_reference(sources):
        return reference.attn_res_mix(sources, query, norm_weight, eps)
    sources = _checked(sources, {"query": query, "norm_weight": norm_weight})
    keep = _train(*sources, query, norm_weight)
    return _mix(sources, query.contiguous(), norm_weight.contiguous(), eps, None, 0.0, keep)[0]


def attn_res_mix_norm(
    sources: Sequence[Tensor],
    query: Tensor,
    norm_weight: Tensor,
    eps: float,
    out_weight: Tensor,
    out_eps: float,
) -> Tensor:
    """`attn_res_mix` and the RMS norm that follows it, in one kernel; see `reference.attn_res_mix_norm`.

    Args:
        sources, query, norm_weight, eps: as in `attn_res_mix`.
        out_weight: [D], weight of the norm of the result. out_eps: added to its mean square.

    Returns:
        [..., D] in the dtype of the first source.

    Raises:
        ValueError: without a source, or if a shape, dtype or device does not fit.
    """
    if _needs_reference(sources):
        return reference.attn_res_mix_norm(sources, query, norm_weight, eps, out_weight, out_eps)
    sources = _checked(sources, {"query": query, "norm_weight": norm_weight, "out_weight": out_weight})
    keep = _train(*sources, query, norm_weight, out_weight)
    vectors = query.contiguous(), norm_weight.contiguous()
    return _mix(sources, *vectors, eps, out_weight.contiguous(), out_eps, keep)[0]


def attn_res_begin(
    sources: Sequence[Tensor], queries: Tensor, norm_weights: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """First phase: the finished blocks against all queries of the coming block; see `reference.attn_res_begin`.

    Float64, and a call that needs gradients, take the reference.

    Args:
        sources: 1 to 129 tensors [..., D]. queries, norm_weights: [S, D]. eps: added to the mean square.

    Returns:
        Unnormalised sums [S, ..., D], and the running maxima and sums of exponentials of the softmax, both [S, ...];
        all fp32.

    Raises:
        ValueError: without a source, or if a shape, dtype or device does not fit.
    """
    if _needs_reference(sources) or _train(*sources, queries, norm_weights):
        return reference.attn_res_begin(sources, queries, norm_weights, eps)
    if queries.dim() != 2:
        raise ValueError(f"queries is {list(queries.shape)} where [S, D] is expected.")
    S, D = queries.shape[0], sources[0].shape[-1]
    check_tensors(sources[0], {"queries": (queries, (S, D)), "norm_weights": (norm_weights, (S, D))})
    return _begin(_checked(sources, {}), queries.contiguous(), norm_weights.contiguous(), eps)


def attn_res_finish(
    mixed: Tensor, peak: Tensor, total: Tensor, partial: Tensor | None, query: Tensor, norm_weight: Tensor, eps: float
) -> Tensor:
    """Second phase: merges the block's partial sum into a slice of `attn_res_begin`; see `reference.attn_res_finish`.

    Float64, and a call that needs gradients, take the reference.

    Args:
        mixed: [..., D]. peak, total: [...]. partial: [..., D], or None for the first sublayer of a block.
        query, norm_weight: [D], those of the slice. eps: added to the mean square.

    Returns:
        [..., D], fp32, equal to `attn_res_mix` of all sources.

    Raises:
        ValueError: if a shape, dtype or device does not fit.
    """
    if mixed.dtype == torch.float64 or _train(mixed, peak, total, partial, query, norm_weight):
        return reference.attn_res_finish(mixed, peak, total, partial, query, norm_weight, eps)
    _check_finish(mixed, peak, total, partial, {"query": query, "norm_weight": norm_weight})
    return _finish(*_dense(mixed, peak, total, partial, query, norm_weight), eps, None, 0.0, torch.float32)


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
    """`attn_res_finish` and the RMS norm that follows it, in one kernel; see `reference.attn_res_finish_norm`.

    Args:
        mixed, peak, total, partial, query, norm_weight, eps: as in `attn_res_finish`.
        out_weight: [D], weight of the norm of the result. out_eps: added to its mean square.
        dtype: of the result; None is that of mixed.

    Returns:
        [..., D] in `dtype`.

    Raises:
        ValueError: if a shape, dtype or device does not fit.
    """
    if mixed.dtype == torch.float64 or _train(mixed, peak, total, partial, query, norm_weight, out_weight):
        return reference.attn_res_finish_norm(
            mixed, peak, total, partial, query, norm_weight, eps, out_weight, out_eps, dtype
        )
    _check_finish(mixed, peak, total, partial, {"query": query, "norm_weight": norm_weight, "out_weight": out_weight})
    tensors = _dense(mixed, peak, total, partial, query, norm_weight)
    return _finish(*tensors, eps, out_weight.contiguous(), out_eps, dtype or mixed.dtype)


@operator("kimi_mm::attn_res_mix")
def _mix(
    sources: Sequence[Tensor],
    query: Tensor,
    norm_weight: Tensor,
    eps: float,
    out_weight: Tensor | None,
    out_eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result; with `keep` logits and inverse RMS [2, R, n], and before a norm the mix itself."""
    first = sources[0]
    D, n = first.shape[-1], len(sources)
    R = first.numel() // D
    out = torch.empty_like(first)
    kept = torch.empty((2, R, n) if keep else (0,), dtype=torch.float32, device=first.device)
    hidden = torch.empty_like(first) if keep and out_weight is not None else first.new_empty(0)
    if R:
        rest, arity = _padded(sources)
        config = CONFIGS["forward"]
        chunks = _chunks(D, config["elements"])
        programs, steps = _share(R, config["held"], chunks)
        with on_device(first):
            mix_kernel[(programs, 1)](
                first, rest, query, norm_weight, out_weight, out, hidden, kept if keep else None, None, None,
                R, n, steps, programs, eps, out_eps,
                **chunks, STAGES=config["num_stages"], SB=1, ARITY=arity,
                NORM=out_weight is not None, KEEP=keep, WHOLE=True,
            )  # fmt: skip
    return out, kept, hidden


@_mix.register_fake
def _(
    sources: Sequence[Tensor],
    query: Tensor,
    norm_weight: Tensor,
    eps: float,
    out_weight: Tensor | None,
    out_eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    first = sources[0]
    shape = (2, first.numel() // first.shape[-1], len(sources)) if keep else (0,)
    hidden = torch.empty_like(first) if keep and out_weight is not None else first.new_empty(0)
    return torch.empty_like(first), first.new_empty(shape, dtype=torch.float32), hidden


@operator("kimi_mm::attn_res_mix_backward")
def _mix_backward(
    d_out: Tensor,
    sources: Sequence[Tensor],
    query: Tensor,
    norm_weight: Tensor,
    out_weight: Tensor | None,
    out_eps: float,
    kept: Tensor,
    hidden: Tensor,
) -> list[Tensor]:
    """Gradients of query, norm_weight, out_weight (empty without one) and every source."""
    first = sources[0]
    D, n = first.shape[-1], len(sources)
    R = first.numel() // D
    norm = out_weight is not None
    d_query, d_norm_weight = torch.empty_like(query), torch.empty_like(norm_weight)
    d_out_weight = query.new_empty(0) if out_weight is None else torch.empty_like(out_weight)
    d_sources = [torch.empty_like(s) for s in sources]
    rest, arity = _padded(sources)
    d_rest, _ = _padded(d_sources)
    config = CONFIGS["backward_norm" if norm else "backward" if arity <= 8 else "backward_many"]
    chunks = _chunks(D, config["elements"])
    programs, steps = _share(R, config["held"], chunks)
    partial = torch.empty(1 + norm, programs, D, dtype=torch.float32, device=first.device)
    with on_device(first):
        if programs:
            mix_backward_kernel[(programs,)](
                d_out, first, rest, query, norm_weight, out_weight, hidden, kept,
                d_sources[0], d_rest, partial, R, n, steps, programs, out_eps,
                **chunks, STAGES=config["num_stages"], ARITY=arity, NP=max(2, 2 * arity), NORM=norm,
            )  # fmt: skip
        columns = cdiv(D, CONFIGS["sum"]["BD"])
        sum_partials_kernel[(columns,)](
            partial, query, norm_weight, d_query, d_norm_weight, d_out_weight, programs, D,
            NORM=norm, **CONFIGS["sum"],
        )  # fmt: skip
    return [d_query, d_norm_weight, d_out_weight, *d_sources]


@_mix_backward.register_fake
def _(
    d_out: Tensor,
    sources: Sequence[Tensor],
    query: Tensor,
    norm_weight: Tensor,
    out_weight: Tensor | None,
    out_eps: float,
    kept: Tensor,
    hidden: Tensor,
) -> list[Tensor]:
    d_out_weight = query.new_empty(0) if out_weight is None else torch.empty_like(out_weight)
    return [torch.empty_like(t) for t in (query, norm_weight)] + [d_out_weight] + [torch.empty_like(s) for s in sources]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    sources, query, norm_weight, _, out_weight, out_eps, _ = inputs
    ctx.save_for_backward(query, norm_weight, out_weight, *output[1:], *sources)
    ctx.mark_non_differentiable(*output[1:])
    ctx.out_eps = out_eps


def _gradients(ctx: Any, d_out: Tensor, *_: Any) -> tuple[Any, ...]:
    query, norm_weight, out_weight, kept, hidden, *sources = ctx.saved_tensors
    d_query, d_norm_weight, d_out_weight, *d_sources = _mix_backward(
        d_out.contiguous(), sources, query, norm_weight, out_weight, ctx.out_eps, kept, hidden
    )
    return d_sources, d_query, d_norm_weight, None, None if out_weight is None else d_out_weight, None, None


_mix.register_autograd(_gradients, setup_context=_keep)


@operator("kimi_mm::attn_res_begin")
def _begin(
    sources: Sequence[Tensor], queries: Tensor, norm_weights: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    first = sources[0]
    S, D = queries.shape
    R = first.numel() // D
    new = {"dtype": torch.float32, "device": first.device}
    mixed = torch.empty(S, *first.shape, **new)
    peak, total = torch.empty(S, *first.shape[:-1], **new), torch.empty(S, *first.shape[:-1], **new)
    config = CONFIGS["begin"]
    group = config["queries"] if S % config["queries"] == 0 else 1
    rest, arity = _padded(sources)
    if R and S:
        with on_device(first):
            mix_kernel[(R, S // group)](
                first, rest, queries, norm_weights, None, mixed, None, None, peak, total,
                R, len(sources), 1, R, eps, 0.0,
                **_chunks(D, config["elements"]), STAGES=config["num_stages"],
                SB=group, ARITY=arity, NORM=False, KEEP=False, WHOLE=False,
            )  # fmt: skip
    return mixed, peak, total


@_begin.register_fake
def _(sources: Sequence[Tensor], queries: Tensor, norm_weights: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    first, S = sources[0], queries.shape[0]
    mixed = first.new_empty((S, *first.shape), dtype=torch.float32)
    return mixed, mixed.new_empty(mixed.shape[:-1]), mixed.new_empty(mixed.shape[:-1])


@operator("kimi_mm::attn_res_finish")
def _finish(
    mixed: Tensor,
    peak: Tensor,
    total: Tensor,
    partial: Tensor | None,
    query: Tensor,
    norm_weight: Tensor,
    eps: float,
    out_weight: Tensor | None,
    out_eps: float,
    dtype: torch.dtype,
) -> Tensor:
    D = mixed.shape[-1]
    out = torch.empty_like(mixed, dtype=dtype)
    if mixed.numel():
        with on_device(mixed):
            finish_kernel[(mixed.numel() // D,)](
                mixed, peak, total, partial, query, norm_weight, out_weight, out, mixed.numel() // D, eps, out_eps,
                NORM=out_weight is not None, **_chunks(D, CONFIGS["finish"]["elements"]),
            )  # fmt: skip
    return out


@_finish.register_fake
def _(
    mixed: Tensor,
    peak: Tensor,
    total: Tensor,
    partial: Tensor | None,
    query: Tensor,
    norm_weight: Tensor,
    eps: float,
    out_weight: Tensor | None,
    out_eps: float,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty_like(mixed, dtype=dtype)


def _chunks(D: int, elements: int) -> dict[str, int]:
    """Chunks of a row and warps to hold it: 8 channels a thread and chunk, at most `elements` a thread in all."""
    warps = 1
    while warps < 16 and 8 * cdiv(D, 256 * warps) > elements:
        warps *= 2
    width = min(256 * warps, power_of_two(D))
    return {"D": D, "BC": width, "CH": cdiv(D, width), "num_warps": warps}


def _share(R: int, held: int, chunks: dict[str, int]) -> tuple[int, int]:
    """Programs for R tokens, as many as hold `held` channels, and tokens for each."""
    steps = max(1, cdiv(R, held // (chunks["BC"] * chunks["CH"])))
    return cdiv(R, steps), int(steps)


def _padded(sources: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], int]:
    """All sources but the first, repeated up to a power of two from 4 on; a lone source stands for them."""
    rest = list(sources[1:]) or [sources[0]]
    arity = max(4, power_of_two(len(rest)))
    return tuple(rest + [rest[-1]] * (arity - len(rest))), arity


def _train(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _needs_reference(sources: Sequence[Tensor]) -> bool:
    if not sources:
        raise ValueError("attention over depth needs at least one source.")
    return any(s.dtype == torch.float64 for s in sources)


def _checked(sources: Sequence[Tensor], vectors: dict[str, Tensor]) -> list[Tensor]:
    """The sources, contiguous, all but the first of one dtype.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    shape = tuple(sources[0].shape)
    if not 1 <= len(sources) <= MAX_SOURCES:
        raise ValueError(f"{len(sources)} sources are too many; this kernel takes 1 to {MAX_SOURCES}.")
    if not shape or not 1 <= shape[-1] <= MAX_CHANNELS:
        raise ValueError(f"sources[0] {list(shape)} must be [..., D] with D from 1 to {MAX_CHANNELS}.")
    check_tensors(
        sources[0],
        {f"sources[{i}]": (s, shape) for i, s in enumerate(sources)}
        | {name: (vector, shape[-1:]) for name, vector in vectors.items()},
    )
    dtypes = {s.dtype for s in sources[1:]}
    common = torch.float32 if len(dtypes) > 1 else None
    return [s.contiguous() if common is None or i == 0 else s.to(common).contiguous() for i, s in enumerate(sources)]


def _check_finish(
    mixed: Tensor, peak: Tensor, total: Tensor, partial: Tensor | None, vectors: dict[str, Tensor]
) -> None:
    shape = tuple(mixed.shape)
    if not shape or not 1 <= shape[-1] <= MAX_CHANNELS:
        raise ValueError(f"mixed {list(shape)} must be [..., D] with D from 1 to {MAX_CHANNELS}.")
    lead = {"mixed": (mixed, shape), "peak": (peak, shape[:-1]), "total": (total, shape[:-1])}
    check_tensors(
        mixed, {**lead, "partial": (partial, shape), **{name: (v, shape[-1:]) for name, v in vectors.items()}}
    )


def _dense(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]
