"""The process: bind, load, serve, and stop cleanly.

bind ─► load the model ─► listen ─► "ready" ─► SIGTERM ─► refuse those who wait, finish those inside ─► stop

Nothing is imported on a second thread while the model loads: two threads that import packages which import lazily
themselves can wait for each other for ever.
"""

from __future__ import annotations

import asyncio
import socket

from kimi_mm.errors import UserError
from kimi_mm.serving.settings import ServeConfig


def serve(config: ServeConfig, api_key: str | None = None) -> None:
    """Serves until SIGINT or SIGTERM.

    Raises:
        UserError: the address cannot be taken, or the model cannot be loaded.
    """
    listener = _bind(config.host, config.port)
    import uvicorn

    import kimi_mm
    from kimi_mm.serving.app import create_app
    from kimi_mm.serving.connections import Connection, GatedServer, WebSocketConnection
    from kimi_mm.serving.service import Service

    service = Service.of(kimi_mm.load(config.model, config.device), config)
    patience = {"read_seconds": config.read_seconds}
    settings = uvicorn.Config(
        create_app(service, api_key),
        http=type("BoundConnection", (Connection,), {"header_seconds": config.header_seconds, **patience}),
        ws=type("BoundWebSocket", (WebSocketConnection,), patience),
        ws_max_size=2**20,
        ws_per_message_deflate=False,  # sound hardly shrinks
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=config.max_connections,
        timeout_graceful_shutdown=config.shutdown_seconds,
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    ready = f"kimi-mm: '{service.model_id}' is ready at http://{shown}:{port}"
    try:
        asyncio.run(GatedServer(settings, service.gate, ready).serve(sockets=[listener]))
    finally:
        service.engine.close()
        listener.close()


def _bind(host: str, port: int) -> socket.socket:
    """Takes the address without listening yet, so that nobody connects before there is somebody to answer."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise UserError(f"{host}: not an address of this machine ({error.strerror}).") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{host}:{port} cannot be taken ({reason}); choose another --port or --host.") from None
    return listener
