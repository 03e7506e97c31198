"""Reading and writing sound files, and bringing samples to what the models take: mono, 16 kHz, fp32."""

from __future__ import annotations

import io
import os
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
_BLOCK = 1 << 20  # samples read at a time


def read_audio(source: str | Path | bytes | BinaryIO, target_rate: int = TARGET_RATE) -> tuple[np.ndarray, float]:
    """Reads any format that libsndfile knows: WAV of any depth, FLAC, OGG, Opus, MP3, AIFF...

    Args:
        source: a path, "-" for standard input, the bytes of a file, or an open binary file.
        target_rate: of the result, Hz.

    Returns:
        Mono fp32 samples at `target_rate`, and the recording's length in seconds.

    Raises:
        AudioError: one sentence on what is wrong with the file.
    """
    name, handle = _open(source)
    try:
        with soundfile.SoundFile(handle) as file:
            rate = file.samplerate
            if not MIN_RATE <= rate <= MAX_RATE:
                raise AudioError(f"{name}: sample rate {rate} Hz is not between {MIN_RATE} and {MAX_RATE}.")
            # Mixed down piece by piece: hours of many channels must not exist whole.
            pieces = [block.mean(1) for block in file.blocks(_BLOCK, dtype="float32", always_2d=True)]
    except (soundfile.LibsndfileError, soundfile.SoundFileError) as error:
        reason = str(error).rsplit(": ", 1)[-1].rstrip(".")
        raise AudioError(f"{name}: not a sound file that can be read ({reason}).") from None
    finally:
        if handle is not source:
            handle.close()
    wave = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    if not len(wave):
        raise AudioError(f"{name}: holds no samples (zero-length audio).")
    check_samples(wave, name)
    return resample(wave, rate, target_rate), len(wave) / rate


def to_mono_16k(wave: np.ndarray | torch.Tensor, sample_rate: int = TARGET_RATE) -> np.ndarray:
    """Brings samples to mono 16 kHz fp32 [S]; see `to_mono` for what they may be. AudioError when there are none."""
    samples = to_mono(wave)
    if not len(samples):
        raise AudioError("the recording holds no samples (zero-length audio).")
    check_samples(samples)
    return resample(samples, sample_rate, TARGET_RATE)


def to_mono(wave: np.ndarray | torch.Tensor) -> np.ndarray:
    """Brings samples to mono fp32 [S].

    Args:
        wave: float in [-1, 1], or integers scaled by their type's range; [S], [channels, S] or [S, channels]. Of two
            axes the shorter one is taken for the channels.
    """
    samples = wave.detach().cpu().numpy() if isinstance(wave, torch.Tensor) else np.asarray(wave)
    if samples.ndim > 2:
        raise AudioError(f"samples have shape {list(samples.shape)}; expected [S], [channels, S] or [S, channels].")
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128.0) / 128.0
    elif np.issubdtype(samples.dtype, np.signedinteger):
        samples = samples.astype(np.float32) / float(-np.iinfo(samples.dtype).min)
    elif not np.issubdtype(samples.dtype, np.floating):
        raise AudioError(f"samples have type {samples.dtype}; expected floats or signed integers.")
    if samples.ndim == 2:
        samples = samples.mean(0 if samples.shape[0] <= samples.shape[1] else 1)
    return np.ascontiguousarray(samples, dtype=np.float32).reshape(-1)


def check_samples(wave: np.ndarray, name: str = "the recording") -> None:
    """Raises AudioError when a sample is NaN or infinite."""
    bad = len(wave) - int(np.isfinite(wave).sum())
    if bad:
        raise AudioError(f"{name}: {bad} of {len(wave)} samples are NaN or infinite.")


def resample(wave: np.ndarray, rate: int, target_rate: int) -> np.ndarray:
    """Resamples mono fp32 [S]; the result has ceil(S * target_rate / rate) samples."""
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"sample rate {rate} Hz is not between {MIN_RATE} and {MAX_RATE}.")
    if rate == target_rate:
        return wave
    # The streaming resampler, so that a stream gives the same samples.
    out = soxr.ResampleStream(rate, target_rate, 1).resample_chunk(wave, last=True)
    goal = -(-len(wave) * target_rate // rate)
    return np.pad(out, (0, max(0, goal - len(out))))[:goal]


def write_wav(path: str | Path, wave: np.ndarray | torch.Tensor, sample_rate: int) -> None:
    """Writes mono 16-bit WAV; the file appears whole or not at all."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    try:
        soundfile.write(aside, np.clip(to_mono(wave), -1.0, 1.0), sample_rate, format="WAV", subtype="PCM_16")
        os.replace(aside, path)
    except (OSError, soundfile.LibsndfileError) as error:
        raise AudioError(f"{path}: cannot be written ({error}).") from None
    finally:
        aside.unlink(missing_ok=True)


def _open(source: str | Path | bytes | BinaryIO) -> tuple[str, BinaryIO]:
    if isinstance(source, bytes):
        name, data = "audio", source
    elif source == "-":
        name, data = "standard input", sys.stdin.buffer.read()
    elif isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            raise AudioError(f"{path}: is a directory, not a sound file.")
        try:
            if path.is_file() and path.stat().st_size == 0:
                raise AudioError(f"{path}: the file is empty.")
            return str(path), path.open("rb")
        except FileNotFoundError:
            raise AudioError(f"{path}: no such file.") from None
        except OSError as error:
            raise AudioError(f"{path}: cannot be opened ({error.strerror}).") from None
    else:
        return getattr(source, "name", "audio"), source
    if not data:
        raise AudioError(f"{name}: empty.")
    return name, io.BytesIO(data)
