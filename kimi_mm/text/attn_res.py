"""The residual stream: plain sums, or Block Attention Residuals (Attention Residuals, sections 3 and 4).

    plain       h ─► f ─► h + f(h)
    attn_res    blocks [b_0 = embedding, b_1, ..] and the running sum of the open block
                h = mix(blocks + [partial]) ─► f ─► partial + f(h);   every `block_size` sublayers the block closes

A stream belongs to one forward call. `fork` gives a second branch the same past. To PyTorch a stream is a tree of its
tensors, so that hooks on layers find them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from kimi_mm import kernels
from kimi_mm.text.norm import RMSNorm


class AttnRes(nn.Module):
    """Pseudo-query and key-norm weight of one sublayer; the zero query starts as a plain mean."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(hidden_size))
        self.norm_weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, sources: list[Tensor], norm: RMSNorm) -> Tensor:
        """n tensors [B, T, D] -> their mix, normed: [B, T, D]."""
        return kernels.attn_res_mix_norm(sources, self.query, self.norm_weight, self.eps, norm.weight, norm.eps)


class PlainStream:
    """The ordinary residual stream."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def read(self, mix: AttnRes | None, norm: RMSNorm) -> Tensor:
        """Input of the next sublayer, after its own norm."""
        return norm(self.x)

    def add(self, out: Tensor) -> None:
        """Takes a sublayer's output."""
        self.x = self.x + out

    def fork(self) -> PlainStream:
        return PlainStream(self.x)


class AttnResStream:
    """Blocks of summed sublayer outputs; every read attends over them."""

    def __init__(self, x: Tensor, block_size: int) -> None:
        self.blocks = [x]
        self.partial: Tensor | None = None
        self.block_size = block_size
        self.in_block = 0

    def read(self, mix: AttnRes | None, norm: RMSNorm) -> Tensor:
        """Input of the next sublayer, after its own norm; without a mix there is one source, the embedding."""
        sources = self.blocks if self.partial is None else [*self.blocks, self.partial]
        return norm(sources[0]) if mix is None else mix(sources, norm)

    def add(self, out: Tensor) -> None:
        """Takes a sublayer's output, first closing the block if it is full."""
        if self.in_block == self.block_size and self.partial is not None:
            self.blocks.append(self.partial)
            self.partial, self.in_block = None, 0
        self.partial = out if self.partial is None else self.partial + out
        self.in_block += 1

    def fork(self) -> AttnResStream:
        twin = AttnResStream(self.blocks[0], self.block_size)
        twin.blocks, twin.partial, twin.in_block = list(self.blocks), self.partial, self.in_block
        return twin


Stream = PlainStream | AttnResStream


def _put_together(leaves: Iterable[Any], kept: tuple[int, int]) -> AttnResStream:
    *blocks, partial = leaves
    stream = AttnResStream(blocks[0], kept[0])
    stream.blocks, stream.partial, stream.in_block = blocks, partial, kept[1]
    return stream


_pytree.register_pytree_node(PlainStream, lambda s: ([s.x], None), lambda leaves, _: PlainStream(*leaves))
_pytree.register_pytree_node(
    AttnResStream, lambda s: ([*s.blocks, s.partial], (s.block_size, s.in_block)), _put_together
)
