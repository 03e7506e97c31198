"""Events that wait to be sent to a client, bounded: who reads too slowly is left."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

MOST_BYTES = 16 * 2**20


class Outbox:
    """A queue of events, filled without waiting and emptied by `run`."""

    def __init__(self) -> None:
        self._events: deque[tuple[str | None, str]] = deque()  # the answer whose sound it is, and the JSON
        self._bytes = 0
        self._news = asyncio.Event()
        self.full = asyncio.Event()  # more waits than a client may leave unread

    def put(self, event: dict[str, Any]) -> None:
        """Adds an event."""
        text = json.dumps(event)
        owner = event["response_id"] if event["type"] == "response.output_audio.delta" else None
        self._events.append((owner, text))
        self._bytes += len(text)
        self._news.set()
        if self._bytes > MOST_BYTES:
            self.full.set()

    def unsay(self, response: str) -> None:
        """Takes back the sound of an answer that was not sent yet."""
        kept = [(owner, text) for owner, text in self._events if owner != response]
        self._events = deque(kept)
        self._bytes = sum(len(text) for _, text in kept)

    async def run(self, send: Callable[[str], Awaitable[None]]) -> None:
        """Sends events for ever."""
        while True:
            while not self._events:
                self._news.clear()
                await self._news.wait()
            _, text = self._events.popleft()
            self._bytes -= len(text)
            await send(text)
