"""A small vocoder that streams exactly: causal ConvNeXt layers over mel frames, then an inverse STFT.

    mel [B, T, M] ─► conv k7 (looks `a` frames ahead) ─► linear, U frames from each ─► [B, U T, D]
    layer:  x += gamma * pw2(GELU(pw1(LN(depthwise conv k7, looks back (x)))))
    x ─► LN ─► linear ─► magnitude exp(m), phase p ─► inverse FFT ─► Hann ─► overlap-add ─► wave [B, T * hop]

The form of Vocos (Siuzdak 2023) with one-sided convolutions. What comes out lags `delay` samples behind the mel: the
frames of look-ahead, and half of what windows overlap. Before and after a recording there is silence, so that a whole
recording is the stream of one piece.

Shapes: B rows, T mel frames, M mel bins, U upsampling, D hidden size, W window of the inverse STFT, S samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from kimi_mm.audio.detokenizer_config import VocoderConfig
from kimi_mm.audio.target_mel import SILENCE

LOUDEST = 6.0  # log-magnitude of a bin; a full-scale sine has 5.5


@dataclass(frozen=True)
class VocoderState:
    """What a vocoder keeps between pieces: tensors with rows first, never written in place, and a counter."""

    tensors: tuple[torch.Tensor, ...]
    counter: int = 0

    @property
    def shape(self) -> tuple:
        """What must agree for two streams to be run together."""
        return (self.counter, *(tuple(t.shape[1:]) for t in self.tensors))

    @classmethod
    def stack(cls, states: list[VocoderState]) -> VocoderState:
        """Puts streams of equal `shape` side by side."""
        joined = (torch.cat(parts) for parts in zip(*(state.tensors for state in states), strict=True))
        return cls(tuple(joined), states[0].counter)

    def row(self, number: int) -> VocoderState:
        """Returns one stream's part."""
        return VocoderState(tuple(t[number : number + 1] for t in self.tensors), self.counter)


class ConvNeXtLayer(nn.Module):
    """Depthwise convolution that looks back, then a channel MLP."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.conv = nn.Conv1d(size, size, config.kernel_size, groups=size)
        self.norm = nn.LayerNorm(size, eps=1e-6)
        self.pw1 = nn.Linear(size, config.intermediate_size)
        self.pw2 = nn.Linear(config.intermediate_size, size)
        self.gamma = nn.Parameter(torch.full((size,), 1.0 / config.num_layers))

    def forward(self, x: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps x [B, D, T] after `past` [B, D, k - 1] to the next x and past."""
        joined = torch.cat([past, x], 2)
        h = self.norm(self.conv(joined).transpose(1, 2))
        h = self.gamma * self.pw2(F.gelu(self.pw1(h)))
        return x + h.transpose(1, 2), joined[:, :, -past.shape[2] :]


class Vocoder(nn.Module):
    """Mel to wave, whole or piece by piece.

    Args:
        config: sizes.
        num_mel_bins: M.
        hop_length: samples per mel frame.
    """

    window: torch.Tensor

    def __init__(self, config: VocoderConfig, num_mel_bins: int, hop_length: int) -> None:
        super().__init__()
        self.config, self.num_mel_bins, self.hop = config, num_mel_bins, hop_length
        self.step_size = hop_length // config.upsample
        size = config.hidden_size
        self.embed = nn.Conv1d(num_mel_bins, size, config.kernel_size)
        self.upsample = nn.Linear(size, config.upsample * size)
        self.layers = nn.ModuleList(ConvNeXtLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(size, eps=1e-6)
        self.head = nn.Linear(size, config.n_fft + 2)
        overlap = config.n_fft // self.step_size
        # Analysis of the shape Hann * Hann sums to 3 / 8 of the overlap, everywhere.
        window = torch.hann_window(config.n_fft, device="cpu") / (3 * overlap / 8)
        self.register_buffer("window", window, persistent=False)
        # Replaced by its replay where CUDA graphs are on.
        self.runner: Callable[..., tuple[torch.Tensor, ...]] = self.run

    @property
    def delay(self) -> int:
        """Samples by which `run` lags behind its input."""
        return self.config.look_ahead * self.hop + (self.config.n_fft - self.step_size) // 2

    @property
    def receptive_frames(self) -> int:
        """Mel frames of the past that can change a sample."""
        back = self.config.kernel_size - 1
        return back + -(-self.config.num_layers * back // self.config.upsample) + -(-self.config.n_fft // self.hop)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        """Maps log-mel [B, T, M] of whole recordings to waves [B, T * hop] in [-1, 1]."""
        return self.step(mel, self.initial_state(len(mel)), final=True)[0]

    def initial_state(self, rows: int = 1) -> VocoderState:
        """Returns the state after endless silence."""
        like, back = self.head.weight, self.config.kernel_size - 1
        silence = like.new_full((1, self.receptive_frames, self.num_mel_bins), SILENCE)
        zeros = [like.new_zeros(1, self.num_mel_bins, back)]
        zeros += [like.new_zeros(1, self.config.hidden_size, back) for _ in self.layers]
        tail = torch.zeros(1, self.config.n_fft - self.step_size, device=like.device)
        _, *tensors = self.run(silence, *zeros, tail)
        return VocoderState(tuple(t.expand(rows, *t.shape[1:]) for t in tensors), self.delay)

    def step(self, mel: torch.Tensor, state: VocoderState, final: bool) -> tuple[torch.Tensor, VocoderState]:
        """Takes the next mel frames [B, T, M], T >= 0, and returns the samples that became certain.

        Args:
            mel: natural-log mel, not normalised.
            state: of `initial_state` or an earlier step.
            final: nothing follows; the samples held back come out, T * hop in all over the stream.

        Returns:
            wave [B, S] in [-1, 1] and the next state.
        """
        due = mel.shape[1] * self.hop
        if final:
            rest = -(-self.delay // self.hop)
            mel = F.pad(mel, (0, 0, 0, rest), value=SILENCE)
            due += self.delay
        if not mel.shape[1]:
            return torch.zeros(len(mel), 0, device=mel.device), state
        wave, *tensors = self.runner(mel, *state.tensors)
        drop = min(state.counter, due)
        return wave[:, drop:due].clamp(-1.0, 1.0), VocoderState(tuple(tensors), state.counter - drop)

    def run(self, mel: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Maps mel [B, T, M] to raw samples [B, T * hop] that lag `delay` behind it, followed by the next past."""
        joined = torch.cat([past[0], (mel - SILENCE).to(past[0].dtype).transpose(1, 2)], 2)
        following = [joined[:, :, -past[0].shape[2] :]]
        x = self.upsample(self.embed(joined).transpose(1, 2))
        x = x.unflatten(-1, (self.config.upsample, -1)).flatten(1, 2).transpose(1, 2)
        for layer, before in zip(self.layers, past[1:-1], strict=True):
            x, after = layer(x, before)
            following.append(after)
        wave, tail = self._overlap_add(self._frames(self.norm(x.transpose(1, 2))), past[-1])
        return wave, *following, tail

    def training_past(self, rows: int) -> tuple[torch.Tensor, ...]:
        """Returns zeros for `run`; samples within `receptive_frames` of the start are then not to be judged."""
        like, back = self.head.weight, self.config.kernel_size - 1
        convs = [like.new_zeros(rows, self.config.hidden_size, back) for _ in self.layers]
        tail = torch.zeros(rows, self.config.n_fft - self.step_size, device=like.device)
        return (like.new_zeros(rows, self.num_mel_bins, back), *convs, tail)

    def _frames(self, x: torch.Tensor) -> torch.Tensor:
        """Maps x [B, F, D] to windowed frames [B, F, W], in fp32: phases need the digits."""
        with torch.autocast(x.device.type, enabled=False):
            out = F.linear(x.float(), self.head.weight.float(), self.head.bias.float())
            magnitude, phase = out.chunk(2, -1)
            spectrum = torch.polar(magnitude.clamp(max=LOUDEST).exp(), phase)
            return torch.fft.irfft(spectrum, self.config.n_fft) * self.window

    def _overlap_add(self, frames: torch.Tensor, tail: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds frames [B, F, W], one every `step_size` samples, onto `tail` [B, W - step_size]."""
        count, overlap = frames.shape[1], frames.shape[2] // self.step_size
        parts = frames.unflatten(2, (overlap, self.step_size))
        wave = F.pad(tail.unflatten(1, (overlap - 1, self.step_size)), (0, 0, 0, count))
        for k in range(overlap):
            wave = wave + F.pad(parts[:, :, k], (0, 0, k, overlap - 1 - k))
        return wave[:, :count].flatten(1), wave[:, count:].flatten(1)
