"""The engine: rows that share steps get what they get alone; leaving frees at once; rows wait for room."""

from __future__ import annotations

import asyncio
import time

import pytest

import kimi_mm
from kimi_mm.audio.io import read_audio
from kimi_mm.cli.demo import CLIPS, read_clips
from kimi_mm.errors import UserError
from kimi_mm.generation import TextSampling, generate_text
from kimi_mm.serving.batch import Prompt, Row
from kimi_mm.serving.engine import Engine, EngineClosed
from kimi_mm.serving.hearing import transcribe, transcribe_stream

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
    alone = [nano.transcribe(wave) for wave, _ in waves]
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


def test_iterators_take_turns_with_rows_and_wait_for_slow_readers(able, engine):
    made = []

    def numbers():
        for number in range(1000):
            made.append(number)
            yield number

    async def read() -> list[int]:
        async with engine.iterate(numbers) as ticket:
            first = await ticket.__anext__()
            assert len(await ids_of(engine, Row(prompt(able, "dogs"), TextSampling(max_tokens=8)))) == 8
            await asyncio.sleep(0.1)
            assert len(made) < 100
            return [first, *[number async for number in ticket]]

    assert asyncio.run(read()) == list(range(1000))


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
