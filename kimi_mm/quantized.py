"""Weights in 8 or 4 bits, activations as they are: linear layers and experts that expand their weights as they go.

    int8   weight [R, C] = values int8 [R, C] * scale [R]                          one scale a row
    int4   weight [R, C] = values [R, C] in int32 [R, C / 8] * scale [R, C / 32]   K2.5's: value + 8, low bits first

Never more than `SLICE` values are rounded or expanded at once, so that a model needs little more memory than its
weights. A few rows at a time, as in decoding, are multiplied on a CPU by torch's own kernel for int8 weights, which
reads them as they are; measured on two CPU cores, 68 M weights in bf16: 1 row 22 ms beside 564 ms, 32 rows 164 ms
beside 656 ms, 256 rows 1246 ms beside 888 ms.

Shapes: R rows (output channels), C columns, E experts, N tokens, D hidden, I expert width, k experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_mm.errors import UserError

BITS = ("int8", "int4")
GROUP = 32
SLICE = 8 * 2**20
FEW_ROWS = 64  # up to so many the CPU's kernel is faster than expanding


def pack_int4(values: Tensor) -> Tensor:
    """Packs whole numbers [..., C] in -8 .. 7 into int32 [..., C / 8], the first of eight in the lowest bits."""
    nibbles = (values.to(torch.int32) + 8).unflatten(-1, (-1, 8))
    shifts = torch.arange(0, 32, 4, device=values.device, dtype=torch.int32)
    # Bits do not overlap, and int32 wraps as the layout does.
    return (nibbles << shifts).sum(-1, dtype=torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """Undoes `pack_int4`: int32 [..., C / 8] to int8 [..., C]."""
    shifts = torch.arange(0, 32, 4, device=packed.device, dtype=torch.int32)
    return (((packed[..., None] >> shifts) & 15) - 8).to(torch.int8).flatten(-2)


def quantize(weight: Tensor, bits: str) -> tuple[Tensor, Tensor]:
    """Rounds a matrix or a stack of them to symmetric integers.

    Args:
        weight: [..., R, C]; for int4 C is a multiple of 32.
        bits: "int8" or "int4".

    Returns:
        values (int8 [..., R, C], or packed int32 [..., R, C / 8]) and scales in the weight's dtype.

    Raises:
        UserError: for another number of bits, or columns that do not divide.
    """
    if bits not in BITS:
        raise UserError(f"weights='{bits}' must be one of {', '.join(BITS)}.")
    columns = weight.shape[-1]
    if bits == "int4" and columns % GROUP:
        raise UserError(f"int4 needs columns in groups of {GROUP}, got {columns}.")
    rows = weight.flatten(0, -2)
    if bits == "int8":
        values, scale = rows.new_empty(rows.shape, dtype=torch.int8), rows.new_empty(len(rows))
    else:
        values = rows.new_empty(len(rows), columns // 8, dtype=torch.int32)
        scale = rows.new_empty(len(rows), columns // GROUP)
    step = max(1, SLICE // columns)
    for at in range(0, len(rows), step):
        part = slice(at, at + step)
        exact = rows[part].float()
        if bits == "int8":
            scale[part] = (exact.abs().amax(-1) / 127).clamp_min(1e-8).to(weight.dtype)
            values[part] = (exact / scale[part].float()[..., None]).round_().clamp_(-127, 127).to(torch.int8)
        else:
            grouped = exact.unflatten(-1, (-1, GROUP))
            scale[part] = (grouped.abs().amax(-1) / 7).clamp_min(1e-8).to(weight.dtype)
            whole = (grouped / scale[part].float()[..., None]).round_().clamp_(-8, 7)
            values[part] = pack_int4(whole.flatten(-2))
    lead = weight.shape[:-1]
    return values.view(*lead, -1), scale.view(lead if bits == "int8" else (*lead, -1))


def expand(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the weights [..., R, C] of `quantize`'s result in a dtype."""
    if values.dtype == torch.int8:
        return values.to(dtype) * scale.to(dtype)[..., None]
    return (unpack_int4(values).to(dtype).unflatten(-1, (-1, GROUP)) * scale.to(dtype)[..., None]).flatten(-2)


class QuantizedLinear(nn.Module):
    """A linear layer over int8 or int4 weights; not for training.

    Args:
        values, scale: of `quantize`, [R, C] or [R, C / 8].
        bias: [R] or None.
    """

    values: Tensor
    scale: Tensor

    def __init__(self, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        packing = 1 if values.dtype == torch.int8 else 8
        self.out_features, self.in_features = values.shape[0], values.shape[1] * packing

    @property
    def weight(self) -> Tensor:
        """The whole matrix, expanded, in the dtype of the scales."""
        return expand(self.values, self.scale, self.scale.dtype)

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """[..., C] -> [..., R], or the first `size` of them."""
        rows = self.out_features if size is None else size
        if self._as_they_are(x):
            flat = x.reshape(-1, self.in_features)
            out = torch._weight_int8pack_mm(flat, self.values[:rows], self.scale[:rows].to(x.dtype))
            out = out.view(*x.shape[:-1], rows)
            return out if self.bias is None else out + self.bias[:rows].to(out.dtype)
        step = max(1, SLICE // self.in_features)
        parts = []
        for at in range(0, rows, step):
            end = min(at + step, rows)
            parts.append(F.linear(x, expand(self.values[at:end], self.scale[at:end], x.dtype)))
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if self.bias is None else out + self.bias[:rows].to(out.dtype)

    def _as_they_are(self, x: Tensor) -> bool:
        """Whether the CPU's kernel multiplies x by the int8 weights without expanding them."""
        few = x.numel() // self.in_features <= FEW_ROWS
        narrow = x.dtype in (torch.bfloat16, torch.float16)
        return few and narrow and x.device.type == "cpu" and self.values.dtype == torch.int8


class QuantizedExperts(nn.Module):
    """Stacked SwiGLU experts over int8 or int4 weights; expands those that were chosen, one at a time."""

    gate_up_values: Tensor
    gate_up_scale: Tensor
    down_values: Tensor
    down_scale: Tensor

    def __init__(self, gate_up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        for name, (values, scale) in (("gate_up", gate_up), ("down", down)):
            self.register_buffer(f"{name}_values", values)
            self.register_buffer(f"{name}_scale", scale)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """x [N, D], indices and weights [N, k] -> [N, D]."""
        out = torch.zeros_like(x)
        for expert in indices.unique().tolist():
            token, place = torch.where(indices == expert)
            gate_up = expand(self.gate_up_values[expert], self.gate_up_scale[expert], x.dtype)
            gate, up = F.linear(x[token], gate_up).chunk(2, -1)
            down = expand(self.down_values[expert], self.down_scale[expert], x.dtype)
            part = F.linear(F.silu(gate) * up, down)
            out.index_add_(0, token, part * weights[token, place, None].to(part.dtype))
        return out
