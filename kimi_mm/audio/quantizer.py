"""Vector quantizer of one codebook behind a small block-causal transformer at 12.5 Hz.

    features [B, N, F] ─► linear ─► layers (block-causal) ─► linear ─► z [B, N, C] ─► nearest code by squared L2

With `hidden_layers=0` there is no transformer and no projection: the F = pooling * D values of a row are averaged over
the pooled frames and quantized directly, as the published 12.5 Hz tokenizer of GLM-4-Voice does.

The codebook follows its vectors by exponential moving averages (van den Oord et al. 2017, appendix A.1); codes that
fall out of use are placed on vectors of the current step. Batches are counted as they pass (`forward` in training
mode), and `update_codebook` moves the codebook: once for a step, whatever batches and processes it is made of.

Shapes: B rows, N codes, F feature width, D hidden size, C code width, K codes in the codebook.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from kimi_mm.audio.encoder import EncoderLayer, KeyValue, attention_mask, sinusoids
from kimi_mm.config import AudioTokenizerConfig
from kimi_mm.errors import UserError


@dataclass
class Quantized:
    """Codes [B, N] int64; `quantized` [B, N, C] with straight-through gradients; the commitment loss."""

    codes: torch.Tensor
    quantized: torch.Tensor
    loss: torch.Tensor


@dataclass
class QuantizerState:
    """Keys and values of a stream, and the position in its segment."""

    past: list[KeyValue | None] = field(default_factory=list)
    position: int = 0

    def clone(self) -> QuantizerState:
        return QuantizerState(list(self.past), self.position)


@dataclass
class Counted:
    """What the batches of a step say about the codes, to be put together over batches and processes.

    `sums` [K, 1 + C] adds up: how many vectors a code took, and their sum. `keys` [K] and `spares` [K, C] are a draw: a
    vector for each code, in case it has to be revived, and the key that it was drawn with, -inf where there was none to
    draw; the largest key wins.
    """

    sums: torch.Tensor
    keys: torch.Tensor
    spares: torch.Tensor

    def add(self, other: Counted) -> None:
        """Takes in what another batch, or another process, counted."""
        self.sums = self.sums + other.sums
        self.spares = torch.where((other.keys > self.keys)[:, None], other.spares, self.spares)
        self.keys = torch.maximum(self.keys, other.keys)


class VectorQuantizer(nn.Module):
    """Turns 12.5 Hz feature rows into codes.

    Args:
        config: the tokenizer's config; blocks and segments are the encoder's, divided by the pooling.
    """

    codebook: torch.Tensor
    ema_count: torch.Tensor
    ema_sum: torch.Tensor
    positions: torch.Tensor

    def __init__(self, config: AudioTokenizerConfig) -> None:
        super().__init__()
        self.config = quantizer = config.quantizer
        self.pooling = config.pooling
        block = config.encoder.block_size
        self.block = None if block is None else block // config.pooling
        self.max_positions = config.encoder.max_positions // config.pooling
        size = quantizer.hidden_size
        self.layers = nn.ModuleList(
            EncoderLayer(size, quantizer.num_heads, 4 * size) for _ in range(quantizer.hidden_layers)
        )
        if quantizer.hidden_layers:
            self.inner = nn.Linear(config.feature_size, size)
            self.norm = nn.LayerNorm(size)
            self.outer = nn.Linear(size, quantizer.codebook_dim)
        elif quantizer.codebook_dim != config.encoder.hidden_size:
            raise UserError(
                f"quantizer.codebook_dim={quantizer.codebook_dim} must equal encoder.hidden_size="
                f"{config.encoder.hidden_size} when hidden_layers is 0."
            )
        with torch.device("cpu"):  # constants are real even in a model laid out on the meta device
            self.register_buffer("positions", sinusoids(self.max_positions, size), persistent=False)
        codebook = torch.randn(quantizer.codebook_size, quantizer.codebook_dim) / math.sqrt(quantizer.codebook_dim)
        self.register_buffer("codebook", codebook)
        self.register_buffer("ema_count", torch.ones(quantizer.codebook_size))
        self.register_buffer("ema_sum", codebook.clone())
        self.counted: Counted | None = None

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> Quantized:
        """Quantizes feature rows; in training mode, with gradients on, they are counted for `update_codebook`.

        Args:
            features: [B, N, F].
            mask: [B, N] bool, True at rows that hold sound; the others enter neither attention, loss nor codebook.

        Returns:
            Codes, their vectors and the commitment loss.
        """
        z = self.project(features, mask).float()
        codes = self.nearest(z)
        quantized = F.embedding(codes, self.codebook)
        valid = torch.ones(codes.shape, device=codes.device) if mask is None else mask.float()
        commitment = ((z - quantized).square().mean(-1) * valid).sum() / valid.sum().clamp_min(1.0)
        if self.training and torch.is_grad_enabled():
            self._count(z.detach(), codes, valid)
        return Quantized(codes, z + (quantized - z).detach(), self.config.commitment_weight * commitment)

    def project(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Maps features [B, N, F] to the vectors [B, N, C] that are quantized; long input goes segment by segment."""
        if not self.layers:
            return features.unflatten(-1, (self.pooling, -1)).mean(-2)
        outputs = []
        for first in range(0, features.shape[1], self.max_positions):
            span = slice(first, first + self.max_positions)
            x = self.inner(features[:, span])
            length = x.shape[1]
            x = x + self.positions[:length]
            valid = None if mask is None else mask[:, span].bool()
            seen = attention_mask(length, self.block, valid, x.device)
            for layer in self.layers:
                x, _ = layer(x, seen)
            outputs.append(self.outer(self.norm(x)))
        return torch.cat(outputs, 1)

    def step(self, features: torch.Tensor, state: QuantizerState) -> tuple[torch.Tensor, QuantizerState]:
        """Returns the codes [B, N] of a stream's next block of features [B, N, F], and the next state."""
        if not self.layers:
            return self.nearest(self.project(features).float()), state
        if state.position >= self.max_positions:
            state = QuantizerState()
        x = self.inner(features) + self.positions[state.position : state.position + features.shape[1]]
        past = state.past or [None] * len(self.layers)
        present: list[KeyValue | None] = []
        for layer, memory in zip(self.layers, past, strict=True):
            x, keys = layer(x, None, memory)
            present.append(keys)
        codes = self.nearest(self.outer(self.norm(x)).float())
        return codes, QuantizerState(present, state.position + features.shape[1])

    def nearest(self, z: torch.Tensor) -> torch.Tensor:
        """Returns the index of the code nearest to each vector of z [..., C]; the first one on ties."""
        with torch.autocast(z.device.type, enabled=False):
            flat = z.float().flatten(0, -2)
            distance = self.codebook.square().sum(1) - 2 * flat @ self.codebook.T
            return distance.argmin(1).unflatten(0, z.shape[:-1])

    @torch.no_grad()
    def init_codebook(self, vectors: torch.Tensor, generator: torch.Generator | None = None) -> None:
        """Places the codes on randomly chosen vectors [n, C], repeated if n is smaller than K, with a little noise.

        Raises:
            UserError: when there are no vectors, or they are of another width.
        """
        count = len(self.codebook)
        if vectors.ndim != 2 or not len(vectors) or vectors.shape[1] != self.codebook.shape[1]:
            raise UserError(
                f"vectors of shape {list(vectors.shape)} cannot start a codebook; "
                f"expected [n, {self.codebook.shape[1]}] with n at least 1."
            )
        order = torch.randperm(len(vectors), generator=generator)[:count]
        index = order[torch.arange(count) % len(order)].to(vectors.device)
        noise = torch.randn(self.codebook.shape, generator=generator).to(vectors.device)
        self.codebook.copy_(vectors[index].float() + 0.01 * vectors.float().std(correction=0) * noise)
        self.restart_averages()

    @torch.no_grad()
    def restart_averages(self) -> None:
        """Starts the moving averages from the codebook as it is."""
        self.ema_count.fill_(1.0)
        self.ema_sum.copy_(self.codebook)

    @torch.no_grad()
    def update_codebook(self) -> None:
        """Moves the codebook to what was counted since the last call; in a run of several, by every process."""
        if self.counted is None:
            return
        counted, self.counted = self.counted, None
        decay = self.config.ema_decay
        count, total = counted.sums[:, 0], counted.sums[:, 1:]
        self.ema_count.mul_(decay).add_(count, alpha=1 - decay)
        self.ema_sum.mul_(decay).add_(total, alpha=1 - decay)
        # Without a single vector there is nothing to revive a code with.
        dead = (self.ema_count < self.config.revive_below) & counted.keys.isfinite()
        self.ema_count.copy_(torch.where(dead, torch.ones_like(self.ema_count), self.ema_count))
        self.ema_sum.copy_(torch.where(dead[:, None], counted.spares, self.ema_sum))
        self.codebook.copy_(self.ema_sum / self.ema_count[:, None])

    @torch.no_grad()
    def _count(self, z: torch.Tensor, codes: torch.Tensor, valid: torch.Tensor) -> None:
        size = len(self.codebook)
        z, codes, valid = z.flatten(0, 1), codes.flatten(), valid.flatten()
        sums = torch.zeros(size, 1 + z.shape[1], device=z.device)
        sums.index_add_(0, codes, torch.cat([valid[:, None], z * valid[:, None]], 1))
        # Valid positions come first in `order`, so a fraction of their number picks one of them without a host sync.
        order, number = valid.argsort(descending=True, stable=True), valid.sum()
        pick = order[(torch.rand(size, device=z.device) * number).long().clamp_max(len(order) - 1)]
        # The largest of keys u^(1 / n) draws from all batches as if they were one (Efraimidis and Spirakis 2006).
        keys = torch.rand(size, device=z.device).clamp_min(1e-30).log() / number
        mine = Counted(sums, keys, z[pick])
        if self.counted is None:
            self.counted = mine
        else:
            self.counted.add(mine)


def usage(counts: torch.Tensor) -> tuple[float, float]:
    """Returns the share of codes in use and the perplexity of their distribution, from counts [K].

    A codebook used evenly has perplexity K, one of which a single code is used 1.
    """
    p = counts.double() / counts.sum().clamp_min(1)
    entropy = -(p * p.clamp_min(1e-12).log()).sum()
    return float((counts > 0).double().mean()), float(entropy.exp())
