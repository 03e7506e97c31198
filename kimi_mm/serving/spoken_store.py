"""Spoken answers of chats, kept for a while: a later turn may name one by its id instead of sending it back."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from kimi_mm.serving.problems import ApiError


@dataclass(frozen=True)
class Spoken:
    """What was said: text, codes without offset, and until when (Unix seconds) it is kept."""

    text: str
    codes: tuple[int, ...]
    expires_at: int

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Content of the turn, as for `Processor.streams`."""
        parts: list[dict[str, Any]] = [{"type": "text", "text": self.text}]
        return [*parts, {"type": "audio", "codes": list(self.codes)}] if self.codes else parts


class SpokenStore:
    """The newest answers, at most `limit`, each for `seconds`."""

    def __init__(self, limit: int = 512, seconds: int = 3600) -> None:
        self.limit, self.seconds = limit, seconds
        self._kept: OrderedDict[str, Spoken] = OrderedDict()  # oldest first, which expire first

    def new_id(self) -> str:
        """Returns an id that nobody can guess."""
        return f"audio_{secrets.token_hex(12)}"

    def keep(self, name: str, text: str, codes: list[int]) -> Spoken:
        """Keeps an answer under an id of `new_id`."""
        now = int(time.time())
        while self._kept and (len(self._kept) >= self.limit or next(iter(self._kept.values())).expires_at < now):
            self._kept.popitem(last=False)
        spoken = self._kept[name] = Spoken(text, tuple(codes), now + self.seconds)
        return spoken

    def get(self, name: str) -> Spoken:
        """Returns an answer.

        Raises:
            ApiError: 400, there is none of this id, or no longer.
        """
        spoken = self._kept.get(name)
        if spoken is None or spoken.expires_at < time.time():
            raise ApiError(
                400,
                f"messages: the spoken answer '{name[:80]}' is not known, or no longer; send its text instead.",
                param="messages",
            )
        return spoken
