"""POST /v1/chat/completions, as OpenAI's: text, recordings and pictures in, text out, whole or as it comes.

    ChatRequest ─► Prompt ─► row of the running batch ─► ids ─► whole characters ─► up to a stop text ─► chunks

Without `temperature` an answer is greedy. `finish_reason` is "stop" at the model's own end or a stop text, "length" at
the budget and where the model began to repeat itself.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import torch
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from kimi_mm.generation import TextSampling
from kimi_mm.serving.answers import Emit, sse
from kimi_mm.serving.batch import Row
from kimi_mm.serving.chat_request import ChatRequest, read_prompt
from kimi_mm.serving.described import EVENTS, ChatCompletion, answers
from kimi_mm.serving.service import Service
from kimi_mm.text.tokenizer import TextPieces


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

        async def whole() -> Response:
            answer = _Answer(service, body)
            async with aclosing(answer.pieces()) as pieces:
                text = "".join([piece async for piece in pieces])
            message = {"role": "assistant", "content": text, "refusal": None}
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

            answer, role = _Answer(service, body), {"role": "assistant"}
            async with aclosing(answer.pieces()) as pieces:
                async for piece in pieces:
                    await chunk({**role, "content": piece})
                    role = {}
            await chunk(role, answer.finish_reason)
            if with_usage:
                await chunk(None)
            await emit(sse("[DONE]"))

        return service.answers.stream(events) if body.stream else await service.answers.whole(request, whole)

    return router


class _Answer:
    """One answer on its way; `finish_reason` and `usage` hold once its pieces have ended."""

    def __init__(self, service: Service, body: ChatRequest) -> None:
        self.service, self.body = service, body
        self.finish_reason = "stop"
        self.usage: dict[str, int] = {}

    async def pieces(self) -> AsyncGenerator[str, None]:
        prompt = await read_prompt(self.service, self.body.messages)
        generator = None
        if self.body.temperature:
            generator = torch.Generator(self.service.model.device)
            if self.body.seed is None:
                generator.seed()
            else:
                generator.manual_seed(self.body.seed)
        sampling = TextSampling(temperature=self.body.temperature or 0.0, max_tokens=self.body.budget)
        row = Row(prompt, sampling, generator)
        pieces, until = TextPieces(self.service.model.processor.tokenizer), Until(self.body.stops)
        async with self.service.engine.text(row) as ids:
            async for token in ids:
                if text := until.push(pieces.push(token)):
                    yield text
                if until.ended:
                    break
        count = len(pieces.ids)
        self.usage = {"prompt_tokens": len(prompt), "completion_tokens": count, "total_tokens": len(prompt) + count}
        if not until.ended:
            self.finish_reason = "stop" if row.stop_reason == "eos" else "length"
            if text := until.rest():
                yield text


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
