"""Transcription in the engine: pieces of a recording are rows of the running batch, and their text comes in order.

    wave ─► pieces cut at silences ─► codes + features ─► rows, a few at a time ─► text of piece 0, 1, 2 ...
                                                              └─ ran away ─► heard again in halves

The result is that of `KimiMM.transcribe` with one beam: words that were sent cannot be taken back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import numpy as np
import torch

from kimi_mm.audio.segment import split_at_silence
from kimi_mm.audio.tokens import AudioTokens
from kimi_mm.generation import TextSampling
from kimi_mm.pipeline import SAMPLE_RATE, second_hearing, transcription_budget
from kimi_mm.processing import AudioClip
from kimi_mm.serving.batch import Prompt, Row
from kimi_mm.serving.engine import Engine
from kimi_mm.text.tokenizer import TextPieces
from kimi_mm.types import Segment, Transcript

PIECES_AT_ONCE = 4  # of one recording, so that a long one leaves room for others


async def transcribe(engine: Engine, wave: np.ndarray, seconds: float) -> Transcript:
    """Writes down a recording of any length.

    Args:
        wave: mono 16 kHz fp32 [S].
        seconds: its length, for the result.
    """
    pieces = split_at_silence(wave)
    turns = asyncio.Semaphore(PIECES_AT_ONCE)

    async def one(start: int, end: int) -> str:
        async with turns:
            return await _hear(engine, wave[start:end])

    tasks = [asyncio.create_task(one(*piece)) for piece in pieces]
    try:
        texts = await asyncio.gather(*tasks)
    finally:
        await _stop(tasks)
    return _transcript(pieces, texts, seconds)


async def transcribe_stream(
    engine: Engine, wave: np.ndarray, seconds: float, tokens: AudioTokens | None = None
) -> AsyncGenerator[str | Segment | Transcript, None]:
    """Yields text as it is recognised, each `Segment` when its text is whole, and at last the `Transcript` of them all.

    What was said cannot be taken back, so a piece that runs away ends where it began to repeat itself.

    Args:
        wave, seconds: as for `transcribe`.
        tokens: of the whole recording, where they are known.
    """
    pieces = split_at_silence(wave)
    known = tokens if pieces == [(0, len(wave))] else None
    texts: list[str] = []
    ahead: list[asyncio.Queue[str | BaseException | None]] = [asyncio.Queue() for _ in pieces]
    turns = asyncio.Semaphore(PIECES_AT_ONCE)

    async def one(number: int) -> None:
        try:
            async with turns, aclosing(_hear_stream(engine, wave[slice(*pieces[number])], known)) as stream:
                async for text in stream:
                    ahead[number].put_nowait(text)
            ahead[number].put_nowait(None)
        except Exception as error:
            ahead[number].put_nowait(error)

    tasks = [asyncio.create_task(one(number)) for number in range(len(pieces))]
    try:
        for piece, queue in zip(pieces, ahead, strict=True):
            text = ""
            while (news := await queue.get()) is not None:
                if isinstance(news, BaseException):
                    raise news
                yield (" " if not text and any(texts) else "") + news
                text += news
            texts.append(text)
            for segment in _transcript([piece], [text], seconds).segments:
                yield segment
    finally:
        await _stop(tasks)
    yield _transcript(pieces, texts, seconds)


async def _stop(tasks: list[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _hear(engine: Engine, wave: np.ndarray, retry: bool = True) -> str:
    row = await _row(engine, wave)
    async with engine.text(row) as ids:
        async for _ in ids:
            pass
    if retry and (halves := second_hearing(wave, row.stop_reason or "")) is not None:
        return " ".join(filter(None, [await _hear(engine, half, retry=False) for half in halves]))
    return engine.model.processor.tokenizer.decode(row.ids)


async def _hear_stream(engine: Engine, wave: np.ndarray, tokens: AudioTokens | None) -> AsyncGenerator[str, None]:
    pieces = TextPieces(engine.model.processor.tokenizer)
    async with engine.text(await _row(engine, wave, tokens)) as ids:
        async for token in ids:
            if text := pieces.push(token):
                yield text


async def _row(engine: Engine, wave: np.ndarray, tokens: AudioTokens | None = None) -> Row:
    def tokenize() -> AudioTokens:
        with torch.inference_mode():
            return engine.model.tokenizer.encode(wave, SAMPLE_RATE)

    kept = tokens is not None  # what is known already may have been read, too
    tokens = tokens or await engine.call(tokenize)
    clip = AudioClip(tokens.codes, tokens.features)
    streams = engine.model.processor.transcription(len(clip.codes))
    sampling = TextSampling(max_tokens=min(256, transcription_budget(wave)))
    return Row(Prompt(streams, [clip]), sampling, kept=kept)


def _transcript(pieces: list[tuple[int, int]], texts: list[str], seconds: float) -> Transcript:
    segments = [
        Segment(start / SAMPLE_RATE, end / SAMPLE_RATE, text)
        for (start, end), text in zip(pieces, texts, strict=True)
        if text
    ]
    return Transcript(" ".join(segment.text for segment in segments), seconds, segments)
