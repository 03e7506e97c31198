"""/v1/realtime by the official client: turns, transcripts, answers in text and speech, interruption, items."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import openai
import pytest
import torch

from kimi_mm.audio.io import read_audio, to_mono_16k
from kimi_mm.audio.tokens import AudioTokens
from kimi_mm.cli.demo import CLIPS, read_clips
from kimi_mm.evaluation.wer import word_error_rate
from kimi_mm.generation_speech import SpeechSampling
from kimi_mm.serving.engine import Engine
from kimi_mm.serving.realtime.conversation import MAX_ITEMS, Conversation, Item, Part
from kimi_mm.serving.realtime.ears import TAIL, Began, Ears, Ended, Paused
from kimi_mm.serving.realtime.listener import Listener
from kimi_mm.serving.realtime.wire import ServerVad
from kimi_mm.types import CodePiece, TextPiece, WavePiece

CLIP = max(read_clips(), key=lambda clip: -abs(clip["seconds"] - 4.6))
RATE = 24_000
LONG_ANSWERED = "367 dogs 91"  # the tiny model says 183 codes


def speech(file: str = CLIP["file"]) -> np.ndarray:
    """A recording at the API's rate."""
    return read_audio(CLIPS / file, RATE)[0]


def quiet(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


def pcm(wave: np.ndarray) -> str:
    return base64.b64encode((wave * 32767).astype("<i2").tobytes()).decode()


class Talk:
    """An open session and all events that came."""

    def __init__(self, connection) -> None:
        self.connection = connection
        self.events: list = []

    def until(self, *kinds: str):
        """Receives up to an event of one of these types, and returns it."""
        while True:
            event = self.connection.recv()
            self.events.append(event)
            if event.type in kinds:
                return event
            assert event.type != "error", event

    def say(self, wave: np.ndarray, piece: float = 0.1) -> None:
        """Sends sound in pieces."""
        size = round(piece * RATE)
        for at in range(0, len(wave), size):
            self.connection.input_audio_buffer.append(audio=pcm(wave[at : at + size]))

    def update(self, **session):
        self.connection.session.update(session={"type": "realtime", **session})  # type: ignore[typeddict-item]
        return self.until("session.updated")

    def of(self, kind: str) -> list:
        return [event for event in self.events if event.type == kind]

    def kinds(self) -> list[str]:
        return [event.type for event in self.events]


@contextmanager
def talk(server) -> Iterator[Talk]:
    with server.client().realtime.connect(model=server.model) as connection:
        session = Talk(connection)
        created = session.until("session.created")
        assert created.session.model == server.model
        yield session


def heard_alone(able, wave: np.ndarray):
    """What the tokenizer hears in a turn that is committed whole."""
    ears = Ears(60)
    ears.push((wave * 32767).astype("<i2").tobytes(), None)
    return able.tokenizer.encode(ears.commit())


@pytest.mark.parametrize("piece", [240, 4801, 24_000])
def test_ears_find_turns_however_the_sound_is_cut(piece):
    wave = np.concatenate([quiet(1), speech(), quiet(1.2), speech(), quiet(1)])
    data = (wave * 32767).astype("<i2").tobytes()
    ears, events = Ears(60), []
    for at in range(0, len(data), 2 * piece):
        events += ears.push(data[at : at + 2 * piece], ServerVad(silence_duration_ms=800))
        assert ears.held < 16_000 * (CLIP["seconds"] + 3)
    turns = [event for event in events if not isinstance(event, Paused)]
    assert [type(event) for event in turns] == [Began, Ended] * 2
    assert 0.5 < turns[0].start / 16_000 < 1.5
    for began, ended in zip(turns[::2], turns[1::2], strict=True):
        assert len(ended.wave) / 16_000 == pytest.approx(CLIP["seconds"] + 0.5, abs=0.4)
        # 800 ms of silence ended it, of which it keeps what is in TAIL.
        assert ended.end - began.start - len(ended.wave) == pytest.approx(0.8 * 16_000 - TAIL, abs=512)
        last = events[events.index(ended) - 1]
        assert isinstance(last, Paused)
        assert np.array_equal(last.wave, ended.wave)
    whole = to_mono_16k(wave, RATE)
    begin = turns[0].start
    assert np.abs(turns[1].wave - whole[begin : begin + len(turns[1].wave)]).max() < 0.01
    assert ears.held < 16_000


def test_ears_end_a_turn_that_never_ends_and_ignore_noise():
    noise = np.random.default_rng(0).normal(size=RATE * 3) * 0.1
    ears = Ears(2.0)
    assert not ears.push((noise * 32767).astype("<i2").tobytes(), ServerVad())
    wave = np.concatenate([speech()] * 3)
    events = ears.push((wave * 32767).astype("<i2").tobytes(), ServerVad(silence_duration_ms=5000))
    lengths = [len(event.wave) / 16_000 for event in events if isinstance(event, Ended)]
    assert len(lengths) >= 2
    assert max(lengths) < 2.1


def test_a_long_conversation_holds_only_so_much():
    async def fill() -> Conversation:
        conversation = Conversation(most_codes=25)
        for number in range(MAX_ITEMS + 5):
            tokens = asyncio.get_running_loop().create_future()
            tokens.set_result(AudioTokens(torch.zeros(10, dtype=torch.int64), torch.zeros(10, 4)))
            part = Part("input_audio", text="red" if number % 2 else "", tokens=tokens)
            conversation.add(Item(f"item_{number}", "user", [part]))
        turns = [await item.turn() for item in conversation.items]
        kinds = [turn and turn["content"][0]["type"] for turn in turns]
        assert kinds[-4:] == ["text", None, "audio", "audio"]
        return conversation

    conversation = asyncio.run(fill())
    assert len(conversation.items) == MAX_ITEMS
    assert conversation.items[0].id == "item_5"


@pytest.mark.parametrize("piece", [480, 30_000])
def test_turns_are_tokenized_while_they_are_said(able, piece):
    """However a turn comes in, its tokens are those of the whole."""
    wave = np.concatenate([quiet(0.4), *[speech()] * 2, quiet(1.0)])
    data = (wave * 32767).astype("<i2").tobytes()
    engine = Engine(able)

    async def listen() -> tuple[list[tuple[np.ndarray, AudioTokens]], int]:
        ears, listener, early = Ears(60), None, 0
        paused: list[tuple[np.ndarray, AudioTokens]] = []
        for at in range(0, len(data), 2 * piece):
            for event in ears.push(data[at : at + 2 * piece], ServerVad(silence_duration_ms=800)):
                if isinstance(event, Began):
                    listener = Listener(engine, asyncio.ensure_future)
                    continue
                assert listener is not None
                if isinstance(event, Paused):  # what is heard of a turn that goes on changes nothing
                    paused.append((event.wave, await listener.end(event.wave)))
                else:
                    early = len(listener.pieces)
                    return [*paused, (event.wave, await listener.end(event.wave))], early
            if listener is not None:
                listener.feed(ears.so_far)
        raise AssertionError("the turn did not end")

    turns, early = asyncio.run(listen())
    engine.close()
    for turn, tokens in turns:
        whole = able.tokenizer.encode(turn)
        assert torch.equal(tokens.codes, whole.codes)
        assert torch.equal(tokens.features, whole.features)
    assert len(turns) > 1
    assert early > 4


def test_a_turn_is_heard_and_answered_in_writing(hearing):
    with talk(hearing) as session:
        session.update(audio={"input": {"transcription": {"model": "ears"}}})
        session.say(np.concatenate([quiet(0.5), speech(), quiet(1.0)]))
        done = session.until("response.done").response
        if not session.of("conversation.item.input_audio_transcription.completed"):
            session.until("conversation.item.input_audio_transcription.completed")
    [started], [stopped] = (session.of(f"input_audio_buffer.speech_{what}") for what in ("started", "stopped"))
    [committed] = session.of("input_audio_buffer.committed")
    [transcript] = session.of("conversation.item.input_audio_transcription.completed")
    assert started.item_id == stopped.item_id == committed.item_id == transcript.item_id
    assert 100 < started.audio_start_ms < 1000 < stopped.audio_end_ms
    assert word_error_rate([CLIP["text"]], [transcript.transcript]).rate < 0.35
    deltas = session.of("conversation.item.input_audio_transcription.delta")
    assert "".join(event.delta for event in deltas) == transcript.transcript
    assert len(deltas) > 1
    assert transcript.usage.type == "duration"
    assert (done.status, done.output_modalities) == ("completed", ["text"])
    text = "".join(event.delta for event in session.of("response.output_text.delta"))
    assert text == done.output[0].content[0].text == session.of("response.output_text.done")[0].text
    assert word_error_rate([CLIP["text"]], [text]).rate < 0.35
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens > 10
    kinds = session.kinds()
    order = ["input_audio_buffer.speech_started", "input_audio_buffer.speech_stopped", "input_audio_buffer.committed",
             "conversation.item.added", "response.created", "response.output_item.added", "response.content_part.added",
             "response.output_text.delta", "response.output_text.done", "response.content_part.done",
             "response.output_item.done", "response.done"]  # fmt: skip
    assert sorted(order, key=kinds.index) == order
    assert len({event.event_id for event in session.events}) == len(session.events)


def test_nano_hears_a_turn_and_answers_aloud(nano):
    with talk(nano) as session:
        assert session.events[0].session.output_modalities == ["audio"]
        session.say(np.concatenate([quiet(0.5), speech(), quiet(1.0)]))
        done = session.until("response.done").response
    assert (done.status, done.output_modalities) == ("completed", ["audio"])
    assert done.output[0].content[0].transcript
    sound = b"".join(base64.b64decode(event.delta) for event in session.of("response.output_audio.delta"))
    assert len(sound) > 0.3 * 2 * RATE
    assert np.frombuffer(sound, "<i2").any()


def test_an_answer_is_begun_while_a_pause_lasts(nano):
    wave, steps = np.concatenate([quiet(0.5), speech(), quiet(0.4)]), nano.metrics()["kimi_mm_steps"]
    with talk(nano) as session:
        session.say(wave)
        deadline = time.monotonic() + 60
        while nano.metrics()["kimi_mm_steps"] < steps + 5:  # the detector waits for the rest of the silence
            assert time.monotonic() < deadline
            time.sleep(0.05)
        session.update(audio={"output": {"voice": "marin"}})
        assert not session.of("response.created") + session.of("input_audio_buffer.speech_stopped")
        session.say(quiet(0.5))
        changed = session.until("response.done").response  # begun anew
    with talk(nano) as session:
        session.say(wave)
        time.sleep(2.0)
        session.say(quiet(0.5))
        paused = session.until("response.done").response
    with talk(nano) as session:
        session.say(np.concatenate([wave, quiet(0.5)]))
        at_once = session.until("response.done").response
    assert {done.output[0].content[0].transcript for done in (changed, paused)} == {
        at_once.output[0].content[0].transcript
    }
    assert paused.usage.input_tokens == at_once.usage.input_tokens > 20
    assert nano.metrics()["kimi_mm_rows_running"] == 0
    with talk(nano) as session:  # a pause that ends no turn
        session.update(audio={"input": {"turn_detection": {"type": "server_vad", "silence_duration_ms": 1500}}})
        session.say(wave)
        time.sleep(1.0)
        session.say(np.concatenate([speech(), quiet(2.0)]))
        done = session.until("response.done").response
    assert done.status == "completed"
    assert done.usage.input_tokens > paused.usage.input_tokens + 30
    assert len(session.of("input_audio_buffer.committed")) == 1


def test_speech_of_a_model_without_a_voice_is_refused_and_the_session_goes_on(hearing):
    with talk(hearing) as session:
        assert session.events[0].session.output_modalities == ["text"]
        session.connection.session.update(session={"type": "realtime", "output_modalities": ["audio"]})
        error = session.connection.recv()
        assert (error.type, error.error.type) == ("error", "invalid_request_error")
        assert "does not speak" in error.error.message
        session.update(instructions="")


def test_answers_are_spoken(tiny, able):
    wave = speech()[: RATE * 2]
    with talk(tiny) as session:
        session.update(audio={"input": {"turn_detection": None}}, max_output_tokens=30)
        session.say(wave)
        session.connection.input_audio_buffer.commit()
        session.connection.response.create()
        done = session.until("response.done").response
    sampling = SpeechSampling(max_text_tokens=30, max_audio_codes=30)
    asked = [{"role": "user", "content": [{"type": "audio", "audio": heard_alone(able, wave)}]}]
    events = list(able.stream(asked, sampling=sampling, generator=torch.Generator().manual_seed(0)))
    text = "".join(event.text for event in events if isinstance(event, TextPiece))
    said = np.concatenate([event.wave for event in events if isinstance(event, WavePiece)])
    assert done.output[0].content[0].transcript == text
    assert "".join(event.delta for event in session.of("response.output_audio_transcript.delta")) == text
    sound = b"".join(base64.b64decode(event.delta) for event in session.of("response.output_audio.delta"))
    assert np.abs(np.frombuffer(sound, "<i2") / 32767 - said).max() < 1e-3
    assert done.usage.output_token_details.audio_tokens == sum(
        len(event.codes) for event in events if isinstance(event, CodePiece)
    )
    assert [kind for kind in session.kinds() if kind.endswith(".done")] == [
        "conversation.item.done", "response.output_audio.done", "response.output_audio_transcript.done",
        "response.content_part.done", "response.output_item.done", "conversation.item.done", "response.done",
    ]  # fmt: skip


def test_speech_interrupts_the_answer_at_once(tiny):
    with talk(tiny) as session:
        session.connection.conversation.item.create(
            item={"type": "message", "role": "user", "content": [{"type": "input_text", "text": LONG_ANSWERED}]}
        )
        session.connection.response.create(response={"conversation": "auto"})
        session.until("response.output_audio.delta")
        session.say(speech(), piece=2.0)
        done = session.until("response.done").response
        assert (done.status, done.status_details.reason) == ("cancelled", "turn_detected")
        assert done.output[0].status == "incomplete"
        started = session.kinds().index("input_audio_buffer.speech_started")
        assert "response.output_audio.delta" not in session.kinds()[started:]
        spoken = session.of("response.output_audio.delta")
        # The listener had heard a tenth of a second of it.
        session.connection.conversation.item.truncate(item_id=done.output[0].id, content_index=0, audio_end_ms=100)
        session.until("conversation.item.truncated")
        session.connection.conversation.item.retrieve(item_id=done.output[0].id)
        kept = session.until("conversation.item.retrieved").item
        assert len(kept.content[0].transcript) < len(done.output[0].content[0].transcript or " ")
        assert spoken
        session.say(quiet(1.0))
        assert session.until("response.created").response.id != done.id
        session.connection.response.cancel()
        assert session.until("response.done").response.status_details.reason == "client_cancelled"
    tiny.wait_until("kimi_mm_sessions", 0)
    tiny.wait_until("kimi_mm_rows_running", 0)
    tiny.wait_until("kimi_mm_cache_bytes", 0)


def test_items_make_the_conversation(tiny, able):
    def text_item(role: str, text: str, **more):
        kind = "output_text" if role == "assistant" else "input_text"
        return {"type": "message", "role": role, "content": [{"type": kind, "text": text}], **more}

    with talk(tiny) as session:
        session.update(output_modalities=["text"], max_output_tokens=12)
        create = session.connection.conversation.item.create
        create(item=text_item("user", "What is in the image?", id="one"))
        create(item=text_item("user", "red dogs", id="three"))
        create(item=text_item("assistant", "dogs", id="two"), previous_item_id="one")
        create(item=text_item("system", "red", id="zero"), previous_item_id="root")
        create(item=text_item("user", "a video", id="four"))
        session.connection.conversation.item.delete(item_id="four")
        session.until("conversation.item.deleted")
        befores = [(event.item.id, event.previous_item_id) for event in session.of("conversation.item.added")]
        assert befores == [("one", None), ("three", "one"), ("two", "one"), ("zero", None), ("four", "three")]
        session.connection.response.create()
        done = session.until("response.done").response
        turns = [
            {"role": "system", "content": "red"},
            {"role": "user", "content": "What is in the image?"},
            {"role": "assistant", "content": "dogs"},
            {"role": "user", "content": "red dogs"},
        ]
        assert done.output[0].content[0].text == "".join(able.reply(turns, max_tokens=12))
        assert (done.status, done.status_details.reason) == ("incomplete", "max_output_tokens")
        # Aside of the conversation, with an input of its own.
        items = [{"type": "item_reference", "id": "one"}]
        session.connection.response.create(response={"conversation": "none", "input": items, "metadata": {"a": "b"}})
        aside = session.until("response.done").response
        assert aside.output[0].content[0].text == "".join(able.reply(turns[1:2], max_tokens=12))
        assert (aside.conversation_id, aside.metadata) == (None, {"a": "b"})
        session.connection.conversation.item.delete(item_id=aside.output[0].id)
        error = session.connection.recv()
        assert (error.type, error.error.code) == ("error", "item_not_found")


def test_a_session_of_transcription(nano):
    with nano.client().realtime.connect(model="nano") as connection:
        session = Talk(connection)
        connection.session.update(session={"type": "transcription"})
        assert session.until("session.updated").session.type == "transcription"
        session.say(np.concatenate([speech(), quiet(1.0)]))
        text = session.until("conversation.item.input_audio_transcription.completed").transcript
        assert word_error_rate([CLIP["text"]], [text]).rate < 0.35
        assert not session.of("response.created")


def test_who_may_connect(tiny):
    refused = openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(Exception, match="401"), refused.realtime.connect(model="able"):
        pass
    with pytest.raises(Exception, match="404"), tiny.client().realtime.connect(model="other"):
        pass


def test_an_answer_that_is_cancelled_at_once_still_ends(tiny):
    with talk(tiny) as session:
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": LONG_ANSWERED}]}
        session.connection.conversation.item.create(item=item)  # type: ignore[arg-type]
        for _ in range(5):
            session.connection.response.create()
            session.connection.response.cancel()
            assert session.until("response.done").response.status == "cancelled"
    tiny.wait_until("kimi_mm_rows_running", 0)
