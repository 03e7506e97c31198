"""24 kHz to 16 kHz on the training device: targets as the tokenizer would hear them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

HALF_WIDTH = 36  # input samples that the filter reaches to either side


def to_16k(wave: torch.Tensor) -> torch.Tensor:
    """Resamples [B, 3 n] at 24 kHz to [B, 2 n] at 16 kHz with a windowed sinc of two phases.

    Args:
        wave: fp32; output sample k lies at input position 1.5 k.
    """
    taps = torch.arange(-HALF_WIDTH, HALF_WIDTH + 3, device=wave.device, dtype=torch.float32)
    # Nothing here comes from the host, so that CUDA graphs may hold it.
    offsets = taps - 1.5 * torch.arange(2, device=wave.device)[:, None]
    cutoff = 0.94 * 2 / 3  # of half the input rate
    window = (torch.pi * offsets / (2 * HALF_WIDTH)).cos().square() * (offsets.abs() <= HALF_WIDTH)
    kernels = cutoff * torch.sinc(cutoff * offsets) * window
    kernels = kernels / kernels.sum(1, keepdim=True)
    padded = F.pad(wave[:, None], (HALF_WIDTH, HALF_WIDTH))
    return F.conv1d(padded, kernels[:, None], stride=3).transpose(1, 2).flatten(1)
