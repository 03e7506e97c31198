"""Log-mel against transformers' extractor, and the stream against the whole."""

import numpy as np
import pytest
import torch

from kimi_mm.audio.features import LogMel, MelState, MelStream, running_floor
from kimi_mm.config import MelConfig
from kimi_mm.errors import AudioError

CODE = 1280


def noise(samples: int, seed: int = 0) -> np.ndarray:
    """Noise that swells and fades, so that a running floor differs from a clip's."""
    swell = 0.02 + np.abs(np.sin(np.arange(samples) / 7000)) ** 4
    return (np.random.default_rng(seed).standard_normal(samples) * 0.2 * swell).astype(np.float32)


@pytest.mark.parametrize("bins", [80, 128])
def test_clip_equals_transformers(bins: int) -> None:
    transformers = pytest.importorskip("transformers")
    wave = noise(7 * 16_000 + 123)
    theirs = transformers.WhisperFeatureExtractor(feature_size=bins)(wave, sampling_rate=16_000, return_tensors="pt")
    padded = torch.from_numpy(np.pad(wave, (0, 480_000 - len(wave))))[None]
    ours = LogMel(MelConfig(num_mel_bins=bins, dynamic_range="clip"))(padded)
    assert ours.shape == (1, 3000, bins)
    torch.testing.assert_close(ours.transpose(1, 2), theirs["input_features"], atol=1e-5, rtol=0)


def test_running_floor_hears_to_the_end_of_its_block_only() -> None:
    power = torch.tensor([[-9.0, 0.5, -9.0, -9.0, 1.5, -9.0, -9.0]])[..., None]
    floor = running_floor(power, block=2)[0, :, 0]
    torch.testing.assert_close(floor, torch.tensor([0.5, 0.5, 0.5, 0.5, 1.5, 1.5, 1.5]) - 8.0)
    assert (running_floor(torch.full((1, 5, 3), -10.0), 2) == -8.0).all(), "silence must not be amplified"


@pytest.mark.parametrize("codes", [1, 2, 7, 26])
@pytest.mark.parametrize("piece", [1, 7, 160, 1000, 48_000])
def test_stream_equals_whole(codes: int, piece: int) -> None:
    samples = codes * CODE - 321
    wave = noise(samples, seed=codes)
    mel = LogMel(MelConfig(num_mel_bins=16))
    whole = mel(torch.from_numpy(np.pad(wave, (0, 321)))[None], block=40)
    stream, state, blocks = MelStream(mel, 40, CODE), MelState(), []
    for at in range(0, samples, piece):
        blocks += stream.push(wave[at : at + piece], state)
    blocks += stream.flush(state)
    assert all(block.shape[1] == 40 for block in blocks[:-1])
    torch.testing.assert_close(torch.cat(blocks, 1), whole, atol=2e-6, rtol=0)


def test_stream_keeps_no_hold_of_the_callers_buffer() -> None:
    mel, wave = LogMel(MelConfig(num_mel_bins=16)), noise(2 * CODE)
    stream, state, buffer = MelStream(mel, 40, CODE), MelState(), np.zeros(CODE, np.float32)
    for at in (0, CODE):
        buffer[:] = wave[at : at + CODE]
        stream.push(buffer, state)
    whole = mel(torch.from_numpy(wave)[None], block=40)
    torch.testing.assert_close(torch.cat(stream.flush(state), 1), whole, atol=2e-6, rtol=0)


def test_too_short_for_a_frame() -> None:
    with pytest.raises(AudioError, match="200 samples are too few"):
        LogMel(MelConfig())(torch.zeros(1, 200))
