"""A turn of the user, tokenized while it is still being said.

    ears ─► feed(the turn so far), again and again ─► stream of the tokenizer, on the engine's thread ─► tokens
            end(the whole turn) ─► what is left is less than a block ─► a copy of the stream ─┘

The tokens are those of the whole turn (`kimi_mm.audio.streaming`); when the user falls silent, most of them are there.
A turn that did not end after all goes on: its end was heard by a copy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np
import torch

from kimi_mm.audio.tokenizer import AudioTokenizer
from kimi_mm.audio.tokens import AudioTokens, join
from kimi_mm.pipeline import SAMPLE_RATE
from kimi_mm.serving.engine import Engine

PIECE = SAMPLE_RATE // 2  # samples that are worth a call

Start = Callable[[Coroutine[Any, Any, AudioTokens]], "asyncio.Task[AudioTokens]"]


class Listener:
    """One turn on its way in.

    Args:
        engine: on whose thread the tokenizer runs.
        start: makes tasks of work, and ends them with the session.
    """

    def __init__(self, engine: Engine, start: Start) -> None:
        self.engine, self.start = engine, start
        self.tokenizer: AudioTokenizer = engine.model.tokenizer
        self._stream = self.tokenizer.stream() if self.tokenizer.streams else None
        self._fed = 0  # samples
        self.pieces: list[asyncio.Task[AudioTokens]] = []

    def feed(self, wave: np.ndarray) -> None:
        """Takes the turn so far, [S] at 16 kHz, from its beginning."""
        if self._stream is not None and len(wave) - self._fed >= PIECE:
            self.pieces.append(self._call(self._stream.push, wave[self._fed :].copy()))
            self._fed = len(wave)

    def end(self, wave: np.ndarray) -> asyncio.Task[AudioTokens]:
        """Takes the whole turn and returns its tokens to come; it can still go on."""
        if (stream := self._stream) is None:
            return self._call(self.tokenizer.encode, wave)

        def last(rest: np.ndarray) -> AudioTokens:
            twin = stream.clone()
            return join([*([twin.push(rest)] if len(rest) else []), twin.flush()])

        return self.start(_joined([*self.pieces, self._call(last, wave[self._fed :].copy())]))

    def _call(self, work: Callable[[np.ndarray], AudioTokens], samples: np.ndarray) -> asyncio.Task[AudioTokens]:
        def tokenize() -> AudioTokens:
            with torch.inference_mode():
                return work(samples)

        # Calls are answered in the order in which they were made.
        return self.start(self.engine.call(tokenize))


async def _joined(pieces: Sequence[asyncio.Task[AudioTokens]]) -> AudioTokens:
    return join([await piece for piece in pieces])
