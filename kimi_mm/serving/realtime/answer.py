"""One answer of a session, from response.created to response.done, however it ends.

items ─► turns ─► Prompt ─► row of the running batch ─► text deltas │ audio and transcript deltas
                                                         ▲
cancel(reason) ── the row is dropped before its next step; sound that waits to be sent is taken back
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import anyio
import torch

from kimi_mm.audio.tokens import AudioTokens
from kimi_mm.generation import TextSampling
from kimi_mm.generation_speech import SpeechSampling
from kimi_mm.serving.batch import Prompt, Row
from kimi_mm.serving.chat_request import read_turns
from kimi_mm.serving.problems import ApiError
from kimi_mm.serving.realtime import wire
from kimi_mm.serving.realtime.conversation import Item, Part
from kimi_mm.serving.sounds import pcm16
from kimi_mm.serving.speaking import answer, spoken_row, written
from kimi_mm.types import CodePiece, TextPiece, WavePiece

if TYPE_CHECKING:
    from kimi_mm.serving.realtime.session import Session

MOST_TEXT = 512  # text ids of an answer whose budget is "inf"


Events = AsyncGenerator[TextPiece | CodePiece | WavePiece, None]


class Ahead:
    """An answer begun at a pause, before it is known that the turn has ended; nobody is told of it until then.

    Args:
        session: whose conversation it answers, and a turn of these `tokens`, of so many `samples`, after it.
    """

    def __init__(self, session: Session, samples: int, tokens: asyncio.Task[AudioTokens]) -> None:
        self.samples, self.tokens = samples, tokens
        self.row: Row | None = None
        self._settings, self._items = session.settings, list(session.conversation.items)
        self._events: asyncio.Queue[TextPiece | CodePiece | WavePiece | Exception | None] = asyncio.Queue()
        self._task = session.start(self._run(session))

    def answers(self, session: Session, samples: int) -> bool:
        """Whether the turn came to be this one, and nothing else of the conversation is another by now."""
        same = self._settings is session.settings and self._items == session.conversation.items
        return same and samples == self.samples

    def stop(self) -> None:
        """Ends it; what it held is free."""
        self._task.cancel()

    async def events(self) -> Events:
        """Yields what there is of it by now, and the rest as it comes. Errors are those that it met."""
        try:
            while (event := await self._events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self._task.cancel()

    async def _run(self, session: Session) -> None:
        turn = Item("", "user", [Part("input_audio", tokens=self.tokens)])
        try:
            async with session.service.gate.enter():
                self.row, stream = await _begin(session, wire.Asked(), [*self._items, turn])
                async with aclosing(stream) as events:
                    async for event in events:
                        self._events.put_nowait(event)
            self._events.put_nowait(None)
        except Exception as error:
            self._events.put_nowait(error)


class Answer:
    """An answer on its way; it starts at once.

    Args:
        session: whose conversation is answered.
        asked: what this answer has of its own.
        ahead: where it was begun already.
    """

    def __init__(self, session: Session, asked: wire.Asked, ahead: Ahead | None = None) -> None:
        self.session, self.asked, self.id = session, asked, wire.new_id("resp")
        self.ahead = ahead
        self.in_conversation = asked.conversation == "auto"
        self.modalities = _modalities(session, asked)
        self.aloud = "audio" in self.modalities
        self.part = Part("output_audio" if self.aloud else "output_text")
        self.item = Item(wire.new_id("item"), "assistant", [self.part], "in_progress")
        self.row: Row | None = None
        self._reason: str | None = None  # why it was cancelled
        self.begun = asyncio.Event()  # its prompt has been read, or it has ended
        self._announced = self._heard = self._told = False
        self._begun = time.monotonic()
        self._send("response.created", response=self._wire("in_progress", None, []))
        self.task = asyncio.ensure_future(self._run())

    async def cancel(self, reason: str) -> None:
        """Stops it and waits until its end has been told."""
        self._reason = reason
        self.session.service.metrics.interrupted.inc()
        self.session.outbox.unsay(self.id)
        self.task.cancel()
        await asyncio.wait([self.task])
        if not self._told:  # it was cancelled before it could begin
            self._end("cancelled", {"type": "cancelled", "reason": reason})

    async def _run(self) -> None:
        status, details = "completed", {"type": "completed"}
        try:
            with anyio.fail_after(self.session.service.config.request_seconds):
                # What was begun ahead has its turn already.
                gate = contextlib.nullcontext() if self.ahead is not None else self.session.service.gate.enter()
                async with gate, aclosing(self._events()) as events:
                    async for event in events:
                        self._take(event)
            if self.row is not None and self.row.stop_reason != "eos":
                status, details = "incomplete", {"type": "incomplete", "reason": "max_output_tokens"}
        except asyncio.CancelledError:
            if self._reason is None:
                raise  # the session ends, and nobody is left to be told
            status, details = "cancelled", {"type": "cancelled", "reason": self._reason}
        except Exception as error:
            told = self.session.error_of(error)
            status, details = (
                "failed",
                {"type": "failed", "error": {key: told[key] for key in ("type", "code", "message")}},
            )
        self._end(status, details)

    async def _events(self) -> Events:
        if self.ahead is not None:
            stream = self.ahead.events()
        else:
            self.row, stream = await _begin(self.session, self.asked, self._items())
        async with aclosing(stream) as events:
            async for event in events:
                self.row = self.ahead.row if self.ahead is not None else self.row
                yield event

    def _items(self) -> list[Item]:
        if self.asked.input is None:
            return list(self.session.conversation.items)
        items = []
        for value in self.asked.input:
            if value.get("type") == "item_reference":
                items.append(self.session.conversation.get(str(value.get("id")), "response.input"))
            else:
                items.append(self.session.item_of(wire.read(wire.MESSAGE, value, "response.input")))
        return items

    # ---- what the client is told -------------------------------------------------------------------------------

    def _take(self, event: TextPiece | CodePiece | WavePiece) -> None:
        self._announce()
        self.begun.set()
        if not self._heard and isinstance(event, WavePiece if self.aloud else TextPiece):
            self._heard = True
            self.session.service.metrics.turn.observe(time.monotonic() - self._begun)
        if isinstance(event, TextPiece):
            self.part.text += event.text
            kind = "output_audio_transcript" if self.aloud else "output_text"
            self._send(f"response.{kind}.delta", **self._place(), delta=event.text)
        elif isinstance(event, WavePiece):
            sound = base64.b64encode(pcm16(event.wave)).decode()
            self._send("response.output_audio.delta", **self._place(), delta=sound)
        else:
            self.part.codes.extend(event.codes)

    def _announce(self) -> None:
        """Makes the item known, once."""
        if self._announced:
            return
        self._announced = True
        before = self.session.conversation.add(self.item) if self.in_conversation else None
        told = {**self.item.wire(), "content": []}
        self._send("response.output_item.added", response_id=self.id, output_index=0, item=told)
        if self.in_conversation:
            self._send("conversation.item.added", item=told, previous_item_id=before)
        self._send("response.content_part.added", **self._place(), part=self._part())

    def _end(self, status: str, details: dict[str, Any]) -> None:
        self._told = True
        self.begun.set()
        if status == "completed":
            self._announce()
        if self._announced:
            self.item.status = "completed" if status == "completed" else "incomplete"
            if self.aloud:
                self._send("response.output_audio.done", **self._place())
                self._send("response.output_audio_transcript.done", **self._place(), transcript=self.part.text)
            else:
                self._send("response.output_text.done", **self._place(), text=self.part.text)
            self._send("response.content_part.done", **self._place(), part=self._part())
            self._send("response.output_item.done", response_id=self.id, output_index=0, item=self.item.wire())
            if self.in_conversation:
                self._send("conversation.item.done", item=self.item.wire(), previous_item_id=None)
        output = [self.item.wire()] if self._announced else []
        self._send("response.done", response=self._wire(status, details, output))

    def _part(self) -> dict[str, Any]:
        if self.aloud:
            return {"type": "audio", "transcript": self.part.text}
        return {"type": "text", "text": self.part.text}

    def _place(self) -> dict[str, Any]:
        return {"response_id": self.id, "item_id": self.item.id, "output_index": 0, "content_index": 0}

    def _wire(self, status: str, details: dict[str, Any] | None, output: list[dict[str, Any]]) -> dict[str, Any]:
        session = self.session
        prompt, text = (0, 0) if self.row is None else (len(self.row.prompt), len(self.row.ids))
        codes = len(self.part.codes)
        usage = {
            "total_tokens": prompt + text + codes,
            "input_tokens": prompt,
            "output_tokens": text + codes,
            "input_token_details": {"cached_tokens": 0 if self.row is None else self.row.reused},
            "output_token_details": {"text_tokens": text, "audio_tokens": codes},
        }
        return {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "status_details": details,
            "output": output,
            "conversation_id": session.conversation_id if self.in_conversation else None,
            "output_modalities": self.modalities,
            "max_output_tokens": self.asked.max_output_tokens or session.settings.max_output_tokens,
            "audio": {"output": session.settings.audio.output.model_dump(include={"format", "voice"})},
            "metadata": self.asked.metadata,
            "usage": None if status == "in_progress" else usage,
        }

    def _send(self, kind: str, **values: Any) -> None:
        self.session.send(kind, **values)


def _modalities(session: Session, asked: wire.Asked) -> list[str]:
    return asked.output_modalities or session.settings.output_modalities  # type: ignore[return-value]


def _sampling(session: Session, asked: wire.Asked) -> TextSampling | SpeechSampling:
    """Returns how an answer is drawn, and its budgets."""
    given = asked.max_output_tokens or session.settings.max_output_tokens
    if "audio" not in _modalities(session, asked):
        return TextSampling(max_tokens=MOST_TEXT if given == "inf" else given)
    default = SpeechSampling()
    text, codes = (default.max_text_tokens, default.max_audio_codes) if given == "inf" else (given, given)
    return SpeechSampling(max_text_tokens=text, max_audio_codes=min(codes, default.max_audio_codes))


async def _begin(session: Session, asked: wire.Asked, items: Sequence[Item]) -> tuple[Row, Events]:
    """Reads items of a conversation; returns the row that answers them, and what comes of it once it is asked for.

    Raises:
        ApiError: they do not fit, or there is nothing to answer.
    """
    service, sampling = session.service, _sampling(session, asked)
    prompt = await _read(session, asked, items, sampling)
    if isinstance(sampling, SpeechSampling):
        row = spoken_row(service.model, prompt, sampling, torch.Generator().manual_seed(0))
        return row, answer(service.engine, row)
    row = Row(prompt, sampling, kept=True)
    return row, written(service.engine, row)  # type: ignore[return-value]


async def _read(
    session: Session, asked: wire.Asked, items: Sequence[Item], sampling: TextSampling | SpeechSampling
) -> Prompt:
    """Reads items of a conversation; what no longer fits is left out, oldest first.

    Raises:
        ApiError: it does not fit, or there is nothing to answer.
    """
    limit = session.service.config.max_prompt
    aloud = isinstance(sampling, SpeechSampling)
    budget = max(sampling.max_text_tokens, sampling.max_audio_codes) if aloud else sampling.max_tokens
    told = asked.instructions if asked.instructions is not None else session.settings.instructions
    system = [{"role": "system", "content": told}] if told.strip() else []
    turns = [turn for item in items if (turn := await item.turn()) is not None]
    if not turns:
        raise ApiError(400, "there is nothing to answer: the conversation is empty.")
    output, room = "speech" if aloud else "text", limit - min(budget, limit // 2)
    while True:
        try:
            return await read_turns(session.service, [*system, *turns], output, room)
        except ApiError as error:
            if error.code != "context_length_exceeded" or session.settings.truncation == "disabled":
                raise
            if len(turns) == 1:
                raise
            turns = turns[(len(turns) + 3) // 4 :]
