"""Subtitle and JSON formats, to the letter."""

from __future__ import annotations

import json

import pytest

from kimi_mm.cli.formats import TranscriptFormat, render, timestamp, to_srt, to_vtt
from kimi_mm.types import Segment, Transcript

TALK = Transcript(
    "Fish & chips. A < B.",
    3_700.5,
    [Segment(0.0, 1.25, "Fish &\n\n chips."), Segment(2.0, 2.0, "  "), Segment(3_661.9996, 3_661.9996, "A < B.")],
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00:00,000"),
        (1.0005, "00:00:01,000"),
        (59.9996, "00:01:00,000"),
        (3_599.9995, "01:00:00,000"),
        (86_400.25, "24:00:00,250"),
        (360_000, "100:00:00,000"),
        (-0.1, "00:00:00,000"),
    ],
)
def test_times(seconds, text):
    assert timestamp(seconds, ",") == text


def test_srt():
    assert to_srt(TALK) == (
        "1\n00:00:00,000 --> 00:00:01,250\nFish & chips.\n\n2\n01:01:02,000 --> 01:01:02,001\nA < B.\n"
    )


def test_vtt():
    assert to_vtt(TALK) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.250\nFish &amp; chips.\n\n01:01:02.000 --> 01:01:02.001\nA &lt; B.\n"
    )


def test_nothing_said():
    nothing = Transcript("", 1.0)
    assert to_srt(nothing) == ""
    assert to_vtt(nothing) == "WEBVTT\n"


def test_json_is_one_line_with_plain_letters():
    line = render(Transcript("naïve", 1.23456, [Segment(0.1, 1.2, "naïve")]), TranscriptFormat.json, "ä.wav", "nano")
    assert line.endswith("}\n")
    assert line.count("\n") == 1
    assert "naïve" in line
    assert json.loads(line) == {
        "file": "ä.wav",
        "model": "nano",
        "duration": 1.235,
        "text": "naïve",
        "segments": [{"start": 0.1, "end": 1.2, "text": "naïve"}],
    }


def test_text_is_labelled_only_when_asked():
    talk = Transcript("yes", 1.0)
    assert render(talk, TranscriptFormat.text, "a.wav", "nano") == "yes\n"
    assert render(talk, TranscriptFormat.text, "a.wav", "nano", label=True) == "a.wav: yes\n"
