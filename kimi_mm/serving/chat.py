"""POST /v1/chat/completions, as OpenAI's: text, recordings and pictures in, text or speech out, whole or as it comes.

    ChatRequest ─► Prompt ─► row of the running batch ─► ids ─► whole characters ─► up to a stop text ─► chunks
                                 └─ modalities with audio: ids, codes and waves ─► transcript and sound ─► chunks

Without `temperature` text is greedy. `finish_reason` is "stop" at the model's own end or a stop text, "length" at the
budget and where the model began to repeat itself. A spoken answer is kept for a while under its id.
"""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import anyio.to_thread
import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from kimi_mm.generation import TextSampling
from kimi_mm.generation_speech import SpeechSampling, TokenSampling
from kimi_mm.serving.answers import Emit, sse
from kimi_mm.serving.batch import Row
from kimi_mm.serving.chat_request import ChatRequest, read_prompt
from kimi_mm.serving.described import EVENTS, ChatCompletion, answers
from kimi_mm.serving.service import Service
from kimi_mm.serving.sounds import SpeechFormat, encode, pcm16
from kimi_mm.serving.speaking import answer, check_voice, spoken_row
from kimi_mm.text.tokenizer import TextPieces
from kimi_mm.types import CodePiece, TextPiece, WavePiece


def routes(service: Service) -> APIRouter:
    """Returns the route over a service."""
    router = APIRouter(tags=["chat"])

    @router.post(
        "/v1/chat/completions",
        summary="Answer a conversation",
        response_class=Response,
        responses=answers("The answer, whole or as it comes.", ChatCompletion, EVENTS),
    )
    async def completions(request: Request, body: ChatRequest) -> Response:
        body.refuse_unknown(service)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.model_id}
        kind = _SpokenAnswer if body.spoken else _WrittenAnswer

        async def whole() -> Response:
            answer = kind(service, body)
            message = {"role": "assistant", "content": None, "refusal": None, **await answer.message()}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
            return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": answer.usage})

        async def events(emit: Emit) -> None:
            with_usage = body.stream_options is not None and body.stream_options.include_usage

            async def chunk(delta: dict[str, Any] | None, finish: str | None = None) -> None:
                choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
                values = {**head, "object": "chat.completion.chunk", "choices": [] if delta is None else [choice]}
                if with_usage:
                    values["usage"] = answer.usage if delta is None else None
                await emit(sse(json.dumps(values, ensure_ascii=False)))

            answer, role = kind(service, body), {"role": "assistant"}
            async with aclosing(answer.deltas()) as deltas:
                async for delta in deltas:
                    await chunk({**role, **delta})
                    role = {}
            await chunk(role, answer.finish_reason)
            if with_usage:
                await chunk(None)
            await emit(sse("[DONE]"))

        return service.answers.stream(events) if body.stream else await service.answers.whole(request, whole)

    return router


class _WrittenAnswer:
    """One answer on its way; `finish_reason` and `usage` hold once it has ended."""

    def __init__(self, service: Service, body: ChatRequest) -> None:
        self.service, self.body = service, body
        self.finish_reason = "stop"
        self.usage: dict[str, Any] = {}

    async def message(self) -> dict[str, Any]:
        """Returns what the whole message holds."""
        async with aclosing(self.deltas()) as deltas:
            return {"content": "".join([delta["content"] async for delta in deltas])}

    async def deltas(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yields what is new, as it comes."""
        prompt = await read_prompt(self.service, self.body.messages)
        generator = self.body.new_generator(self.service) if self.body.temperature else None
        sampling = TextSampling(temperature=self.body.temperature or 0.0, max_tokens=self.body.budget or 256)
        row = Row(prompt, sampling, generator, kept=True)
        pieces, until = TextPieces(self.service.model.processor.tokenizer), Until(self.body.stops)
        async with self.service.engine.text(row) as ids:
            async for token in ids:
                if text := until.push(pieces.push(token)):
                    yield {"content": text}
                if until.ended:
                    break
        self.usage = _usage(row, len(pieces.ids))
        if not until.ended:
            self.finish_reason = "stop" if row.stop_reason == "eos" else "length"
            if text := until.rest():
                yield {"content": text}


class _SpokenAnswer:
    """One answer in text and speech; else as `_WrittenAnswer`."""

    def __init__(self, service: Service, body: ChatRequest) -> None:
        self.service, self.body = service, body
        self.finish_reason = "stop"
        self.usage: dict[str, Any] = {}
        self.id = service.spoken.new_id()

    async def message(self) -> dict[str, Any]:
        """Returns what the whole message holds."""
        assert self.body.audio is not None
        waves, said, expires_at = [np.zeros(0, np.float32)], "", 0
        async with aclosing(self._events()) as events:
            async for event in events:
                if isinstance(event, TextPiece):
                    said += event.text
                elif isinstance(event, WavePiece):
                    waves.append(event.wave)
                else:
                    expires_at = event
        rate, form = check_voice(self.service.model), SpeechFormat(self.body.audio.format)
        data = await anyio.to_thread.run_sync(encode, np.concatenate(waves), rate, form)
        sound = base64.b64encode(data).decode()
        return {"audio": {"id": self.id, "data": sound, "transcript": said, "expires_at": expires_at}}

    async def deltas(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yields what is new, as it comes: transcript, 16-bit samples, and at last when the answer expires."""
        async with aclosing(self._events()) as events:
            async for event in events:
                if isinstance(event, TextPiece):
                    yield {"audio": {"id": self.id, "transcript": event.text}}
                elif isinstance(event, WavePiece):
                    yield {"audio": {"id": self.id, "data": base64.b64encode(pcm16(event.wave)).decode()}}
                else:
                    yield {"audio": {"id": self.id, "expires_at": event}}

    async def _events(self) -> AsyncGenerator[TextPiece | WavePiece | int, None]:
        """Yields text and waves, and when the answer, which is kept then, expires."""
        prompt = await read_prompt(self.service, self.body.messages, "speech")
        default, most = SpeechSampling(), self.body.budget
        text = default.text if self.body.temperature is None else TokenSampling(temperature=self.body.temperature)
        sampling = SpeechSampling(
            text=text,
            max_text_tokens=most or default.max_text_tokens,
            max_audio_codes=min(most or default.max_audio_codes, default.max_audio_codes),
        )
        row = spoken_row(self.service.model, prompt, sampling, self.body.new_generator(self.service))
        said = ""
        async with aclosing(answer(self.service.engine, row)) as events:
            async for event in events:
                if isinstance(event, TextPiece):
                    said += event.text
                if not isinstance(event, CodePiece):
                    yield event
        codes = row.reply.result.codes
        self.finish_reason = "stop" if row.stop_reason == "eos" else "length"
        self.usage = _usage(row, len(row.ids), len(codes))
        yield self.service.spoken.keep(self.id, said, codes).expires_at


def _usage(row: Row, text: int, codes: int = 0) -> dict[str, Any]:
    prompt = len(row.prompt)
    usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": text + codes}
    usage["total_tokens"] = prompt + text + codes
    usage["prompt_tokens_details"] = {"cached_tokens": row.reused}
    if codes:
        usage["completion_tokens_details"] = {"audio_tokens": codes}
    return usage


class Until:
    """Passes text on up to the first of some texts; what may become one of them is held back."""

    def __init__(self, stops: list[str]) -> None:
        self.stops, self.ended, self._held = stops, False, ""

    def push(self, text: str) -> str:
        """Takes the next piece, and returns what is certain to belong to the answer."""
        self._held += text
        if found := [at for stop in self.stops if (at := self._held.find(stop)) >= 0]:
            self.ended = True
            return self._held[: min(found)]
        keep = max((_overlap(self._held, stop) for stop in self.stops), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def rest(self) -> str:
        """Returns what was held back, when nothing more comes."""
        return self._held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
