"""Causal depthwise convolution of short kernel followed by SiLU (Kimi Linear, section 4), in plain PyTorch.

    y_t = silu( sum_j w_j x_{t-W+1+j} )        rows before the start come from the state, or are zero

Shapes:  B batch  T time  C channels  W kernel width  N sequences (B, or those of cu_seqlens)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def short_conv(
    x: Tensor,
    weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Convolves every channel with its own short causal kernel and applies SiLU.

    Args:
        x: [B, T, C].
        weight: [C, W]; the last column multiplies the present row.
        initial_state: [N, W - 1, C], the raw inputs before the first row, oldest first; None is zeros.
        cu_seqlens: [N + 1] int, starts of the sequences packed in one row (B = 1) and the total.
        lengths: [B] int, valid rows of right-padded sequences; decides what the final state holds.

    Returns:
        y [B, T, C], and the last W - 1 raw inputs of every sequence [N, W - 1, C], or None unless asked for.

    Raises:
        ValueError: if cu_seqlens is combined with a batch or with lengths.
    """
    B, T, C = x.shape
    tail = weight.shape[1] - 1
    weight = weight.to(x.dtype)
    if cu_seqlens is not None:
        if B != 1 or lengths is not None:
            raise ValueError("cu_seqlens needs batch size 1 and no lengths; pass one packed row.")
        return _packed_conv(x[0], weight, initial_state, output_final_state, cu_seqlens)
    past = x.new_zeros(B, tail, C) if initial_state is None else initial_state.to(x.dtype)
    rows = torch.cat([past, x], 1)
    if T == 1:
        y = (rows * weight.t()).sum(1, keepdim=True)
    else:
        y = rows[:, tail:] * weight[:, tail]
        for j in range(tail):
            y = torch.addcmul(y, rows[:, j : j + T], weight[:, j])
    final = None
    if output_final_state:
        if lengths is None:
            final = rows[:, T:].contiguous()
        else:
            index = lengths[:, None] + torch.arange(tail, device=x.device)
            final = torch.take_along_dim(rows, index[..., None], 1)
    return F.silu(y), final


def _packed_conv(
    x_TC: Tensor, weight: Tensor, initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor | None]:
    T, C = x_TC.shape
    tail = weight.shape[1] - 1
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    N = starts.shape[0]
    sequence = torch.repeat_interleave(torch.arange(N, device=x_TC.device), ends - starts, output_size=T)
    row = torch.arange(T, device=x_TC.device)
    past = x_TC.new_zeros(N, tail, C) if initial_state is None else initial_state.to(x_TC.dtype)
    rows = torch.cat([x_TC, past.reshape(N * tail, C)])

    def source(row: Tensor, sequence: Tensor, back: Tensor | int) -> Tensor:
        """Row of `rows` that lies `back` steps before `row`: an input, or one of the sequence's `tail` past rows."""
        missing = starts[sequence] - (row - back)
        return torch.where(missing > 0, T + (sequence + 1) * tail - missing, row - back)

    y = x_TC * weight[:, tail]
    for j in range(tail):
        y = torch.addcmul(y, rows[source(row, sequence, tail - j)], weight[:, j])
    final = None
    if output_final_state:
        back = torch.arange(tail, 0, -1, device=x_TC.device)
        final = rows[source(ends[:, None], torch.arange(N, device=x_TC.device)[:, None], back)]
    return F.silu(y)[None], final
