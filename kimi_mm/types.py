"""Plain results that cross module borders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording and its text; times in seconds from the start of the recording."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """A transcribed recording: the whole text, its segments in order, and the recording's length in seconds."""

    text: str
    duration: float
    segments: list[Segment] = field(default_factory=list)


@dataclass(frozen=True)
class TextPiece:
    """Text of a reply that became certain."""

    text: str


@dataclass(frozen=True)
class CodePiece:
    """Audio codes of a reply, without offset."""

    codes: tuple[int, ...]


@dataclass(frozen=True)
class WavePiece:
    """Speech that became certain: samples [S] fp32, finite and in [-1, 1], at `sample_rate` Hz."""

    wave: np.ndarray
    sample_rate: int


@dataclass(frozen=True)
class Stopped:
    """The end of a reply: why its text and its speech stopped, see `kimi_mm.generation_speech.SpeechResult`."""

    text: str
    audio: str


Event = TextPiece | CodePiece | WavePiece | Stopped
