"""What stands before every handler: who asks, from where, how much and how slowly it is said.

    Host  ─► Origin ─► key ─► Content-Length ─► body, piece by piece: size and pace ─► handler

Host and Origin are checked because a web page that a user visits can make their browser talk to loopback addresses,
under a name of the page's choice (DNS rebinding). A key is compared in constant time and never logged.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimi_mm.serving.problems import ApiError, response_of
from kimi_mm.serving.settings import ServeConfig

KEY_PROTOCOL = "openai-insecure-api-key."


class Guard:
    """ASGI middleware with the checks above.

    Args:
        app: what is guarded.
        config: limits, allowed hosts and origins.
        api_key: asked of every request; None: nobody is asked.
        open_paths: need no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: ServeConfig,
        api_key: str | None = None,
        open_paths: Collection[str] = ("/health",),
    ) -> None:
        self.app, self.config, self.api_key, self.open_paths = app, config, api_key, frozenset(open_paths)
        self.held = 0  # bytes of all bodies that are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            self._check_origin(scope, headers)
            self._check_key(scope, headers)
            if scope["type"] == "http":
                await self._with_body(headers, scope, receive, send)
                return
        except ApiError as error:
            await self._refuse(error, scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _with_body(self, headers: Headers, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(self, headers, receive)
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            # Whoever parses the body makes an answer of its own of the refusal; the asker shall get the refusal.
            if body.refusal is not None and not started:
                return
            started = True
            await send(message)

        try:
            await self.app(scope, body.receive, noted)
        except ApiError:
            if body.refusal is None or started:
                raise
        finally:
            self.held -= body.size
        if body.refusal is not None and not started:
            await self._refuse(body.refusal, scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        name = _host_name(headers.get("host", ""))
        allowed = (*self.config.allow_hosts, self.config.host, "localhost")
        if "*" not in allowed and name not in allowed and not _is_address(name):
            raise ApiError(
                403, f"this server is not known as '{name[:80]}'; start it with --allow-host {name[:80] or 'NAME'}."
            )

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or "*" in self.config.allow_origins or origin in self.config.allow_origins:
            return
        try:
            same = urlsplit(origin).netloc == headers.get("host")
        except ValueError:
            same = False
        if not same:
            raise ApiError(403, f"pages of {origin[:80]} may not use this server; see --allow-origin.")

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"]
        if self.api_key is None or path in self.open_paths:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = ""
        if not given and scope["type"] == "websocket":
            # Browsers cannot set headers of a WebSocket; OpenAI's pages offer the key among the subprotocols.
            keys = [name[len(KEY_PROTOCOL) :] for name in scope["subprotocols"] if name.startswith(KEY_PROTOCOL)]
            given = keys[0] if keys else ""
        if not given:
            raise ApiError(401, "an API key is needed: Authorization: Bearer KEY.", code="invalid_api_key")
        if not hmac.compare_digest(given.strip().encode(), self.api_key.encode()):
            raise ApiError(401, "the API key is wrong.", code="invalid_api_key")

    @staticmethod
    async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        response = response_of(error)
        # What is left of the body shall not be read as the next request.
        response.headers["Connection"] = "close"
        await response(scope, receive, send)


class _Body:
    """A body as it is received: each piece is counted and timed. `refusal` is set when it is too large or too slow."""

    def __init__(self, guard: Guard, headers: Headers, receive: Receive) -> None:
        self.guard, self.size = guard, 0
        self.refusal: ApiError | None = None
        self._receive, self._whole = receive, False
        self._start = time.monotonic()
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > guard.config.max_body_mib * 2**20:
            raise _too_large(guard.config)

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        config = self.guard.config
        left = self._start + config.upload_seconds - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, min(config.body_seconds, left)))
        except asyncio.TimeoutError:
            self.refusal = ApiError(408, "the body came too slowly.", code="timeout")
            raise self.refusal from None
        piece = len(message.get("body", b""))
        self.size += piece
        self.guard.held += piece
        self._whole = not message.get("more_body", False)
        if self.size > config.max_body_mib * 2**20:
            self.refusal = _too_large(config)
        elif self.guard.held > config.max_bodies_mib * 2**20:
            self.refusal = ApiError(429, "too much is being sent at once; try again a little later.", retry_after=2)
        if self.refusal is not None:
            raise self.refusal
        return message


def _too_large(config: ServeConfig) -> ApiError:
    return ApiError(413, f"the body is larger than {config.max_body_mib} MiB.", code="request_too_large")


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
