"""The process: bind, load, serve, and stop cleanly.

bind ─► load the model, while the web framework is imported ─► listen ─► "ready" ─► SIGTERM ─► refuse those who
wait, finish those inside ─► stop
"""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

from kimi_mm.errors import UserError
from kimi_mm.serving.settings import ServeConfig


def serve(config: ServeConfig, api_key: str | None = None) -> None:
    """Serves until SIGINT or SIGTERM.

    Raises:
        UserError: the address cannot be taken, or the model cannot be loaded.
    """
    listener = _bind(config.host, config.port)
    loading = _Loading(config)
    import uvicorn

    from kimi_mm.serving.app import create_app
    from kimi_mm.serving.connections import Connection, GatedServer
    from kimi_mm.serving.service import Service

    service = Service.of(loading.result(), config)
    settings = uvicorn.Config(
        create_app(service, api_key),
        http=type("BoundConnection", (Connection,), {"header_seconds": config.header_seconds}),
        ws="websockets-sansio",
        ws_max_size=2**20,
        ws_max_queue=16,
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


class _Loading:
    """Loads the model on a thread of its own."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._result: Any = None
        self._thread = threading.Thread(target=self._load, daemon=True)
        self._thread.start()

    def _load(self) -> None:
        try:
            import kimi_mm

            self._result = kimi_mm.load(self._config.model, self._config.device)
        except BaseException as error:
            self._result = error

    def result(self) -> Any:
        self._thread.join()
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result


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
