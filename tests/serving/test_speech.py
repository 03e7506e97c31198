"""/v1/audio/speech by the official client: forms, speech that begins before it is whole, leaving, bad input."""

from __future__ import annotations

import io

import numpy as np
import openai
import pytest
import soundfile

from kimi_mm.serving.sounds import pcm16

TEXT = "red dogs"


@pytest.fixture(scope="module")
def spoken(able) -> np.ndarray:
    return np.frombuffer(pcm16(able.speak(TEXT)), "<i2")


def say(server, form: str, text: str = TEXT, **options) -> bytes:
    return server.client().audio.speech.create(
        model=server.model, voice="alloy", input=text, response_format=form, **options
    ).read()  # fmt: skip


def test_forms_hold_what_the_model_says(tiny, able, spoken):
    rate = able.detokenizer.sample_rate
    pcm = np.frombuffer(say(tiny, "pcm"), "<i2")
    assert abs(spoken).max() > 0
    assert len(pcm) == len(spoken)
    assert abs(pcm.astype(int) - spoken).max() <= 2
    for form in ("wav", "flac"):
        wave, found = soundfile.read(io.BytesIO(say(tiny, form)), dtype="int16")
        assert (found, wave.ndim) == (rate, 1)
        assert np.array_equal(wave, pcm)
    for form in ("mp3", "opus"):
        wave, found = soundfile.read(io.BytesIO(say(tiny, form)))
        assert found == rate
        assert abs(len(wave) - len(pcm)) < 0.1 * rate


def test_it_comes_as_it_is_made_and_leaving_stops_it(tiny):
    long = "What is in the image? " * 180
    with tiny.client().audio.speech.with_streaming_response.create(
        model=tiny.model, voice="alloy", input=long, response_format="pcm"
    ) as answer:
        pieces = answer.iter_bytes()
        assert len(next(pieces)) > 0
        assert tiny.metrics()["kimi_mm_requests_active"] == 1
    tiny.wait_until("kimi_mm_rows_running", 0)
    tiny.wait_until("kimi_mm_requests_active", 0)


@pytest.mark.parametrize(
    ("form", "text", "options", "words"),
    [
        ("aac", TEXT, {}, "response_format"),
        ("wav", "", {}, "input"),
        ("wav", "a" * 5000, {}, "input"),
        ("wav", "...", {}, "spoken"),
        ("wav", TEXT, {"speed": 2.0}, "speed"),
        ("wav", TEXT, {"instructions": "whisper"}, "instructions"),
    ],
)
def test_bad_requests(tiny, form, text, options, words):
    with pytest.raises(openai.BadRequestError, match=words):
        say(tiny, form, text, **options)


def test_a_model_without_a_voice_says_so(hearing):
    with pytest.raises(openai.BadRequestError, match="does not speak"):
        say(hearing, "wav")
