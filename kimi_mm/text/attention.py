"""What every attention layer of one forward call shares: positions, masks, and where new tokens go in the cache.

    no cache                causal
    cu_seqlens              causal within every packed sequence
    empty cache             causal among the new tokens; right-padded rows need no mask, their tails are never read
    filled cache, T = 1     all keys of the row
    cache with a capacity   the same, behind a mask over all of it; nothing depends on the host's count
    filled cache, T > 1     keys up to each query
    context parallel        keys of all ranks before, and causal among one's own (kimi_mm.text.context)

Shapes:  B batch  T new tokens  S keys  H heads  D channels
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_mm.text.cache import BackboneCache
from kimi_mm.text.context import Context, ContextStep, document_step


@dataclass
class Step:
    """One forward call, as the layers see it."""

    positions: Tensor  # [B, T] int64, for rotary embeddings
    lengths: Tensor | None = None  # [B] valid new tokens of right-padded rows
    valid: Tensor | None = None  # [B, T] bool, the same as a mask
    cu_seqlens: Tensor | None = None
    bounds: list[int] | None = None  # cu_seqlens on the host, on a CPU
    mask: Tensor | None = None  # [B, 1, T, S] or [1, 1, T, T] bool, True where a query may look
    start: int = 0  # tokens the fullest cache row holds
    write: Tensor | None = None  # [B, T] cache index of every new token; None: all rows at `start`
    context: ContextStep | None = None  # rows that other ranks hold the rest of


def plan_step(
    x: Tensor,
    positions: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: BackboneCache | None,
    context: Context | None = None,
) -> Step:
    """Works out positions and masks of one call, without reading the device unless cu_seqlens lies on a CPU.

    Args:
        x: [B, T, D]. positions: [B, T] or None for 0, 1, .. in every sequence. lengths: [B]. cu_seqlens: [N + 1].
        context: the group that shares the rows: x is this rank's stretch, cu_seqlens are the whole row's.

    Raises:
        ValueError: if the options contradict each other.
    """
    B, T, _ = x.shape
    counted = torch.arange(T, device=x.device)
    valid = None if lengths is None else counted < lengths[:, None]
    if context is not None:
        if cache is not None or lengths is not None:
            raise ValueError("context parallelism is for training on whole rows: it excludes a cache and lengths.")
        if cu_seqlens is not None and B != 1:
            raise ValueError("cu_seqlens packs sequences into one row: it excludes B > 1.")
        if cu_seqlens is not None:
            shared, local, own, mask = document_step(context, T, cu_seqlens)
            return Step(own if positions is None else positions, cu_seqlens=local, mask=mask, context=shared)
        offset = context.rank * T
        where = (offset + counted).expand(B, T) if positions is None else positions
        return Step(where, context=ContextStep(context, offset))
    if cu_seqlens is not None:
        if cache is not None or lengths is not None or B != 1:
            raise ValueError("cu_seqlens packs sequences into one row: it excludes a cache, lengths, and B > 1.")
        sizes = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        numbers = torch.arange(sizes.shape[0], device=x.device)
        sequence = torch.repeat_interleave(numbers, sizes, output_size=T)
        if positions is None:
            positions = (counted - cu_seqlens.long()[sequence])[None]
        if x.device.type == "cpu":
            return Step(positions, cu_seqlens=cu_seqlens, bounds=cu_seqlens.tolist())
        mask = (sequence[:, None] == sequence) & (counted[:, None] >= counted)
        return Step(positions, cu_seqlens=cu_seqlens, mask=mask[None, None])
    if cache is None:
        return Step(counted.expand(B, T) if positions is None else positions, lengths, valid)
    if cache.batch_size != B:
        raise ValueError(f"The cache holds {cache.batch_size} rows, the input {B}; use new_cache({B}) or select().")
    index = cache.lengths[:, None] + counted
    if cache.capacity:
        if T != 1 or lengths is not None or cache.max_length >= cache.capacity:
            raise ValueError(f"a cache with a capacity takes one token a step, {cache.capacity} in all.")
        mask = (torch.arange(cache.capacity, device=x.device) <= index[..., None])[:, None]
        where = index if positions is None else positions
        return Step(where, mask=mask, start=cache.capacity - 1, write=index)
    step = Step(index if positions is None else positions, lengths, valid, start=cache.max_length)
    if cache.max_length:
        if cache.ragged:
            step.write = index
        if cache.ragged or T > 1:
            keys = torch.arange(cache.max_length + T, device=x.device)
            step.mask = (keys <= index[..., None])[:, None]
    return step


def attend(q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float) -> Tensor:
    """Scaled dot-product attention under the step's mask.

    Args:
        q: [B, T, H, D]. k: [B, S, G, D]. v: [B, S, G, E]; H is a multiple of G.
        scale: factor on the logits.

    Returns:
        [B, T, H, E].
    """
    B, T, H, _ = q.shape
    S, G = k.shape[1:3]
    if T == 1 and H != G:
        # Heads that share keys become query rows: no key is copied, and the mask row serves them all.
        out = F.scaled_dot_product_attention(
            q.view(B, G, H // G, -1), k.transpose(1, 2), v.transpose(1, 2), attn_mask=step.mask, scale=scale
        )
        return out.reshape(B, 1, H, -1)
    if H != G:
        k, v = k.repeat_interleave(H // G, 2), v.repeat_interleave(H // G, 2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if step.bounds is not None:
        parts = [
            F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True, scale=scale)
            for a, b in zip(step.bounds[:-1], step.bounds[1:], strict=True)
            if b > a
        ]
        return torch.cat(parts, 2).transpose(1, 2)
    causal = step.mask is None and S == T
    mask = step.mask
    if step.context is not None and mask is None and S > T:
        from torch.nn.attention.bias import causal_lower_right  # brings torch's compiler: seconds that only this needs

        mask, causal = causal_lower_right(T, S), False  # the queries are the last T of S positions
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale).transpose(1, 2)


class PeakLogits(nn.Module):
    """The largest attention logit of every head since `peak` was last cleared, for QK-clip (Kimi K2, section 2.1).

    Args:
        num_heads: query heads H.
    """

    ROWS = 1024  # queries scored at once
    peak: Tensor

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.enabled = False
        self.register_buffer("peak", torch.zeros(num_heads, device="cpu"), persistent=False)

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, step: Step, scale: float) -> None:
        """Notes the maxima of scale * q k^T over visible pairs; q [B, T, H, D], k [B, S, G, D], as for `attend`."""
        if not (self.enabled and self.training):
            return
        T, H = q.shape[1:3]
        S, G = k.shape[1:3]
        keys = k.transpose(1, 2)[:, :, None]  # [B, G, 1, S, D]
        positions = torch.arange(S, device=q.device)
        mask = step.mask
        if step.bounds is not None:
            edges = torch.tensor(step.bounds[1:], device=q.device)
            document = torch.bucketize(positions, edges, right=True)
            mask = (document[:, None] == document) & (positions[:, None] >= positions)
            mask = mask[None, None]
        for start in range(0, T, self.ROWS):
            rows = slice(start, min(T, start + self.ROWS))
            queries = q[:, rows].transpose(1, 2).unflatten(1, (G, H // G))  # [B, G, H / G, t, D]
            scores = (queries @ keys.mT).flatten(1, 2).float() * scale  # [B, H, t, S]
            if mask is None:
                seen = torch.arange(S - T + rows.start, S - T + rows.stop, device=q.device)[:, None] >= positions
            else:
                seen = mask[:, :, rows] if mask.shape[-2] == T else mask
            if step.valid is not None:
                seen = seen & step.valid[:, None, rows, None]
            peaks = scores.masked_fill(~seen, float("-inf")).amax((0, 2, 3))
            self.peak.copy_(torch.maximum(self.peak, peaks))
