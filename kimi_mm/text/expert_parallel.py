"""Expert parallelism: every rank of a group holds some of the experts, and tokens travel to those they picked.

    rows ─► sorted by expert ─► all-to-all ─► own experts ─► all-to-all ─► weighted sum at home

A rank sends R = N * k rows and gets as many as picked its experts; only those numbers are read back from the device.
The gradient of an expert is a sum over the tokens of the whole group where that of other weights is one rank's alone,
so it is divided by the size of the group: averaging over ranks then treats both alike.

Shapes:  N tokens of this rank  D width  E experts in all  k experts per token  I expert width  P ranks
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from kimi_mm import kernels


@dataclass(frozen=True)
class ExpertPlace:
    """How the experts of a layer, of which a rank holds some, lie over all ranks.

    Args:
        mesh: [copies, expert] ranks; a row of it shares all experts.
        flat: [replicas, shards * expert] the same ranks in the order of their experts, for stacks that FSDP cuts again.
        shards: into how many parts FSDP cuts what a rank of the row would hold.
    """

    mesh: DeviceMesh
    flat: DeviceMesh
    shards: int = 1

    @property
    def ranks(self) -> int:
        """Ranks that share the experts."""
        return self.mesh.size(1)

    @property
    def copies(self) -> int:
        """How often every expert exists, before FSDP."""
        return self.mesh.size(0)

    @property
    def group(self) -> dist.ProcessGroup:
        """This rank's sharers."""
        return self.mesh.get_group(1)


class _Exchange(torch.autograd.Function):
    """Rows [R, D], `given` of them for each rank in turn, to the rows meant for this rank; gradients go back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, given: list[int], taken: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = (given, taken), group
        out = rows.new_empty(sum(taken), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), taken, given, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        given, taken = ctx.sizes
        gradient = gradients[0].contiguous()
        out = gradient.new_empty(sum(given), *gradient.shape[1:])
        dist.all_to_all_single(out, gradient, given, taken, group=ctx.group)
        return out, None, None, None


class _Shared(torch.autograd.Function):
    """A weight as it is; its gradient is divided by the size of the group."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, size: int) -> Tensor:
        ctx.size = size
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / ctx.size, None


def spread_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Does what `kernels.moe_experts` does, with the experts spread over a group.

    Args:
        x: [N, D] of this rank; N may differ between ranks, and be 0.
        indices: [N, k] int64, of all E experts. weights: [N, k].
        gate_up: [E / P, 2 * I, D], the experts of this rank, those of rank 0 being the first. down: [E / P, D, I].
        group: the ranks; all must call this together.

    Returns:
        [N, D].
    """
    (N, k), size, own = indices.shape, dist.get_world_size(group), len(gate_up)
    gate_up, down = (_Shared.apply(weight, size) for weight in (gate_up, down))
    ids, order = indices.flatten().sort(stable=True)
    edges = torch.arange(own * size, device=ids.device)
    given = torch.searchsorted(ids, edges, right=True).diff(prepend=ids.new_zeros(1))  # [E] rows for each expert
    taken = torch.empty_like(given)
    dist.all_to_all_single(taken, given, group=group)  # [P, E / P] rows for each of mine from each rank
    counts = torch.stack([given, taken]).view(2, size, own).sum(-1).tolist()
    rows = _Exchange.apply(x.index_select(0, order // k), *counts, group)
    local = torch.arange(own, device=ids.device).repeat(size).repeat_interleave(taken, output_size=sum(counts[1]))
    spare = 0 if len(local) else 1  # an empty call would leave the experts without a gradient
    if spare:
        rows, local = torch.cat([rows, rows.new_zeros(1, x.shape[1])]), local.new_zeros(1)
    done = kernels.moe_experts(rows, local[:, None], torch.ones_like(local, dtype=x.dtype)[:, None], gate_up, down)
    if spare:
        done = done[:0] + 0 * done.sum()
    back = _Exchange.apply(done, counts[1], counts[0], group)
    home = torch.empty_like(order).scatter_(0, order, torch.arange(N * k, device=order.device))
    return (back[home].view(N, k, back.shape[1]) * weights.to(back.dtype)[..., None]).sum(1)
