"""From a row of data to a document: two streams with labels, the codes of its recordings, the patches of its pictures.

    Row ─► parse ─► hear recordings, read pictures and clips ─► layout ─► Document

A layout decides what the model reads and what it learns to write; see `DataSourceConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kimi_mm.data.conversations import Part, kinds_of, parse_conversation, parse_document, parse_segments
from kimi_mm.data.document_config import INTERLEAVED, PAIRS
from kimi_mm.data.rows import Row, RowError, Source
from kimi_mm.processing import IGNORE, AudioClip, Processor, Streams
from kimi_mm.vision.processing import VisionItem

Hear = Callable[[Source], AudioClip]
_Laid = tuple[Streams, list[AudioClip], list[VisionItem], str]
GROUPS = ("text", "audio", "image", "video", "mixed")


@dataclass(frozen=True)
class Document:
    """One sample as the model takes it; `group` names the media that it holds, one of `GROUPS`."""

    streams: Streams
    clips: list[AudioClip]
    items: list[VisionItem]
    group: str

    def __len__(self) -> int:
        return len(self.streams)

    @property
    def learns(self) -> bool:
        """Whether any position has a label."""
        spoken = any(clip.features is None for clip in self.clips)
        return spoken or any(label != IGNORE for label in (*self.streams.text_labels, *self.streams.audio_labels))


class DocumentMaker:
    """Makes documents for one model.

    Args:
        processor: of the model; its `vision` is None for one without eyes.
        hear: from a recording to its codes and features, see `AudioCache`.
        speaks: whether the model has an audio head, so that it can learn speech.
    """

    def __init__(self, processor: Processor, hear: Hear, speaks: bool = False) -> None:
        self.processor, self.hear, self.speaks = processor, hear, speaks

    def make(self, row: Row, layout: str = "conversation") -> Document:
        """Lays out a row.

        Args:
            row: of `open_rows`.
            layout: one of `document_config.LAYOUTS`.

        Raises:
            UserError: the row, or one of its media, cannot be used by this model.
        """
        if layout == "conversation" or layout in PAIRS:
            messages = parse_conversation(row) if layout == "conversation" else _pair(parse_document(row), layout)
            return self._checked(*self._conversation(messages))
        return self._checked(*self._document(_ordered(row, layout)))

    def _conversation(self, messages: list[dict[str, Any]]) -> _Laid:
        clips: list[AudioClip] = []
        group = _group([part for message in messages for part in message["content"]])
        seen, items = self.processor.see(messages)
        spoken = False
        for message in seen:
            says = message["role"] == "assistant"
            spoken |= says and "audio" in kinds_of(message["content"])
            parts = _joined(message["content"]) if says else message["content"]
            message["content"] = [self._heard(part, clips, learn=says) for part in parts]
        output = "speech" if spoken else "text"
        return self.processor.streams(seen, output=output, add_assistant_start=False), clips, items, group

    def _document(self, parts: list[Part]) -> _Laid:
        clips: list[AudioClip] = []
        group = _group(parts)
        (seen,), items = self.processor.see([{"role": "assistant", "content": parts}])
        laid = [self._heard(part, clips, learn=bool(part.get("learn"))) for part in seen["content"]]
        return self.processor.document(laid), clips, items, group

    def _checked(self, streams: Streams, clips: list[AudioClip], items: list[VisionItem], group: str) -> Document:
        document = Document(streams, clips, items, group)
        if not document.learns:
            raise RowError("nothing to learn: no text of the assistant, or of the document", "add one")
        return document

    def _heard(self, part: Part, clips: list[AudioClip], learn: bool) -> dict[str, Any]:
        if part["type"] not in ("audio", "spoken"):
            return part
        learn = learn or part["type"] == "spoken"
        if learn and not self.speaks:
            raise RowError("there is speech to learn, but the model has no audio head", "take a model that has one")
        clip = self.hear(part["audio"])
        clips.append(AudioClip(clip.codes) if learn else clip)
        return {**part, "num_codes": len(clip.codes), "learn": learn}


def _group(parts: list[Part]) -> str:
    kinds = kinds_of(parts) | ({"audio"} if any(part["type"] == "spoken" for part in parts) else set())
    return "text" if not kinds else kinds.pop() if len(kinds) == 1 else "mixed"


def _ordered(row: Row, layout: str) -> list[Part]:
    """Returns the parts of a document in the order in which the model reads them, `learn` where a layout says so."""
    if layout not in INTERLEAVED:
        parts = parse_document(row)
        if layout == "document":
            return parts
        kinds = sorted(part["type"] for part in parts)
        if layout == "audio":
            if set(kinds) != {"audio"}:
                raise RowError(f"layout 'audio' with {' and '.join(kinds)}", "give recordings alone")
            return [{**part, "learn": True} for part in parts]
        if kinds != ["audio", "text"]:
            raise RowError("not one 'audio' and one 'text'", "use layout 'document' for anything else")
        by_kind = {part["type"]: part for part in parts}
        return [{**by_kind["text"], "learn": False}, {**by_kind["audio"], "learn": True}]
    parts = []
    for number, (audio, text) in enumerate(parse_segments(row)):
        if number % 2 == 0:
            parts.append(audio)
        elif layout == "interleaved_text":
            parts.append(text)
        elif layout == "interleaved_codes":
            parts.append({**audio, "learn": True})
        else:
            parts.append({"type": "spoken", "text": text["text"], "audio": audio["audio"]})
    return parts


def _joined(parts: list[Part]) -> list[Part]:
    """Joins the texts of an answer, since `text_eos` stands once, at its end; its speech follows."""
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    spoken = [part for part in parts if part["type"] != "text"]
    if len(spoken) > 1:
        raise RowError("an answer with more than one recording", "join them into one file")
    return [*([{"type": "text", "text": text}] if text else []), *spoken]


def _pair(parts: list[Part], layout: str) -> list[dict[str, Any]]:
    """A medium and a text to a question without words and its answer."""
    kind = layout.removesuffix("_to_text")
    media, texts = [p for p in parts if p["type"] != "text"], [p for p in parts if p["type"] == "text"]
    if len(media) != 1 or media[0]["type"] != kind or len(texts) != 1:
        raise RowError(f"not one '{kind}' and one 'text'", "use layout 'document' for anything else")
    return [{"role": "user", "content": media}, {"role": "assistant", "content": texts}]
