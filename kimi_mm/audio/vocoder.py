"""A small vocoder that streams exactly: causal ConvNeXt layers over mel frames, then an inverse STFT.

    mel [B, T, M] ─► conv k7 (looks `a` frames ahead) ─► linear, U frames from each ─► [B, U T, D]
    layer:  x += gamma * pw2(GELU(pw1(LN(depthwise conv k7, looks back (x)))))
    x ─► LN ─► linear ─► magnitude exp(m), phase p ─► inverse FFT ─► Hann ─► overlap-add ─► wave [B, T * hop]
                     └─ with a source: filters of pulses at the pitch that x tells, and of noise, in place of m and p

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
from kimi_mm.audio.excitation import LOWEST_HZ, PitchHead, SourceState, noise_table, pulse_frames
from kimi_mm.audio.target_mel import SILENCE

LOUDEST = 6.0  # log-magnitude of a bin; a full-scale sine has 5.5
PULSES = 0.01  # level of the pulse train before its filter
FIRST_NOISE = -3.0  # log-magnitude of the noise of an untrained source


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
        sample_rate: of the wave, Hz; the pitch of a source needs it.
    """

    window: torch.Tensor
    noise: torch.Tensor

    def __init__(self, config: VocoderConfig, num_mel_bins: int, hop_length: int, sample_rate: int = 24_000) -> None:
        super().__init__()
        self.config, self.num_mel_bins, self.hop, self.sample_rate = config, num_mel_bins, hop_length, sample_rate
        self.step_size = hop_length // config.upsample
        size = config.hidden_size
        self.embed = nn.Conv1d(num_mel_bins, size, config.kernel_size)
        self.upsample = nn.Linear(size, config.upsample * size)
        self.layers = nn.ModuleList(ConvNeXtLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(size, eps=1e-6)
        bins, overlap = config.n_fft // 2 + 1, config.n_fft // self.step_size
        self.head = nn.Linear(size, (3 if config.source else 2) * bins)
        self.pitch = PitchHead(size) if config.source else None
        if config.source:
            nn.init.constant_(self.head.bias[2 * bins :], FIRST_NOISE)
            with torch.device("cpu"):
                self.register_buffer("noise", noise_table(bins), persistent=False)
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
        like = self.head.weight
        silence = like.new_full((1, self.receptive_frames, self.num_mel_bins), SILENCE)
        _, *tensors = self.run(silence, *self.training_past(1))
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
        x, following = self._layers(mel, past)
        if self.pitch is None:
            frames, source = self._frames(x), ()
        else:
            pitch, voiced = self.pitch.decode(self.pitch(x))
            state = SourceState(*past[-4:-1])
            places = (state.frame + torch.arange(x.shape[1], device=x.device)) % len(self.noise)
            frames, after = self._sourced(x, pitch, voiced, state, self.noise[places])
            source = (after.phase, after.pitch, after.frame)
        wave, tail = self._overlap_add(frames, past[-1])
        return wave, *following, *source, tail

    def learn(self, mel: torch.Tensor, pitch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps mel [B, T, M] to raw samples as `run` does, with the pitch given, and to the loss of guessing it.

        Args:
            mel: natural-log mel; samples within `receptive_frames` of the start are not to be judged.
            pitch: [B, U T] in Hz, 0 where there is none; a vocoder without a source does not look at it.
        """
        past = self.training_past(len(mel))
        if self.pitch is None:
            return self.run(mel, *past)[0], mel.new_zeros(())
        x, _ = self._layers(mel, past)
        late = self.config.look_ahead * self.config.upsample
        pitch = F.pad(pitch, (late, 0))[:, : x.shape[1]]
        voiced, state = pitch > 0, SourceState.start(len(mel), mel.device)
        noise = torch.randn(*x.shape[:2], *self.noise.shape[1:], device=mel.device) * 0.5**0.5
        frames, _ = self._sourced(x, pitch.masked_fill(~voiced, LOWEST_HZ), voiced, state, noise)
        loss = self.pitch.loss(self.pitch(x[:, late:]), pitch[:, late:])
        return self._overlap_add(frames, past[-1])[0], loss

    def training_past(self, rows: int) -> tuple[torch.Tensor, ...]:
        """Returns zeros for `run`; samples within `receptive_frames` of the start are then not to be judged."""
        like, back = self.head.weight, self.config.kernel_size - 1
        convs = [like.new_zeros(rows, self.config.hidden_size, back) for _ in self.layers]
        tail = torch.zeros(rows, self.config.n_fft - self.step_size, device=like.device)
        start = SourceState.start(rows, like.device)
        source = () if self.pitch is None else (start.phase, start.pitch, start.frame)
        return (like.new_zeros(rows, self.num_mel_bins, back), *convs, *source, tail)

    def _layers(self, mel: torch.Tensor, past: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Maps mel [B, T, M] to normalised x [B, U T, D], and returns the next past of all convolutions."""
        joined = torch.cat([past[0], (mel - SILENCE).to(past[0].dtype).transpose(1, 2)], 2)
        following = [joined[:, :, -past[0].shape[2] :]]
        x = self.upsample(self.embed(joined).transpose(1, 2))
        x = x.unflatten(-1, (self.config.upsample, -1)).flatten(1, 2).transpose(1, 2)
        for layer, before in zip(self.layers, past[1:], strict=False):
            x, after = layer(x, before)
            following.append(after)
        return self.norm(x.transpose(1, 2)), following

    def _frames(self, x: torch.Tensor) -> torch.Tensor:
        """Maps x [B, F, D] to windowed frames [B, F, W], in fp32: phases need the digits."""
        with torch.autocast(x.device.type, enabled=False):
            magnitude, phase = self._head(x).chunk(2, -1)
            spectrum = torch.polar(magnitude.clamp(max=LOUDEST).exp(), phase)
            return torch.fft.irfft(spectrum, self.config.n_fft) * self.window

    def _sourced(
        self, x: torch.Tensor, pitch: torch.Tensor, voiced: torch.Tensor, state: SourceState, noise: torch.Tensor
    ) -> tuple[torch.Tensor, SourceState]:
        """Maps x [B, F, D], pitch and voicing [B, F] and noise [B, F, W / 2 + 1, 2] to windowed frames [B, F, W]."""
        size = self.config.n_fft
        with torch.autocast(x.device.type, enabled=False):
            strength, phase, level = self._head(x).chunk(3, -1)
            pulses, after = pulse_frames(pitch.float(), voiced, state, size, self.step_size, self.sample_rate)
            analysis = self.window * (3 * size * PULSES / (8 * self.step_size))
            spectrum = torch.fft.rfft(pulses * analysis) * torch.polar(strength.clamp(max=LOUDEST).exp(), phase)
            spectrum = spectrum + torch.view_as_complex(noise) * level.clamp(max=LOUDEST).exp()
            return torch.fft.irfft(spectrum, size) * self.window, after

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), self.head.weight.float(), self.head.bias.float())

    def _overlap_add(self, frames: torch.Tensor, tail: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds frames [B, F, W], one every `step_size` samples, onto `tail` [B, W - step_size]."""
        count, overlap = frames.shape[1], frames.shape[2] // self.step_size
        parts = frames.unflatten(2, (overlap, self.step_size))
        wave = F.pad(tail.unflatten(1, (overlap - 1, self.step_size)), (0, 0, 0, count))
        for k in range(overlap):
            wave = wave + F.pad(parts[:, :, k], (0, 0, k, overlap - 1 - k))
        return wave[:, :count].flatten(1), wave[:, count:].flatten(1)
