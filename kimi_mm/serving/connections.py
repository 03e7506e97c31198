"""What uvicorn does not do by itself: time limits on who asks slowly and who never reads, and an orderly stop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from kimi_mm.serving.gate import Gate


class Impatient:
    """Cuts off a client that takes nothing of what waits for it for `read_seconds`; a mixin for protocols."""

    read_seconds = 60.0
    loop: asyncio.AbstractEventLoop
    transport: Any
    _unread: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[misc]
        self._expect_reading()

    def resume_writing(self) -> None:
        super().resume_writing()  # type: ignore[misc]
        self._has_read()

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_read()
        super().connection_lost(exc)  # type: ignore[misc]

    def _expect_reading(self) -> None:
        self._has_read()
        self._unread = self.loop.call_later(self.read_seconds, self.transport.abort)

    def _has_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


class Connection(Impatient, H11Protocol):
    """HTTP/1.1 whose clients must say what they want in `header_seconds`, however slowly they drip it."""

    header_seconds = 10.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_headers()

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._stop_waiting()

    def handle_websocket_upgrade(self, event: Any) -> None:
        self._stop_waiting()
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Idle connections end by the keep-alive limit; a request that has begun must go on.
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(self.header_seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class WebSocketConnection(Impatient, WebSocketsSansIOProtocol):
    """WebSockets whose bad text ends with 1007 and nothing in the log, and whose end waits for nobody."""

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.close":
            self._expect_reading()
        elif message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True  # it was refused, which is not a mistake of the app's

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text":
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:
                self.frames = []
                self.conn.send_close(1007)
                self.handle_parser_exception()
                return
        super().send_receive_event_to_app()


class GatedServer(uvicorn.Server):
    """Says when it listens, and closes the gate when it is told to stop: those inside finish, the others are refused.

    Args:
        config: of uvicorn.
        gate: of the service.
        ready: printed to stderr as soon as connections are taken.
    """

    def __init__(self, config: uvicorn.Config, gate: Gate, ready: str) -> None:
        super().__init__(config)
        self.gate, self.ready = gate, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            print(self.ready, file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.gate.close()
        with contextlib.suppress(asyncio.CancelledError):
            await super().shutdown(sockets)
