"""Tensors of which a process holds a part: which part, how to fill it, and how to get the whole.

    replicated      an ordinary tensor, the same on all ranks
    FSDP2           a DTensor cut along its rows
    experts         an ordinary tensor, or a DTensor, of the experts of this rank; `expert_places` says where it belongs

`as_global` turns any of them into a DTensor (or leaves it) that knows its place in the whole, without copying.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from kimi_mm.text.expert_parallel import ExpertPlace
from kimi_mm.text.moe import Experts


def expert_places(module: nn.Module) -> dict[str, ExpertPlace]:
    """Returns the names of the parameters that are this rank's part of a stack of experts, and where they belong."""
    found = {}
    for prefix, part in module.named_modules():
        if isinstance(part, Experts) and part.place is not None:
            for name, _ in part.named_parameters(recurse=False):
                found[f"{prefix}.{name}" if prefix else name] = part.place
    return found


def local(tensor: Tensor) -> Tensor:
    """Returns the part that this process holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_global(tensor: Tensor, place: ExpertPlace | None) -> Tensor:
    """Returns a view of a parameter, or of something of its shape, that knows its place in the whole."""
    if place is None:
        return tensor
    own = local(tensor)
    if isinstance(tensor, DTensor):
        mesh, experts = place.flat, len(own) * place.ranks * place.shards
    else:
        mesh, experts = place.mesh, len(own) * place.ranks
    shape = torch.Size((experts, *own.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, mesh, [Replicate(), Shard(0)], run_check=False, shape=shape, stride=stride)


def whole(tensor: Tensor, place: ExpertPlace | None = None) -> Tensor:
    """Returns the whole tensor; all ranks must call this together."""
    tensor = as_global(tensor, place)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(full: Tensor, tensor: Tensor, place: ExpertPlace | None = None) -> Tensor:
    """Returns the part of a whole tensor that this process holds of `tensor`."""
    spot = as_global(tensor, place)
    if not isinstance(spot, DTensor):
        return full
    size, offset = compute_local_shape_and_global_offset(full.shape, spot.device_mesh, spot.placements)
    for dim, (length, start) in enumerate(zip(size, offset, strict=True)):
        full = full.narrow(dim, min(start, full.shape[dim]), length)
    return full


@torch.no_grad()
def scale_rows(weight: Tensor, factors: Tensor) -> None:
    """Multiplies the rows of a matrix, or the elements of a vector, in place; factors [rows] are those of the whole."""
    mine = part_of(factors, weight[:, 0] if weight.dim() == 2 else weight) if isinstance(weight, DTensor) else factors
    local(weight).mul_(mine if weight.dim() == 1 else mine[:, None])
