"""Sound files of every kind, and what is said about those that cannot be read."""

import io
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

from kimi_mm.audio.io import Resampler, read_audio, resample, write_wav
from kimi_mm.errors import AudioError

TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)).astype(np.float32)


def wav_bytes(wave: np.ndarray = TONE, rate: int = 16_000, **how: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=how.get("format", "WAV"), subtype=how.get("subtype", "PCM_16"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("format", "subtype", "tolerance"),
    [
        ("WAV", "PCM_U8", 1e-2),
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "PCM_32", 1e-6),
        ("WAV", "FLOAT", 1e-6),
        ("WAV", "DOUBLE", 1e-6),
        ("WAV", "ULAW", 3e-2),
        ("FLAC", "PCM_16", 1e-4),
        ("AIFF", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 5e-2),
        ("OGG", "OPUS", 5e-2),
    ],
)
def test_formats(format: str, subtype: str, tolerance: float) -> None:
    wave, seconds = read_audio(wav_bytes(format=format, subtype=subtype))
    assert wave.dtype == np.float32
    assert seconds == 1.0
    assert np.abs(wave - TONE)[100:-100].max() < tolerance


def test_mp3() -> None:
    wave, seconds = read_audio(wav_bytes(format="MP3", subtype="MPEG_LAYER_III"))
    spectrum = np.abs(np.fft.rfft(wave))
    assert seconds == pytest.approx(1.0, abs=0.15)
    assert np.argmax(spectrum) * 16_000 / len(wave) == pytest.approx(440, abs=2)


@pytest.mark.parametrize("rate", [1000, 8000, 11_025, 44_100, 48_000, 192_000, 384_000])
def test_rates(rate: int) -> None:
    tone = np.sin(2 * np.pi * 100 * np.arange(rate + 1) / rate)
    wave, seconds = read_audio(wav_bytes(tone, rate, subtype="FLOAT"))
    assert len(wave) == -(-(rate + 1) * 16_000 // rate)
    assert seconds == (rate + 1) / rate
    middle = slice(4000, 12_000)
    assert np.abs(wave - np.sin(2 * np.pi * 100 * np.arange(len(wave)) / 16_000))[middle].max() < 5e-3


@pytest.mark.parametrize("channels", [2, 3, 8])
def test_channels_are_mixed_down(channels: int) -> None:
    gains = np.arange(1, channels + 1) / channels
    wave, _ = read_audio(wav_bytes(TONE[:, None] * gains, subtype="FLOAT"))
    np.testing.assert_allclose(wave, TONE * gains.mean(), atol=1e-6)


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, path = wav_bytes(), tmp_path / "ü b.wav"
    path.write_bytes(data)
    misnamed = tmp_path / "wave.raw"
    misnamed.write_bytes(data)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=[data])
    writer.start()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    with path.open("rb") as handle:
        for source in (path, str(path), misnamed, fifo, "-", data, bytearray(data), io.BytesIO(data), handle):
            wave, seconds = read_audio(source)  # pyright: ignore[reportArgumentType]
            assert (len(wave), seconds) == (16_000, 1.0)
        assert not handle.closed
    writer.join()


def test_size_unknown_when_the_header_was_written() -> None:
    """Programs that write into a pipe leave the sizes at their maximum."""
    data = bytearray(wav_bytes())
    data[4:8] = data[40:44] = b"\xff" * 4
    assert len(read_audio(bytes(data))[0]) == 16_000


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "audio: empty"),
        (b"hello" * 100, "not a sound file"),
        (wav_bytes()[:30], "not a sound file"),
        (wav_bytes(np.zeros(0)), "zero-length"),
        (wav_bytes(np.array([0.0, np.nan]), subtype="FLOAT"), "1 of 2 samples are NaN"),
        (wav_bytes(np.array([np.inf]), subtype="FLOAT"), "NaN or infinite"),
        (wav_bytes(TONE, 400), "sample rate 400 Hz"),
        (wav_bytes(TONE, 400_000), "sample rate 400000 Hz"),
    ],
    # Not the bytes: libsndfile writes the time of day into float files.
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_bytes(data: bytes, words: str) -> None:
    with pytest.raises(AudioError, match=words):
        read_audio(data)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "samples.raw").write_bytes(bytes(range(100)))
    text = io.StringIO("text")
    for source, words in (
        (tmp_path / "none.wav", "none.wav: no such file"),
        (tmp_path, "is a directory"),
        (tmp_path / "empty.wav", "empty.wav: the file is empty"),
        (tmp_path / "empty.wav" / "x", "cannot be opened"),
        (tmp_path / "samples.raw", "not a sound file"),
        ("a\0b", "not a file name"),
        ("x" * 5000, "cannot be opened"),
        (text, "binary mode"),
        (None, "expected a path"),
    ):
        with pytest.raises(AudioError, match=words):
            read_audio(source)  # pyright: ignore[reportArgumentType]


def test_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, whom no mode stops
    with pytest.raises(AudioError, match=r"a\.wav: cannot be opened \(Permission denied\)"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("rate", [8000, 44_100])
def test_resampling_does_not_depend_on_the_pieces(rate: int) -> None:
    wave = np.random.default_rng(0).standard_normal(30_001).astype(np.float32)
    whole = resample(wave, rate, 16_000)
    for size in (1, 333, 10_000):
        resampler = Resampler(rate, 16_000)
        pieces = [resampler.push(wave[at : at + size]) for at in range(0, len(wave), size)]
        np.testing.assert_allclose(np.concatenate([*pieces, resampler.flush()]), whole, atol=1e-6)


def test_write_wav(tmp_path: Path) -> None:
    path = tmp_path / "out.wav"
    write_wav(path, np.concatenate([TONE, [2.0, -2.0]]), 16_000)
    wave, _ = read_audio(path)
    np.testing.assert_allclose(wave[:-2], TONE, atol=1e-4)
    assert wave[-2] > 0.999
    assert wave[-1] == -1.0
    assert [p.name for p in tmp_path.iterdir()] == ["out.wav"]


def test_failed_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.wav"
    write_wav(path, TONE, 16_000)
    before = path.read_bytes()
    for wave, rate, words in ((np.array([np.nan]), 16_000, "NaN"), (TONE, 0, "sample rate 0")):
        with pytest.raises(AudioError, match=words):
            write_wav(path, wave, rate)
    with pytest.raises(AudioError, match="does not exist"):
        write_wav(tmp_path / "none" / "out.wav", TONE, 16_000)
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(AudioError, match="cannot be written"):
        write_wav(tmp_path / "folder.wav", TONE, 16_000)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.wav", "out.wav"]
