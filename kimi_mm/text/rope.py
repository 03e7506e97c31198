"""Rotary positions, with YaRN stretching as DeepSeek-V3 and Kimi K2 use it.

    angle[t, i] = t * theta^(-2i/d)       pairs are (i, i + d/2), or (2i, 2i + 1) when interleaved

Shapes:  B batch  T time  H heads  R rotary channels
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kimi_mm.config import RopeConfig


class RotaryEmbedding:
    """Angles for positions, and their application; holds no parameters.

    `softmax_factor` is what attention logits are multiplied with on top of 1/sqrt(d): YaRN's mscale_all_dim squared.
    """

    def __init__(self, config: RopeConfig, dim: int) -> None:
        if dim % 2:
            raise ValueError(f"Rotary positions need an even number of channels, got {dim}.")
        self.config = config
        self.frequencies = _frequencies(config, dim)
        all_dim = _mscale(config.yarn_factor, config.yarn_mscale_all_dim)
        self.amplitude = _mscale(config.yarn_factor, config.yarn_mscale) / all_dim
        self.softmax_factor = all_dim * all_dim
        self._on_device: dict[torch.device, Tensor] = {}

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, both [B, T, 1, R/2] fp32, for positions [B, T]."""
        frequencies = self._on_device.get(positions.device)
        if frequencies is None:
            frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=positions.device)
            self._on_device[positions.device] = frequencies
        angle = positions[..., None, None].float() * frequencies
        cos, sin = angle.cos(), angle.sin()
        return (cos, sin) if self.amplitude == 1.0 else (cos * self.amplitude, sin * self.amplitude)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates x [B, T, H, R]; interleaved pairs come out split in halves, which inner products do not notice."""
        if self.config.interleaved:
            first, second = x[..., 0::2], x[..., 1::2]
        else:
            first, second = x.chunk(2, -1)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _frequencies(config: RopeConfig, dim: int) -> list[float]:
    # In fp32, as the published models were trained with: the last digit counts at long range.
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    plain: list[float] = (1.0 / config.theta**exponents).tolist()
    if config.yarn_factor <= 1.0:
        return plain

    def channel(rotations: float) -> float:
        """The channel that makes this many turns over the original context."""
        period = config.yarn_original_positions / (rotations * 2 * math.pi)
        return dim * math.log(period) / (2 * math.log(config.theta))

    low = max(math.floor(channel(config.yarn_beta_fast)), 0)
    high = min(math.ceil(channel(config.yarn_beta_slow)), dim - 1)
    span = max(high - low, 0.001)
    stretched = []
    for i, frequency in enumerate(plain):
        slow = min(max((i - low) / span, 0.0), 1.0)  # 0: turns often, kept; 1: turns rarely, interpolated
        stretched.append(frequency * (1.0 - slow) + frequency / config.yarn_factor * slow)
    return stretched


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0
