"""POST /v1/audio/transcriptions, as OpenAI's: json, text, verbose_json, srt, vtt, or a stream of events.

`language`, `prompt` and `temperature` are taken and change nothing: the models decode greedily and hear what they were
trained on. A stream that is asked for times of segments also has events transcript.text.segment.
"""

from __future__ import annotations

import enum
import json
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Request, Response, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse

from kimi_mm.cli.formats import to_srt, to_vtt
from kimi_mm.serving.answers import Emit, sse
from kimi_mm.serving.described import EVENTS, Transcription, VerboseTranscription, answers, texts
from kimi_mm.serving.hearing import transcribe, transcribe_stream
from kimi_mm.serving.problems import ApiError
from kimi_mm.serving.service import Service
from kimi_mm.types import Segment, Transcript


class ResponseFormat(str, enum.Enum):
    """Forms of a transcript."""

    json = "json"
    text = "text"
    verbose_json = "verbose_json"
    srt = "srt"
    vtt = "vtt"


class Granularity(str, enum.Enum):
    """What times are given for."""

    segment = "segment"
    word = "word"


def routes(service: Service) -> APIRouter:
    """Returns the route over a service."""
    router = APIRouter(tags=["audio"])

    @router.post(
        "/v1/audio/transcriptions",
        summary="Write down what is said in a recording",
        response_class=Response,
        responses=answers(
            "The words, in the form that was asked for.",
            VerboseTranscription | Transcription,
            texts("text/plain", "application/x-subrip", "text/vtt") | EVENTS,
        ),
    )
    async def transcriptions(
        request: Request,
        file: Annotated[UploadFile, File(description="Any format that libsndfile reads.")],
        model: Annotated[str, Form(min_length=1)],
        response_format: Annotated[ResponseFormat, Form()] = ResponseFormat.json,
        stream: Annotated[bool, Form(description="Events transcript.text.delta and .done.")] = False,
        language: Annotated[str | None, Form()] = None,
        prompt: Annotated[str | None, Form()] = None,
        temperature: Annotated[float | None, Form()] = None,
        timestamp_granularities: Annotated[list[Granularity] | None, Form(alias="timestamp_granularities[]")] = None,
    ) -> Response:
        service.check_model(model)
        if timestamp_granularities and Granularity.word in timestamp_granularities:
            raise ApiError(
                400, "times of single words are not known; take 'segment'.", param="timestamp_granularities[]"
            )
        data = await file.read()

        async def whole() -> Response:
            return _response(
                service, await transcribe(service.engine, *await service.read_audio(data)), response_format
            )

        async def events(emit: Emit) -> None:
            count = 0
            wave, seconds = await service.read_audio(data)
            async with aclosing(transcribe_stream(service.engine, wave, seconds)) as news:
                async for item in news:
                    if isinstance(item, str):
                        await emit(_event({"type": "transcript.text.delta", "delta": item}))
                    elif isinstance(item, Segment):
                        if timestamp_granularities:
                            await emit(_event({"type": "transcript.text.segment", **_span(count, item), "speaker": ""}))
                        count += 1
                    else:
                        done = {"type": "transcript.text.done", "text": item.text, "usage": _usage(item)}
                        await emit(_event(done))
            await emit(sse("[DONE]"))

        return service.answers.stream(events) if stream else await service.answers.whole(request, whole)

    return router


def _response(service: Service, transcript: Transcript, form: ResponseFormat) -> Response:
    if form is ResponseFormat.json:
        return JSONResponse({"text": transcript.text, "usage": _usage(transcript)})
    if form is ResponseFormat.text:
        return PlainTextResponse(transcript.text + "\n")
    if form is ResponseFormat.srt:
        return PlainTextResponse(to_srt(transcript), media_type="application/x-subrip")
    if form is ResponseFormat.vtt:
        return PlainTextResponse(to_vtt(transcript), media_type="text/vtt")
    encode = service.model.processor.tokenizer.encode
    segments = [
        {
            **_span(number, segment),
            "tokens": encode(segment.text),
            "temperature": 0.0,
        }
        for number, segment in enumerate(transcript.segments)
    ]
    return JSONResponse(
        {
            "task": "transcribe",
            "duration": round(transcript.duration, 3),
            "text": transcript.text,
            "segments": segments,
            "usage": _usage(transcript),
        }
    )


def _span(number: int, segment: Segment) -> dict[str, Any]:
    return {
        "id": number,
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
    }


def _usage(transcript: Transcript) -> dict[str, Any]:
    return {"type": "duration", "seconds": round(transcript.duration, 3)}


def _event(values: dict[str, Any]) -> bytes:
    return sse(json.dumps(values, ensure_ascii=False))
