"""MoonViT-3D at native resolution: items of any size in one pass, no padding (K2.5 report, section 4.1).

    pixel_values [P, 3, p, p] ─► linear ─► + table resampled to (h, w) ─► + time rows (t > 1) ─► layers ─► norm
      layer:  x + out(attention(rotate(qkv(norm x))))  ─►  x + fc2(gelu(fc1(norm x)))
    ─► merge 2x2, mean over t ─► projector ─► one [tokens_i, O] per item

Items of one grid are brought together, so that each distinct grid costs one table, one attention call and one merge,
however many items share it. Attention is full within an item, all frames of a chunk included, and never looks across
items. Rotary positions are axial and width first: channel pair 2j turns with x, pair 2j + 1 with y.

Shapes: P patches of all items, t x h x w patches of one, n items of a grid, L = t * h * w, D width, H heads,
K head size, O output size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from kimi_mm.config import VisionConfig, VisionTowerConfig
from kimi_mm.errors import UserError
from kimi_mm.kernels.precision import without_autocast
from kimi_mm.vision.projector import Projector, merge_cells

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Group:
    """Items of one grid (t, h, w), and their numbers in the batch."""

    grid: Grid
    items: tuple[int, ...]

    @property
    def length(self) -> int:
        """Patches of one item."""
        t, h, w = self.grid
        return t * h * w

    @property
    def patches(self) -> int:
        return self.length * len(self.items)


@dataclass(frozen=True)
class Layout:
    """How the patches of a batch lie: `groups` in order, and `cu_seqlens` [items + 1] int32 where items vary a lot."""

    groups: tuple[Group, ...]
    order: torch.Tensor | None  # [P] where each patch comes from; None: they lie in order already
    cu_seqlens: torch.Tensor | None
    longest: int


class Attention(nn.Module):
    """Multi-head attention within every item."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_PD: torch.Tensor, turns: torch.Tensor, layout: Layout) -> torch.Tensor:
        """[P, D] -> [P, D]; `turns` [P, 1, 1, K / 2] complex are the rotations."""
        qkv = self.qkv(x_PD).unflatten(-1, (3, self.num_heads, -1))  # [P, 3, H, K]
        pairs = torch.view_as_complex(qkv[:, :2].float().unflatten(-1, (-1, 2)))
        qk = torch.view_as_real(pairs * turns).flatten(-2).to(qkv.dtype)
        return self.out(attend(qk[:, 0], qk[:, 1], qkv[:, 2], layout).flatten(1))


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer with the tanh form of GELU."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.norm_2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_PD: torch.Tensor, turns: torch.Tensor, layout: Layout) -> torch.Tensor:
        """[P, D] -> [P, D]."""
        x_PD = x_PD + self.attention(self.norm_1(x_PD), turns, layout)
        return x_PD + self.fc2(F.gelu(self.fc1(self.norm_2(x_PD)), approximate="tanh"))


class VisionTower(nn.Module):
    """Patches to hidden states; weights are drawn at construction."""

    time_table: torch.Tensor

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.positions = nn.Parameter(torch.empty(config.position_height, config.position_width, config.hidden_size))
        with torch.device("cpu"):  # constants are real even in a model laid out on the meta device
            self.register_buffer("time_table", time_rows(config.max_frames, config.hidden_size), persistent=False)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, pixel_values: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Encodes patches [P, 3, p, p], in the order of their items, to [P, D], group by group."""
        if layout.order is not None:
            pixel_values = pixel_values[layout.order]
        x = self.patch_embed(pixel_values.flatten(1).to(self.patch_embed.weight.dtype))
        x = x + self._positions(layout.groups)
        turns = torch.cat([self._turns(group) for group in layout.groups])[:, None, None]
        for layer in self.layers:
            x = layer(x, turns, layout)
        return self.final_norm(x)

    def _positions(self, groups: Sequence[Group]) -> torch.Tensor:
        """Learned table resampled to each grid, and a time row for each frame of a chunk with several: [P, D]."""
        pieces = []
        tables = resample(self.positions, [group.grid[1:] for group in groups])
        for group, table in zip(groups, tables, strict=True):
            t, h, w = group.grid
            rows = table.reshape(1, h * w, -1)
            if t > 1:
                rows = rows + self.time_table[:t, None].to(rows.dtype)
            pieces.append(rows.reshape(t * h * w, -1).repeat(len(group.items), 1))
        return torch.cat(pieces)

    def _turns(self, group: Group) -> torch.Tensor:
        """Rotations exp(i angle) of every patch, [n * L, K / 2] complex64, alike in all frames."""
        t, h, w = group.grid
        head_size, device = self.config.hidden_size // self.config.num_heads, self.positions.device
        exponents = torch.arange(0, head_size, 4, device=device, dtype=torch.float32) / head_size
        rates = 1.0 / self.config.rope_theta**exponents
        y, x = (torch.arange(size, device=device, dtype=torch.float32)[:, None] * rates for size in (h, w))
        angles = torch.stack([x[None].expand(h, -1, -1), y[:, None].expand(-1, w, -1)], -1).view(h * w, -1)
        return torch.polar(torch.ones_like(angles), angles).repeat(t * len(group.items), 1)


class VisionEncoder(nn.Module):
    """Tower, merger and projector behind one forward.

    Args:
        config: sizes; `output_size` is the width of the rows.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = VisionTower(config.tower)
        self.projector = Projector(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws matrices and the position table from N(0, 0.02^2); biases zero, norms one."""
        nn.init.normal_(self.tower.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor | list[Grid]) -> list[torch.Tensor]:
        """Encodes pictures and chunks of clips, of any sizes, together.

        Args:
            pixel_values: [P, 3, p, p], the patches of all items one after the other (`processing.pack`).
            grid_thw: [items, 3] frames, rows and columns of patches; on the CPU, so that no device is waited for.

        Returns:
            One [h/m * w/m, O] per item, in order.

        Raises:
            UserError: when grids and patches do not fit each other or the config.
        """
        rows = grid_thw if isinstance(grid_thw, list) else grid_thw.tolist()
        grids: list[Grid] = [(t, h, w) for t, h, w in rows]
        self._check(pixel_values, grids)
        if not grids:
            return []
        layout = kept_layout(tuple(grids), pixel_values.device)
        x_PD = self.tower(pixel_values, layout)
        cells: list[torch.Tensor] = [x_PD] * len(grids)
        pieces = x_PD.split([group.patches for group in layout.groups])
        for group, piece in zip(layout.groups, pieces, strict=True):
            merged = merge_cells(piece.view(len(group.items), group.length, -1), group.grid, self.config.merge_size)
            for item, cell in zip(group.items, merged, strict=True):
                cells[item] = cell
        return list(self.projector(torch.cat(cells)).split([len(cell) for cell in cells]))

    def _check(self, pixel_values: torch.Tensor, grids: list[Grid]) -> None:
        tower, m = self.config.tower, self.config.merge_size
        for number, (t, h, w) in enumerate(grids):
            if not 1 <= t <= tower.max_frames:
                raise UserError(f"item {number}: {t} frames; this tower takes 1 to {tower.max_frames} in one item.")
            if min(h, w) < 1 or h % m or w % m:
                raise UserError(f"item {number}: a grid of {h}x{w} patches is not made of whole {m}x{m} cells.")
        expected = (sum(t * h * w for t, h, w in grids), 3, tower.patch_size, tower.patch_size)
        if pixel_values.shape != expected:
            raise UserError(f"pixel_values have shape {list(pixel_values.shape)}, the grids need {list(expected)}.")


@functools.lru_cache(maxsize=16)
def kept_layout(grids: tuple[Grid, ...], device: torch.device) -> Layout:
    """Returns the layout of a batch, one of the last few or a new one.

    A device is not waited for twice, and a captured graph may not copy from the host at all; since it reads the layout
    at every replay, whoever keeps such a graph has to keep the layout too.
    """
    with torch.inference_mode(False):
        return plan_layout(grids, device, device.type == "cuda")


def plan_layout(grids: Sequence[Grid], device: torch.device, varlen: bool = False) -> Layout:
    """Groups items by grid.

    Args:
        grids: (t, h, w) of every item.
        device: of the patches.
        varlen: prepare `cu_seqlens`, for attention over all groups at once where there are several.
    """
    members: dict[Grid, list[int]] = {}
    for number, grid in enumerate(grids):
        members.setdefault(grid, []).append(number)
    groups = tuple(Group(grid, tuple(items)) for grid, items in members.items())
    sequence = [item for group in groups for item in group.items]
    sizes = [t * h * w for t, h, w in grids]
    order = None
    if sequence != sorted(sequence):
        starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
        order = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in sequence]).to(device)
    cu_seqlens = None
    if varlen and len(groups) > 1:
        cu_seqlens = torch.tensor([0, *(sizes[i] for i in sequence)]).cumsum(0).to(device, torch.int32)
    return Layout(groups, order, cu_seqlens, max(sizes))


def resample(table: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Resamples a table [H, W, D] to each size (h, w), as torch's bicubic `interpolate` does: one [h, w, D] each.

    Bicubic weights of rows and columns are apart, so that a size takes a product with [h, H] and one with [w, W], the
    former in one for all sizes. `interpolate` takes kernels of its own for every size, and its gradient adds up by
    atomics. In fp32 both agree to rounding (unless products are allowed less), in 16 bits this one rounds once.
    """
    height, width, _ = table.shape
    if all(size == (height, width) for size in sizes):
        return [table] * len(sizes)
    with without_autocast(table.device):
        rows = torch.cat([_weights(height, h, table.device) for h, _ in sizes])
        tall = (rows @ table.float().flatten(1)).unflatten(1, (width, -1))  # [sum of h, W, D]
        pieces = zip(tall.split([h for h, _ in sizes]), sizes, strict=True)
        return [(_weights(width, w, table.device) @ piece).to(table.dtype) for piece, (_, w) in pieces]


@functools.cache
def _weights(size: int, wanted: int, device: torch.device) -> torch.Tensor:
    """Bicubic weights [wanted, size] fp32: kernel without antialiasing, pixel centres aligned. Kept as layouts are."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        impulses = torch.eye(size).view(1, size, size, 1)
        spread = F.interpolate(impulses, (wanted, 1), mode="bicubic", align_corners=False)
        return spread[0, :, :, 0].T.contiguous().to(device)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Attention of every patch to its own item; memory is linear in the number of patches.

    Args:
        q, k, v: [P, H, K], group by group.
        layout: where the items lie.

    Returns:
        [P, H, K].
    """
    varlen = _varlen_attention()
    low = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0  # what flash attention takes
    if varlen is not None and layout.cu_seqlens is not None and low:
        bounds, longest = layout.cu_seqlens, layout.longest
        return varlen(q.contiguous(), k.contiguous(), v.contiguous(), bounds, bounds, longest, longest)
    outputs, start = [], 0
    for group in layout.groups:
        stop = start + group.patches
        heads = [part[start:stop].unflatten(0, (-1, group.length)).transpose(1, 2) for part in (q, k, v)]
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        outputs.append(mixed.transpose(1, 2).flatten(0, 1))
        start = stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@functools.cache
def _varlen_attention() -> Callable[..., torch.Tensor] | None:
    """Flash attention over sequences of many lengths, which torch has since 2.10, for CUDA and 16 bits."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn  # type: ignore[return-value]


def time_rows(max_frames: int, size: int) -> torch.Tensor:
    """Returns fixed rows [max_frames, size]: sines, then cosines, of frame * 10000^(-2 i / size)."""
    rates = 10_000.0 ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = torch.arange(max_frames, dtype=torch.float32)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)
