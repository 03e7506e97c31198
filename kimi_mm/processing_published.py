"""Prompt layouts of published models where they differ from ours (`processing`).

Kimi-Audio (released code): messages of one role in a row make one turn, which opens and closes once; there is no system
role; a spoken reply of the history has no text_eos and is blank for six steps on the audio side.

    "Hi" and a clip of 3 codes, text wanted
    A: user_start _  _   media_begin a0 a1 a2 media_end continue_text msg_end assistant_start
    T: _          72 105 _           _  _  _  _         _             _       _

K2, K2.5, Kimi-VL, Kimi-Linear (chat template): one stream, the role is named in text.

    <|im_system|>system<|im_middle|>...<|im_end|><|im_user|>user<|im_middle|>...<|im_end|>
    <|im_assistant|>assistant<|im_middle|>
    picture: <|media_begin|>image<|media_content|> pad x n <|media_end|>\\n
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kimi_mm.config import ModelConfig
from kimi_mm.errors import UserError
from kimi_mm.processing import Processor, Streams
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.vision.processing import VisionProcessor

TRANSCRIBE = "Please transcribe the following audio:"


def processor_for(config: ModelConfig, tokenizer: TextTokenizer) -> Processor:
    """Returns the processor that lays out prompts as the model was trained to read them."""
    vision = None if config.vision is None else VisionProcessor(config.vision)
    kind = Processor
    if config.vocab.special_ids is not None:
        kind = KimiAudioProcessor if config.hears else K2Processor
    return kind(config.vocab, tokenizer, vision, config.audio_delay)


class KimiAudioProcessor(Processor):
    """Lays out conversations as Kimi-Audio's released code does."""

    def streams(
        self, messages: Sequence[dict[str, Any]], *, output: str = "text", add_assistant_start: bool = True
    ) -> Streams:
        """Lays out a conversation; see `Processor.streams`.

        Without `add_assistant_start` it is one to learn from, and spoken replies end as ours do, with text_eos.
        """
        if output not in ("text", "speech"):
            raise UserError(f"output '{output}' must be 'text' or 'speech'.")
        ids, blank = self.ids, self.ids["text_blank"]
        streams, clips = Streams(), 0
        for role, parts, where in _turns(messages, ("user", "assistant")):
            streams.add(ids[f"{role}_start"], blank)
            if role == "assistant" and any(part.get("type") == "audio" for part in parts):
                if not add_assistant_start:
                    clips += self._spoken(streams, clips, parts, where)
                    continue
                clips += self._spoken_before(streams, clips, parts, where)
            else:
                for part in parts:
                    if part.get("type") == "text":
                        self._text(streams, part["text"], learn=role == "assistant")
                    elif part.get("type") == "audio":
                        self._audio(streams, clips, part)
                        clips += 1
                    else:
                        raise UserError(f"{where}: part type {part.get('type')!r} must be 'text' or 'audio'.")
                if parts[-1].get("type") == "audio":
                    streams.add(ids["continue_text" if output == "text" else "continue_speech"], blank)
            streams.add(ids["msg_end"], blank)
        if add_assistant_start:
            streams.add(ids["assistant_start"], blank)
        return streams

    def _spoken_before(self, streams: Streams, clip: int, parts: Sequence[dict[str, Any]], where: str) -> int:
        """Lays out a spoken reply of the history; returns how many recordings it has to be given."""
        kinds = [part.get("type") for part in parts]
        if kinds.count("audio") != 1 or set(kinds) - {"text", "audio"}:
            raise UserError(f"{where}: a spoken reply has text and one part of type 'audio'.")
        blank, part = self.ids["text_blank"], parts[kinds.index("audio")]
        said = [token for part in parts if part["type"] == "text" for token in self.tokenizer.encode(part["text"])]
        codes = part.get("codes")
        count = int(part["num_codes"]) if codes is None else len(codes)
        if len(said) > self.audio_delay + count:
            raise UserError(f"{where}: {len(said)} text tokens do not fit beside {count} codes of speech.")
        said += [blank] * (self.audio_delay + count - len(said))
        for step, token in enumerate(said):
            row = step - self.audio_delay
            if row < 0:
                streams.add(blank, token)
            elif codes is None:
                streams.add(self.ids["media_pad"], token, clip=clip, row=row)
            else:
                streams.add(self.vocab.audio_offset + int(codes[row]), token)
        return int(codes is None)

    def transcription(self, num_codes: int, text: str | None = None) -> Streams:
        """Lays out speech recognition of one clip, asked for in words; with `text`, the answer follows."""
        parts = [{"type": "text", "text": TRANSCRIBE}, {"type": "audio", "num_codes": num_codes}]
        streams = self.streams([{"role": "user", "content": parts}])
        if text is not None:
            self._text(streams, text, learn=True)
        return streams


class K2Processor(Processor):
    """Lays out conversations as the chat template of K2 does; everything lies in the text stream."""

    def streams(
        self, messages: Sequence[dict[str, Any]], *, output: str = "text", add_assistant_start: bool = True
    ) -> Streams:
        """Lays out a conversation; see `Processor.streams`. A user who types a marker gets its letters."""
        if output != "text":
            raise UserError("this model answers in text only; output must be 'text'.")
        streams, items = Streams(), 0
        for role, parts, where in _turns(messages, ("system", "user", "assistant"), join=False):
            self._open(streams, role)
            for part in parts:
                kind = part.get("type")
                if kind == "text":
                    self._text(streams, part["text"], learn=role == "assistant")
                elif kind in ("image", "video") and self.vision is not None:
                    items = self._seen(streams, items, part)
                else:
                    raise UserError(f"{where}: this model cannot read a part of type {kind!r}.")
            self._add(streams, self.ids["msg_end"], learn=role == "assistant")
        if add_assistant_start:
            self._open(streams, "assistant")
        return streams

    def _open(self, streams: Streams, role: str) -> None:
        self._add(streams, self.vocab.special(f"{role}_start"))
        self._text(streams, role, learn=False)
        self._add(streams, self.vocab.special("message_middle"))

    def _add(self, streams: Streams, token: int, *, learn: bool = False) -> None:
        if learn:
            streams.text_labels[-1] = token
        streams.add(token, token)

    def _text(self, streams: Streams, text: str, *, learn: bool) -> None:
        for token in self.tokenizer.encode(text):
            self._add(streams, token, learn=learn)

    def _seen(self, streams: Streams, item: int, part: dict[str, Any]) -> int:
        item = super()._seen(streams, item, part)
        if part["type"] == "image":
            self._text(streams, "\n", learn=False)
        return item

    def _mark(self, streams: Streams, name: str, count: int = 1, *, item: int = -1) -> None:
        streams.fill(self.ids[name], self.ids[name], count, item=item)


def _turns(
    messages: Sequence[dict[str, Any]], roles: tuple[str, ...], join: bool = True
) -> Iterator[tuple[str, list[dict[str, Any]], str]]:
    """Yields (role, parts, place); with `join`, messages of one role in a row make one turn."""
    turn: list[dict[str, Any]] = []
    last, where = "", ""
    for number, message in enumerate(messages):
        role, parts = message.get("role"), message.get("content")
        if role not in roles:
            raise UserError(f"message {number}: role {role!r} must be one of {', '.join(roles)} for this model.")
        if isinstance(parts, str):
            parts = [{"type": "text", "text": parts}]
        if not isinstance(parts, list) or not parts:
            raise UserError(f"message {number}: content must be a text or a non-empty list of parts.")
        if turn and (role != last or not join):
            yield last, turn, where
            turn = []
        if not turn:
            where = f"message {number}"
        turn, last = [*turn, *parts], role
    if turn:
        yield last, turn, where
