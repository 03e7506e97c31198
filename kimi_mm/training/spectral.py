"""How far two waves are apart in several spectra; losses without a discriminator.

Yamamoto et al., "Parallel WaveGAN" (2020), eqs. 4-6, and log-mel distances at several resolutions (Kumar et al. 2023).

Shapes: B rows, S samples, F frames, W frequencies, M mel bins.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kimi_mm.audio.features import mel_filters
from kimi_mm.config import MelConfig

# Transform size, hop, mel bins.
STFT_SIZES = ((512, 128), (1024, 256), (2048, 512))
MEL_SIZES = ((256, 64, 32), (512, 128, 64), (1024, 256, 100), (2048, 512, 160))


class SpectralDistance(nn.Module):
    """Distances of magnitudes at several resolutions, in fp32.

    Args:
        sample_rate: of the waves, Hz.
    """

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        for size in sorted({row[0] for row in (*STFT_SIZES, *MEL_SIZES)}):
            self.register_buffer(f"window_{size}", torch.hann_window(size), persistent=False)
        for size, _, bins in MEL_SIZES:
            bank = mel_filters(MelConfig(sample_rate=sample_rate, n_fft=size, num_mel_bins=bins))
            self.register_buffer(f"filters_{size}", bank, persistent=False)

    def stft(self, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Spectral convergence plus mean distance of log-magnitudes, averaged over resolutions; [B, S] each."""
        with torch.autocast(fake.device.type, enabled=False):
            total = fake.new_zeros(())
            for size, hop in STFT_SIZES:
                a, b = self._magnitude(fake, size, hop), self._magnitude(real, size, hop)
                converged = (a - b).norm() / b.norm().clamp_min(1e-5)
                total = total + converged + (a.log() - b.log()).abs().mean()
            return total / len(STFT_SIZES)

    def mel(self, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Mean distance of natural-log mel magnitudes, averaged over resolutions; [B, S] each."""
        with torch.autocast(fake.device.type, enabled=False):
            total = fake.new_zeros(())
            for size, hop, _ in MEL_SIZES:
                filters = getattr(self, f"filters_{size}")
                a, b = ((self._magnitude(x, size, hop) @ filters).clamp_min(1e-5).log() for x in (fake, real))
                total = total + (a - b).abs().mean()
            return total / len(MEL_SIZES)

    def _magnitude(self, wave: torch.Tensor, size: int, hop: int) -> torch.Tensor:
        """Magnitudes [B, F, W] of waves [B, S]."""
        window = getattr(self, f"window_{size}")
        padded = F.pad(wave.float()[:, None], (size // 2, size // 2), mode="reflect")[:, 0]
        # As torch.stft, whose gradient adds frame after frame with atomics.
        spectrum = torch.fft.rfft(padded.unfold(1, size, hop) * window)
        return (spectrum.real.square() + spectrum.imag.square() + 1e-7).sqrt()
