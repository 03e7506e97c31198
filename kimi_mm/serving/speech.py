"""POST /v1/audio/speech, as OpenAI's: a text spoken, sent as it is made.

    text ─► sentences ─► iterator in the engine ─► 24 kHz samples ─► wav, pcm: each piece at once; flac: when whole

A WAV header names a length, which is not known yet: it holds the largest there is, as players expect of a stream.
"""

from __future__ import annotations

import enum
import io
import struct

import numpy as np
import soundfile
from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from kimi_mm.serving.answers import Emit
from kimi_mm.serving.chat_request import Words
from kimi_mm.serving.described import answers, sounds
from kimi_mm.serving.problems import ApiError
from kimi_mm.serving.service import Service
from kimi_mm.types import WavePiece

MAX_LETTERS = 4096  # as OpenAI's


class SpeechFormat(str, enum.Enum):
    """Forms of speech; pcm is 16 bits, little-endian, mono, at the model's rate."""

    wav = "wav"
    pcm = "pcm"
    flac = "flac"


class SpeechRequest(BaseModel):
    """The body of /v1/audio/speech; the model has one voice, so any name of one is taken."""

    model: Words
    input: Words = Field(min_length=1, max_length=MAX_LETTERS)
    voice: Words | None = None
    response_format: SpeechFormat = Field(SpeechFormat.wav, description="OpenAI's default, mp3, is not made here.")
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
        responses=answers("The speech, as it is made.", None, sounds("audio/wav", "audio/pcm", "audio/flac")),
    )
    async def speech(body: SpeechRequest) -> Response:
        service.check_model(body.model)
        if body.speed not in (None, 1.0):
            raise ApiError(400, "speed: the voice has one speed; leave it out.", param="speed")
        if body.instructions:
            raise ApiError(400, "instructions: the voice takes none; leave them out.", param="instructions")
        if body.stream_format not in (None, "audio"):
            raise ApiError(400, "stream_format: must be 'audio'.", param="stream_format")
        rate = service.model.detokenizer.sample_rate  # raises the sentence of a model without a voice
        form = body.response_format

        async def say(emit: Emit) -> None:
            waves: list[np.ndarray] = []
            async with service.engine.iterate(lambda: service.model.speak_stream(body.input)) as events:
                async for event in events:
                    if not isinstance(event, WavePiece):
                        continue
                    if form is SpeechFormat.flac:
                        waves.append(event.wave)
                        continue
                    head = wav_head(rate) if form is SpeechFormat.wav and not waves else b""
                    waves = waves or [event.wave]
                    await emit(head + pcm16(event.wave))
            if form is SpeechFormat.flac:
                await emit(_flac(np.concatenate(waves), rate))

        kinds = {"wav": "audio/wav", "pcm": f"audio/pcm;rate={rate}", "flac": "audio/flac"}
        return service.answers.stream(say, kinds[form.value])

    return router


def pcm16(wave: np.ndarray) -> bytes:
    """Returns samples [S] in [-1, 1] as 16-bit little-endian bytes."""
    return (wave * 32767).round().astype("<i2").tobytes()


def wav_head(rate: int) -> bytes:
    """Returns the header of a 16-bit mono WAV of unknown length."""
    most = 2**32 - 1
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", most, b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", most - 36
    )


def _flac(wave: np.ndarray, rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.frombuffer(pcm16(wave), "<i2"), rate, format="FLAC")
    return file.getvalue()
