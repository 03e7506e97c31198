"""POST /v1/audio/speech, as OpenAI's: a text spoken, sent as it is made.

text ─► sentences ─► rows of the running batch ─► 24 kHz samples ─► wav, pcm: each piece at once; others: when whole
"""

from __future__ import annotations

from contextlib import aclosing
from typing import Literal

import anyio.to_thread
import numpy as np
from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from kimi_mm.serving.answers import Emit
from kimi_mm.serving.chat_request import Words
from kimi_mm.serving.described import answers, sounds
from kimi_mm.serving.problems import ApiError
from kimi_mm.serving.service import Service
from kimi_mm.serving.sounds import SpeechFormat, encode, pcm16, wav_head
from kimi_mm.serving.speaking import check_voice, read_out

MAX_LETTERS = 4096  # as OpenAI's
MEDIA_TYPES = {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg", "opus": "audio/ogg"}


class SpeechRequest(BaseModel):
    """The body of /v1/audio/speech; the model has one voice, so any name of one is taken."""

    model: Words
    input: Words = Field(min_length=1, max_length=MAX_LETTERS)
    voice: Words | None = None
    response_format: Literal["wav", "pcm", "flac", "mp3", "opus"] = "wav"
    speed: float | None = None
    instructions: Words | None = None
    stream_format: Words | None = None


def routes(service: Service) -> APIRouter:
    """Returns the route over a service."""
    router = APIRouter(tags=["audio"])

    @router.post(
        "/v1/audio/speech",
        summary="Speak a text",
        response_class=Response,
        responses=answers("The speech, as it is made.", None, sounds("audio/pcm", *MEDIA_TYPES.values())),
    )
    async def speech(body: SpeechRequest) -> Response:
        service.check_model(body.model)
        if body.speed not in (None, 1.0):
            raise ApiError(400, "speed: the voice has one speed; leave it out.", param="speed")
        if body.instructions:
            raise ApiError(400, "instructions: the voice takes none; leave them out.", param="instructions")
        if body.stream_format not in (None, "audio"):
            raise ApiError(400, "stream_format: must be 'audio'.", param="stream_format")
        rate = check_voice(service.model)
        form = SpeechFormat(body.response_format)

        async def as_made(emit: Emit) -> None:
            head = wav_head(rate) if form is SpeechFormat.wav else b""
            async with aclosing(read_out(service.engine, body.input)) as pieces:
                async for piece in pieces:
                    await emit(head + pcm16(piece.wave))
                    head = b""

        async def whole(emit: Emit) -> None:
            async with aclosing(read_out(service.engine, body.input)) as pieces:
                wave = np.concatenate([piece.wave async for piece in pieces])
            await emit(await anyio.to_thread.run_sync(encode, wave, rate, form))

        say = as_made if form in (SpeechFormat.wav, SpeechFormat.pcm) else whole
        return service.answers.stream(say, MEDIA_TYPES.get(form.value, f"audio/pcm;rate={rate}"))

    return router
