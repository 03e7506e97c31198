"""How an answer is made: it waits for its turn, has so much time, and stops when its asker leaves.

gate ─► work ──────────────► response
         │ emit(event) ... ─► server-sent events; the status goes out with the first one, so that whatever fails
         ▼                    before it still gets a status of its own
the asker leaves, or time is up: the work is cancelled, and what it held in the engine is free
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from kimi_mm.serving.gate import Gate
from kimi_mm.serving.metrics import Metrics
from kimi_mm.serving.problems import event_of

T = TypeVar("T")
Emit = Callable[[bytes], Awaitable[None]]


class AskerGone(Exception):
    """The connection was closed before the answer was whole."""


class Answers:
    """Runs the work of requests under one server's limits.

    Args:
        gate: gives turns.
        metrics: is told of first outputs.
        seconds: for an answer, its wait included.
    """

    def __init__(self, gate: Gate, metrics: Metrics, seconds: float) -> None:
        self.gate, self.metrics, self.seconds = gate, metrics, seconds

    async def whole(self, request: Request, work: Callable[[], Awaitable[Response]]) -> Response:
        """Returns the response that the work makes.

        Raises:
            ApiError: 429 or 503 from the gate.
            TimeoutError: time is up.
        """
        try:
            return await self._supervised(request.receive, work)
        except AskerGone:
            return Response(status_code=499)

    def stream(self, work: Callable[[Emit], Awaitable[None]], media_type: str = "text/event-stream") -> Response:
        """Returns a response whose body is what the work emits."""
        return _Stream(self, work, media_type)

    async def _supervised(self, receive: Receive, work: Callable[[], Awaitable[T]]) -> T:
        async def timed() -> T:
            with anyio.fail_after(self.seconds):
                async with self.gate.enter():
                    return await work()

        task = asyncio.ensure_future(timed())
        watch = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise AskerGone
            return task.result()
        finally:
            for part in (task, watch):
                part.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)


class _Stream(Response):
    def __init__(self, answers: Answers, work: Callable[[Emit], Awaitable[None]], media_type: str) -> None:
        super().__init__(media_type=media_type, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.answers, self.work = answers, work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, started = time.monotonic(), False

        async def emit(data: bytes) -> None:
            nonlocal started
            if not started:
                started = True
                self.answers.metrics.first.observe(time.monotonic() - start)
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            await self.answers._supervised(receive, lambda: self.work(emit))
        except AskerGone:
            return
        except Exception as error:
            if not started:
                raise
            if self.media_type == "text/event-stream":
                await emit(sse(event_of(error)))
        if not started:
            await emit(b"")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def sse(data: str) -> bytes:
    """Returns one server-sent event."""
    return f"data: {data}\n\n".encode("utf-8", "replace")


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
