"""Context parallelism: the ranks of a group hold consecutive stretches of the same rows, of T positions each.

    conv       the last W - 1 raw rows of the rank before                      gather of [B, W - 1, C]
    KDA        S_r = fold of (transition, state) of all ranks before           gather of [N, HV, K + V, K], any length
    MLA, GQA   latents, or keys and values, of all ranks up to this one        gather of [B, T, ...]

KDA's identity is explained in `kimi_mm.kernels.kda.segments`. Documents packed by `cu_seqlens` may cross any number of
ranks: a summary covers the rows of the document that goes on to the next rank, and its transition is zero where that
document starts on this rank. Nothing is read back from the device. Rows of softmax attention get longer from rank to
rank, KDA's work is the same on all.

Shapes:  B batch  T positions of this rank  R ranks  N documents (B without cu_seqlens)  C convolved channels
         W conv kernel  HV value heads  K key channels  V value channels  S positions up to the end of this rank
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_mm.kernels.kda.segments import fold_segments, segment_summary


class _Gather(torch.autograd.Function):
    """[...] of every rank to [R, ...]; the gradient of a rank's part is summed over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(dist.get_world_size(group), *x.shape)
        dist.all_gather_into_tensor(out.flatten(0, 1), x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        mine = torch.empty_like(gradient[0])
        dist.reduce_scatter_tensor(mine, gradient.flatten(0, 1), group=ctx.group)
        return mine, None


class Context:
    """The group of ranks that this process shares its rows with."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def cut(self, x: Tensor) -> Tensor:
        """Returns this rank's stretch of whole rows, [B, R * T] to [B, T].

        Raises:
            ValueError: if the rows cannot be cut into R equal stretches.
        """
        if x.shape[1] % self.size:
            raise ValueError(f"rows of {x.shape[1]} positions cannot be shared by {self.size} processes equally.")
        return x.chunk(self.size, 1)[self.rank].contiguous()

    def gather(self, x: Tensor) -> Tensor:
        """[...] of every rank to [R, ...], with gradients; every rank must use the result."""
        return _Gather.apply(x, self.group)  # type: ignore[return-value]


@dataclass
class ContextStep:
    """One forward call as a rank of a context group sees it.

    Args:
        context: the group.
        offset: position of this rank's first row.
        carried: [N] bool, the document that comes from the rank before; None without documents: all rows do.
        carried_start: scalar, where that document starts.
        leaving: [B, T] bool, rows of the document that goes on to the next rank; None: all do.
        enters: scalar bool, whether that document comes from the rank before too; None: it does.
    """

    context: Context
    offset: int
    carried: Tensor | None = None
    carried_start: Tensor | None = None
    leaving: Tensor | None = None
    enters: Tensor | None = None

    def conv_past(self, x: Tensor, width: int) -> Tensor:
        """Raw rows before this rank's x [B, T, C], as the initial state of a convolution: [N, width - 1, C]."""
        rank, tail = self.context.rank, width - 1
        if x.shape[1] < tail:
            raise ValueError(f"stretches of {x.shape[1]} positions are too short for a convolution of {width}.")
        tails = self.context.gather(x[:, x.shape[1] - tail :])
        past = tails[rank - 1] if rank else tails[0] * 0.0
        if self.carried is None or self.carried_start is None:
            return past
        at = torch.arange(self.offset - tail, self.offset, device=x.device)
        return past * (self.carried[:, None] & (at >= self.carried_start))[..., None]

    def kda_past(self, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> Tensor:
        """State that this rank's rows start from, [N, HV, V, K]; arguments as those of `segment_summary`."""
        rank, size = self.context.rank, self.context.size
        B, _, HV, V = v.shape
        K = k.shape[-1]
        if rank < size - 1:
            if self.leaving is not None:  # rows without keys leave the state as it is
                k = k * self.leaving[..., None, None]
            transition, state = segment_summary(k, v, g, beta, **options)
            if self.enters is not None:
                transition = transition * self.enters
        else:
            inner = torch.float64 if v.dtype == torch.float64 else torch.float32
            state = torch.zeros(B, HV, V, K, dtype=inner, device=v.device, requires_grad=True)
            transition = torch.zeros(B, HV, K, K, dtype=inner, device=v.device)
        maps = self.context.gather(torch.cat([state, transition], 2))
        states, transitions = maps[:, :, :, :V], maps[:, :, :, V:]
        past = fold_segments(transitions[:rank], states[:rank])[-1] if rank else states[0] * 0.0
        if self.carried is None:
            return past
        return past * self.carried[:, None, None, None]

    def keys(self, rows: Tensor) -> Tensor:
        """[B, T, ...] of every rank to [B, S, ...]: what the queries of this rank may see, and themselves."""
        gathered = self.context.gather(rows)[: self.context.rank + 1]
        return gathered.transpose(0, 1).flatten(1, 2)


def document_step(context: Context, length: int, cu_seqlens: Tensor) -> tuple[ContextStep, Tensor, Tensor, Tensor]:
    """Works out one call over packed documents.

    Args:
        length: positions T of this rank.
        cu_seqlens: [N + 1] int, of the whole row.

    Returns:
        The step; this rank's cu_seqlens [N + 1] (documents elsewhere are empty); positions [1, T] within documents;
        mask [1, 1, T, S] of what a query may see.
    """
    device, total = cu_seqlens.device, length * context.size
    offset = context.rank * length
    end = offset + length
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    carried = (starts < offset) & (ends > offset)
    going = (starts < end) & (ends > end)
    numbers = torch.arange(len(starts), device=device)
    document = torch.repeat_interleave(numbers, ends - starts, output_size=total)
    here = torch.arange(offset, end, device=device)
    keys = torch.arange(end, device=device)
    last_start = torch.where(going, starts, 0).sum()
    step = ContextStep(
        context,
        offset,
        carried,
        carried_start=torch.where(carried, starts, 0).sum(),
        leaving=((here >= last_start) & going.any())[None],
        enters=(going & (starts < offset)).any(),
    )
    local = (cu_seqlens - offset).clamp(0, length)
    positions = (here - starts[document[here]])[None]
    mask = (document[here][:, None] == document[:end]) & (here[:, None] >= keys)
    return step, local, positions, mask[None, None]
