"""The source of a voice: pulses of the right pitch whatever the pieces, pitch as classes, noise of unit variance."""

import math

import pytest
import torch

from kimi_mm.audio.detokenizer_config import VocoderConfig
from kimi_mm.audio.excitation import CLASSES, LOWEST_HZ, PitchHead, SourceState, noise_table, pulse_frames
from kimi_mm.audio.vocoder import Vocoder

RATE, STEP, WINDOW = 24_000, 240, 960


def pulses(pitch: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Frames [B, F, W] of a voiced pitch [B, F], made in pieces."""
    state, parts = SourceState.start(len(pitch), pitch.device), []
    for piece in pitch.split(sizes, 1):
        frames, state = pulse_frames(piece, torch.ones_like(piece).bool(), state, WINDOW, STEP, RATE)
        parts.append(frames)
    return torch.cat(parts, 1)


def test_pulses_do_not_depend_on_pieces():
    pitch = 100 + 150 * torch.rand(2, 40, generator=torch.Generator().manual_seed(0))
    whole = pulses(pitch, [40])
    assert torch.allclose(pulses(pitch, [1] * 13 + [20, 7]), whole, atol=2e-3)  # of 110 harmonics
    assert whole.abs().max() <= 11_000 / 100


@pytest.mark.parametrize("hertz", [80.0, 213.0, 400.0])
def test_overlapping_pulses_are_one_train_of_that_pitch(hertz):
    vocoder = Vocoder(VocoderConfig(hidden_size=8, num_layers=1, intermediate_size=8), 4, 480)
    frames = pulses(torch.full((1, 100), hertz), [100]) * torch.hann_window(WINDOW) * vocoder.window
    wave = vocoder._overlap_add(frames, torch.zeros(1, WINDOW - STEP))[0][0, WINDOW:]
    time = torch.arange(len(wave), dtype=torch.float64) / RATE
    for harmonic in (1, 2, 7):
        bins = [
            float((wave * torch.exp(-2j * math.pi * harmonic * hertz * (1 + error) * time)).mean().abs() * 2)
            for error in (0.0, 0.35 / harmonic)
        ]
        assert bins[0] == pytest.approx(1.0, abs=0.05)  # every harmonic has strength one
        assert bins[1] < 0.1


def test_no_pulses_without_a_voice():
    pitch = torch.full((1, 6), 200.0)
    voiced = torch.tensor([[True, False, True, False, False, True]])
    frames, _ = pulse_frames(pitch, voiced, SourceState.start(1, pitch.device), WINDOW, STEP, RATE)
    assert frames.abs().amax(2).gt(0)[0].tolist() == voiced[0].tolist()


def test_pitch_is_learnt_finer_than_its_classes():
    torch.manual_seed(0)
    head = PitchHead(CLASSES + 1)
    torch.nn.init.eye_(head.linear.weight)
    torch.nn.init.zeros_(head.linear.bias)
    pitch = torch.tensor([[60.0, 187.3, 0.0, 431.0]])
    x = torch.zeros(1, 4, CLASSES + 1, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.3)
    for _ in range(150):
        optimizer.zero_grad()
        head.loss(head(x), pitch).backward()
        optimizer.step()
    found, voiced = head.decode(head(x))
    assert voiced[0].tolist() == [True, True, False, True]
    cents = 1200 * (found / pitch).log2()[0, [0, 1, 3]].abs()
    assert cents.max() < 10  # classes are 37.5 apart


def test_the_lowest_pitch_is_the_lowest_class():
    head = PitchHead(4)
    logits = torch.full((1, 1, CLASSES + 1), -1e4)
    logits[..., 0] = 0.0
    assert float(head.decode(logits)[0]) == pytest.approx(LOWEST_HZ)


def test_noise_has_unit_variance():
    noise = noise_table(481)
    assert float(noise.square().sum(-1).mean()) == pytest.approx(1.0, abs=0.01)
    assert torch.equal(noise, noise_table(481))
