"""Samples as bytes: raw 16 bits, WAV that may go on for ever, and whole files.

A WAV header names a length, which a stream does not know yet: it holds the largest there is, as players expect then.
"""

from __future__ import annotations

import enum
import io
import struct

import numpy as np
import soundfile


class SpeechFormat(str, enum.Enum):
    """Forms of speech; pcm (in chats and sessions: pcm16) is 16 bits, little-endian, mono, at the model's rate."""

    wav = "wav"
    pcm = "pcm"
    pcm16 = "pcm16"
    flac = "flac"
    mp3 = "mp3"
    opus = "opus"


_CODED = {SpeechFormat.flac: ("FLAC", "PCM_16"), SpeechFormat.mp3: ("MP3", None), SpeechFormat.opus: ("OGG", "OPUS")}


def pcm16(wave: np.ndarray) -> bytes:
    """Returns samples [S] in [-1, 1] as 16-bit little-endian bytes."""
    return (wave * 32767).round().astype("<i2").tobytes()


def wav_head(rate: int, data_bytes: int | None = None) -> bytes:
    """Returns the header of a 16-bit mono WAV; None: of unknown length."""
    data = 2**32 - 37 if data_bytes is None else data_bytes
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", data + 36, b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", data
    )


def encode(wave: np.ndarray, rate: int, form: SpeechFormat) -> bytes:
    """Returns samples [S] in [-1, 1] as a file."""
    data = pcm16(wave)
    if form in (SpeechFormat.pcm, SpeechFormat.pcm16):
        return data
    if form is SpeechFormat.wav:
        return wav_head(rate, len(data)) + data
    container, subtype = _CODED[form]
    file = io.BytesIO()
    soundfile.write(file, np.frombuffer(data, "<i2"), rate, format=container, subtype=subtype)
    return file.getvalue()
