"""Augmentation of speech on the training device: rooms, noise, telephone lines, loudness.

    waves [B, S] ─► room ─► tilt ─► noise ─► band limit ─► coarse quantisation ─► gain ─► [B, S]

Every step draws its rows and strengths on the device, in fixed shapes and without host synchronisation. Steps with a
spectral form (tilt, bands) are products in the frequency domain, one FFT there and back for all of them.

Shapes: B rows, S samples, R samples of a room response, W = S / 2 + 1 frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kimi_mm.config import Config

SAMPLE_RATE = 16_000
ROOM_SAMPLES = 4800  # 0.3 s


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Config):
    """Share of the rows that each step touches, and its strength; `probability` scales all shares."""

    probability: float = 1.0
    room: float = 0.3
    noise: float = 0.6
    noise_snr_db: tuple[float, ...] = (8.0, 35.0)
    babble: float = 0.1  # noise made of other rows' speech
    tilt: float = 0.4
    tilt_db_per_octave: float = 3.0
    telephone: float = 0.12  # 300 - 3400 Hz
    wideband: float = 0.4  # below 7 kHz, as G.722 keeps
    quantise: float = 0.2  # noise that follows the signal, as ADPCM leaves
    gain_db: tuple[float, ...] = (-20.0, 6.0)


def augment(waves: torch.Tensor, lengths: torch.Tensor, config: AugmentConfig) -> torch.Tensor:
    """Returns augmented copies of waves.

    Args:
        waves: [B, S] fp32 in [-1, 1].
        lengths: [B] samples that hold the recording; noise fills the padding too, as a microphone would.
        config: what to do and how often.

    Returns:
        [B, S], clipped to [-1, 1].
    """
    size, samples = waves.shape
    device = waves.device

    def chosen(share: float) -> torch.Tensor:
        return (torch.rand(size, 1, device=device) < share * config.probability).float()

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(size, 1, device=device)

    level = _rms(waves, lengths)
    width = samples + ROOM_SAMPLES
    spectrum = torch.fft.rfft(waves, width)
    hertz = torch.linspace(0, SAMPLE_RATE / 2, spectrum.shape[1], device=device)
    spectrum = torch.where(chosen(config.room) > 0, spectrum * torch.fft.rfft(_rooms(size, device), width), spectrum)
    octaves = (hertz.clamp_min(50.0) / 1000.0).log2()
    slope = chosen(config.tilt) * uniform(-config.tilt_db_per_octave, config.tilt_db_per_octave)
    spectrum = spectrum * 10 ** (slope * octaves / 20)

    # Noise with its own colour joins before the line, which limits the band of both.
    snr = uniform(config.noise_snr_db[0], config.noise_snr_db[1])
    colour = 10 ** (uniform(-6.0, 1.0) * octaves / 20)
    noise = torch.fft.irfft(torch.fft.rfft(torch.randn_like(waves), width) * colour, width)[:, :samples]
    clean = torch.fft.irfft(spectrum, width)[:, :samples]
    clean = clean * (level / _rms(clean, lengths)).clamp(0.1, 10.0)
    noisy = clean + chosen(config.noise) * _at_snr(noise, level, snr)
    noisy = noisy + chosen(config.babble) * _at_snr(waves.roll(1, 0) + waves.roll(2, 0), level, snr.clamp_min(12.0))

    telephone = _band(hertz, 300.0, 3400.0)
    wideband = _band(hertz, 40.0, 7000.0)
    phone, wide = chosen(config.telephone), chosen(config.wideband)
    response = 1 + phone * (telephone - 1)
    response = response * (1 + wide * (wideband - 1))
    line = torch.fft.irfft(torch.fft.rfft(noisy, width) * response, width)[:, :samples]
    grain = uniform(26.0, 42.0)  # dB between the signal and the noise that follows it
    envelope = F.avg_pool1d(line.square()[:, None], 81, stride=1, padding=40, count_include_pad=False)[:, 0].sqrt()
    line = line + chosen(config.quantise) * torch.randn_like(line) * envelope * 10 ** (-grain / 20)
    gain = 10 ** (uniform(config.gain_db[0], config.gain_db[1]) / 20)
    loud = chosen(1.0)
    return (line * (1 + loud * (gain - 1))).clamp(-1.0, 1.0)


def _rooms(size: int, device: torch.device) -> torch.Tensor:
    """Draws room responses [B, R]: the direct sound, then noise that decays by 60 dB within 0.1 to 0.5 s."""
    time = torch.arange(ROOM_SAMPLES, device=device) / SAMPLE_RATE
    decay = 0.1 + 0.4 * torch.rand(size, 1, device=device)
    tail = torch.randn(size, ROOM_SAMPLES, device=device) * torch.exp(-math.log(1000.0) * time / decay)
    tail = tail * (time > 0.002)
    direct_db = 3.0 + 15.0 * torch.rand(size, 1, device=device)
    tail = tail / tail.square().sum(1, keepdim=True).sqrt().clamp_min(1e-6) * 10 ** (-direct_db / 20)
    return F.pad(tail[:, 1:], (1, 0), value=1.0)


def _rms(waves: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Level [B, 1] of the recorded part; rows are zero past it."""
    return (waves.square().sum(1, keepdim=True) / lengths[:, None].clamp_min(1)).sqrt().clamp_min(1e-4)


def _at_snr(noise: torch.Tensor, level: torch.Tensor, snr_db: torch.Tensor) -> torch.Tensor:
    power = noise.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)
    return noise * (level / power) * 10 ** (-snr_db / 20)


def _band(hertz: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """A band's response [W] with edges of about a third of an octave."""
    below = torch.sigmoid((hertz / low).clamp_min(1e-3).log2() * 18)
    above = torch.sigmoid(-(hertz / high).clamp_min(1e-3).log2() * 18)
    return below * above
