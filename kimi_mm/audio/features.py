"""Log-mel features by Whisper's definition, of a whole batch or of a stream (`MelStream`).

    wave 16 kHz ─► frames of 400 every 160, Hann ─► |FFT|^2 ─► 80 or 128 Slaney filters ─► log10 ─► floor ─► (x + 4) / 4

Frame t is centred on sample 160 t; the recording is reflected at both ends and the frame centred on its very end is
dropped, so S samples give S // 160 frames. The floor keeps 8 decades (80 dB) below the loudest value, either of the
clip (Whisper) or of everything heard so far (`running_floor`), which needs no future.

Shapes: B rows, S samples, T mel frames (100 Hz), M mel bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kimi_mm.config import MelConfig
from kimi_mm.errors import AudioError

DECADES = 8.0


class LogMel(nn.Module):
    """Computes log-mel features on whatever device it lives on, in fp32, without host synchronisation."""

    window: torch.Tensor
    filters: torch.Tensor

    def __init__(self, config: MelConfig) -> None:
        super().__init__()
        self.config = config
        with torch.device("cpu"):  # constants are real even in a model laid out on the meta device
            self.register_buffer("window", torch.hann_window(config.n_fft), persistent=False)
            self.register_buffer("filters", mel_filters(config), persistent=False)

    def forward(self, wave: torch.Tensor, block: int | None = None, dynamic_range: str | None = None) -> torch.Tensor:
        """Maps waves [B, S] in [-1, 1] to features [B, S // 160, M].

        Args:
            wave: fp32, S >= 201 (the reflection needs half a window).
            block: mel frames per block of the running floor; the floor of a frame uses all frames to its block's end.
                None: the whole wave is one block.
            dynamic_range: "clip" or "running"; None takes the config's.

        Raises:
            AudioError: when the wave is shorter than half a window.
        """
        half = self.config.n_fft // 2
        if wave.shape[1] <= half:
            raise AudioError(f"{wave.shape[1]} samples are too few for a mel frame; pad them to at least {half + 1}.")
        log_power = self.log_power(F.pad(wave.float()[:, None], (half, half), mode="reflect")[:, 0])
        log_power = log_power[:, : wave.shape[1] // self.config.hop_length]
        if (dynamic_range or self.config.dynamic_range) == "clip":
            floor = log_power.amax((1, 2), keepdim=True) - DECADES
        else:
            floor = running_floor(log_power, block or log_power.shape[1])
        return self.scale(log_power, floor)

    def log_power(self, padded: torch.Tensor) -> torch.Tensor:
        """Maps samples [B, 400 + 160 (T - 1) + r] that already hold their context to log10 mel power [B, T, M]."""
        with torch.autocast(padded.device.type, enabled=False):
            frames = padded.float().unfold(1, self.config.n_fft, self.config.hop_length) * self.window
            spectrum = torch.fft.rfft(frames)
            power = spectrum.real.square() + spectrum.imag.square()
            return (power @ self.filters).clamp_min(1e-10).log10()

    @staticmethod
    def scale(log_power: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
        """Applies the floor and Whisper's scaling."""
        return (torch.maximum(log_power, floor) + 4.0) / 4.0


@dataclass
class MelState:
    """What a `MelStream` remembers; copy it with `clone`."""

    pieces: list[np.ndarray] = field(default_factory=list)  # samples from half a window before the next block on
    held: int = 0  # their number
    received: int = 0  # samples so far
    started: bool = False  # whether the mirrored start has been put in front
    loudest: float = 0.0  # of the running floor, log10 power

    def clone(self) -> MelState:
        """Returns an independent copy; arrays are never written, so they can be shared."""
        return replace(self, pieces=list(self.pieces))


class MelStream:
    """Log-mel with the running floor, in whole blocks; equal to `LogMel.forward` for any size of pieces.

    A block becomes certain 40 samples (2.5 ms) after its end: half a window less one hop.

    Args:
        mel: does the arithmetic.
        block: mel frames per block, as in `LogMel.forward`.
        multiple: the recording is padded with zeros to a multiple of this many samples.
    """

    def __init__(self, mel: LogMel, block: int, multiple: int) -> None:
        self.mel, self.block, self.multiple = mel, block, multiple
        self.hop, self.window = mel.config.hop_length, mel.config.n_fft
        self.half = self.window // 2

    def push(self, samples: np.ndarray, state: MelState) -> list[torch.Tensor]:
        """Adds samples [S] fp32 to the state and returns the blocks [1, block, M] that became certain."""
        state.pieces.append(samples.astype(np.float32))
        state.held += len(samples)
        state.received += len(samples)
        need = self._samples(self.block)
        if state.held + (0 if state.started else self.half) < need:
            return []
        data, blocks, at = self._join(state), [], 0
        while len(data) - at >= need:
            blocks.append(self._frames(data[at : at + need], state))
            at += self.block * self.hop
        state.pieces, state.held = [data[at:].copy()], len(data) - at
        return blocks

    def flush(self, state: MelState) -> list[torch.Tensor]:
        """Returns the remaining blocks of the padded recording, the last one as short as it is; empties the state."""
        if not state.received:
            return []
        state.pieces.append(np.zeros(-state.received % self.multiple, np.float32))
        data = self._join(state)
        frames = (len(data) - self.half) // self.hop
        data = np.concatenate([data, data[-self.half - 1 : -1][::-1]])
        blocks = []
        for first in range(0, frames, self.block):
            start, count = first * self.hop, min(self.block, frames - first)
            blocks.append(self._frames(data[start : start + self._samples(count)], state))
        state.pieces, state.held = [], 0
        return blocks

    def _samples(self, frames: int) -> int:
        return (frames - 1) * self.hop + self.window

    def _join(self, state: MelState) -> np.ndarray:
        data = np.concatenate(state.pieces)
        if not state.started:
            state.started = True
            data = np.concatenate([data[1 : self.half + 1][::-1], data])
        return data

    def _frames(self, samples: np.ndarray, state: MelState) -> torch.Tensor:
        wave = torch.from_numpy(np.ascontiguousarray(samples))[None].to(self.mel.window.device)
        log_power = self.mel.log_power(wave)
        state.loudest = max(state.loudest, float(log_power.max()))
        return self.mel.scale(log_power, log_power.new_tensor(state.loudest - DECADES))


def running_floor(log_power: torch.Tensor, block: int) -> torch.Tensor:
    """Returns the floor [B, T, 1] of each frame: the largest value up to the end of its block, at least 0, minus 8.

    Speech peaks between 0 and 2; starting at 0 keeps leading silence from being amplified.
    """
    length = log_power.shape[1]
    loudest = F.pad(log_power.amax(2), (0, -length % block), value=-math.inf)
    blocks = loudest.unflatten(1, (-1, block)).amax(2).cummax(1).values.clamp_min(0.0)
    return (blocks.repeat_interleave(block, 1)[:, :length] - DECADES)[..., None]


def mel_filters(config: MelConfig) -> torch.Tensor:
    """Returns the Slaney filter bank [n_fft // 2 + 1, M]: linear below 1 kHz, logarithmic above, unit area.

    Slaney, Auditory Toolbox (1998): 15 / 200 mel per Hz up to 1000 Hz, then 27 steps per factor 6.4.
    """
    low_step, break_hz, log_step = 200.0 / 3, 1000.0, math.log(6.4) / 27.0
    break_mel = break_hz / low_step

    def to_mel(hz: torch.Tensor) -> torch.Tensor:
        return torch.where(hz < break_hz, hz / low_step, break_mel + (hz.clamp_min(1.0) / break_hz).log() / log_step)

    def to_hz(mel: torch.Tensor) -> torch.Tensor:
        return torch.where(mel < break_mel, mel * low_step, break_hz * ((mel - break_mel) * log_step).exp())

    nyquist = torch.tensor(config.sample_rate / 2, dtype=torch.float64)
    edges = to_hz(torch.linspace(0.0, float(to_mel(nyquist)), config.num_mel_bins + 2, dtype=torch.float64))
    bins = torch.linspace(0.0, float(nyquist), config.n_fft // 2 + 1, dtype=torch.float64)
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    area = 2.0 / (edges[2:] - edges[:-2])
    return (torch.minimum(rising, falling).clamp_min(0.0) * area).float()
