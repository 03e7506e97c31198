"""Mixture-of-experts layer with shared experts (DeepSeek-V3, section 2.1.2).

    x ─► router ─► k experts of E, weighted ─┬─► sum
    x ─► shared experts ─────────────────────┘

The router's selection bias is not trained by gradients: `update_bias` nudges it after each optimizer step so that
every expert gets its share, from the loads counted since the last update.

Shapes:  B batch  T time  D hidden  E experts  k per token  I expert width
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_mm import kernels
from kimi_mm.config import MoEConfig
from kimi_mm.kernels.precision import without_autocast
from kimi_mm.text.expert_parallel import ExpertPlace, spread_experts
from kimi_mm.text.mlp import DenseMLP


class Router(nn.Module):
    """Sigmoid scores in fp32; `bias` moves the choice, `load` counts the picks while training."""

    bias: Tensor
    load: Tensor

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.counting = True  # off while a forward pass is only repeated for its gradients
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.register_buffer("bias", torch.zeros(config.num_experts))
        self.register_buffer("load", torch.zeros(config.num_experts, device="cpu"), persistent=False)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [N, D] -> indices [N, k], weights [N, k]; rows with valid [N] False are not counted."""
        config = self.config
        with without_autocast(x.device):
            inner = torch.float64 if x.dtype == torch.float64 else torch.float32
            indices, weights = kernels.moe_route(
                F.linear(x.to(inner), self.weight.to(inner)),
                self.bias,
                config.num_experts_per_token,
                num_groups=config.num_groups,
                top_groups=config.top_groups,
                normalize=config.normalize_weights,
                scaling=config.routed_scaling_factor,
            )
        if self.counting and self.training and torch.is_grad_enabled():
            self._count(indices, valid)
        return indices, weights

    @torch.no_grad()
    def _count(self, indices: Tensor, valid: Tensor | None) -> None:
        picked = indices[..., None] == torch.arange(self.load.shape[0], device=indices.device)
        if valid is not None:
            picked = picked & valid[:, None, None]
        self.load += picked.sum((0, 1))

    @torch.no_grad()
    def update_bias(self) -> None:
        """Raises the bias of experts below the mean load and lowers the others, then clears the counts."""
        self.bias += self.config.bias_update_rate * torch.sign(self.load.mean() - self.load)
        self.load.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """Moves like any module, but keeps bias and load in fp32: bf16 would swallow steps of 1e-3."""
        bias, load = self.bias, self.load
        super()._apply(fn, recurse)
        self.bias, self.load = bias.to(self.bias.device), load.to(self.load.device)
        return self


class Experts(nn.Module):
    """Stacked SwiGLU experts; gate rows come first in `gate_up_proj` [E, 2 * I, D]; `down_proj` is [E, D, I]."""

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        E, I = config.num_experts, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(E, hidden_size, I))

        self.place: ExpertPlace | None = None  # ranks that the experts are spread over; each holds E / ranks

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """x [N, D], indices and weights [N, k] -> [N, D]."""
        if self.place is not None:
            return spread_experts(x, indices, weights, self.gate_up_proj, self.down_proj, self.place.group)
        return kernels.moe_experts(x, indices, weights, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """Routed experts plus shared ones that see every token."""

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.router = Router(config, hidden_size)
        self.experts = Experts(config, hidden_size)
        shared = config.num_shared_experts * config.intermediate_size
        self.shared_experts = DenseMLP(hidden_size, shared) if shared else None

    def reset_parameters(self) -> None:
        """Draws router and experts from N(0, 0.02^2)."""
        for weight in (self.router.weight, self.experts.gate_up_proj, self.experts.down_proj):
            nn.init.normal_(weight, std=0.02)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; `valid` [B, T] marks the tokens that count towards the load."""
        rows = x.flatten(0, -2)
        indices, weights = self.router(rows, None if valid is None else valid.flatten())
        out = self.experts(rows, indices, weights).view(x.shape)
        return out if self.shared_experts is None else out + self.shared_experts(x)

    def update_bias(self) -> None:
        """See `Router.update_bias`."""
        self.router.update_bias()
