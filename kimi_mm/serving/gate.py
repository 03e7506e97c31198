"""Back-pressure: so many requests are worked on, so many wait, and the rest are told when to come again."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator

from kimi_mm.serving.problems import ApiError


class Gate:
    """Lets at most `active` requests in at a time and `waiting` more wait, first come first served."""

    def __init__(self, active: int, waiting: int) -> None:
        self.limit, self.waiting_limit = active, waiting
        self.active = self.waiting = 0
        self.closed = False
        self._seconds = 1.0  # a running mean of how long one takes
        self._turns: asyncio.Semaphore = asyncio.Semaphore(active)

    @contextlib.asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        """Waits for a turn and holds it.

        Raises:
            ApiError: 429 when too many wait, 503 when the server shuts down.
        """
        self._refuse_closed()
        if self._turns.locked() and self.waiting >= self.waiting_limit:
            raise ApiError(
                429,
                f"{self.active} requests are being answered and {self.waiting} wait; try again a little later.",
                code="rate_limit_exceeded",
                retry_after=self.retry_after,
            )
        self.waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self.waiting -= 1
        try:
            self._refuse_closed()
            self.active += 1
            start = time.monotonic()
            try:
                yield
            finally:
                self.active -= 1
                self._seconds += 0.2 * (time.monotonic() - start - self._seconds)
        finally:
            self._turns.release()

    @property
    def retry_after(self) -> int:
        """Seconds after which those that wait now will have been answered."""
        return max(1, math.ceil(self._seconds * (self.waiting + 1) / self.limit))

    def close(self) -> None:
        """Refuses all who come or still wait; those inside finish."""
        self.closed = True

    def _refuse_closed(self) -> None:
        if self.closed:
            raise ApiError(503, "the server is shutting down.", retry_after=5)
