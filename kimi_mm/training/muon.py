"""The optimiser of MuonClip: Muon for matrices, AdamW for everything else.

    matrix  G ─► M = mu M + G ─► G + mu M ─► Newton-Schulz ─► W -= lr (0.2 sqrt(max(m, n)) O + wd W)
    other   AdamW

Moonlight (arXiv 2502.16982), section 2; Kimi K2, section 2.1. The factor gives updates the RMS of AdamW's, so that rate
and decay are shared. Matrices of one shape are orthogonalised together; stacked experts [E, m, n] count as E matrices.
The clip of attention logits is `kimi_mm.training.qk_clip`.

Shapes: m rows, n columns, E stacked matrices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

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
        [..., m, n] in the dtype of x; computed in bf16 on a GPU.
    """
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp_min(eps)
    y = y.bfloat16() if x.is_cuda else y
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y.mT if tall else y).to(x.dtype)


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
        gradients = [p.grad.float() for p in parameters]  # type: ignore[union-attr]
        momenta = [self._buffer(p, "momentum") for p in parameters]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        directions = torch._foreach_add(gradients, momenta, alpha=group["momentum"])
        shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, direction in enumerate(directions):
            shapes[direction.shape[-2], direction.shape[-1]].append(i)
        updates: list[Tensor] = [torch.empty(0)] * len(parameters)
        for (m, n), members in shapes.items():
            counts = [directions[i].numel() // (m * n) for i in members]
            stacked = orthogonalize(torch.cat([directions[i].view(-1, m, n) for i in members]))
            scale = UPDATE_RMS * max(m, n) ** 0.5
            for i, part in zip(members, (stacked * scale).split(counts), strict=True):
                updates[i] = part.view_as(parameters[i]).to(parameters[i].dtype)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        first, second = group["betas"]
        group["adamw_steps"] = steps = group.get("adamw_steps", 0) + 1
        gradients = [p.grad.float() for p in parameters]  # type: ignore[union-attr]
        means = [self._buffer(p, "exp_avg") for p in parameters]
        squares = [self._buffer(p, "exp_avg_sq") for p in parameters]
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, (1 - second**steps) ** 0.5)
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(means, roots)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(
            parameters,
            [u.to(p.dtype) for u, p in zip(updates, parameters, strict=True)],
            alpha=-group["lr"] / (1 - first**steps),
        )

    def _buffer(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        return state[name]
