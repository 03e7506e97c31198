"""Sizes and weights that the vision tests share."""

from __future__ import annotations

import torch

from kimi_mm.config import VisionConfig, VisionInputConfig, VisionTowerConfig

TOWER = VisionTowerConfig(
    hidden_size=24, num_layers=2, num_heads=2, intermediate_size=48, position_height=6, position_width=5
)
EYES = VisionConfig(input=VisionInputConfig(max_patches=64, max_patches_per_frame=16), tower=TOWER, output_size=32)
GRIDS = [(1, 4, 6), (3, 4, 4), (1, 6, 6), (4, 2, 6), (1, 4, 6), (1, 10, 8), (2, 6, 4), (3, 4, 4)]


def shaken(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Moves every parameter far from its initial value, so that each of them shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.3 if parameter.dim() == 1 else 0.15
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval()


def patches(grids, seed: int = 0) -> torch.Tensor:
    """Random patches [P, 3, 14, 14] for items of the given grids."""
    total = sum(t * h * w for t, h, w in grids)
    return torch.randn(total, 3, 14, 14, generator=torch.Generator().manual_seed(seed))
