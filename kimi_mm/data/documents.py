"""From a row of data to a document: two streams with labels, the codes of its recordings, the patches of its pictures.

    Row ─► parse ─► hear recordings, read pictures and clips ─► layout ─► Document

A layout decides what the model reads and what it learns to write; see `DataSourceConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kimi_mm.data.conversations import Part, kinds_of, parse_conversation, parse_document
from kimi_mm.data.rows import Row, RowError, Source
from kimi_mm.processing import IGNORE, AudioClip, Processor, Streams
from kimi_mm.vision.processing import VisionItem

Hear = Callable[[Source], AudioClip]
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
        if layout == "conversation":
            messages = parse_conversation(row)
        elif layout == "document":
            messages = [{"role": "assistant", "content": parse_document(row)}]
        else:
            messages = _pair(parse_document(row), layout.removesuffix("_to_text"))
        kinds = set().union(*(kinds_of(message["content"]) for message in messages))
        group = "text" if not kinds else kinds.pop() if len(kinds) == 1 else "mixed"
        seen, items = self.processor.see(messages)
        clips: list[AudioClip] = []
        spoken = False
        for message in seen:
            says = layout != "document" and message["role"] == "assistant"
            spoken |= says and "audio" in kinds_of(message["content"])
            parts = _joined(message["content"]) if says else message["content"]
            message["content"] = [self._heard(part, clips, learn=says) for part in parts]
        if layout == "document":
            streams = self.processor.document(seen[0]["content"])
        else:
            output = "speech" if spoken else "text"
            streams = self.processor.streams(seen, output=output, add_assistant_start=False)
        document = Document(streams, clips, items, group)
        if not document.learns:
            raise RowError("nothing to learn: no text of the assistant, or of the document", "add one")
        return document

    def _heard(self, part: Part, clips: list[AudioClip], learn: bool) -> dict[str, Any]:
        if part["type"] != "audio":
            return part
        if learn and not self.speaks:
            raise RowError("the assistant speaks, but the model has no audio head", "take a model that has one")
        clip = self.hear(part["audio"])
        clips.append(AudioClip(clip.codes) if learn else clip)
        return {"type": "audio", "num_codes": len(clip.codes)}


def _joined(parts: list[Part]) -> list[Part]:
    """Joins the texts of an answer, since `text_eos` stands once, at its end; its speech follows."""
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    spoken = [part for part in parts if part["type"] != "text"]
    if len(spoken) > 1:
        raise RowError("an answer with more than one recording", "join them into one file")
    return [*([{"type": "text", "text": text}] if text else []), *spoken]


def _pair(parts: list[Part], kind: str) -> list[dict[str, Any]]:
    """A medium and a text to a question without words and its answer."""
    media, texts = [p for p in parts if p["type"] != "text"], [p for p in parts if p["type"] == "text"]
    if len(media) != 1 or media[0]["type"] != kind or len(texts) != 1:
        raise RowError(f"not one '{kind}' and one 'text'", "use layout 'document' for anything else")
    return [{"role": "user", "content": media}, {"role": "assistant", "content": texts}]
