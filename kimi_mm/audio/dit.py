"""Diffusion transformer for flow matching over mel frames, conditioned frame by frame on codes.

    x_t [B, T, M] ─► linear ─► h                       codes [B, N] ─► embed, repeat per frame ─► cond [B, T, D]
    t [B, T or 1] ─► sinusoids ─► MLP ──────────────────────────────────────────────────────────────► + ─► c
        layer:  h += gate(c) * Attention(LN(h) * (1 + scale(c)) + shift(c))      the same for the MLP
    h ─► LN, scale(c), shift(c) ─► linear ─► velocity [B, T, M]

Attention is full over [past frames | this chunk]: causality lies in what the past holds (`DiTCache`). Training runs
all chunks of an utterance at once, under a mask that says the same (`chunk_mask`).

Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), adaLN-Zero, per frame.

Shapes: B rows, T frames (50 Hz), N codes, M mel bins, D hidden size, L layers, H heads, C past frames, K head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from kimi_mm.audio.detokenizer_config import DiTConfig
from kimi_mm.audio.dit_cache import DiTCache
from kimi_mm.config import RopeConfig
from kimi_mm.text.rope import RotaryEmbedding

CLEAN = 0.999  # flow time at which finished frames are written to the cache


@dataclass(frozen=True)
class DiTContext:
    """What the frames of a chunk attend to besides themselves, and where they stand.

    Rotated keys and values of the past, [L, B, H, C, K] each or None; cos and sin [T, K / 2] of the frames; `mask`,
    broadcast to [B, H, T, C + T], True where a key may be seen, or None.
    """

    keys: torch.Tensor | None
    values: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor
    mask: torch.Tensor | None

    def repeated(self, times: int) -> DiTContext:
        """Returns the context of the same rows, `times` times over."""

        def again(t: torch.Tensor | None, dim: int) -> torch.Tensor | None:
            return None if t is None else torch.cat([t] * times, dim)

        mask = again(self.mask, 0) if self.mask is not None and self.mask.dim() == 4 else self.mask
        return DiTContext(again(self.keys, 1), again(self.values, 1), self.cos, self.sin, mask)


class Modulation(nn.Module):
    """SiLU and a linear map from the condition to `parts` vectors per frame, optionally of low rank; starts at zero."""

    def __init__(self, hidden_size: int, parts: int, rank: int | None) -> None:
        super().__init__()
        self.parts = parts
        self.squeeze = None if rank is None else nn.Linear(hidden_size, rank, bias=False)
        self.expand = nn.Linear(rank or hidden_size, parts * hidden_size)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, condition: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Maps SiLU(c) [B, T, D] to `parts` tensors [B, T, D]."""
        x = condition if self.squeeze is None else self.squeeze(condition)
        return self.expand(x).chunk(self.parts, -1)


class DiTBlock(nn.Module):
    """Attention and MLP, both behind a modulated LayerNorm without weights."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.modulation = Modulation(size, 6, config.modulation_rank)
        self.qkv = nn.Linear(size, 3 * size)
        self.proj = nn.Linear(size, size)
        self.fc1 = nn.Linear(size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, size)

    def forward(
        self, x: torch.Tensor, c: torch.Tensor, rope: RotaryEmbedding, context: DiTContext, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Maps x [B, T, D] and SiLU(c) to the next x, and the layer's unrotated keys and values [B, H, T, K]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c)
        heard, k, v = self._attend(_modulate(x, shift_a, scale_a), rope, context, layer)
        x = torch.addcmul(x, gate_a, heard)
        inner = F.gelu(self.fc1(_modulate(x, shift_m, scale_m)), approximate="tanh")
        return torch.addcmul(x, gate_m, self.fc2(inner)), k, v

    def _attend(
        self, x: torch.Tensor, rope: RotaryEmbedding, context: DiTContext, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        keys, values = _rotate(rope, k, context.cos, context.sin), v
        if context.keys is not None and context.values is not None:
            keys = torch.cat([context.keys[layer], keys], 2)
            values = torch.cat([context.values[layer], v], 2)
        q = _rotate(rope, q, context.cos, context.sin)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=context.mask)
        return self.proj(out.transpose(1, 2).flatten(2)), k, v


class DiT(nn.Module):
    """The velocity of the flow.

    Args:
        config: sizes.
        num_mel_bins: M.
        frames_per_code: mel frames that one code stands for.
    """

    def __init__(self, config: DiTConfig, num_mel_bins: int, frames_per_code: int = 4) -> None:
        super().__init__()
        self.config, self.frames_per_code = config, frames_per_code
        size = config.hidden_size
        self.null_code = config.codebook_size  # the embedding's last row: no code is known
        self.code_embedding = nn.Embedding(config.codebook_size + 1, size)
        self.phase_embedding = nn.Embedding(frames_per_code, size) if config.frame_phase else None
        self.time_mlp = nn.Sequential(nn.Linear(config.time_size, size), nn.SiLU(), nn.Linear(size, size))
        self.input = nn.Linear(num_mel_bins, size)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.num_layers))
        self.output_modulation = Modulation(size, 2, config.modulation_rank)
        self.output = nn.Linear(size, num_mel_bins)
        nn.init.normal_(self.code_embedding.weight, std=0.02)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.rope = RotaryEmbedding(
            RopeConfig(theta=config.rope_theta, interleaved=True), config.hidden_size // config.num_heads
        )

    def condition(self, codes: torch.Tensor) -> torch.Tensor:
        """Maps codes [B, N], `null_code` where unknown, to one vector per frame, [B, N * frames_per_code, D]."""
        x = self.code_embedding(codes)[:, :, None].expand(-1, -1, self.frames_per_code, -1)
        if self.phase_embedding is not None:
            x = x + self.phase_embedding.weight
        return x.flatten(1, 2)

    def forward(self, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor, context: DiTContext) -> torch.Tensor:
        """Returns the velocity at x.

        Args:
            x: [B, T, M], noisy normalised mel.
            time: flow time in [0, 1], [B, T] or broadcast to it.
            cond: [B, T, D] of `condition`.
            context: of `context` or, in training, `chunk_context`.

        Returns:
            [B, T, M].
        """
        h, c, _, _ = self._run(x, time, cond, context)
        shift, scale = self.output_modulation(c)
        return self.output(_modulate(h, shift, scale))

    def keys_values(
        self, x: torch.Tensor, cond: torch.Tensor, context: DiTContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads finished frames x [B, T, M] as the past of what follows: unrotated keys, values, [L, B, H, T, K]."""
        time = torch.full((1, 1), CLEAN, device=x.device)
        _, _, keys, values = self._run(x, time, cond, context)
        return torch.stack(keys), torch.stack(values)

    def context(self, cache: DiTCache, counts: list[int]) -> DiTContext:
        """Prepares the past for chunks of `counts` frames, padded on the right to the longest."""
        return self.context_of(cache.keys, cache.values, cache.visible(counts), max(counts))

    def context_of(
        self, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor | None, frames: int
    ) -> DiTContext:
        """Rotates a past into place.

        Args:
            keys, values: [L, B, H, C, K] of a cache.
            seen: [B, C + T] bool of `DiTCache.visible`, or None where all is visible.
            frames: T of the chunk.
        """
        past = keys.shape[3]
        cos, sin = self._angles(torch.arange(past + frames, device=keys.device))
        mask = None if seen is None else seen[:, None, None]
        if not past:
            return DiTContext(None, None, cos, sin, mask)
        return DiTContext(_rotate(self.rope, keys, cos[:past], sin[:past]), values, cos[past:], sin[past:], mask)

    def chunk_context(self, chunks: torch.Tensor) -> DiTContext:
        """Prepares a training pass over [noisy frames | the same frames clean]; see `chunk_mask`.

        Args:
            chunks: [T] number of the chunk that each frame lies in, ascending.
        """
        frames = torch.arange(len(chunks), device=chunks.device)
        return DiTContext(None, None, *self._angles(frames.repeat(2)), chunk_mask(chunks))

    def empty_cache(self, rows: int = 1) -> DiTCache:
        """Returns the cache of streams that have not begun, on the model's device and in its type."""
        config, like = self.config, self.output.weight
        heads, size = config.num_heads, config.hidden_size // config.num_heads
        nothing = like.new_zeros(config.num_layers, rows, heads, 0, size)
        return DiTCache(nothing, nothing, (0,) * rows, (0,) * rows)

    def _run(
        self, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor, context: DiTContext
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        c = F.silu(self.time_mlp(self._sinusoids(time).to(cond.dtype)) + cond)
        h = self.input(x.to(self.input.weight.dtype))
        if self.config.condition_input:
            h = h + cond
        keys, values = [], []
        for layer, block in enumerate(self.blocks):
            h, k, v = block(h, c, self.rope, context, layer)
            keys.append(k)
            values.append(v)
        return h, c, keys, values

    def _sinusoids(self, time: torch.Tensor) -> torch.Tensor:
        """Maps flow time [..] to [.., time_size]: cosines, then sines, of its thousandths."""
        half = self.config.time_size // 2
        steps = time.float() * 1000
        if self.config.integer_time:
            steps = steps.floor()
        rates = torch.exp(torch.arange(half, device=time.device) * (-math.log(10_000.0) / half))
        angles = steps[..., None] * rates
        return torch.cat([angles.cos(), angles.sin()], -1)

    def _angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.rope.angles(positions[None])
        return cos[0, :, 0], sin[0, :, 0]


def chunk_mask(chunks: torch.Tensor) -> torch.Tensor:
    """Returns what frames may see in a training pass over [noisy | clean] copies of an utterance, [2 T, 2 T] bool.

    A clean frame sees the clean frames of its chunk and earlier ones; a noisy frame sees the noisy frames of its own
    chunk and the clean ones of earlier chunks: just what a stream sees in its cache.

    Args:
        chunks: [T] chunk number of each frame.
    """
    row, column = chunks[:, None], chunks[None]
    noisy = torch.cat([row == column, column < row], 1)
    clean = torch.cat([torch.zeros_like(row == column), column <= row], 1)
    return torch.cat([noisy, clean], 0)


def _modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def _rotate(rope: RotaryEmbedding, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates x [.., T, K] in fp32."""
    return rope.rotate(x.float(), cos, sin).to(x.dtype)
