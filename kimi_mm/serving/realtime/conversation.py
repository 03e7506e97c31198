"""The items of a session, in order, and how they read as turns of the model.

user: text, recordings (tokenized as they come), pictures
assistant: text, or text with the codes that said it; cut where its listener interrupted it
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from kimi_mm.audio.tokens import AudioTokens
from kimi_mm.serving.problems import ApiError

MAX_ITEMS = 512
CODE_MS = 80


@dataclass(eq=False)
class Part:
    """A part of a message: its type on the wire, and what it holds."""

    type: str
    text: str = ""  # or the transcript
    image: str = ""
    codes: list[int] = field(default_factory=list)  # of what the assistant said
    tokens: asyncio.Future[AudioTokens] | None = None  # of what the user said

    def wire(self) -> dict[str, Any]:
        """Returns it as clients see it, without sound."""
        if self.type == "input_audio":
            return {"type": self.type, "transcript": self.text or None}
        if self.type == "input_image":
            return {"type": self.type, "image_url": self.image}
        return {"type": self.type, "transcript" if self.type == "output_audio" else "text": self.text}


@dataclass(eq=False)
class Item:
    """A message."""

    id: str
    role: str
    content: list[Part]
    status: str = "completed"

    def wire(self) -> dict[str, Any]:
        """Returns it as clients see it."""
        return {
            "id": self.id,
            "object": "realtime.item",
            "type": "message",
            "status": self.status,
            "role": self.role,
            "content": [part.wire() for part in self.content],
        }

    async def turn(self) -> dict[str, Any] | None:
        """Returns it as a turn of the model, as for `Processor.streams`; None where nothing is left of it.

        Raises:
            UserError: a recording cannot be used.
        """
        parts: list[dict[str, Any]] = []
        for part in self.content:
            if part.tokens is not None:
                parts.append({"type": "audio", "audio": await asyncio.shield(part.tokens)})
            elif part.image:
                parts.append({"type": "image", "image": part.image})
            elif part.text or part.codes:
                parts.append({"type": "text", "text": part.text})
            if part.codes:
                parts.append({"type": "audio", "codes": part.codes})
        return {"role": self.role, "content": parts} if parts else None

    def truncate(self, milliseconds: int) -> None:
        """Forgets what was said after so many milliseconds: codes, and the words in proportion.

        Raises:
            ApiError: it was not spoken, or is shorter.
        """
        part = self.content[0] if self.content else None
        if self.role != "assistant" or part is None or part.type != "output_audio":
            raise ApiError(400, "item_id: only spoken answers can be cut.", param="item_id")
        count = -(-milliseconds // CODE_MS)
        if count > len(part.codes):
            raise ApiError(400, f"audio_end_ms: the answer has {CODE_MS * len(part.codes)} ms.", param="audio_end_ms")
        # Text runs ahead of its speech; where each word was said is not known.
        words = part.text.split()
        part.text = " ".join(words[: len(words) * count // max(1, len(part.codes))])
        part.codes = part.codes[:count]


class Conversation:
    """Items in order, the newest `MAX_ITEMS`.

    Args:
        most_codes: of what the user said that are held; of earlier turns only the words stay, where they are known.
    """

    def __init__(self, most_codes: int) -> None:
        self.most_codes = most_codes
        self.items: list[Item] = []

    def add(self, item: Item, after: str | None = None) -> str | None:
        """Adds an item at the end, or after another ("root": first), and returns the id of the one before it.

        Raises:
            ApiError: there is no such other item, or this id is taken.
        """
        if any(other.id == item.id for other in self.items):
            raise ApiError(400, f"item.id: '{item.id}' is there already.", param="item.id")
        place = len(self.items)
        if after is not None:
            place = 0 if after == "root" else self.items.index(self.get(after, "previous_item_id")) + 1
        before = self.items[place - 1].id if place else None
        self.items.insert(place, item)
        del self.items[: max(0, len(self.items) - MAX_ITEMS)]
        self._forget_sound()
        return before

    def _forget_sound(self) -> None:
        held = 0
        for part in (part for item in reversed(self.items) for part in reversed(item.content)):
            if part.tokens is None or not part.tokens.done() or part.tokens.cancelled() or part.tokens.exception():
                continue
            held += len(part.tokens.result())
            if held > self.most_codes:
                part.tokens = None

    def get(self, name: str, param: str = "item_id") -> Item:
        """Returns an item.

        Raises:
            ApiError: there is none of this id.
        """
        for item in self.items:
            if item.id == name:
                return item
        raise ApiError(400, f"{param}: there is no item '{name[:80]}'.", param=param, code="item_not_found")

    def delete(self, name: str) -> None:
        """Takes an item out. Errors as of `get`."""
        self.items.remove(self.get(name))
