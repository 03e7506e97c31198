"""One realtime session: what its client sends, what is answered, and how the two interrupt each other.

    events in ─► settings │ ears ─► turns ─► items │ items │ response.create, .cancel
                              │       │                        │
              speech begins ──┘       └─► transcript ─► deltas │
              = barge-in: the answer stops                     ▼
    events out ◄─ Outbox ◄──────────────────────────────── Answer ◄─ rows of the running batch

Everything runs on the event loop. Events are handled one after another; transcripts and the answer are tasks.

A pause may be the end of a turn: while the detector waits for more of it, the answer is begun. Nobody is told of it,
and if speech goes on it was for nothing.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import anyio
import numpy as np

from kimi_mm.audio.tokens import AudioTokens
from kimi_mm.pipeline import SAMPLE_RATE
from kimi_mm.serving.hearing import transcribe_stream
from kimi_mm.serving.problems import ApiError, body_of
from kimi_mm.serving.realtime import wire
from kimi_mm.serving.realtime.answer import Ahead, Answer
from kimi_mm.serving.realtime.conversation import Conversation, Item, Part
from kimi_mm.serving.realtime.ears import PER_MS, Began, Ears, Ended, Paused
from kimi_mm.serving.realtime.listener import Listener
from kimi_mm.serving.realtime.outbox import Outbox
from kimi_mm.serving.service import Service
from kimi_mm.serving.speaking import speaks

LOG = logging.getLogger(__name__)
T = TypeVar("T")
SHORTEST_MS = 100  # of a turn that is committed by hand


class Session:
    """A client's conversation.

    Args:
        service: whose model answers.
        outbox: takes the events for the client.
    """

    def __init__(self, service: Service, outbox: Outbox) -> None:
        self.service, self.outbox = service, outbox
        self.id = wire.new_id("sess")
        self.conversation_id = wire.new_id("conv")
        self.expires_at = int(time.time() + service.config.session_seconds)
        modalities = ["audio" if speaks(service.model) else "text"]
        self.settings = wire.Settings(model=service.model_id, output_modalities=modalities)  # type: ignore[arg-type]
        self.conversation = Conversation(service.config.max_prompt)
        self.ears = Ears(service.config.turn_seconds)
        self.answer: Answer | None = None
        self._next_item = wire.new_id("item")  # of the user's turn that goes on
        self._listener: Listener | None = None  # to that turn, once it has begun
        self._ahead: Ahead | None = None  # the answer to it, if the last pause has ended it
        self._tasks: set[asyncio.Task] = set()

    def open(self) -> None:
        """Greets the client."""
        self.send("session.created", session=self._wire())

    async def close(self) -> None:
        """Stops everything that goes on."""
        tasks = [*self._tasks, *([self.answer.task] if self.answer is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def receive(self, text: str | None) -> None:
        """Handles a message of the client; whatever is wrong with it becomes an error event."""
        event_id = None
        try:
            if text is None:
                raise ApiError(400, "events are JSON in text messages; this one was binary.")
            try:
                values = json.loads(text)
            except (ValueError, RecursionError):
                raise ApiError(400, "the message is not JSON.") from None
            if isinstance(values, dict) and isinstance(values.get("event_id"), str):
                event_id = values["event_id"][:512]
            event = wire.read(wire.CLIENT_EVENT, values)
            await self._handlers()[event.type](event)
        except Exception as error:
            self.complain(error, event_id)

    def send(self, kind: str, **values: Any) -> None:
        """Sends an event."""
        self.outbox.put({"type": kind, "event_id": wire.new_id("event"), **values})

    def complain(self, error: Exception, event_id: str | None = None) -> None:
        """Sends an error event."""
        self.send("error", error={**self.error_of(error), "event_id": event_id})

    @staticmethod
    def error_of(error: Exception) -> dict[str, Any]:
        """Returns an error as events tell it; what nobody foresaw tells nothing, and is logged."""
        status, body, _ = body_of(error)
        if status == 500:
            LOG.error("a realtime session met an error that nobody foresaw", exc_info=error)
        return body["error"]

    def _handlers(self) -> dict[str, Callable[[Any], Awaitable[None]]]:
        return {
            "session.update": self._update,
            "input_audio_buffer.append": self._append,
            "input_audio_buffer.commit": self._commit,
            "input_audio_buffer.clear": self._clear,
            "conversation.item.create": self._create_item,
            "conversation.item.retrieve": self._retrieve_item,
            "conversation.item.delete": self._delete_item,
            "conversation.item.truncate": self._truncate_item,
            "response.create": self._respond,
            "response.cancel": self._cancel,
        }

    # ---- settings ----------------------------------------------------------------------------------------------

    async def _update(self, event: wire.SessionUpdate) -> None:
        settings = self.settings.updated(event.session)
        self.service.check_model(settings.model or "")
        check_modalities(self.service, settings.output_modalities)
        self.settings = settings
        self.send("session.updated", session=self._wire())

    def _wire(self) -> dict[str, Any]:
        values = self.settings.model_dump()
        if self.settings.type == "transcription":
            values = {key: values[key] for key in ("type", "include")} | {"audio": {"input": values["audio"]["input"]}}
        return {"object": f"{self.settings.type}.session", "id": self.id, "expires_at": self.expires_at, **values}

    # ---- what the user says ------------------------------------------------------------------------------------

    async def _append(self, event: wire.Append) -> None:
        data = _sound(event.audio, "audio")
        vad = self.settings.audio.input.turn_detection
        if vad is None and self.ears.held + len(data) // 3 > self.ears.most:
            raise ApiError(400, f"the buffer holds {self.service.config.turn_seconds:.0f} s; commit or clear it.")
        for heard in self.ears.push(data, vad):
            assert vad is not None
            ahead = self._take_ahead(len(heard.wave) if isinstance(heard, Ended) else 0)
            if isinstance(heard, Began):
                self._listener = Listener(self.service.engine, self.start)
                milliseconds = heard.start // PER_MS
                self.send("input_audio_buffer.speech_started", audio_start_ms=milliseconds, item_id=self._next_item)
                if vad.interrupt_response and self.answer is not None and self.answer.in_conversation:
                    await self._stop(self.answer, "turn_detected")
            elif isinstance(heard, Paused):
                answers = vad.create_response and self.settings.type == "realtime" and self.answer is None
                if answers and self._listener is not None:
                    tokens = self._listener.end(heard.wave)
                    self._ahead = Ahead(self, len(heard.wave), tokens)
            else:
                milliseconds = heard.end // PER_MS
                self.send("input_audio_buffer.speech_stopped", audio_end_ms=milliseconds, item_id=self._next_item)
                self._take_turn(heard.wave, ahead and ahead.tokens)
                if vad.create_response and self.settings.type == "realtime" and self.answer is None:
                    self._answer(wire.Asked(), ahead)
                elif ahead is not None:
                    ahead.stop()
        if self._listener is not None:
            self._listener.feed(self.ears.so_far)

    async def _commit(self, event: wire.Commit) -> None:
        if self.ears.held < SHORTEST_MS * PER_MS:
            raise ApiError(
                400, f"the buffer holds less than {SHORTEST_MS} ms of sound.", code="input_audio_buffer_commit_empty"
            )
        self._listener = None  # which began later than the buffer
        self._take_ahead()
        self._take_turn(self.ears.commit())

    async def _clear(self, event: wire.Clear) -> None:
        self.ears.clear()
        self._listener = None
        self._take_ahead()
        self.send("input_audio_buffer.cleared")

    def _take_ahead(self, samples: int = 0) -> Ahead | None:
        """Returns the answer that was begun ahead if it is one to a turn of so many samples, and stops it if not."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and not ahead.answers(self, samples):
            ahead.stop()  # and not its tokens: pieces of them are the turn's, which goes on
            return None
        return ahead

    def _take_turn(self, wave: np.ndarray, tokens: asyncio.Task[AudioTokens] | None = None) -> None:
        """Makes an item of what was said, and has it tokenized and, where that is wished for, written down."""
        name, self._next_item = self._next_item, wire.new_id("item")
        listener, self._listener = self._listener, None
        part = Part("input_audio", tokens=tokens or self._tokenize(wave, listener))
        self.service.metrics.audio.inc(len(wave) / SAMPLE_RATE)
        item = Item(name, "user", [part])
        before = self.conversation.add(item)
        self.send("input_audio_buffer.committed", item_id=name, previous_item_id=before)
        self._announce(item, before)
        if self.settings.audio.input.transcription is not None or self.settings.type == "transcription":
            self.start(self._transcribe(item, part, wave))

    def _tokenize(self, wave: np.ndarray, listener: Listener | None = None) -> asyncio.Task[AudioTokens]:
        return (listener or Listener(self.service.engine, self.start)).end(wave)

    async def _transcribe(self, item: Item, part: Part, wave: np.ndarray) -> None:
        kind, place = "conversation.item.input_audio_transcription", {"item_id": item.id, "content_index": 0}
        seconds = len(wave) / SAMPLE_RATE
        try:
            with anyio.fail_after(self.service.config.request_seconds):
                assert part.tokens is not None
                tokens = await asyncio.shield(part.tokens)
                if self.answer is not None:  # which comes first, and whose reading of the turn may serve here too
                    await self.answer.begun.wait()
                hearing = transcribe_stream(self.service.engine, wave, seconds, tokens)
                async with self.service.gate.enter(), aclosing(hearing) as news:
                    async for piece in news:
                        if isinstance(piece, str):
                            part.text += piece
                            self.send(f"{kind}.delta", **place, delta=piece)
            usage = {"type": "duration", "seconds": round(seconds, 3)}
            self.send(f"{kind}.completed", **place, transcript=part.text, usage=usage)
        except Exception as error:
            self.send(f"{kind}.failed", **place, error=self.error_of(error))

    # ---- items -------------------------------------------------------------------------------------------------

    async def _create_item(self, event: wire.ItemCreate) -> None:
        item = self.item_of(event.item)
        before = self.conversation.add(item, event.previous_item_id)
        self._announce(item, before)

    def item_of(self, message: wire.Message) -> Item:
        """Reads a message of the client.

        Raises:
            ApiError: a part does not belong there, or is damaged.
            UserError: the model has no organ for it.
        """
        fitting = {"system": ("input_text",), "assistant": ("output_text", "output_audio")}
        parts: list[Part] = []
        for content in message.content:
            if content.type not in fitting.get(message.role, ("input_text", "input_audio", "input_image")):
                raise ApiError(400, f"item.content: '{content.type}' does not belong to the {message.role}.")
            if content.type == "input_audio":
                ears = Ears(self.service.config.turn_seconds)
                ears.push(_sound(content.audio or "", "item.content.audio"), None)
                wave = ears.commit()
                if not len(wave):
                    raise ApiError(400, "item.content.audio: there is no sound.", param="item.content.audio")
                self.service.metrics.audio.inc(len(wave) / SAMPLE_RATE)
                parts.append(Part(content.type, text=content.transcript or "", tokens=self._tokenize(wave)))
            elif content.type == "input_image":
                url = content.image_url or ""
                if url[:5].lower() != "data:":
                    raise ApiError(400, "image_url: only data: URLs are taken; nothing is fetched from elsewhere.")
                self.service.model.look([])  # raises the sentence of a model without eyes
                parts.append(Part(content.type, image=url))
            else:
                # Of what the assistant said elsewhere only the words can be used.
                kind = "output_text" if message.role == "assistant" else "input_text"
                parts.append(Part(kind, text=content.text or content.transcript or ""))
        return Item(message.id or wire.new_id("item"), message.role, parts)

    def _announce(self, item: Item, before: str | None) -> None:
        for kind in ("added", "done"):
            self.send(f"conversation.item.{kind}", item=item.wire(), previous_item_id=before)

    async def _retrieve_item(self, event: wire.ItemRetrieve) -> None:
        self.send("conversation.item.retrieved", item=self.conversation.get(event.item_id).wire())

    async def _delete_item(self, event: wire.ItemDelete) -> None:
        self.conversation.delete(event.item_id)
        self.send("conversation.item.deleted", item_id=event.item_id)

    async def _truncate_item(self, event: wire.ItemTruncate) -> None:
        self.conversation.get(event.item_id).truncate(event.audio_end_ms)
        self._take_ahead()  # which had read more
        place = {"item_id": event.item_id, "content_index": 0, "audio_end_ms": event.audio_end_ms}
        self.send("conversation.item.truncated", **place)

    # ---- answers -----------------------------------------------------------------------------------------------

    async def _respond(self, event: wire.ResponseCreate) -> None:
        if self.settings.type == "transcription":
            raise ApiError(400, "a session of transcription gives no answers.")
        if self.answer is not None:
            raise ApiError(
                400,
                f"the answer {self.answer.id} still goes on; cancel it or wait.",
                code="conversation_already_has_active_response",
            )
        asked = event.response or wire.Asked()
        check_modalities(self.service, asked.output_modalities or self.settings.output_modalities)
        self._answer(asked)

    async def _cancel(self, event: wire.ResponseCancel) -> None:
        if self.answer is None or event.response_id not in (None, self.answer.id):
            raise ApiError(400, "there is no such answer to cancel.", code="response_cancel_not_active")
        await self._stop(self.answer, "client_cancelled")

    def _answer(self, asked: wire.Asked, ahead: Ahead | None = None) -> None:
        answer = self.answer = Answer(self, asked, ahead)

        def over(task: asyncio.Task) -> None:
            if self.answer is answer:
                self.answer = None
            if ahead is not None:  # which goes on where the answer was cancelled before it could begin
                ahead.stop()

        answer.task.add_done_callback(over)

    async def _stop(self, answer: Answer, reason: str) -> None:
        self.answer = None
        await answer.cancel(reason)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Makes a task of work, which ends with the session at the latest."""

        def over(task: asyncio.Task[T]) -> None:
            self._tasks.discard(task)
            if not task.cancelled():
                task.exception()  # told where its result is needed

        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(over)
        return task


def check_modalities(service: Service, modalities: Sequence[str]) -> None:
    """Raises ApiError where speech is wanted of a model without a voice."""
    if "audio" in modalities and not speaks(service.model):
        raise ApiError(
            400,
            f"output_modalities: model '{service.model_id}' does not speak; take ['text'].",
            param="output_modalities",
        )


def _sound(data: str, param: str) -> bytes:
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{param}: is not base64.", param=param) from None
    if len(raw) % 2:
        raise ApiError(400, f"{param}: 16-bit samples have two bytes each; one is missing.", param=param)
    return raw
