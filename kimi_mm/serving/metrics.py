"""What /metrics tells, in Prometheus' text form."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimi_mm.serving.engine import Engine
from kimi_mm.serving.gate import Gate

SECONDS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 60.0, 120.0)


class Metrics:
    """Counters of one server; gauges are read from the engine and the gate when they are asked for."""

    def __init__(self, engine: Engine, gate: Gate) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("kimi_mm_requests", "Answered requests", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "kimi_mm_request_seconds", "Whole answers", ["route"], buckets=SECONDS, registry=self.registry
        )
        self.first = Histogram(
            "kimi_mm_first_output_seconds",
            "Until the first piece of a streamed answer",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.sessions = Gauge("kimi_mm_sessions", "Open sessions of /v1/realtime", registry=self.registry)
        self.turn = Histogram(
            "kimi_mm_turn_first_seconds",
            "From the end of a turn of a session to the first piece of its answer: of sound, or of text alone",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.interrupted = Counter(
            "kimi_mm_interrupted", "Answers of sessions that were interrupted", registry=self.registry
        )
        self.audio = Counter("kimi_mm_audio_seconds", "Seconds of sound taken in", registry=self.registry)
        for name, text, read in (
            ("kimi_mm_rows_running", "Rows at work", lambda: engine.running),
            ("kimi_mm_rows_waiting", "Rows that wait for room", lambda: engine.waiting),
            ("kimi_mm_cache_bytes", "Bytes of the running rows' caches", lambda: engine.batch.held_bytes),
            ("kimi_mm_prefix_hits", "Prompts read on from a kept state", lambda: engine.batch.prefixes.hits),
            ("kimi_mm_prefix_misses", "Prompts of which no state was kept", lambda: engine.batch.prefixes.misses),
            ("kimi_mm_prefix_positions", "Positions not read again", lambda: engine.batch.prefixes.positions),
            ("kimi_mm_prefix_bytes", "Bytes of kept states", lambda: engine.batch.prefixes.held_bytes),
            ("kimi_mm_requests_active", "Requests being answered", lambda: gate.active),
            ("kimi_mm_requests_waiting", "Requests that wait for their turn", lambda: gate.waiting),
            ("kimi_mm_steps", "Steps of the running batch since the start", lambda: engine.steps),
            ("kimi_mm_tokens", "Text ids chosen since the start", lambda: engine.tokens),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

    def render(self) -> bytes:
        """Returns the page."""
        return generate_latest(self.registry)


class Timed:
    """ASGI middleware that counts and times every request by its route."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 499  # nginx' number for an asker who left before the answer

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            # Paths that lead nowhere are the asker's invention; they must not become labels.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - start)
