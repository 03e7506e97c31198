"""A transcript as text, JSON, SubRip (SRT) or WebVTT."""

from __future__ import annotations

import enum
import json

from kimi_mm.types import Segment, Transcript


class TranscriptFormat(str, enum.Enum):
    """Names of the formats of `kimi-mm transcribe`."""

    text = "text"
    json = "json"
    srt = "srt"
    vtt = "vtt"


SUFFIXES = {
    TranscriptFormat.text: ".txt",
    TranscriptFormat.json: ".json",
    TranscriptFormat.srt: ".srt",
    TranscriptFormat.vtt: ".vtt",
}


def render(transcript: Transcript, how: TranscriptFormat, name: str, model: str, label: bool = False) -> str:
    """Writes a transcript out.

    Args:
        transcript: what `KimiMM.transcribe` returned.
        how: the format.
        name: the recording, as given on the command line.
        model: the model that was used.
        label: in text form, whether the line starts with the recording's name.

    Returns:
        Text that ends in a newline.
    """
    if how is TranscriptFormat.json:
        return to_json(transcript, name, model)
    if how is TranscriptFormat.srt:
        return to_srt(transcript)
    if how is TranscriptFormat.vtt:
        return to_vtt(transcript)
    return f"{name}: {transcript.text}\n" if label else f"{transcript.text}\n"


def to_json(transcript: Transcript, name: str, model: str) -> str:
    """Returns one line of JSON: file, model, duration and segment times in seconds, text; see docs/cli.md."""
    return (
        json.dumps(
            {
                "file": name,
                "model": model,
                "duration": round(transcript.duration, 3),
                "text": transcript.text,
                "segments": [
                    {"start": round(s.start, 3), "end": round(s.end, 3), "text": s.text} for s in transcript.segments
                ],
            },
            ensure_ascii=False,
        )
        + "\n"
    )


def to_srt(transcript: Transcript) -> str:
    """Returns SubRip cues, numbered from 1, with times as HH:MM:SS,mmm."""
    cues = [
        f"{index}\n{timestamp(cue.start, ',')} --> {timestamp(cue.end, ',')}\n{cue.text}\n"
        for index, cue in enumerate(_cues(transcript), start=1)
    ]
    return "\n".join(cues)


def to_vtt(transcript: Transcript) -> str:
    """Returns a WebVTT file with times as HH:MM:SS.mmm; '&', '<' and '>' of the text are escaped."""
    cues = [
        f"{timestamp(cue.start, '.')} --> {timestamp(cue.end, '.')}\n{_escape(cue.text)}\n" for cue in _cues(transcript)
    ]
    return "\n".join(["WEBVTT\n", *cues])


def timestamp(seconds: float, point: str) -> str:
    """Returns HH:MM:SS, `point`, and milliseconds; hours grow beyond two digits when they must."""
    milliseconds = max(round(seconds * 1000), 0)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{milliseconds // 1000:02d}{point}{milliseconds % 1000:03d}"


def _cues(transcript: Transcript) -> list[Segment]:
    cleaned = (Segment(s.start, max(s.end, s.start + 0.001), " ".join(s.text.split())) for s in transcript.segments)
    return [cue for cue in cleaned if cue.text]


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
