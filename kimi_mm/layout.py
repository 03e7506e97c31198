"""The layout of prompts: messages to two streams of ids, without tensors.

A prompt is two streams of equal length, an audio stream A and a text stream T; the idle stream holds `text_blank`
("_" below). The layout is Kimi-Audio's (technical report, section 3; see also docs/architecture.md):

    user text + audio of 3 codes, text wanted          assistant text
    A: user_start _  _  media_begin a0 a1 a2 media_end continue_text msg_end assistant_start | _  _  _
    T: _          t0 t1 _           _  _  _  _         _             _       _               | t0 t1 text_eos

Continuous features belong to the positions of the codes, row for row.

A spoken reply is text and audio side by side, the audio some steps (`audio_delay`, here 2) behind the text:

    A: assistant_start _  _  a0       a1 a2 msg_end
    T: _               t0 t1 text_eos _  _  _

The model chooses all but the blanks; history and what is generated look the same.

Pictures and clips follow K2.5: a picture of n rows, and each chunk of a clip behind the time it starts at, are

    A: _ ...        media_begin _     media_content pad x n media_end
    T: 00:00:02.000 _           video _             _   x n _            ("image", and no time, for a picture)

The rows of the vision encoder stand at the pads in place of their embeddings; no pad ever carries a label.

Importing this takes no torch, so that processes which only prepare data start at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kimi_mm.config import VocabConfig
from kimi_mm.errors import UserError
from kimi_mm.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from kimi_mm.vision.processing import VisionItem

IGNORE = -100  # label of positions without loss


@dataclass
class Streams:
    """One conversation as Python lists, grown message by message.

    `clip_index[i]`/`clip_row[i]` tell which clip and which of its rows position i shows; -1 elsewhere. `item_index[i]`
    is the number of the picture or chunk whose rows, in order, lie at the positions that bear it; -1 elsewhere.
    """

    audio: list[int] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    clip_index: list[int] = field(default_factory=list)
    clip_row: list[int] = field(default_factory=list)
    text_labels: list[int] = field(default_factory=list)
    audio_labels: list[int] = field(default_factory=list)
    item_index: list[int] = field(default_factory=list)

    def add(self, audio: int, text: int, *, label: int = IGNORE, clip: int = -1, row: int = -1, item: int = -1) -> None:
        self.audio.append(audio)
        self.text.append(text)
        self.text_labels.append(label)
        self.audio_labels.append(IGNORE)
        self.clip_index.append(clip)
        self.clip_row.append(row)
        self.item_index.append(item)

    def fill(
        self, audio: int, text: int | list[int], count: int, *, labels: int | list[int] = IGNORE, item: int = -1
    ) -> None:
        """Appends `count` positions at once; each value is one for all of them, or a list."""
        for values, value in zip(vars(self).values(), (audio, text, -1, -1, labels, IGNORE, item), strict=True):
            values.extend(value if isinstance(value, list) else [value] * count)

    def extend(self, other: Streams) -> None:
        """Appends another conversation, whose clips, pictures and chunks are numbered after those that are here."""
        first = {name: max(getattr(self, name), default=-1) + 1 for name in ("clip_index", "item_index")}
        for name, values in vars(other).items():
            shift = first.get(name, 0)
            getattr(self, name).extend(value + shift if value >= 0 else value for value in values)

    def __len__(self) -> int:
        return len(self.audio)


class Layout:
    """Lays out conversations and documents.

    Args:
        vocab: ids of the joint vocabulary.
        tokenizer: of the text.
        audio_delay: steps by which the audio of a reply trails its text, `ModelConfig.audio_delay`.
    """

    def __init__(self, vocab: VocabConfig, tokenizer: TextTokenizer, audio_delay: int = 6) -> None:
        self.vocab = vocab
        self.tokenizer = tokenizer
        self.audio_delay = audio_delay
        self.ids = vocab.specials

    def streams(
        self, messages: Sequence[dict[str, Any]], *, output: str = "text", add_assistant_start: bool = True
    ) -> Streams:
        """Lays out a conversation.

        Args:
            messages: dictionaries with `role` ("user", "assistant", "system") and `content`: a string or a list of
                parts: {"type": "text", "text": str, "letters": optional, whether to write it letter by letter},
                {"type": "audio", "num_codes": int, "codes": optional ids},
                {"type": "image", "num_tokens": int}, {"type": "video", "chunks": [(seconds, num_tokens), ...]}.
                Recordings, and pictures and chunks together, are numbered in the order in which they appear. An
                assistant's audio is the speech of its text; with its codes given it is no recording. Where
                a text of such a reply has "ids", it stands as those, and the text of the reply is not learnt.
            output: "text", or "speech" for text and audio.
            add_assistant_start: end with the marker after which the model answers.

        Raises:
            UserError: on an unknown role, part type or output.
        """
        if output not in ("text", "speech"):
            raise UserError(f"output '{output}' must be 'text' or 'speech'.")
        ids, blank = self.ids, self.ids["text_blank"]
        streams, clips, items = Streams(), 0, 0
        for number, message in enumerate(messages):
            role = message.get("role")
            if role not in ("user", "assistant", "system"):
                raise UserError(f"message {number}: role {role!r} must be 'user', 'assistant' or 'system'.")
            parts = message.get("content")
            if isinstance(parts, str):
                parts = [{"type": "text", "text": parts}]
            if not isinstance(parts, list) or not parts:
                raise UserError(f"message {number}: content must be a text or a non-empty list of parts.")
            streams.add(ids[f"{role}_start"], blank)
            if role == "assistant" and any(part.get("type") == "audio" for part in parts):
                clips += self._spoken(streams, clips, parts, f"message {number}")
                continue
            for part in parts:
                kind = part.get("type")
                if kind == "text":
                    letters = bool(part.get("letters"))
                    self._text(streams, part["text"], learn=role == "assistant", letters=letters)
                elif kind == "audio":
                    self._audio(streams, clips, part)
                    clips += 1
                elif kind in ("image", "video"):
                    items = self._seen(streams, items, part)
                else:
                    raise UserError(
                        f"message {number}: part type {kind!r} must be 'text', 'audio', 'image' or 'video'."
                    )
            if parts[-1].get("type") == "audio" and role == "user":
                streams.add(ids["continue_text" if output == "text" else "continue_speech"], blank)
            streams.add(ids["msg_end"], blank)
        if add_assistant_start:
            streams.add(ids["assistant_start"], blank)
        return streams

    def transcription(self, num_codes: int, text: str | None = None) -> Streams:
        """Lays out speech recognition of one clip; with `text`, the answer follows and carries the labels."""
        streams = self.streams([{"role": "user", "content": [{"type": "audio", "num_codes": num_codes}]}])
        if text is not None:
            self._text(streams, text, learn=True)
        return streams

    def question(self, items: Sequence[VisionItem], question: str, answer: str | None = None) -> Streams:
        """Lays out a question about pictures and chunks; with `answer`, it follows and carries the labels."""
        parts: list[dict[str, Any]] = []
        for item in items:
            if item.seconds is None:
                parts.append({"type": "image", "num_tokens": item.num_tokens})
            else:
                parts.append({"type": "video", "chunks": [(item.seconds, item.num_tokens)]})
        streams = self.streams([{"role": "user", "content": [*parts, {"type": "text", "text": question}]}])
        if answer is not None:
            self._text(streams, answer, learn=True)
        return streams

    def document(self, parts: Sequence[dict[str, Any]]) -> Streams:
        """Lays out a document for pretraining.

        Args:
            parts: as for `streams`, in order. A key `learn` says whether a text (by default) or the codes of a
                recording (not by default) carry labels; of the latter collate wants clips without features.
                {"type": "spoken", "text": str, "num_codes": int} is text and speech side by side, as in a reply.

        Returns:
            Streams that start with `assistant_start`, as the model writes them; `text_eos` ends them where they end
            with a text.
        """
        streams, clips, items = Streams(), 0, 0
        streams.add(self.ids["assistant_start"], self.ids["text_blank"])
        for number, part in enumerate(parts):
            if part["type"] == "text":
                self._text(streams, part["text"], learn=part.get("learn", True), end=number == len(parts) - 1)
            elif part["type"] == "audio":
                self._audio(streams, clips, part)
                if part.get("learn"):
                    streams.audio_labels[-2] = self.ids["media_end"]
                clips += 1
            elif part["type"] == "spoken":
                said = {"type": "text", "text": part["text"]}
                clips += self._spoken(streams, clips, [said, {"type": "audio", "num_codes": part["num_codes"]}], "part")
            else:
                items = self._seen(streams, items, part)
        return streams

    def _text(self, streams: Streams, text: str, *, learn: bool, end: bool = True, letters: bool = False) -> None:
        # A label sits on the position that must predict it, one before the token itself.
        encode = self.tokenizer.encode_letters if letters else self.tokenizer.encode
        tokens = [*encode(text), *([self.ids["text_eos"]] if learn and end else [])]
        if not tokens:
            return
        labels = [*tokens[1:], IGNORE] if learn else IGNORE
        if learn:
            streams.text_labels[-1] = tokens[0]
        streams.fill(self.ids["text_blank"], tokens, len(tokens), labels=labels)

    def _spoken(self, streams: Streams, clip: int, parts: Sequence[dict[str, Any]], where: str) -> int:
        """Lays out a reply of text and speech, msg_end included; returns how many recordings it has to be given.

        Speech that ends before its text (its budget was spent) waits in blanks, and its end is not learnt.
        """
        kinds = [part.get("type") for part in parts]
        if kinds.count("audio") != 1 or set(kinds) - {"text", "audio"}:
            raise UserError(f"{where}: a spoken reply has text and one part of type 'audio'.")
        blank, part = self.ids["text_blank"], parts[kinds.index("audio")]
        texts = [part for part in parts if part["type"] == "text"]
        given = any("ids" in part for part in texts)
        if given:
            each = (part["ids"] if "ids" in part else self.tokenizer.encode(part["text"]) for part in texts)
            said = [*itertools.chain.from_iterable(each), self.ids["text_eos"]]
        else:
            said = [*self.tokenizer.encode(" ".join(part["text"] for part in texts)), self.ids["text_eos"]]
        codes = part.get("codes")
        count = int(part["num_codes"]) if codes is None else len(codes)
        if count < 1:
            raise UserError(f"{where}: a spoken reply needs at least one code.")
        end = self.audio_delay + count
        for step in range(max(end, len(said))):
            row, token, place = step - self.audio_delay, blank, {}
            if 0 <= row < count and codes is not None:
                streams.audio_labels[-1] = token = self.vocab.audio_offset + int(codes[row])
            elif 0 <= row < count:
                token, place = self.ids["media_pad"], {"clip": clip, "row": row}
            if step < len(said) and not given:
                streams.text_labels[-1] = said[step]
            streams.add(token, said[step] if step < len(said) else blank, **place)
        if end >= len(said):
            streams.audio_labels[-1] = self.ids["msg_end"]
        streams.add(self.ids["msg_end"], blank)
        return int(codes is None)

    def _audio(self, streams: Streams, clip: int, part: dict[str, Any]) -> None:
        blank, num_codes = self.ids["text_blank"], int(part["num_codes"])
        if num_codes < 1:
            raise UserError(f"audio part {clip}: a clip needs at least one code, got {num_codes}.")
        codes = part.get("codes")
        streams.add(self.ids["media_begin"], blank)
        for row in range(num_codes):
            code = self.ids["media_pad"] if codes is None else self.vocab.audio_offset + int(codes[row])
            streams.add(code, blank, clip=clip, row=row)
        streams.add(self.ids["media_end"], blank)

    def _seen(self, streams: Streams, item: int, part: dict[str, Any]) -> int:
        """Lays out a picture or a clip whose first item is number `item`; returns the number of the next one."""
        chunks = part.get("chunks", []) if part["type"] == "video" else [(None, part.get("num_tokens", 0))]
        if not chunks or min(count for _, count in chunks) < 1:
            raise UserError(f"{part['type']} part {item}: its size is not known; pass the messages to `see` first.")
        for seconds, count in chunks:
            if seconds is not None:
                self._text(streams, timestamp(seconds), learn=False)
            self._mark(streams, "media_begin")
            self._text(streams, part["type"], learn=False)
            self._mark(streams, "media_content")
            self._mark(streams, "media_pad", count, item=item)
            self._mark(streams, "media_end")
            item += 1
        return item

    def _mark(self, streams: Streams, name: str, count: int = 1, *, item: int = -1) -> None:
        """Appends a special id `count` times."""
        streams.fill(self.ids[name], self.ids["text_blank"], count, item=item)


def timestamp(seconds: float) -> str:
    """Returns HH:MM:SS.mmm as published: milliseconds are cut off, not rounded."""
    whole = int(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}.{int(seconds % 1 * 1000):03d}"
