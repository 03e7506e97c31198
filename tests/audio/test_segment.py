"""Cutting at silences: nothing that may be speech is lost, nothing is too long."""

import itertools

import numpy as np
import pytest

from kimi_mm.audio.segment import split_at_silence

RATE = 16_000


def db(level: float) -> float:
    return 10 ** (level / 20)


def noise(seconds: float, level: float, seed: int = 0) -> np.ndarray:
    samples = np.random.default_rng(seed).standard_normal(int(seconds * RATE))
    return (samples * db(level)).astype(np.float32)


def speech(seconds: float, level: float, seed: int = 0) -> np.ndarray:
    """Bursts like syllables: 250 ms of noise, 80 ms of pause."""
    wave = noise(seconds, level, seed)
    return (wave * (np.arange(len(wave)) % 5280 < 4000)).astype(np.float32)


def check(pieces: list[tuple[int, int]], samples: int, max_seconds: float = 20.0) -> None:
    assert all(0 <= start < end <= samples for start, end in pieces)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(pieces))
    assert all(end - start <= max_seconds * RATE for start, end in pieces)


def kept(pieces: list[tuple[int, int]], start: float, end: float) -> bool:
    """Whether every sample from `start` to `end` seconds is in a piece."""
    inside = np.zeros(int(end * RATE) + 1, bool)
    for first, last in pieces:
        inside[first:last] = True
    return bool(inside[int(start * RATE) : int(end * RATE)].all())


@pytest.mark.parametrize("wave", [np.zeros(0), np.zeros(1), np.zeros(5 * RATE), np.full(5 * RATE, 0.3), noise(3, -80)])
def test_silence_gives_nothing(wave: np.ndarray) -> None:
    """A constant offset and the hiss of a good microphone are silence too."""
    assert split_at_silence(wave.astype(np.float32)) == []


@pytest.mark.parametrize("level", [-15, -30, -45])
@pytest.mark.parametrize("background", [-90, -62])
def test_utterances_survive_and_long_pauses_go(level: float, background: float) -> None:
    wave, places, at = noise(60, background, 9), [], 3.0
    for number, seconds in enumerate((1.0, 6.0, 0.3, 9.0)):
        first = int(at * RATE)
        burst = speech(seconds, level, number)
        wave[first : first + len(burst)] += burst
        places.append((at, at + seconds))
        at += seconds + 7.0
    pieces = split_at_silence(wave)
    check(pieces, len(wave))
    assert all(kept(pieces, *place) for place in places)
    assert sum(end - start for start, end in pieces) < 25 * RATE


def test_a_quiet_word_after_loud_ones() -> None:
    wave = np.concatenate([speech(10, -12), noise(4, -75), speech(0.5, -45, 1), noise(4, -75, 2)])
    assert kept(split_at_silence(wave), 14.0, 14.5)


def test_one_word_in_a_long_silence() -> None:
    wave = noise(300, -85)
    wave[200 * RATE : 200 * RATE + 4000] += noise(0.25, -40, 1)
    pieces = split_at_silence(wave)
    assert kept(pieces, 200.0, 200.25)
    assert sum(end - start for start, end in pieces) < 2 * RATE


@pytest.mark.parametrize("max_seconds", [5.0, 20.0, 24.0])
def test_steady_sound_is_kept_whole(max_seconds: float) -> None:
    tone = (0.1 * np.sin(np.arange(120 * RATE) / 5)).astype(np.float32)
    for wave in (tone, noise(600, -20), speech(130, -20)):
        pieces = split_at_silence(wave, max_seconds=max_seconds)
        check(pieces, len(wave), max_seconds)
        assert kept(pieces, 0.0, len(wave) / RATE)


def test_forced_cuts_lie_in_pauses() -> None:
    """Talk of 3 s with pauses of 0.4 s: each cut is inside a pause."""
    parts = [part for number in range(20) for part in (noise(3, -20, number), noise(0.4, -60, number))]
    wave = np.concatenate(parts)
    pieces = split_at_silence(wave)
    assert len(pieces) >= 4
    for _, end in pieces[:-1]:
        assert (end / RATE) % 3.4 > 3.0


def test_clicks() -> None:
    wave = noise(30, -90)
    wave[[0, 5 * RATE, 20 * RATE, 30 * RATE - 1]] = 1.0
    pieces = split_at_silence(wave)
    check(pieces, len(wave))
    assert all(any(start <= at < end for start, end in pieces) for at in (0, 5 * RATE, 20 * RATE, 30 * RATE - 1))


def test_one_sample() -> None:
    assert split_at_silence(np.ones(1, np.float32)) == [(0, 1)]


@pytest.mark.parametrize("rate", [8000, 11_025, 48_000])
def test_other_rates(rate: int) -> None:
    burst = np.random.default_rng(0).standard_normal(rate).astype(np.float32) * 0.1
    wave = np.concatenate([np.zeros(4 * rate, np.float32), burst, np.zeros(4 * rate, np.float32)])
    ((start, end),) = split_at_silence(wave, rate)
    assert start <= 4 * rate
    assert end >= 5 * rate
    assert end - start < 2 * rate


def test_deterministic() -> None:
    wave = speech(100, -25)
    assert split_at_silence(wave) == split_at_silence(wave.copy())
