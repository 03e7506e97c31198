"""The engine: one thread decodes and one listens; everything that wants the model hands work in and gets events back.

    handlers (event loop) ──► call(f)          one computation: tokenizing a recording   ──► listener thread
                          ──► text(row)        a row of the running batch: ids as they are chosen
                          ──► speech(row)      a row that speaks: ids, codes and waves
                                  │
    engine thread:  drop what was cancelled ─► admit what fits ─► one step of the batch ─► voices ─┐
                      ▲                                                                            │
                      └────────────────────────────────────────────────────────────────────────────┘

The audio tokenizer belongs to the listener and all else to the engine's thread, so that recordings are tokenized while
rows decode: on two cores, eight chats about recordings take two thirds of the time.
A `Ticket` is one piece of work as its asker sees it: an async iterator of events. Leaving it cancels the work, and the
row's memory is free before the next step.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from kimi_mm.errors import AudioError, UserError
from kimi_mm.pipeline import KimiMM
from kimi_mm.serving.batch import News, Row, RunningBatch, SpokenRow
from kimi_mm.serving.voices import Voice, speak
from kimi_mm.types import CodePiece, WavePiece

T = TypeVar("T")
Given = int | CodePiece | WavePiece  # what a row that speaks gives: text ids, codes, waves
PREFILL_ROWS = 4  # prompts read together; those already decoding wait meanwhile

_END = object()


class EngineClosed(Exception):
    """The engine is shutting down and takes no more work."""


class Ticket(Generic[T]):
    """Events of one piece of work, in order, up to its end."""

    def __init__(self) -> None:
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        event = await self._events.get()
        if event is _END:
            raise StopAsyncIteration
        if isinstance(event, BaseException):
            raise event
        return event

    def put(self, event: Any) -> None:
        """Called by the engine's thread."""
        if self.cancelled:
            return
        with contextlib.suppress(RuntimeError):  # the loop has gone, and with it the asker
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def end(self) -> None:
        """Called by the engine's thread after the last event."""
        self.put(_END)


class Engine:
    """Runs a model for many askers at once.

    Args:
        model: used by this engine's threads alone from now on.
        cache_bytes: memory for the caches of rows that decode together.
        max_rows: most of them.
        reuse_bytes: memory for states that are kept from turn to turn.
        threads: of torch on a CPU; None leaves one core to the handlers.
    """

    def __init__(
        self,
        model: KimiMM,
        *,
        cache_bytes: int = 2**30,
        max_rows: int = 16,
        reuse_bytes: int = 2**27,
        threads: int | None = None,
    ) -> None:
        self.model, self.threads = model, threads
        self.batch = RunningBatch(model, cache_bytes, max_rows, reuse_bytes)
        self.steps = self.tokens = 0
        self._wake = threading.Condition()
        self._calls = 0
        self._waiting: collections.deque[tuple[Row, Ticket[Any]]] = collections.deque()
        self._tickets: dict[int, Ticket[Any]] = {}  # of running rows, by id(row)
        self._closed = False
        self._listener = ThreadPoolExecutor(1, "kimi-mm-listener", self._limit_threads)
        self._thread = threading.Thread(target=self._run, name="kimi-mm-engine", daemon=True)
        self._thread.start()

    # ---- what handlers call, on the event loop -----------------------------------------------------------------

    async def call(self, work: Callable[[], T]) -> T:
        """Runs one computation beside the rows and returns its result; a cancelled one is not started."""
        if self._closed:
            raise _closing()
        self._calls += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._listener, work)
        finally:
            self._calls -= 1

    def text(self, row: Row) -> contextlib.AbstractAsyncContextManager[Ticket[int]]:
        """Opens a row: a ticket of its ids; when they end, `row.stop_reason` says why.

        Raises:
            UserError: the row is larger than all the memory there is for rows.
        """
        return self._open(row)

    def speech(self, row: SpokenRow) -> contextlib.AbstractAsyncContextManager[Ticket[Given]]:
        """Opens a row that speaks: a ticket of text ids, codes and waves; else as `text`."""
        return self._open(row)

    def _open(self, row: Row) -> contextlib.AbstractAsyncContextManager[Ticket[Any]]:
        if not self.batch.fits(row, []):
            raise UserError(
                f"the conversation of {len(row.prompt)} positions and its answer need more memory than the server "
                "gives to one; shorten it, or ask for fewer tokens."
            )
        return self._hand_in(lambda ticket: self._waiting.append((row, ticket)))

    @contextlib.asynccontextmanager
    async def _hand_in(self, put: Callable[[Ticket[T]], None]) -> AsyncIterator[Ticket[T]]:
        ticket: Ticket[T] = Ticket()
        with self._wake:
            if self._closed:
                raise _closing()
            put(ticket)
            self._wake.notify()
        try:
            yield ticket
        finally:
            ticket.cancelled = True
            self._notify()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def close(self) -> None:
        """Ends the threads; whatever is still open gets `EngineClosed`."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        self._listener.shutdown(cancel_futures=True)

    @property
    def running(self) -> int:
        """Rows at work."""
        return len(self.batch.rows)

    @property
    def waiting(self) -> int:
        """Rows that wait for room, and computations that are not done."""
        return len(self._waiting) + self._calls

    # ---- the thread --------------------------------------------------------------------------------------------

    def _limit_threads(self) -> None:
        # OpenMP counts threads for every thread that calls it, so each of ours must say this.
        torch.set_num_threads(self.threads or max(1, min(torch.get_num_threads(), (os.cpu_count() or 2) - 1)))

    def _run(self) -> None:
        self._limit_threads()
        while True:
            with self._wake:
                self._wake.wait_for(self._has_work)
                if self._closed:
                    break
                self._leave()
                admitted = self._next_rows()
            if admitted:
                self._admit(admitted)
            if self.batch.rows:
                self._step()
        self._refuse_all()

    def _has_work(self) -> bool:
        return bool(self._closed or self._waiting or self.batch.rows)

    def _leave(self) -> None:
        """Frees everything whose asker has gone."""
        gone = [row for row in self.batch.rows if self._tickets[id(row)].cancelled]
        self.batch.drop(gone)
        for row in gone:
            del self._tickets[id(row)]
        self._waiting = collections.deque(pair for pair in self._waiting if not pair[1].cancelled)

    def _next_rows(self) -> list[tuple[Row, Ticket[Any]]]:
        """Takes the first waiting rows for which there is room; none overtakes another."""
        admitted: list[tuple[Row, Ticket[Any]]] = []
        while self._waiting and len(admitted) < PREFILL_ROWS:
            running = [*self.batch.rows, *(row for row, _ in admitted)]
            if not self.batch.fits(self._waiting[0][0], running):
                break
            admitted.append(self._waiting.popleft())
        return admitted

    def _admit(self, admitted: list[tuple[Row, Ticket[Any]]]) -> None:
        try:
            self.batch.admit([row for row, _ in admitted])
            self._tickets.update((id(row), ticket) for row, ticket in admitted)
        except Exception as error:
            if len(admitted) == 1:
                admitted[0][1].put(error)
                return
            for pair in admitted:  # one of them is at fault, and only that one shall suffer
                self._admit([pair])

    def _step(self) -> None:
        try:
            news = self.batch.step()
            waves = self._speak(news)
        except Exception as error:
            self._fail(list(self._tickets), error)
            return
        self.steps += 1
        for told in news:
            row, ticket = told.row, self._tickets[id(told.row)]
            if told.text is not None:
                self.tokens += 1
                ticket.put(told.text)
            if isinstance(row, SpokenRow):
                if told.code is not None:
                    ticket.put(CodePiece((told.code,)))
                wave = waves.get(id(row.voice))
                if isinstance(wave, Exception):
                    self._fail([id(row)], wave)
                    continue
                if wave is not None:
                    ticket.put(WavePiece(wave, row.voice.rate))
            if row.stop_reason is not None:
                ticket.end()
                del self._tickets[id(row)]

    @staticmethod
    def _speak(news: list[News]) -> dict[int, np.ndarray | AudioError]:
        """Hands codes to the voices of the rows that gave them, and lets speak those that must."""
        voices: list[Voice] = []
        closing: list[Voice] = []
        for told in news:
            if not isinstance(told.row, SpokenRow):
                continue
            voices.append(told.row.voice)
            if told.code is not None:
                told.row.voice.take(told.code)
            if told.row.last and told.row.stop_reason is not None:
                closing.append(told.row.voice)
        return speak(voices, closing)

    def _fail(self, rows: list[int], error: Exception) -> None:
        """Ends rows, given by id(row), with an error."""
        for key in rows:
            self._tickets.pop(key).put(error)
        self.batch.drop([row for row in self.batch.rows if id(row) in rows])

    def _refuse_all(self) -> None:
        for ticket in [*self._tickets.values(), *(ticket for _, ticket in self._waiting)]:
            ticket.put(_closing())
        self.batch.drop(list(self.batch.rows))
        self._tickets.clear()


def _closing() -> EngineClosed:
    return EngineClosed("the server is shutting down.")
