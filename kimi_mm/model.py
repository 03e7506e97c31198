"""The joint model, read top to bottom: audio tokenizer, eyes and backbone, and how a batch flows through them.

    wave [B, S] ─► AudioTokenizer ─► codes [B, N], features [B, N, F]
                                          │ placed at the clip's positions
    text_ids [B, T] ─┐                    ▼
    audio_ids [B, T] ┴─► Backbone.embed ─► x [B, T, D] ─► trunk ─► text branch ─► text logits [B, T, V]
                      ▲                                        └─► audio branch ─► audio logits [B, T, V]
                      │ in place of the embeddings at the media pads
    pixel_values [P, 3, p, p] ─► VisionEncoder ─► rows [M, D]

Shapes: B rows, T positions, N codes, F feature width, D hidden size, V vocabulary, S samples at 16 kHz, P patches,
p pixels a side of a patch, M vision rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from kimi_mm.audio.detokenizer import Detokenizer
from kimi_mm.audio.tokenizer import AudioTokenizer
from kimi_mm.config import ModelConfig
from kimi_mm.errors import UserError
from kimi_mm.processing import ModelInputs
from kimi_mm.text.backbone import Backbone
from kimi_mm.text.cache import BackboneCache
from kimi_mm.vision.encoder import VisionEncoder


@dataclass
class ModelOutput:
    """Hidden states after the final norm of each branch, [B, T, D]; `audio_hidden` None where it did not run."""

    text_hidden: torch.Tensor
    audio_hidden: torch.Tensor | None


class Model(nn.Module):
    """Audio tokenizer, eyes and backbone behind one forward; `vision` and `detokenizer` (voice) may be None.

    A model that does not hear has no `audio`, and reads the text stream alone.

    Args:
        config: sizes of all parts; `config.backbone.vocab_size` covers text, special ids and audio codes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        if config.hears:
            self.audio = AudioTokenizer(config.audio)
        self.backbone = Backbone(config.backbone)
        self.vision = None if config.vision is None else VisionEncoder(config.vision)
        self.detokenizer = None if config.detokenizer is None else Detokenizer(config.detokenizer)

    def forward(self, inputs: ModelInputs, cache: BackboneCache | None = None) -> ModelOutput:
        """Runs the backbone over a batch whose codes and features are already in place.

        Args:
            inputs: ids [B, T], `lengths` [B] or `cu_seqlens`, features [B, T, F] where `feature_mask` [B, T] is set,
                pictures.
            cache: continues earlier positions and is updated in place; None starts afresh and keeps nothing.

        Raises:
            UserError: pictures for a model without eyes, or more or fewer rows than placeholders.
        """
        lengths = None if inputs.cu_seqlens is not None else inputs.lengths
        output = self.backbone(self.embed(inputs), lengths=lengths, cu_seqlens=inputs.cu_seqlens, cache=cache)
        return ModelOutput(output.text_hidden, output.audio_hidden)

    def embed(self, inputs: ModelInputs) -> torch.Tensor:
        """Returns what the backbone reads, [B, T, D]: ids, features, and the rows of pictures in their places."""
        audio_ids = inputs.audio_ids if self.config.hears else None
        features = inputs.features if inputs.clip_waves is None else self.hear(inputs)
        x = self.backbone.embed(inputs.text_ids, audio_ids, features, inputs.feature_mask)
        if inputs.vision_at is None:
            return x
        rows = self.see(inputs) if inputs.vision_rows is None else inputs.vision_rows
        if len(rows) != len(inputs.vision_at):
            raise UserError(f"the pictures make {len(rows)} rows, the prompt has {len(inputs.vision_at)} placeholders.")
        return x.flatten(0, 1).index_copy(0, inputs.vision_at, rows.to(x.dtype)).view_as(x)

    def hear(self, inputs: ModelInputs) -> torch.Tensor:
        """Runs the feature encoder over the recordings of a batch: features [B, T, F] in their places."""
        assert inputs.clip_waves is not None
        assert inputs.clip_rows is not None
        assert inputs.clip_at is not None
        rows = self.audio.feature_rows(inputs.clip_waves).flatten(0, 1).index_select(0, inputs.clip_rows)
        batch, positions = inputs.text_ids.shape
        empty = rows.new_zeros(batch * positions, rows.shape[-1])
        return empty.index_copy(0, inputs.clip_at, rows).view(batch, positions, -1)

    def see(self, inputs: ModelInputs) -> torch.Tensor:
        """Runs the eyes over all pictures and chunks of a batch: rows [M, D] in the order of `vision_at`."""
        if self.vision is None:
            raise UserError("the model has no eyes, its config has no section 'vision'.")
        if inputs.pixel_values is None or inputs.grid_thw is None:
            raise UserError("the prompt has placeholders for pictures, but there are no pictures.")
        return torch.cat(self.vision(inputs.pixel_values, inputs.grid_thw))

    def step(self, text_ids: torch.Tensor, audio_ids: torch.Tensor, cache: BackboneCache) -> ModelOutput:
        """Decodes one position: ids [B] of both streams to hidden states [B, 1, D]."""
        x = self.backbone.embed(text_ids[:, None], audio_ids[:, None] if self.config.hears else None)
        output = self.backbone(x, cache=cache)
        return ModelOutput(output.text_hidden, output.audio_hidden)
