"""Small discriminators of waves: of samples a period apart, and of spectrograms at several resolutions.

    wave [B, S] ─┬─ folded to [B, 1, S / p, p] ─► 2-d convolutions along time ─► scores       one for each period p
                 └─ |STFT| [B, 1, F, W] ────────► 2-d convolutions ────────────► scores       one for each resolution

HiFi-GAN's multi-period discriminator (Kong et al. 2020, section 2.3) and UnivNet's of several resolutions (Jang et al.
2021), a few times narrower. Images are laid out with channels last, as the tensor cores read them: otherwise every
convolution would turn its input and output around.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

Judged = tuple[torch.Tensor, list[torch.Tensor]]  # scores, and the features behind them


class _Stack(nn.Module):
    """Convolutions with leaky rectifiers; the last one gives scores."""

    def __init__(self, layers: list[nn.Conv2d], last: nn.Conv2d) -> None:
        super().__init__()
        self.layers = nn.ModuleList(weight_norm(layer) for layer in layers)
        self.last = weight_norm(last)

    def forward(self, image: torch.Tensor) -> Judged:
        """Maps images of one channel [B, H, W] to scores and features, all with channels last."""
        # A channel of stride 1 tells a convolution so; `contiguous` would leave an only channel as it is.
        x, features = image.contiguous()[..., None].permute(0, 3, 1, 2), []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.1)
            features.append(x)
        return self.last(x), features


class PeriodDiscriminator(_Stack):
    """Judges samples that lie `period` apart."""

    def __init__(self, period: int, channels: int) -> None:
        widths = [1, channels, 2 * channels, 4 * channels, 8 * channels]
        layers = [nn.Conv2d(a, b, (5, 1), (3, 1), padding=(2, 0)) for a, b in itertools.pairwise(widths)]
        layers.append(nn.Conv2d(widths[-1], widths[-1], (5, 1), padding=(2, 0)))
        super().__init__(layers, nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))
        self.period = period

    def forward(self, wave: torch.Tensor) -> Judged:
        """Maps waves [B, S] to scores and features."""
        padded = F.pad(wave, (0, -wave.shape[1] % self.period))
        return super().forward(padded.unflatten(1, (-1, self.period)))


class ResolutionDiscriminator(_Stack):
    """Judges magnitudes of a short-time Fourier transform of `n_fft` samples."""

    window: torch.Tensor

    def __init__(self, n_fft: int, channels: int) -> None:
        layers = [nn.Conv2d(1, channels, (3, 9), padding=(1, 4))]
        layers += [nn.Conv2d(channels, channels, (3, 9), (1, 2), padding=(1, 4)) for _ in range(3)]
        layers.append(nn.Conv2d(channels, channels, 3, padding=1))
        super().__init__(layers, nn.Conv2d(channels, 1, 3, padding=1))
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def forward(self, wave: torch.Tensor) -> Judged:
        """Maps waves [B, S] to scores and features."""
        with torch.autocast(wave.device.type, enabled=False):
            spectrum = torch.fft.rfft(wave.float().unfold(1, self.n_fft, self.n_fft // 4) * self.window)
            # The cube root brings quiet partials up, as a logarithm would, without its pole.
            power = spectrum.real.square() + spectrum.imag.square()
            level = (power + 1e-9).pow(1 / 6)
        return super().forward(level)


class Discriminators(nn.Module):
    """All of them.

    Args:
        periods: of the period discriminators, in samples.
        resolutions: transform sizes of the others.
        channels: of their first layers.
    """

    def __init__(self, periods: tuple[int, ...], resolutions: tuple[int, ...], channels: int) -> None:
        super().__init__()
        parts: list[nn.Module] = [PeriodDiscriminator(period, channels) for period in periods]
        parts += [ResolutionDiscriminator(n_fft, channels) for n_fft in resolutions]
        self.parts = nn.ModuleList(parts)

    def forward(self, wave: torch.Tensor) -> list[Judged]:
        """Maps waves [B, S] to scores and features of each part."""
        return [part(wave) for part in self.parts]


def halves(judged: list[Judged]) -> tuple[list[Judged], list[Judged]]:
    """Takes apart what was judged in one batch [2 B, S]: its first B rows, and its last."""
    first, last = [], []
    for scores, features in judged:
        a, b = scores.chunk(2)
        pairs = [feature.chunk(2) for feature in features]
        first.append((a, [pair[0] for pair in pairs]))
        last.append((b, [pair[1] for pair in pairs]))
    return first, last


def discriminator_loss(real: list[Judged], fake: list[Judged]) -> torch.Tensor:
    """Least squares: real waves should score 1, made ones 0; the mean over parts."""
    losses = [
        (1 - r).float().square().mean() + f.float().square().mean() for (r, _), (f, _) in zip(real, fake, strict=True)
    ]
    return torch.stack(losses).mean()


def generator_loss(real: list[Judged], fake: list[Judged]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the least-squares loss of made waves that should score 1, and the distance of features, both means."""
    scores = torch.stack([(1 - f).float().square().mean() for f, _ in fake]).mean()
    distances = [
        (a.detach() - b).abs().mean(dtype=torch.float32)
        for (_, ra), (_, fb) in zip(real, fake, strict=True)
        for a, b in zip(ra, fb, strict=True)
    ]
    return scores, torch.stack(distances).mean()
