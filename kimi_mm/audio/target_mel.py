"""Log-mel of the speech that a detokenizer makes: what the DiT draws and the vocoder reads.

    wave [B, S] ─► mirrored by (n_fft - hop) / 2 at its ends ─► Hann ─► |FFT| ─► Slaney filters ─► ln ─► [B, T, M]

Shapes: B rows, S samples, T = S / hop frames, M mel bins.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from kimi_mm.audio.detokenizer_config import TargetMelConfig
from kimi_mm.audio.features import mel_filters
from kimi_mm.config import MelConfig
from kimi_mm.errors import AudioError

FLOOR = 1e-5  # magnitudes below it, silence too, read as this
SILENCE = math.log(FLOOR)


class TargetMel(nn.Module):
    """Computes natural-log mel magnitudes in fp32; `normalize` and `denormalize` map them to what the DiT sees."""

    window: torch.Tensor
    filters: torch.Tensor

    def __init__(self, config: TargetMelConfig) -> None:
        super().__init__()
        self.config = config
        bank = MelConfig(sample_rate=config.sample_rate, n_fft=config.n_fft, num_mel_bins=config.num_mel_bins)
        # Constants are real even where the model is laid out on the meta device to be filled by a checkpoint.
        with torch.device("cpu"):
            self.register_buffer("window", torch.hann_window(config.n_fft), persistent=False)
            self.register_buffer("filters", mel_filters(bank), persistent=False)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """Maps waves [B, S] in [-1, 1] to log-mel [B, S // hop, M].

        Raises:
            AudioError: when a wave is too short to be mirrored at its ends.
        """
        config = self.config
        margin = (config.n_fft - config.hop_length) // 2
        if wave.shape[1] <= max(margin, config.hop_length - 1):
            raise AudioError(f"{wave.shape[1]} samples are too few for a mel frame of {config.n_fft}.")
        with torch.autocast(wave.device.type, enabled=False):
            padded = F.pad(wave.float()[:, None], (margin, margin), mode="reflect")[:, 0]
            spectrum = torch.fft.rfft(padded.unfold(1, config.n_fft, config.hop_length) * self.window)
            magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
            return (magnitude @ self.filters).clamp_min(FLOOR).log()

    def normalize(self, mel: torch.Tensor) -> torch.Tensor:
        """Maps log-mel to zero mean and unit variance over the training data."""
        return (mel - self.config.mean) / self.config.std

    def denormalize(self, mel: torch.Tensor) -> torch.Tensor:
        """Undoes `normalize`."""
        return mel * self.config.std + self.config.mean
