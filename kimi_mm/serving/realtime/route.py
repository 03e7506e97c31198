"""WebSocket /v1/realtime, as OpenAI's: a conversation by voice, in events of JSON.

    handshake: Host, Origin, key (Guard) ─► model, room for a session ─► accepted ─► session.created
    reader ─► Session ─► Outbox ─► writer;   it ends when one of them does, when time is up, or when nobody reads

A close says why: 1000 time is up, 1008 nothing was said for long or nothing was read, 1012 the server shuts down.
"""

from __future__ import annotations

import asyncio
import contextlib

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from kimi_mm.serving.problems import ApiError, response_of
from kimi_mm.serving.realtime.outbox import Outbox
from kimi_mm.serving.realtime.session import Session
from kimi_mm.serving.service import Service

SUBPROTOCOL = "realtime"


def routes(service: Service) -> APIRouter:
    """Returns the route over a service."""
    router = APIRouter()

    @router.websocket("/v1/realtime")
    async def realtime(socket: WebSocket, model: str | None = None) -> None:
        try:
            if model is not None:
                service.check_model(model)
            if service.gate.closed:
                raise ApiError(503, "the server is shutting down.", retry_after=5)
            if service.sessions >= service.config.max_sessions:
                raise ApiError(429, f"{service.sessions} sessions are open; try again later.", retry_after=10)
        except ApiError as error:
            await socket.send_denial_response(response_of(error))
            return
        service.sessions += 1
        service.metrics.sessions.set(service.sessions)
        try:
            offered = socket.scope.get("subprotocols", ())
            await socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
            code, reason = await _converse(service, socket)
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                await socket.close(code, reason)
        except WebSocketDisconnect:
            pass
        finally:
            service.sessions -= 1
            service.metrics.sessions.set(service.sessions)

    return router


async def _converse(service: Service, socket: WebSocket) -> tuple[int, str]:
    """Runs a session to its end; returns why it is closed."""
    outbox = Outbox()
    session = Session(service, outbox)
    config = service.config

    async def read() -> tuple[int, str]:
        while True:
            try:
                message = await asyncio.wait_for(socket.receive(), config.silent_seconds)
            except asyncio.TimeoutError:
                return 1008, f"nothing was said for {config.silent_seconds:.0f} s"
            if message["type"] == "websocket.disconnect":
                return 1000, ""
            await session.receive(message.get("text"))

    async def write() -> tuple[int, str]:
        async def send(text: str) -> None:
            await asyncio.wait_for(socket.send_text(text), config.read_seconds)

        with contextlib.suppress(asyncio.TimeoutError):
            await outbox.run(send)
        return 1008, "events are not read"

    async def watch() -> tuple[int, str]:
        await outbox.full.wait()
        return 1008, "events are not read"

    async def clock() -> tuple[int, str]:
        await asyncio.sleep(config.session_seconds)
        return 1000, "the session has expired"

    session.open()
    tasks = [asyncio.ensure_future(part) for part in (read(), write(), watch(), clock())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(iter(done)).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await session.close()
