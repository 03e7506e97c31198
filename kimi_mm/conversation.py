"""A conversation that remembers: what was heard (codes and features), what was said (text and codes)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kimi_mm.audio.detokenizer import SpeakerPrompt
from kimi_mm.audio.detokenizer_config import StreamingConfig
from kimi_mm.errors import UserError
from kimi_mm.generation_speech import SpeechSampling
from kimi_mm.pipeline import SAMPLE_RATE, KimiMM
from kimi_mm.types import CodePiece, Event, TextPiece


class Conversation:
    """Turns of a user and spoken replies, in order; every reply sees all that came before.

    Args:
        engine: a model with a voice.
        sampling: of both streams, and their budgets.
        generator: source of all randomness; None starts one at seed 0.
        voice: to speak in, of `KimiMM.voice`.
        streaming: chunk sizes and solver of the speech.

    Raises:
        UserError: the model has no voice.
    """

    def __init__(
        self,
        engine: KimiMM,
        *,
        sampling: SpeechSampling | None = None,
        generator: torch.Generator | None = None,
        voice: SpeakerPrompt | None = None,
        streaming: StreamingConfig | None = None,
    ) -> None:
        self.sample_rate = engine.detokenizer.sample_rate
        self.engine = engine
        self.messages: list[dict[str, Any]] = []
        self._options = {
            "sampling": sampling,
            "generator": generator or torch.Generator().manual_seed(0),
            "voice": voice,
            "streaming": streaming,
        }

    def say(self, text: str | None = None, audio: Any = None, *, sample_rate: int = SAMPLE_RATE) -> Iterator[Event]:
        """Takes the user's next turn and yields the reply as it comes.

        A reply that is left early (the iterator is closed) stays in the history as far as it was said.

        Args:
            text: what the user writes.
            audio: what the user says, as for `KimiMM.transcribe`; it is heard after the text.
            sample_rate: of samples given as an array, Hz.

        Returns:
            Events as of `KimiMM.stream`.

        Raises:
            UserError: a turn with neither, or one that cannot be used; the conversation stays as it was.
        """
        parts: list[dict[str, Any]] = []
        if text is not None and text.strip():
            parts.append({"type": "text", "text": text.strip()})
        if audio is not None:
            parts.append({"type": "audio", "audio": self.engine.listen(audio, sample_rate)})
        if not parts:
            raise UserError("an empty turn; say or write something.")
        messages = [*self.messages, {"role": "user", "content": parts}]
        events = self.engine.stream(messages, **self._options)
        self.messages = messages
        return self._remember(events)

    def _remember(self, events: Iterator[Event]) -> Iterator[Event]:
        text, codes = "", []
        try:
            for event in events:
                if isinstance(event, TextPiece):
                    text += event.text
                elif isinstance(event, CodePiece):
                    codes += event.codes
                yield event
        finally:
            content: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
            if codes:
                content.append({"type": "audio", "codes": codes})
            if content:
                self.messages.append({"role": "assistant", "content": content})
