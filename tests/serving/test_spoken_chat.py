"""Chats answered in text and speech, by the official client: forms, streams, earlier answers by id, bad input."""

from __future__ import annotations

import base64
import io
import time

import numpy as np
import openai
import pytest
import soundfile
import torch

from kimi_mm.generation_speech import SpeechSampling
from kimi_mm.serving.problems import ApiError
from kimi_mm.serving.spoken_store import SpokenStore
from kimi_mm.types import CodePiece, TextPiece, WavePiece
from tests.serving.test_chat import TONE, sound, user

ASKED = user({"type": "text", "text": "red dogs"})
LIMIT = 40


def ask(server, messages, form: str = "wav", **options):
    return server.client().chat.completions.create(
        model=server.model, messages=messages, modalities=["text", "audio"], audio={"voice": "alloy", "format": form},
        max_tokens=LIMIT, **options,
    )  # fmt: skip


def told(able, messages) -> tuple[str, list[int], np.ndarray]:
    """Text, codes and samples of the model's own answer."""
    sampling = SpeechSampling(max_text_tokens=LIMIT, max_audio_codes=LIMIT)
    events = list(able.stream(messages, sampling=sampling, generator=torch.Generator().manual_seed(0)))
    codes = [code for event in events if isinstance(event, CodePiece) for code in event.codes]
    text = "".join(event.text for event in events if isinstance(event, TextPiece))
    return text, codes, np.concatenate([event.wave for event in events if isinstance(event, WavePiece)])


def pcm(audio) -> np.ndarray:
    return np.frombuffer(base64.b64decode(audio), "<i2")


@pytest.fixture(scope="module")
def said(able) -> tuple[str, list[int], np.ndarray]:
    text, codes, wave = told(able, ASKED)
    assert text
    assert len(codes) > 5
    return text, codes, wave


def test_answers_hold_what_the_model_says(tiny, able, said):
    text, codes, wave = said
    answer = ask(tiny, ASKED)
    [choice] = answer.choices
    audio = choice.message.audio
    assert (choice.message.content, audio.transcript) == (None, text)
    found, rate = soundfile.read(io.BytesIO(base64.b64decode(audio.data)))
    assert rate == able.detokenizer.sample_rate
    assert found.shape == wave.shape
    assert np.abs(found - wave).max() < 1e-3
    assert 0 < audio.expires_at - time.time() < 7200
    assert answer.usage.completion_tokens_details.audio_tokens == len(codes)
    assert answer.usage.prompt_tokens == len(able.read(ASKED, "speech")[0])
    assert choice.finish_reason in ("stop", "length")


@pytest.mark.parametrize("form", ["flac", "mp3", "opus", "pcm16"])
def test_forms(tiny, said, form):
    data = base64.b64decode(ask(tiny, ASKED, form).choices[0].message.audio.data)
    if form == "pcm16":
        assert np.abs(np.frombuffer(data, "<i2") / 32767 - said[2]).max() < 1e-3
        return
    wave, rate = soundfile.read(io.BytesIO(data))
    assert rate == 24_000
    assert abs(len(wave) - len(said[2])) < 0.1 * rate


def test_streams_say_the_same(tiny, said):
    chunks = list(ask(tiny, ASKED, "pcm16", stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    parts = [chunk.choices[0].delta.audio for chunk in chunks[:-2]]
    assert len({part.id for part in parts}) == 1
    assert "".join(part.transcript or "" for part in parts) == said[0]
    waves = [pcm(part.data) for part in parts if part.data]
    assert len(waves) > 1
    assert np.abs(np.concatenate(waves) / 32767 - said[2]).max() < 1e-3
    assert parts[-1].expires_at > time.time()
    assert (parts[-1].data, parts[-1].transcript) == (None, None)
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage.completion_tokens_details.audio_tokens == len(said[1])


def test_recordings_are_answered_aloud(tiny, able):
    audio = ask(tiny, user(sound())).choices[0].message.audio
    text, _, wave = told(able, user({"type": "audio", "audio": TONE}))
    assert audio.transcript == text
    assert len(base64.b64decode(audio.data)) == 44 + 2 * len(wave)


def test_an_earlier_answer_is_named_by_its_id(tiny, able, said):
    first = ask(tiny, ASKED).choices[0].message
    again = [{"role": "user", "content": "What is in the image?"}]
    named = ask(tiny, [*ASKED, {"role": "assistant", "audio": {"id": first.audio.id}}, *again])
    parts = [{"type": "text", "text": said[0]}, {"type": "audio", "codes": said[1]}]
    text, codes, _ = told(able, [*ASKED, {"role": "assistant", "content": parts}, *again])
    assert named.choices[0].message.audio.transcript == text
    assert named.usage.completion_tokens_details.audio_tokens == len(codes)
    # And in a chat that is answered in writing.
    written = tiny.client().chat.completions.create(
        model=tiny.model, messages=[*ASKED, {"role": "assistant", "audio": {"id": first.audio.id}}, *again]
    )
    assert written.usage.prompt_tokens == named.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="not known"):
        ask(tiny, [*ASKED, {"role": "assistant", "audio": {"id": "audio_0"}}, *again])


def test_the_store_is_bounded_and_forgets():
    store = SpokenStore(limit=3, seconds=1000)
    names = [store.new_id() for _ in range(5)]
    for number, name in enumerate(names):
        store.keep(name, str(number), [number])
    assert [store.get(name).text for name in names[2:]] == ["2", "3", "4"]
    for name in names[:2]:
        with pytest.raises(ApiError, match="not known"):
            store.get(name)
    gone = SpokenStore(seconds=-1)
    gone.keep("a", "", [])
    with pytest.raises(ApiError, match="not known"):
        gone.get("a")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"audio": None}, "which format"),
        ({"audio": {"voice": "alloy", "format": "aac"}}, "format"),
        ({"audio": {"voice": "alloy", "format": "wav"}, "stream": True}, "pcm16"),
        ({"stop": "red"}, "ends by itself"),
        ({"messages": [{"role": "user", "audio": {"id": "a"}}]}, "belongs into a message of the assistant"),
        ({"messages": [{"role": "user"}]}, "needs 'content'"),
    ],
)
def test_bad_requests(tiny, options, words):
    audio = {"voice": "alloy", "format": "pcm16"}
    request = {"model": tiny.model, "messages": ASKED, "modalities": ["text", "audio"], "audio": audio, **options}
    with pytest.raises(openai.BadRequestError, match=words):
        tiny.client().chat.completions.create(**request)


def test_leaving_frees_at_once(tiny):
    options = {"model": tiny.model, "messages": ASKED, "modalities": ["text", "audio"], "stream": True}
    audio = {"voice": "alloy", "format": "pcm16"}
    stream = tiny.client().chat.completions.create(**options, audio=audio, temperature=2.0, max_tokens=1500)
    next(iter(stream))
    stream.close()
    tiny.wait_until("kimi_mm_rows_running", 0)
    tiny.wait_until("kimi_mm_requests_active", 0)
    tiny.wait_until("kimi_mm_cache_bytes", 0)
