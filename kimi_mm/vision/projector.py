"""From patches to rows of the backbone: 2x2 cells side by side, averaged over the frames of a chunk, then two layers.

    [t * h * w, D] ─► mean over t ─► cells [h/2 * w/2, 4, D] ─► LayerNorm ─► [.., 4 D] ─► linear ─► GELU ─► linear

The cell's patches keep reading order: (0, 0), (0, 1), (1, 0), (1, 1). The activation is the exact GELU, unlike the
tower's (published `mm_projector`, "sd2_tpool" merging and "patchmerger").

Shapes: t frames, h x w patches, m merge size, M rows, D tower width, O output size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kimi_mm.config import VisionConfig


def merge_cells(x: torch.Tensor, grid: tuple[int, int, int], merge_size: int) -> torch.Tensor:
    """Averages over time and gathers cells.

    Args:
        x: [n, t * h * w, D], n items of the same grid.
        grid: (t, h, w); h and w are multiples of `merge_size`.
        merge_size: m, patches a side of a cell.

    Returns:
        [n, h/m * w/m, m * m, D], cells in reading order.
    """
    (t, h, w), m = grid, merge_size
    x = x.view(len(x), t, h // m, m, w // m, m, -1)
    x = x.mean(1) if t > 1 else x[:, 0]
    return x.transpose(2, 3).reshape(len(x), h // m * (w // m), m * m, -1)


class Projector(nn.Module):
    """Two layers from merged patches to the backbone's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.tower.hidden_size
        inner = width * config.merge_size**2
        self.pre_norm = nn.LayerNorm(width, eps=config.projector_norm_eps)
        self.linear_1 = nn.Linear(inner, inner)
        self.linear_2 = nn.Linear(inner, config.output_size)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        """[M, m * m, D] -> [M, O]."""
        return self.linear_2(F.gelu(self.linear_1(self.pre_norm(cells).flatten(1))))
