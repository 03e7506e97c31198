"""BigVGAN-v2's generator: the architecture of the published vocoder.

    mel [B, T, M] ─► conv k7 ─► stages: (transposed conv x u ─► mean of blocks) ─► activation ─► conv k7 ─► wave
        block:  x += conv(act(dilated conv(act(x))))   once per dilation
        act:    up x 2 ─► x + sin^2(a x) / b ─► down x 2   (without aliases)

Lee et al., "BigVGAN: A Universal Neural Vocoder with Large-Scale Training" (2023), section 3. Weight norm is fused:
published tensors go through `kimi_mm.audio.key_maps`.

Shapes: B rows, T mel frames, M mel bins, C channels, S samples at a stage's rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from kimi_mm.audio.detokenizer_config import BigVGANConfig
from kimi_mm.audio.overlap import overlap_step
from kimi_mm.audio.vocoder import VocoderState

FILTER_TAPS = 12


class SnakeBeta(nn.Module):
    """x + sin^2(x e^alpha) / e^beta per channel, computed at twice the rate so that its harmonics do not fold back."""

    filter: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self.register_buffer("filter", kaiser_sinc_filter(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps x [B, C, S] to the same shape."""
        channels = x.shape[1]
        taps = self.filter.to(x.dtype).expand(channels, 1, -1)
        crop = FILTER_TAPS + FILTER_TAPS // 4
        up = F.conv_transpose1d(F.pad(x, (5, 5), mode="replicate"), 2 * taps, stride=2, groups=channels)
        up = up[:, :, crop : up.shape[2] - crop]
        alpha, beta = self.alpha.exp()[:, None], self.beta.exp()[:, None]
        up = up + (up * alpha).sin().square() / (beta + 1e-9)
        return F.conv1d(F.pad(up, (5, 6), mode="replicate"), taps, stride=2, groups=channels)


class ResidualBlock(nn.Module):
    """Dilated convolutions with periodic activations, each pair with a shortcut."""

    def __init__(self, channels: int, kernel_size: int, dilations: tuple[int, ...]) -> None:
        super().__init__()

        def conv(dilation: int) -> nn.Conv1d:
            padding = dilation * (kernel_size - 1) // 2
            return nn.Conv1d(channels, channels, kernel_size, dilation=dilation, padding=padding)

        self.convs1 = nn.ModuleList(conv(dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(conv(1) for _ in dilations)
        self.activations = nn.ModuleList(SnakeBeta(channels) for _ in range(2 * len(dilations)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, (first, second) in enumerate(zip(self.convs1, self.convs2, strict=True)):
            h = first(self.activations[2 * i](x))
            x = x + second(self.activations[2 * i + 1](h))
        return x


class BigVGAN(nn.Module):
    """Mel to wave; pieces of a stream are joined by `overlap_step`.

    Args:
        config: sizes.
        num_mel_bins: M.
        fade: window that joins pieces, "hamming" or "hann".
    """

    def __init__(self, config: BigVGANConfig, num_mel_bins: int, fade: str = "hamming") -> None:
        super().__init__()
        self.config, self.num_mel_bins, self.fade = config, num_mel_bins, fade
        self.hop = math.prod(config.upsample_rates)
        widths = [config.initial_channels >> i for i in range(len(config.upsample_rates) + 1)]
        self.pre = nn.Conv1d(num_mel_bins, widths[0], 7, padding=3)
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(width, width // 2, k, u, padding=(k - u) // 2)
            for width, u, k in zip(widths, config.upsample_rates, config.upsample_kernels, strict=False)
        )
        self.blocks = nn.ModuleList(
            ResidualBlock(width, kernel, config.resblock_dilations)
            for width in widths[1:]
            for kernel in config.resblock_kernels
        )
        self.post_activation = SnakeBeta(widths[-1])
        self.post = nn.Conv1d(widths[-1], 1, 7, padding=3, bias=False)
        # Replaced by its replay where CUDA graphs are on.
        self.runner: Callable[..., tuple[torch.Tensor, ...]] = self.run

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        """Maps log-mel [B, T, M] to waves [B, T * hop] in [-1, 1]."""
        return self.run(mel)[0]

    def run(self, mel: torch.Tensor) -> tuple[torch.Tensor]:
        """The same as a tuple of one."""
        x = self.pre(mel.to(self.pre.weight.dtype).transpose(1, 2))
        branches = len(self.config.resblock_kernels)
        for stage, up in enumerate(self.ups):
            x = up(x)
            blocks = list(self.blocks)[stage * branches : (stage + 1) * branches]
            x = torch.stack([block(x) for block in blocks]).mean(0)
        return (self.post(self.post_activation(x))[:, 0].float().clamp(-1.0, 1.0),)

    def initial_state(self, rows: int = 1) -> VocoderState:
        """Returns the state of streams that have not begun."""
        device = self.pre.weight.device
        return VocoderState(
            (torch.zeros(rows, 0, self.num_mel_bins, device=device), torch.zeros(rows, 0, device=device))
        )

    def step(self, mel: torch.Tensor, state: VocoderState, final: bool) -> tuple[torch.Tensor, VocoderState]:
        """Takes the next mel frames [B, T, M]; see `Vocoder.step` and `overlap_step`."""
        return overlap_step(lambda joined: self.runner(joined)[0], mel, state, final, self.hop, self.fade)


def kaiser_sinc_filter(taps: int = FILTER_TAPS, cutoff: float = 0.25, half_width: float = 0.3) -> torch.Tensor:
    """Returns a low-pass filter [1, 1, taps]: a sinc under a Kaiser window, of unit sum.

    Kaiser's design formulas (1974): attenuation from the width of the transition, then the window's beta.

    Args:
        cutoff, half_width: in cycles per sample.
    """
    attenuation = 2.285 * (taps // 2 - 1) * math.pi * 4 * half_width + 7.95
    if attenuation > 50.0:
        beta = 0.1102 * (attenuation - 8.7)
    elif attenuation >= 21.0:
        beta = 0.5842 * (attenuation - 21.0) ** 0.4 + 0.07886 * (attenuation - 21.0)
    else:
        beta = 0.0
    window = torch.kaiser_window(taps, periodic=False, beta=beta, device="cpu")
    time = torch.arange(taps, device="cpu") - (taps - 1) / 2
    sinc = 2 * cutoff * window * torch.sinc(2 * cutoff * time)
    return (sinc / sinc.sum())[None, None]
