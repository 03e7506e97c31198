"""Messages to model inputs: the only place that knows the prompt layout.

A prompt is two streams of equal length, an audio stream A and a text stream T; the idle stream holds `text_blank`
("_" below). The layout is Kimi-Audio's (technical report, section 3; see also docs/architecture.md):

    user text + audio of 3 codes, text wanted          assistant text
    A: user_start _  _  media_begin a0 a1 a2 media_end continue_text msg_end assistant_start | _  _  _
    T: _          t0 t1 _           _  _  _  _         _             _       _               | t0 t1 text_eos

Continuous features belong to the positions of the codes, row for row.

Shapes: T positions, N codes of one clip, F feature width, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kimi_mm.config import VocabConfig
from kimi_mm.errors import UserError
from kimi_mm.text.tokenizer import TextTokenizer

IGNORE = -100  # label of positions without loss


@dataclass
class Streams:
    """One conversation as Python lists, grown message by message.

    `clip_index[i]`/`clip_row[i]` tell which clip and which of its rows position i shows; -1 elsewhere.
    """

    audio: list[int] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    clip_index: list[int] = field(default_factory=list)
    clip_row: list[int] = field(default_factory=list)
    text_labels: list[int] = field(default_factory=list)

    def add(self, audio: int, text: int, *, label: int = IGNORE, clip: int = -1, row: int = -1) -> None:
        self.audio.append(audio)
        self.text.append(text)
        self.text_labels.append(label)
        self.clip_index.append(clip)
        self.clip_row.append(row)

    def __len__(self) -> int:
        return len(self.audio)


@dataclass
class ModelInputs:
    """A right-padded batch: ids [B, T] int64, `lengths` [B], features [B, T, F] with `feature_mask` [B, T] bool."""

    text_ids: torch.Tensor
    audio_ids: torch.Tensor
    lengths: torch.Tensor
    features: torch.Tensor | None = None
    feature_mask: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> ModelInputs:
        """Moves every tensor to a device."""
        moved = (t if t is None else t.to(device) for t in (self.features, self.feature_mask))
        return ModelInputs(self.text_ids.to(device), self.audio_ids.to(device), self.lengths.to(device), *moved)


@dataclass(frozen=True)
class AudioClip:
    """Tokenized audio: `codes` [N] int64 without offset, `features` [N, F]."""

    codes: torch.Tensor
    features: torch.Tensor


class Processor:
    """Turns messages into the two streams, and the model's text ids back into text."""

    def __init__(self, vocab: VocabConfig, tokenizer: TextTokenizer) -> None:
        self.vocab = vocab
        self.tokenizer = tokenizer
        self.ids = {name: vocab.special(name) for name in VocabConfig.SPECIALS}

    # ---- layout ------------------------------------------------------------------------------------------------

    def streams(
        self, messages: Sequence[dict[str, Any]], *, output: str = "text", add_assistant_start: bool = True
    ) -> Streams:
        """Lays out a conversation.

        Args:
            messages: dictionaries with `role` ("user", "assistant", "system") and `content`: a string or a list of
                parts, {"type": "text", "text": str} or {"type": "audio", "num_codes": int, "codes": optional ids}.
                Clips are numbered in the order in which they appear.
            output: "text", or "speech" for text and audio.
            add_assistant_start: end with the marker after which the model answers.

        Raises:
            UserError: on an unknown role, part type or output.
        """
        if output not in ("text", "speech"):
            raise UserError(f"output '{output}' must be 'text' or 'speech'.")
        ids, blank = self.ids, self.ids["text_blank"]
        streams, clips = Streams(), 0
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
            for part in parts:
                kind = part.get("type")
                if kind == "text":
                    self._text(streams, part["text"], learn=role == "assistant")
                elif kind == "audio":
                    self._audio(streams, clips, part)
                    clips += 1
                else:
                    raise UserError(f"message {number}: part type {kind!r} must be 'text' or 'audio'.")
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

    def _text(self, streams: Streams, text: str, *, learn: bool) -> None:
        # A label sits on the position that must predict it, one before the token itself.
        blank = self.ids["text_blank"]
        for token in [*self.tokenizer.encode(text), *([self.ids["text_eos"]] if learn else [])]:
            if learn:
                streams.text_labels[-1] = token
            streams.add(blank, token)

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

    # ---- tensors -----------------------------------------------------------------------------------------------

    def collate(self, rows: Sequence[Streams], clips: Sequence[Sequence[AudioClip]]) -> ModelInputs:
        """Pads rows on the right and fills in codes and features.

        Args:
            rows: B conversations.
            clips: for each row, its clips in order; `codes` [N], `features` [N, F].
        """
        batch, longest = len(rows), max(len(row) for row in rows)
        text = torch.full((batch, longest), self.ids["pad"])
        audio = torch.full((batch, longest), self.ids["pad"])
        mask = torch.zeros(batch, longest, dtype=torch.bool)
        width = next((clip.features.shape[-1] for row in clips for clip in row), 0)
        features = torch.zeros(batch, longest, width)
        for b, (row, row_clips) in enumerate(zip(rows, clips, strict=True)):
            length = len(row)
            text[b, :length] = torch.tensor(row.text)
            audio[b, :length] = torch.tensor(row.audio)
            index, at = np.asarray(row.clip_index), np.asarray(row.clip_row)
            for number, clip in enumerate(row_clips):
                where = torch.from_numpy(np.flatnonzero(index == number))
                rows_of_clip = torch.from_numpy(at[index == number])
                if len(where) != len(clip.codes):
                    raise UserError(f"clip {number} has {len(clip.codes)} codes, its placeholder {len(where)}.")
                audio[b, where] = self.vocab.audio_offset + clip.codes.cpu()[rows_of_clip]
                features[b, where] = clip.features.cpu().float()[rows_of_clip]
                mask[b, where] = True
        lengths = torch.tensor([len(row) for row in rows])
        return ModelInputs(text, audio, lengths, features if width else None, mask if width else None)
