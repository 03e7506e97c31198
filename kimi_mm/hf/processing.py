"""Messages to the tensors that `KimiMMForConditionalGeneration` takes, and ids back to text."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature

from kimi_mm.audio.io import read_audio, to_mono_16k
from kimi_mm.config import ModelConfig
from kimi_mm.conversion.hub import locate
from kimi_mm.conversion.load import text_tokenizer
from kimi_mm.errors import UserError
from kimi_mm.hf.configuration import KimiMMConfig
from kimi_mm.processing_published import processor_for
from kimi_mm.text.tokenizer import TextTokenizer


class KimiMMProcessor:
    """Lays out conversations with text, recordings, pictures and clips.

    Args:
        config: of the model.
        tokenizer: of the text.
        folder: where the vocabulary came from; `save_pretrained` copies it.
    """

    def __init__(self, config: ModelConfig, tokenizer: TextTokenizer, folder: Path) -> None:
        self.config, self.tokenizer, self.folder = config, tokenizer, folder
        self.processor = processor_for(config, tokenizer)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> KimiMMProcessor:
        """Reads config and vocabulary of a folder or a repository."""
        folder = locate(pretrained_model_name_or_path)
        config = KimiMMConfig.from_pretrained(folder).model_config
        return cls(config, text_tokenizer(folder, config, own=config.vocab.special_ids is None), folder)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Copies the vocabulary."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.json", "tiktoken.model", "tokenizer_config.json"):
            if (self.folder / name).is_file():
                shutil.copy(self.folder / name, Path(save_directory) / name)

    def __call__(
        self, conversation: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]], **options: Any
    ) -> BatchFeature:
        """Lays out one conversation or a batch of them.

        Args:
            conversation: OpenAI-style messages; recordings are {"type": "audio", "audio": path, bytes or samples at
                16 kHz}, pictures {"type": "image", "image": ...}, clips {"type": "video", "video": ...}. A message that
                is a recording alone asks for its transcript.

        Returns:
            input_ids, audio_ids and attention_mask [B, T], and where there are any, waves [C, S], wave_lengths [C],
            clip_at [C], pixel_values, grid_thw and vision_at.

        Raises:
            UserError: on something that cannot be laid out or read.
        """
        if not conversation:
            raise UserError("the conversation is empty.")
        batch: Any = [conversation] if isinstance(conversation[0], dict) else conversation
        rows, items, waves = [], [], []
        for messages in batch:
            seen, looked = self.processor.see([self._listen(message, waves) for message in messages])
            rows.append(self.processor.streams(seen))
            items.append(looked)
        inputs = self.processor.collate(rows, [[] for _ in rows], items)
        width = inputs.text_ids.shape[1]
        mask = (torch.arange(width) < inputs.lengths[:, None]).long()
        data: dict[str, Any] = {
            "input_ids": inputs.text_ids,
            "audio_ids": inputs.audio_ids,
            "attention_mask": mask,
            "pixel_values": inputs.pixel_values,
            "grid_thw": inputs.grid_thw,
            "vision_at": inputs.vision_at,
        }
        if waves:
            longest = max(len(wave) for wave in waves)
            data["waves"] = torch.from_numpy(np.stack([np.pad(wave, (0, longest - len(wave))) for wave in waves]))
            data["wave_lengths"] = torch.tensor([len(wave) for wave in waves])
            data["clip_at"] = torch.tensor(
                [
                    number * width + place
                    for number, row in enumerate(rows)
                    for place, at in enumerate(row.clip_row)
                    if at == 0
                ]
            )
        return BatchFeature({name: value for name, value in data.items() if value is not None})

    def decode(self, ids: torch.Tensor | Sequence[int], **options: Any) -> str:
        """Returns the text of ids; special ids are skipped."""
        return self.tokenizer.decode(ids.tolist() if isinstance(ids, torch.Tensor) else ids)

    def batch_decode(self, ids: torch.Tensor | Sequence[Sequence[int]], **options: Any) -> list[str]:
        """Returns the text of every row."""
        return [self.decode(row) for row in ids]

    def _listen(self, message: dict[str, Any], waves: list[np.ndarray]) -> dict[str, Any]:
        parts = message.get("content")
        if not isinstance(parts, list):
            return message
        laid_out = []
        for part in parts:
            if part.get("type") == "audio":
                source = part.get("audio")
                if source is None:
                    raise UserError("a part of type 'audio' needs a key 'audio' with the recording.")
                if isinstance(source, (str, Path, bytes)):
                    wave = read_audio(source)[0]
                else:
                    wave = to_mono_16k(source, int(part.get("sample_rate", 16_000)))
                waves.append(np.asarray(wave, np.float32))
                part = {"type": "audio", "num_codes": -(-len(wave) // self.config.audio.samples_per_code)}
            laid_out.append(part)
        return {**message, "content": laid_out}
