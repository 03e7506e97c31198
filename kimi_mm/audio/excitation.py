"""What a voice is made of before its filter: a train of pulses at the pitch, and noise, frame by frame.

    h [B, F, D] ─► PitchHead ─► f0 [B, F], 0 where unvoiced ─► phase at frame centres ─► pulses [B, F, W] ─┐
                                                                                          noise table ─────┴─► spectra

A pulse train holds every harmonic below `TOP_HZ` at the same strength: cos(x) + ... + cos(K x) = sin((K + 1/2) x) /
(2 sin(x / 2)) - 1/2. Within a frame the pitch is constant; phases of neighbouring frames agree halfway between them.
Noise is read from a table by the number of the frame, so that a stream gives the same samples however it is cut.

The source-filter model of speech, as in Wang et al., "Neural source-filter waveform models" (2019), section II.

Shapes: B rows, F frames, D hidden size, W window of a frame, P pitch classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

LOWEST_HZ, OCTAVES, CLASSES = 50.0, 4.0, 128
TOP_HZ = 11_000.0  # harmonics end here
NOISE_FRAMES = 509  # length of the table; its repetition is not heard
SPREAD = 1.0  # of a pitch target over classes
REACH = 4  # classes around the likeliest that are averaged


@dataclass(frozen=True)
class SourceState:
    """Where the source of each row stands: phase in turns [B, 1] fp64, the last pitch [B, 1] in Hz, frames [B, 1]."""

    phase: torch.Tensor
    pitch: torch.Tensor
    frame: torch.Tensor

    @classmethod
    def start(cls, rows: int, device: torch.device) -> SourceState:
        """Returns the state before the first frame."""
        zeros = torch.zeros(rows, 1, device=device)
        return cls(zeros.double(), zeros + 2 * LOWEST_HZ, zeros.long())


class PitchHead(nn.Module):
    """Pitch as a choice among 128 classes, 37.5 cents apart, and whether there is any.

    Kim et al., "CREPE" (2018), section 2: targets are blurred over classes, and the classes around the likeliest are
    averaged, which is finer than a class.
    """

    centers: torch.Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, CLASSES + 1)
        with torch.device("cpu"):
            self.register_buffer("centers", torch.arange(CLASSES, dtype=torch.float32), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps x [B, F, D] to logits [B, F, P + 1]; the last one says whether there is a pitch."""
        with torch.autocast(x.device.type, enabled=False):
            return self.linear(x.float())

    def decode(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the pitch [B, F] in Hz, also where there is none, and where there is one [B, F] bool."""
        scores = logits[..., :CLASSES]
        near = (self.centers - scores.argmax(-1, keepdim=True)).abs() <= REACH
        chances = scores.masked_fill(~near, float("-inf")).softmax(-1)
        place = (chances * self.centers).sum(-1)
        return LOWEST_HZ * 2.0 ** (place * (OCTAVES / CLASSES)), logits[..., CLASSES] > 0

    def loss(self, logits: torch.Tensor, pitch: torch.Tensor) -> torch.Tensor:
        """Returns the mean cross entropy of pitch [B, F] in Hz, 0 where there is none; classes count where there is."""
        voiced = pitch > 0
        place = (pitch.clamp_min(LOWEST_HZ) / LOWEST_HZ).log2() * (CLASSES / OCTAVES)
        target = (-0.5 * ((self.centers - place[..., None]) / SPREAD).square()).softmax(-1)
        classes = -(target * logits[..., :CLASSES].log_softmax(-1)).sum(-1)
        found = F.binary_cross_entropy_with_logits(logits[..., CLASSES], voiced.float())
        return found + (classes * voiced).sum() / voiced.sum().clamp_min(1)


def pulse_frames(
    pitch: torch.Tensor, voiced: torch.Tensor, state: SourceState, window: int, step: int, rate: int
) -> tuple[torch.Tensor, SourceState]:
    """Returns pulses of each frame, [B, F, W] fp32, zeros where `voiced` is False, and the next state.

    Args:
        pitch: [B, F] in Hz, above 0.
        voiced: [B, F] bool.
        state: of the frames before.
        window: W.
        step: samples between frames.
        rate: of samples, Hz.
    """
    known = torch.cat([state.pitch, pitch], 1).double()
    turns = state.phase + ((known[:, 1:] + known[:, :-1]) * (step / (2 * rate))).cumsum(1)
    turns = turns % 1.0
    time = torch.arange(window, device=pitch.device) - window // 2
    x = (2 * math.pi) * (turns.float()[..., None] + (pitch / rate)[..., None] * time)
    count = (TOP_HZ / pitch).floor()[..., None]
    half = (x / 2).sin()
    near = half.abs() < 1e-3  # where the quotient has its limit, the number of harmonics
    train = torch.where(near, count, ((count + 0.5) * x).sin() / (2 * half).masked_fill(near, 1.0) - 0.5)
    after = SourceState(turns[:, -1:], pitch[:, -1:], state.frame + pitch.shape[1])
    return train * voiced[..., None], after


def noise_table(bins: int) -> torch.Tensor:
    """Returns complex noise of unit variance, [NOISE_FRAMES, bins, 2] fp32, always the same."""
    return torch.randn(NOISE_FRAMES, bins, 2, generator=torch.Generator().manual_seed(0)) * math.sqrt(0.5)
