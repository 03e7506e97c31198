"""Messages to model inputs: streams as `kimi_mm.layout` lays them out, pictures and recordings, as tensors.

Shapes: T positions, N codes of one clip, F feature width, B rows, M vision rows, P patches, p pixels a side of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kimi_mm.config import VocabConfig
from kimi_mm.errors import UserError
from kimi_mm.layout import IGNORE as IGNORE
from kimi_mm.layout import Layout
from kimi_mm.layout import Streams as Streams
from kimi_mm.layout import timestamp as timestamp
from kimi_mm.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from kimi_mm.vision.processing import VisionItem, VisionProcessor

SAMPLES_PER_CODE = 1280  # at 16 kHz: 12.5 codes a second


@dataclass
class ModelInputs:
    """A right-padded batch: ids [B, T] int64, `lengths` [B], features [B, T, F] with `feature_mask` [B, T] bool.

    Pictures and chunks of the whole batch, row by row: `pixel_values` [P, 3, p, p], `grid_thw` [items, 3], which stays
    on the CPU, and `vision_at` [M] int64, the flat positions b * T + t that their rows take. `vision_rows` [M, D], when
    given, are rows computed before, and no pixels are needed. Labels [B, T] say what position t is to predict, IGNORE
    where nothing.

    Where features are to be learnt, `clip_waves` [segments, S] are the recordings of the whole batch, cut and padded to
    what the feature encoder reads at once; its rows `clip_rows` [N], counted over all segments, then stand at the flat
    positions `clip_at` [N] in the place of `features`.

    `cu_seqlens` [documents + 1] int32 marks B = 1 as a row of packed documents, which do not see each other.
    """

    text_ids: torch.Tensor
    audio_ids: torch.Tensor
    lengths: torch.Tensor
    features: torch.Tensor | None = None
    feature_mask: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
    grid_thw: torch.Tensor | None = None
    vision_at: torch.Tensor | None = None
    vision_rows: torch.Tensor | None = None
    clip_waves: torch.Tensor | None = None
    clip_rows: torch.Tensor | None = None
    clip_at: torch.Tensor | None = None
    text_labels: torch.Tensor | None = None
    audio_labels: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> ModelInputs:
        """Moves every tensor to a device, but for `grid_thw`, which the host reads."""
        tensors = {name: value for name, value in vars(self).items() if value is not None and name != "grid_thw"}
        return replace(self, **{name: move(tensor, device) for name, tensor in tensors.items()})


def move(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copies a tensor to a device; from the host to a GPU without waiting for what the GPU is at."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class AudioClip:
    """Tokenized audio: `codes` [N] int64 without offset, `features` [N, F]; None for what the assistant says.

    `segments` [segments, S], where features are to be learnt, are the recording as the feature encoder reads it.
    """

    codes: torch.Tensor
    features: torch.Tensor | None = None
    segments: torch.Tensor | None = None


class Processor(Layout):
    """Turns messages into the two streams, and the model's text ids back into text.

    Args:
        vocab: ids of the joint vocabulary.
        tokenizer: of the text.
        vision: reads pictures and clips; None for a model without eyes.
        audio_delay: steps by which the audio of a reply trails its text, `ModelConfig.audio_delay`.
    """

    def __init__(
        self,
        vocab: VocabConfig,
        tokenizer: TextTokenizer,
        vision: VisionProcessor | None = None,
        audio_delay: int = 6,
    ) -> None:
        super().__init__(vocab, tokenizer, audio_delay)
        self.vision = vision

    def see(self, messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[VisionItem]]:
        """Reads the pictures and clips of a conversation.

        Args:
            messages: as for `streams`, where {"type": "image", "image": source} and {"type": "video", "video": source}
                stand for files, bytes, PIL images or arrays (`kimi_mm.vision.processing`), and OpenAI's
                {"type": "image_url", "image_url": {"url": "data:..."}} is taken too.

        Returns:
            The messages with sizes in place of sources, and all pictures and chunks in order.

        Raises:
            ImageError: a picture or clip cannot be used.
            UserError: the model has no eyes, or a part has no source.
        """
        items: list[VisionItem] = []
        seen = []
        for number, message in enumerate(messages):
            parts = message.get("content")
            if isinstance(parts, list):
                parts = [self._look(part, f"message {number}", items) for part in parts]
            seen.append({**message, "content": parts})
        return seen, items

    def _look(self, part: dict[str, Any], where: str, items: list[VisionItem]) -> dict[str, Any]:
        kind = part.get("type")
        if kind not in ("image", "image_url", "video"):
            return part
        if self.vision is None:
            raise UserError(f"{where}: the model has no eyes, its config has no section 'vision'.")
        source = part.get(kind)
        if kind == "image_url" and isinstance(source, dict):
            source = source.get("url")
        if source is None:
            raise UserError(f"{where}: part of type '{kind}' needs a key '{kind}' with the file or picture.")
        found = self.vision.clip(source, fps=part.get("fps")) if kind == "video" else [self.vision.picture(source)]
        items.extend(found)
        if kind == "video":
            return {"type": "video", "chunks": [(item.seconds, item.num_tokens) for item in found]}
        return {"type": "image", "num_tokens": found[0].num_tokens}

    # ---- tensors -----------------------------------------------------------------------------------------------

    def collate(
        self,
        rows: Sequence[Streams],
        clips: Sequence[Sequence[AudioClip]],
        items: Sequence[Sequence[VisionItem]] | None = None,
    ) -> ModelInputs:
        """Pads rows on the right, fills in codes and features, and packs pictures.

        Args:
            rows: B conversations.
            clips: for each row, its clips in order; `codes` [N], `features` [N, F] or, of a reply, None.
            items: for each row, its pictures and chunks in order; None: there are none.

        Raises:
            UserError: a recording, picture or chunk and its placeholder have different sizes.
        """
        batch, longest = len(rows), max(len(row) for row in rows)
        text = torch.full((batch, longest), self.ids["pad"])
        audio = torch.full((batch, longest), self.ids["pad"])
        mask = torch.zeros(batch, longest, dtype=torch.bool)
        text_labels, audio_labels = torch.full_like(text, IGNORE), torch.full_like(text, IGNORE)
        width = next((clip.features.shape[-1] for row in clips for clip in row if clip.features is not None), 0)
        features = torch.zeros(batch, longest, width)
        waves: list[torch.Tensor] = []
        heard: list[tuple[torch.Tensor, torch.Tensor]] = []  # positions and rows of each of them
        for b, (row, row_clips) in enumerate(zip(rows, clips, strict=True)):
            length = len(row)
            text[b, :length] = torch.tensor(row.text)
            audio[b, :length] = torch.tensor(row.audio)
            text_labels[b, :length] = torch.tensor(row.text_labels)
            audio_labels[b, :length] = torch.tensor(row.audio_labels)
            index, at = np.asarray(row.clip_index), np.asarray(row.clip_row)
            for number, clip in enumerate(row_clips):
                where = torch.from_numpy(np.flatnonzero(index == number))
                rows_of_clip = torch.from_numpy(at[index == number])
                if len(where) != len(clip.codes):
                    raise UserError(f"clip {number} has {len(clip.codes)} codes, its placeholder {len(where)}.")
                audio[b, where] = self.vocab.audio_offset + clip.codes.cpu()[rows_of_clip]
                if clip.features is None:
                    audio_labels[b, where - 1] = audio[b, where]
                    continue
                features[b, where] = clip.features.cpu().float()[rows_of_clip]
                mask[b, where] = True
                if clip.segments is not None:
                    waves.append(clip.segments)
                    heard.append((where + b * longest, rows_of_clip))
        lengths = torch.tensor([len(row) for row in rows])
        inputs = ModelInputs(text, audio, lengths, features if width else None, mask if width else None)
        inputs.text_labels, inputs.audio_labels = text_labels, audio_labels
        if waves:
            firsts = np.cumsum([0, *(len(segments) for segments in waves)])
            per_segment = waves[0].shape[1] // SAMPLES_PER_CODE
            inputs.clip_waves = torch.cat(waves)
            inputs.clip_at = torch.cat([at for at, _ in heard])
            inputs.clip_rows = torch.cat(
                [rows + int(first) * per_segment for (_, rows), first in zip(heard, firsts, strict=False)]
            )
        return self._place_items(inputs, rows, items or [[] for _ in rows])

    @staticmethod
    def _place_items(
        inputs: ModelInputs, rows: Sequence[Streams], items: Sequence[Sequence[VisionItem]]
    ) -> ModelInputs:
        width, at, everything = inputs.text_ids.shape[1], [], []
        for b, (row, row_items) in enumerate(zip(rows, items, strict=True)):
            index = np.asarray(row.item_index)
            pads = np.flatnonzero(index >= 0)
            counts = np.bincount(index[pads]).tolist()
            if len(counts) != len(row_items):
                raise UserError(f"row {b} has placeholders for {len(counts)} pictures, and {len(row_items)} pictures.")
            for item, count in zip(row_items, counts, strict=True):
                if item.num_tokens != count:
                    raise UserError(f"{item.name} makes {item.num_tokens} rows, its placeholder has {count}.")
            at.append(pads + b * width)
            everything.extend(row_items)
        if everything:
            inputs.pixel_values = torch.cat([item.pixel_values for item in everything])
            inputs.grid_thw = torch.tensor([item.grid for item in everything])
            inputs.vision_at = torch.from_numpy(np.concatenate(at))
        return inputs
