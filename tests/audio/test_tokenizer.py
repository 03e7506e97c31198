"""Recordings to codes: lengths, layouts, and the stream against the whole."""

import numpy as np
import pytest
import torch

from kimi_mm.audio.tokenizer import AudioTokenizer
from kimi_mm.audio.tokens import AudioTokens, join
from kimi_mm.config import AudioEncoderConfig, AudioTokenizerConfig, MelConfig, QuantizerConfig
from kimi_mm.errors import AudioError

CODE = 1280
CONFIG = AudioTokenizerConfig(
    mel=MelConfig(num_mel_bins=20),
    encoder=AudioEncoderConfig(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, block_size=100),
    quantizer=QuantizerConfig(codebook_size=64, codebook_dim=8, hidden_layers=1, hidden_size=16, num_heads=2),
)


def make(**changes: object) -> AudioTokenizer:
    torch.manual_seed(0)
    tokenizer = AudioTokenizer(CONFIG.replace(**changes)).eval()
    wave = torch.from_numpy(noise(10 * CODE))[None]
    with torch.no_grad():
        vectors = tokenizer.quantizer.project(tokenizer.features_from_wave(wave))[0]
    tokenizer.quantizer.init_codebook(vectors, torch.Generator().manual_seed(0))
    return tokenizer


def noise(samples: int, seed: int = 0) -> np.ndarray:
    swell = 0.02 + np.abs(np.sin(np.arange(samples) / 9000)) ** 3
    return (np.random.default_rng(seed).standard_normal(samples) * 0.2 * swell).astype(np.float32)


def in_pieces(tokenizer: AudioTokenizer, wave: np.ndarray, size: int, rate: int = 16_000) -> AudioTokens:
    stream = tokenizer.stream(rate)
    return join([*(stream.push(wave[at : at + size]) for at in range(0, len(wave), size)), stream.flush()])


@pytest.fixture(scope="module")
def tokenizer() -> AudioTokenizer:
    return make()


@pytest.mark.parametrize("samples", [1, 2, 399, 1279, 1280, 1281, 31_999, 32_000, 32_041, 64_001, 480_000, 487_031])
def test_encode_equals_the_training_path(tokenizer: AudioTokenizer, samples: int) -> None:
    wave = noise(samples, seed=samples)
    tokens = tokenizer.encode(wave)
    assert len(tokens) == -(-samples // CODE)
    assert tokens.codes.dtype == torch.int64
    assert tokens.features.dtype == torch.float32
    with torch.no_grad():
        features = tokenizer.features_from_wave(torch.from_numpy(np.pad(wave, (0, -samples % CODE)))[None])
        codes = tokenizer.quantize(features).codes
    torch.testing.assert_close(tokens.features, features[0], atol=1e-4, rtol=0)
    assert torch.equal(tokens.codes, codes[0])


@pytest.mark.parametrize("samples", [1, 2, 399, 1281, 31_999, 32_041])
@pytest.mark.parametrize("size", [1, 7, 160, 1000, 48_000])
def test_any_chunking_gives_the_same_bits(tokenizer: AudioTokenizer, samples: int, size: int) -> None:
    if samples > 2000 and size == 1:
        samples = 2000
    wave = noise(samples, seed=samples)
    whole, streamed = tokenizer.encode(wave), in_pieces(tokenizer, wave, size)
    assert torch.equal(streamed.codes, whole.codes)
    assert torch.equal(streamed.features, whole.features)


def test_stream_over_segments(tokenizer: AudioTokenizer) -> None:
    wave = noise(70 * 16_000 + 13)
    whole, streamed = tokenizer.encode(wave), in_pieces(tokenizer, wave, 12_345)
    assert len(whole) == 876
    assert torch.equal(streamed.codes, whole.codes)
    assert len(whole.codes.unique()) > 5, "a constant code would prove nothing"


@pytest.mark.parametrize("rate", [1000, 8000, 11_025, 22_050, 44_100, 48_000, 384_000])
def test_other_rates(tokenizer: AudioTokenizer, rate: int) -> None:
    wave = noise(rate + 7, seed=rate)
    whole = tokenizer.encode(wave, rate)
    resampled = -(-len(wave) * 16_000 // rate)
    assert len(whole) == -(-resampled // CODE)
    for size in (997, 48_000):
        streamed = in_pieces(tokenizer, wave, size, rate)
        assert torch.equal(streamed.codes, whole.codes)
        torch.testing.assert_close(streamed.features, whole.features, atol=1e-4, rtol=0)


def test_codes_come_as_soon_as_a_block_is_complete(tokenizer: AudioTokenizer) -> None:
    stream, wave = tokenizer.stream(), noise(3 * 32_000)
    assert len(stream.push(wave[:32_039])) == 0
    assert len(stream.push(wave[32_039:32_040])) == 25
    assert len(stream.push(wave[32_040:])) == 25
    assert len(stream.flush()) == 25


def test_a_copied_stream_goes_on_by_itself(tokenizer: AudioTokenizer) -> None:
    start, left, right = noise(40_000, 1), noise(30_000, 2), noise(50_000, 3)
    stream = tokenizer.stream()
    before = stream.push(start)
    twin = stream.clone()
    for one, rest in ((stream, left), (twin, right)):
        tokens = join([before, one.push(rest), one.flush()])
        assert torch.equal(tokens.codes, tokenizer.encode(np.concatenate([start, rest])).codes)
    with pytest.raises(AudioError, match="cannot be copied"):
        tokenizer.stream(8000).clone()


def test_closed_and_empty_streams(tokenizer: AudioTokenizer) -> None:
    for rate in (16_000, 44_100):
        stream = tokenizer.stream(rate)
        assert len(stream.push(np.zeros(0, np.float32))) == 0
        assert len(stream.flush()) == 0
        with pytest.raises(AudioError, match="flushed"):
            stream.push(noise(10))
        with pytest.raises(AudioError, match="flushed"):
            stream.flush()


def test_a_refused_piece_leaves_the_stream_as_it_was(tokenizer: AudioTokenizer) -> None:
    wave, stream = noise(30_000), tokenizer.stream(8000)
    pieces = [stream.push(wave[:12_000])]
    with pytest.raises(AudioError, match="1 of 3 samples are NaN"):
        stream.push(np.array([0.0, np.nan, 0.0]))
    pieces += [stream.push(wave[12_000:]), stream.flush()]
    assert torch.equal(join(pieces).codes, tokenizer.encode(wave, 8000).codes)


def test_layouts(tokenizer: AudioTokenizer) -> None:
    left, right = noise(5000, 1), noise(5000, 2)
    mixed = tokenizer.encode((left + right) / 2)
    stereo = np.stack([left, right])
    for wave in (stereo, stereo.T, torch.from_numpy(stereo), torch.from_numpy(stereo).double()):
        torch.testing.assert_close(tokenizer.encode(wave).features, mixed.features, atol=1e-4, rtol=0)
    streamed = in_pieces(tokenizer, stereo.T, 1)
    torch.testing.assert_close(streamed.features, mixed.features, atol=1e-4, rtol=0)
    int16 = np.round(left * 32768).astype(np.int16)
    exact = tokenizer.encode(int16.astype(np.float32) / 32768)
    assert torch.equal(tokenizer.encode(int16).features, exact.features)
    assert torch.equal(tokenizer.encode(torch.from_numpy(int16)).features, exact.features)


@pytest.mark.parametrize(
    ("wave", "rate", "words"),
    [
        (np.zeros(0, np.float32), 16_000, "no samples"),
        (np.zeros((0, 2), np.float32), 16_000, "no samples"),
        (np.array([0.0, np.nan]), 16_000, "1 of 2 samples are NaN or infinite"),
        (np.array([np.inf]), 16_000, "NaN or infinite"),
        (np.zeros((2, 2, 2)), 16_000, r"shape \[2, 2, 2\]"),
        (np.zeros(4, complex), 16_000, "type complex128"),
        (np.zeros(4), 0, "sample rate 0 Hz"),
        (np.zeros(4), float("nan"), "sample rate nan Hz"),
        (np.zeros(4), 22_050.5, "not a whole number"),
    ],
)
def test_bad_input(tokenizer: AudioTokenizer, wave: np.ndarray, rate: float, words: str) -> None:
    with pytest.raises(AudioError, match=words):
        tokenizer.encode(wave, rate)  # pyright: ignore[reportArgumentType]


def test_batch_is_each_alone(tokenizer: AudioTokenizer) -> None:
    waves = [noise(samples, samples) for samples in (1, 40_000, 5000)]
    for wave, tokens in zip(waves, tokenizer.encode_batch(waves), strict=True):
        assert torch.equal(tokens.codes, tokenizer.encode(wave).codes)


def test_padding_of_a_batch_is_hidden(tokenizer: AudioTokenizer) -> None:
    """Rows agree with the recording alone but for the mirrored 2.5 ms that touch the last encoder frame."""
    short, total = noise(5 * CODE, 1), 30 * CODE
    batch = torch.from_numpy(np.stack([np.pad(short, (0, total - len(short))), noise(total, 2)]))
    alone = tokenizer.encode(short)
    with torch.no_grad():
        shown = tokenizer.features_from_wave(batch)[0, :5]
        hidden = tokenizer.features_from_wave(batch, torch.tensor([len(short), total]))[0, :5]
    error = (hidden - alone.features).abs()
    assert error[:4].max() < 0.02 < (shown - alone.features)[:4].abs().max()


def test_gradients_reach_the_encoder(tokenizer: AudioTokenizer) -> None:
    features = tokenizer.features_from_wave(torch.from_numpy(noise(4 * CODE))[None])
    features.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tokenizer.encoder.conv1.parameters())


@pytest.mark.parametrize("dynamic_range", ["clip", "running"])
def test_without_streaming_each_segment_stands_alone(dynamic_range: str) -> None:
    encoder = CONFIG.encoder.replace(causal_convolution=False, block_size=None)
    tokenizer = make(encoder=encoder, mel=CONFIG.mel.replace(dynamic_range=dynamic_range))
    wave = noise(480_000 + 3000)
    tokens = tokenizer.encode(wave)
    parts = [tokenizer.encode(wave[:480_000]), tokenizer.encode(wave[480_000:])]
    assert len(tokens) == 378
    torch.testing.assert_close(tokens.features, join(parts).features, atol=1e-4, rtol=0)
    with torch.no_grad():
        features = tokenizer.features_from_wave(torch.from_numpy(np.pad(wave, (0, -len(wave) % CODE)))[None])
    torch.testing.assert_close(tokens.features, features[0], atol=1e-4, rtol=0)
    with pytest.raises(AudioError, match="cannot stream"):
        tokenizer.stream()
