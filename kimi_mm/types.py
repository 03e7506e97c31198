"""Plain results that cross module borders."""

from __future__ import annotations

from dataclasses import dataclass, field


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
