"""Reading and writing sound files, and bringing samples to what the models take: mono, 16 kHz, fp32."""

from __future__ import annotations

import io
import os
import struct
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr
import torch

from kimi_mm.errors import AudioError

TARGET_RATE = 16_000
MIN_RATE, MAX_RATE = 1000, 384_000
_BLOCK = 1 << 20  # samples read at a time, of all channels together


def read_audio(
    source: str | Path | bytes | BinaryIO, target_rate: int = TARGET_RATE, max_seconds: float | None = None
) -> tuple[np.ndarray, float]:
    """Reads any format that libsndfile knows: WAV of any depth, FLAC, OGG, Opus, MP3, AIFF...

    Args:
        source: a path (pipes too), "-" for standard input, the bytes of a file, or a file opened in binary mode.
        target_rate: of the result, Hz.
        max_seconds: a longer recording is refused as soon as that shows, however small its file is; None: any length.

    Returns:
        Mono fp32 samples at `target_rate`, and the recording's length in seconds.

    Raises:
        AudioError: one sentence on what is wrong with the file.
    """
    name, handle = _open(source)
    try:
        with soundfile.SoundFile(handle) as file:
            rate, count = check_rate(file.samplerate, name), 0
            resampler, pieces = Resampler(rate, target_rate), []
            # Mixed down and resampled piece by piece: hours of many channels must not exist whole.
            for block in file.blocks(max(1, _BLOCK // file.channels), dtype="float32", always_2d=True):
                mono = block.mean(1)
                check_samples(mono, name)
                count += len(mono)
                if max_seconds is not None and count > max_seconds * rate:
                    raise AudioError(f"{name}: is longer than {max_seconds:g} seconds; cut it into parts.")
                pieces.append(resampler.push(mono))
    except (soundfile.LibsndfileError, soundfile.SoundFileError) as error:
        reason = str(error).rsplit(": ", 1)[-1].rstrip(".")
        raise AudioError(f"{name}: not a sound file that can be read ({reason}).") from None
    finally:
        if handle is not source:
            handle.close()
    if not count:
        raise AudioError(f"{name}: holds no samples (zero-length audio).")
    return np.concatenate([*pieces, resampler.flush()]), count / rate


def to_mono_16k(wave: np.ndarray | torch.Tensor, sample_rate: int = TARGET_RATE) -> np.ndarray:
    """Brings samples to mono 16 kHz fp32 [S]; see `to_mono` for what they may be. AudioError when there are none."""
    rate, samples = check_rate(sample_rate), to_mono(wave)
    if not len(samples):
        raise AudioError("the recording holds no samples (zero-length audio).")
    check_samples(samples)
    return resample(samples, rate, TARGET_RATE)


def to_mono(wave: np.ndarray | torch.Tensor, channel_axis: int | None = None) -> np.ndarray:
    """Brings samples to mono fp32 [S].

    Args:
        wave: float in [-1, 1], or integers scaled by their type's range; [S], [channels, S] or [S, channels].
        channel_axis: of two axes, the one to mix down; None takes the shorter one.
    """
    if isinstance(wave, torch.Tensor):
        tensor = torch.as_tensor(wave).detach().cpu()
        samples = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    else:
        samples = np.asarray(wave)
    if samples.ndim > 2:
        raise AudioError(f"samples have shape {list(samples.shape)}; expected [S], [channels, S] or [S, channels].")
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128.0) / 128.0
    elif np.issubdtype(samples.dtype, np.signedinteger):
        samples = samples.astype(np.float32) / float(-np.iinfo(samples.dtype).min)
    elif not np.issubdtype(samples.dtype, np.floating):
        raise AudioError(f"samples have type {samples.dtype}; expected floats or signed integers.")
    if not samples.size:
        return np.zeros(0, np.float32)
    if samples.ndim == 2:
        shorter = 0 if samples.shape[0] <= samples.shape[1] else 1
        samples = samples.mean(shorter if channel_axis is None else channel_axis)
    return np.ascontiguousarray(samples, dtype=np.float32).reshape(-1)


def check_samples(wave: np.ndarray, name: str = "the recording") -> None:
    """Raises AudioError when a sample is NaN or infinite."""
    bad = len(wave) - int(np.isfinite(wave).sum())
    if bad:
        raise AudioError(f"{name}: {bad} of {len(wave)} samples are NaN or infinite.")


def check_rate(rate: float, name: str = "the recording") -> int:
    """Returns the sample rate in Hz as an integer; AudioError when it is out of range or not whole."""
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"{name}: sample rate {rate} Hz is not between {MIN_RATE} and {MAX_RATE}.")
    if rate != int(rate):
        raise AudioError(f"{name}: sample rate {rate} Hz is not a whole number.")
    return int(rate)


class Resampler:
    """Resamples mono fp32 as it comes in; S samples give ceil(S * target_rate / rate), however they are cut.

    Args:
        rate: of the input, Hz.
        target_rate: of the output, Hz.
    """

    def __init__(self, rate: int, target_rate: int) -> None:
        self.rate, self.target_rate = rate, target_rate
        self.received = self.given = 0
        self._soxr = None if rate == target_rate else soxr.ResampleStream(rate, target_rate, 1)

    @property
    def copyable(self) -> bool:
        """Whether a copy would go on by itself; soxr's state cannot be copied."""
        return self._soxr is None

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Takes the next samples [S], returns those that became certain."""
        self.received += len(samples)
        out = samples if self._soxr is None else self._soxr.resample_chunk(samples)
        self.given += len(out)
        return out

    def flush(self) -> np.ndarray:
        """Returns the rest; soxr may end a sample early or late, so it is cut or padded to the exact length."""
        if self._soxr is None:
            return np.zeros(0, np.float32)
        rest = self._soxr.resample_chunk(np.zeros(0, np.float32), last=True)
        due = max(0, -(-self.received * self.target_rate // self.rate) - self.given)
        return np.pad(rest, (0, max(0, due - len(rest))))[:due]


def resample(wave: np.ndarray, rate: int, target_rate: int) -> np.ndarray:
    """Resamples mono fp32 [S] to [ceil(S * target_rate / rate)]."""
    if rate == target_rate:
        return wave
    resampler = Resampler(rate, target_rate)
    pieces = [resampler.push(wave[at : at + _BLOCK]) for at in range(0, len(wave), _BLOCK)]
    return np.concatenate([*pieces, resampler.flush()])


def wav_stream_header(sample_rate: int) -> bytes:
    """Returns the header of a mono 16-bit WAV whose length is not known yet: sizes say "until the end"."""
    unknown, rate = 0xFFFFFFFF, check_rate(sample_rate)
    form = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", unknown, b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
    return form + struct.pack("<4sI", b"data", unknown)


def pcm16(wave: np.ndarray) -> bytes:
    """Returns samples [S] in [-1, 1] as 16-bit little-endian integers."""
    return np.round(np.clip(wave, -1.0, 1.0) * 32767).astype("<i2").tobytes()


def write_wav(path: str | Path, wave: np.ndarray | torch.Tensor, sample_rate: int) -> None:
    """Writes mono 16-bit WAV, clipped to [-1, 1]; the file appears whole or not at all.

    Raises:
        AudioError: on NaN or infinite samples, an impossible rate, or a place that cannot be written.
    """
    path, rate, samples = Path(path), check_rate(sample_rate), to_mono(wave)
    check_samples(samples)
    if not path.parent.is_dir():
        raise AudioError(f"{path}: the folder {path.parent} does not exist.")
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        soundfile.write(aside, np.clip(samples, -1.0, 1.0), rate, format="WAV", subtype="PCM_16")
        os.replace(aside, path)
    except (OSError, soundfile.LibsndfileError) as error:
        reason = getattr(error, "strerror", None) or str(error).rsplit(": ", 1)[-1].rstrip(".")
        raise AudioError(f"{path}: cannot be written ({reason}).") from None
    finally:
        aside.unlink(missing_ok=True)


def _open(source: str | Path | bytes | BinaryIO) -> tuple[str, BinaryIO]:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _in_memory("audio", bytes(source))
    if source == "-":
        return _in_memory("standard input", sys.stdin.buffer.read())
    if not isinstance(source, (str, Path)):
        name = str(getattr(source, "name", "audio"))
        if not hasattr(source, "read") or isinstance(source, io.TextIOBase):
            raise AudioError(f"{name}: expected a path, bytes or a file opened in binary mode.")
        return (name, source) if _readable_in_place(name, source) else _in_memory(name, source.read())
    path = Path(source)
    try:
        handle = path.open("rb")
    except FileNotFoundError:
        raise AudioError(f"{path}: no such file.") from None
    except IsADirectoryError:
        raise AudioError(f"{path}: is a directory, not a sound file.") from None
    except OSError as error:
        raise AudioError(f"{path}: cannot be opened ({error.strerror}).") from None
    except ValueError as error:
        raise AudioError(f"{str(path)!r}: not a file name ({error}).") from None
    if _readable_in_place(str(path), handle):
        if path.stat().st_size:
            return str(path), handle
        handle.close()
        raise AudioError(f"{path}: the file is empty.")
    with handle:
        return _in_memory(str(path), handle.read())


def _readable_in_place(name: str, handle: BinaryIO) -> bool:
    """libsndfile goes back and forth, which a pipe does not allow, and guesses headerless samples from ".raw"."""
    return handle.seekable() and not name.lower().endswith(".raw")


def _in_memory(name: str, data: bytes) -> tuple[str, BinaryIO]:
    if not data:
        raise AudioError(f"{name}: empty.")
    return name, io.BytesIO(data)
