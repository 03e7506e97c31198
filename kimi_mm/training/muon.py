"""The optimiser of MuonClip: Muon for matrices, AdamW for everything else.

    matrix  G ─► M = mu M + G ─► G + mu M ─► Newton-Schulz ─► W -= lr (0.2 sqrt(max(m, n)) O + wd W)
    other   AdamW

Moonlight (arXiv 2502.16982), section 2; Kimi K2, section 2.1. The factor gives updates the RMS of AdamW's, so that rate
and decay are shared. Matrices of one shape are orthogonalised together; stacked experts [E, m, n] count as E matrices.
The clip of attention logits is `kimi_mm.training.qk_clip`.

Sharded parameters (FSDP2) keep sharded momenta. Stacked experts are cut between matrices, so nothing travels. Other
matrices are dealt to the ranks: shards travel to the matrix's owner, which orthogonalises it, and back; a rank sends
and works on 1 / ranks of all matrices, and the result is that of one process.

Shapes: m rows, n columns, E stacked matrices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kimi_mm.training.sharding import local

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
UPDATE_RMS = 0.2
# Matrices whose rows are looked up, or that are not maps between hidden spaces.
ADAMW_NAMES = ("embed", "lm_head", "audio_head", "conv_weight", "codebook", "position")


def orthogonalize(x: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Moves the singular values of matrices towards 1 (0.7 to 1.2 after five steps), leaving their vectors.

    Args:
        x: [..., m, n].
        steps: of the quintic Newton-Schulz iteration.
        eps: least Frobenius norm that is divided by; a zero matrix stays zero.

    Returns:
        [..., m, n]; computed and returned in bf16 on a GPU, elsewhere in the dtype of x.
    """
    a, b, c = NEWTON_SCHULZ
    y = _narrow(x).reshape(-1, *x.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    y = y.mT if tall else y
    wide = torch.promote_types(y.dtype, torch.float32)
    y = y / torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True, dtype=wide).clamp_min(eps).to(y.dtype)
    for _ in range(steps):  # sums ride along with products: nothing else passes over the matrices
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).reshape(x.shape)


def _narrow(x: Tensor) -> Tensor:
    """The type that matrices are orthogonalised in: bf16 on a GPU."""
    return x.bfloat16() if x.is_cuda else x


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """True for what Muon should update: maps between hidden spaces, stacked experts included."""
    return parameter.dim() in (2, 3) and not any(part in name for part in ADAMW_NAMES)


class Muon(torch.optim.Optimizer):
    """Muon for groups with `muon` True, AdamW for the others; fp32 momenta.

    Args:
        groups: parameter groups; `is_hidden_matrix` says which parameters suit Muon.
        lr, weight_decay: of groups that name none.
        momentum: mu of Muon.
        betas, eps: of AdamW.

    Raises:
        ValueError: if a Muon group holds something that is not a matrix or a stack of matrices.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(groups, {**defaults, "muon": False})
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["muon"] and parameter.dim() not in (2, 3):
                    raise ValueError(
                        f"Muon takes matrices [m, n] and stacks [E, m, n], not {tuple(parameter.shape)}; "
                        "put this parameter into a group with muon=False."
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._muon if group["muon"] else self._adamw)(parameters, group)
        return loss

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [local(p.grad).float() for p in parameters]  # type: ignore[arg-type]
        momenta = [local(self._buffer(p, "momentum")) for p in parameters]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        directions = torch._foreach_add(gradients, momenta, alpha=group["momentum"])
        # Matrices of one shape go together; those that are cut between rows apart, for they travel.
        shapes: dict[tuple[int, int, Any], list[int]] = defaultdict(list)
        for i, parameter in enumerate(parameters):
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) and parameter.dim() == 2 else None
            shapes[parameter.shape[-2], parameter.shape[-1], mesh].append(i)
        weights = [local(p) for p in parameters]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        for (m, n, mesh), members in shapes.items():
            own = [directions[i] for i in members]
            done = _together(own) if mesh is None else _dealt(own, m, mesh.get_group())
            scale = UPDATE_RMS * max(m, n) ** 0.5
            for i, part in zip(members, done, strict=True):
                weights[i].add_(part, alpha=-group["lr"] * scale)

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        first, second = group["betas"]
        group["adamw_steps"] = steps = group.get("adamw_steps", 0) + 1
        gradients = [local(p.grad).float() for p in parameters]  # type: ignore[arg-type]
        means = [local(self._buffer(p, "exp_avg")) for p in parameters]
        squares = [local(self._buffer(p, "exp_avg_sq")) for p in parameters]
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, (1 - second**steps) ** 0.5)
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(means, roots)
        weights = [local(p) for p in parameters]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(
            weights,
            [u.to(w.dtype) for u, w in zip(updates, weights, strict=True)],
            alpha=-group["lr"] / (1 - first**steps),
        )

    def _buffer(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        return state[name]


def _together(directions: list[Tensor]) -> list[Tensor]:
    """Orthogonalises matrices and stacks of matrices of one shape, all at once."""
    m, n = directions[0].shape[-2:]
    stacked = orthogonalize(torch.cat([_narrow(direction).reshape(-1, m, n) for direction in directions]))
    parts = stacked.split([direction.numel() // (m * n) for direction in directions])
    return [part.view_as(direction) for part, direction in zip(parts, directions, strict=True)]


def _dealt(directions: list[Tensor], rows: int, group: dist.ProcessGroup) -> list[Tensor]:
    """Orthogonalises matrices of one shape of which every rank holds some rows: matrix i belongs to rank i mod ranks.

    Args:
        directions: this rank's rows of each, [m_r, n]; those of the ranks, in their order, make [m, n].
        rows: m.
        group: the ranks; all must call this together.

    Returns:
        This rank's rows of each result.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    each = -(-rows // size)  # as DTensor cuts
    held = [max(0, min(each, rows - r * each)) for r in range(size)]
    n, mine = directions[0].shape[1], range(rank, len(directions), size)
    owned = [len(range(r, len(directions), size)) for r in range(size)]
    sent = torch.cat([_narrow(directions[i]).flatten() for r in range(size) for i in range(r, len(directions), size)])
    out_sizes = [held[r] * n * len(mine) for r in range(size)]
    in_sizes = [held[rank] * n * owned[r] for r in range(size)]
    got = sent.new_empty(sum(out_sizes))
    dist.all_to_all_single(got, sent, out_sizes, in_sizes, group=group)
    parts = [part.view(len(mine), held[r], n) for r, part in enumerate(got.split(out_sizes))]
    if mine:
        parts = list(orthogonalize(torch.cat(parts, 1)).split(held, 1))
    back = torch.empty_like(sent)
    dist.all_to_all_single(back, torch.cat([part.flatten() for part in parts]), in_sizes, out_sizes, group=group)
    results = list(back.view(len(directions), held[rank], n))
    order = [i for r in range(size) for i in range(r, len(directions), size)]
    return [results[order.index(i)] for i in range(len(directions))]
