"""The engine: rows that share steps get what they get alone; leaving frees at once; rows wait for room."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import numpy as np
import pytest
import torch

import kimi_mm
from kimi_mm.audio.io import read_audio
from kimi_mm.cli.demo import CLIPS, read_clips
from kimi_mm.errors import UserError
from kimi_mm.generation import TextSampling, generate_text
from kimi_mm.generation_speech import SpeechSampling
from kimi_mm.serving.batch import Prompt, Row
from kimi_mm.serving.engine import Engine, EngineClosed
from kimi_mm.serving.hearing import transcribe, transcribe_stream
from kimi_mm.serving.speaking import answer, spoken_row
from kimi_mm.serving.voices import Voice, speak
from kimi_mm.speech import open_voice
from kimi_mm.types import CodePiece, TextPiece, WavePiece

TEXTS = ["red dogs", "What is in the image?", "a video of 0123", "0", "dogs of a video in the image", "red"]


def prompt(able, text: str) -> Prompt:
    return Prompt(*able.read([{"role": "user", "content": text}]))


@pytest.fixture
def engine(able):
    engine = Engine(able, max_rows=4)
    yield engine
    engine.close()


async def ids_of(engine, row: Row) -> list[int]:
    async with engine.text(row) as ticket:
        return [token async for token in ticket]


def test_rows_get_what_they_get_alone(able, engine):
    budgets = [30, 7, 19, 1, 25, 12]

    async def together() -> list[Row]:
        rows = [
            Row(prompt(able, text), TextSampling(max_tokens=budget))
            for text, budget in zip(TEXTS, budgets, strict=True)
        ]

        async def late(number: int) -> None:
            await asyncio.sleep(0.02 * number)
            assert await ids_of(engine, rows[number]) == rows[number].ids or rows[number].stop_reason == "loop"

        await asyncio.gather(*map(late, range(len(rows))))
        return rows

    for text, budget, row in zip(TEXTS, budgets, asyncio.run(together()), strict=True):
        inputs = able.processor.collate([prompt(able, text).streams], [[]])
        [alone] = generate_text(able.model, inputs, budgets=[budget])
        assert (row.ids, row.stop_reason) == (alone.ids, alone.stop_reason)
    assert engine.running == engine.waiting == engine.batch.held_bytes == 0


def test_clips_heard_together_are_heard_as_alone():
    nano = kimi_mm.load("nano")
    waves = [read_audio(CLIPS / clip["file"]) for clip in sorted(read_clips(), key=lambda clip: clip["seconds"])[:3]]
    alone = [nano.transcribe(wave, beams=1) for wave, _ in waves]
    engine = Engine(nano)

    async def streamed() -> list:
        return [item async for item in transcribe_stream(engine, *waves[0])]

    async def together():
        return await asyncio.gather(*(transcribe(engine, *wave) for wave in waves), streamed())

    *heard, pieces = asyncio.run(together())
    engine.close()
    assert heard == alone
    assert pieces[-1] == alone[0]
    assert [piece for piece in pieces[:-1] if not isinstance(piece, str)] == alone[0].segments
    assert "".join(piece for piece in pieces if isinstance(piece, str)) == alone[0].text
    assert len(pieces) > 4


def test_leaving_frees_at_once(able, engine):
    async def leave() -> None:
        row = Row(prompt(able, "red dogs"), TextSampling(max_tokens=100_000, temperature=5.0))
        async with engine.text(row) as ticket:
            await ticket.__anext__()
            assert engine.running == 1
        end = time.monotonic() + 2
        while engine.running or engine.batch.held_bytes:
            assert time.monotonic() < end
            await asyncio.sleep(0.005)

    asyncio.run(leave())


def test_rows_wait_for_room_and_none_overtakes(able):
    small = Row(prompt(able, "red"), TextSampling(max_tokens=4))
    engine = Engine(able, cache_bytes=0)
    engine.batch.cache_bytes = 2 * engine.batch.bytes_for([small])
    with pytest.raises(UserError, match="more memory"):
        engine.text(Row(prompt(able, "red"), TextSampling(max_tokens=10**7)))

    async def fill() -> int:
        rows = [Row(prompt(able, "red"), TextSampling(max_tokens=4)) for _ in range(9)]
        most = 0

        async def one(row: Row) -> None:
            nonlocal most
            async with engine.text(row) as ticket:
                async for _ in ticket:
                    most = max(most, engine.running)

        await asyncio.gather(*map(one, rows))
        assert all(row.ids == rows[0].ids for row in rows)
        return most

    assert asyncio.run(fill()) <= 2
    engine.close()


def test_errors_reach_their_asker_alone(able, engine):
    broken = prompt(able, "red")
    broken.streams.audio[0] = 10**9

    async def ask() -> tuple[list[int], BaseException]:
        good = Row(prompt(able, "dogs"), TextSampling(max_tokens=6))
        return await asyncio.gather(ids_of(engine, good), ids_of(engine, Row(broken)), return_exceptions=True)  # type: ignore[return-value]

    got, error = asyncio.run(ask())
    assert len(got) == 6
    assert isinstance(error, IndexError)

    async def fail() -> None:
        await engine.call(lambda: 1 // 0)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(fail())


def ask_aloud(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def joined(events: list) -> tuple[str, list[int], np.ndarray]:
    """Text, codes and samples of events."""
    text = "".join(event.text for event in events if isinstance(event, TextPiece))
    codes = [code for event in events if isinstance(event, CodePiece) for code in event.codes]
    return text, codes, np.concatenate([event.wave for event in events if isinstance(event, WavePiece)])


def test_voices_say_together_what_they_say_alone(able, engine):
    sampling = SpeechSampling(max_text_tokens=20, max_audio_codes=33, min_audio_codes=12)

    async def one(number: int) -> list:
        await asyncio.sleep(0.03 * number)
        asked = Prompt(*able.read(ask_aloud(TEXTS[number]), "speech"))
        row = spoken_row(able, asked, sampling, torch.Generator().manual_seed(number))
        async with aclosing(answer(engine, row)) as events:
            return [event async for event in events]

    async def together() -> list:
        written = Row(prompt(able, "red dogs"), TextSampling(max_tokens=60))
        *spoken, ids = await asyncio.gather(*map(one, range(4)), ids_of(engine, written))
        alone = Row(prompt(able, "red dogs"), TextSampling(max_tokens=60))
        assert ids == await ids_of(engine, alone)
        return spoken

    for number, events in enumerate(asyncio.run(together())):
        generator = torch.Generator().manual_seed(number)
        text, codes, wave = joined(list(able.stream(ask_aloud(TEXTS[number]), sampling=sampling, generator=generator)))
        assert joined(events)[:2] == (text, codes)
        assert len(codes) >= 12
        assert np.abs(joined(events)[2] - wave).max() < 1e-4 < 0.01 < np.abs(wave).max()
    assert engine.running == engine.batch.held_bytes == 0


def test_voices_wait_for_each_other_but_not_until_their_listeners_run_dry(able):
    def voice(seed: int) -> Voice:
        return Voice(open_voice(able, torch.Generator().manual_seed(seed)))

    first, second = voice(1), voice(2)
    for code in range(5):
        first.take(code)
    out = speak([first, second])
    assert list(out) == [id(first)]  # whoever begins is heard at once
    first.sent(10 * first.rate)  # and its listener has much to listen to
    for code in range(4):
        first.take(code)
    assert first.due
    assert not first.urgent
    assert not speak([first, second])
    for code in range(5):
        second.take(code)
    assert set(speak([first, second])) == {id(first), id(second)}  # both in one go
    for code in range(4):
        first.take(code)
    assert list(speak([first])) == [id(first)]  # there is nobody else
    for code in range(4):
        first.take(code)
    assert set(speak([first, second], closing=[second])) == {id(second)}  # it ends; the other still has time


def test_closing_refuses_what_is_open(able):
    engine = Engine(able)

    async def ask() -> None:
        async with engine.text(Row(prompt(able, "red"), TextSampling(max_tokens=10_000, temperature=5.0))) as ticket:
            await ticket.__anext__()
            await asyncio.to_thread(engine.close)
            with pytest.raises(EngineClosed):
                async for _ in ticket:
                    pass
        with pytest.raises(EngineClosed):
            await engine.call(lambda: 1)

    asyncio.run(ask())
