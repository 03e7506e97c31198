"""The joint model, read top to bottom: audio tokenizer and backbone, and how a batch flows through them.

    wave [B, S] ─► AudioTokenizer ─► codes [B, N], features [B, N, F]
                                          │ placed at the clip's positions
    text_ids [B, T] ─┐                    ▼
    audio_ids [B, T] ┴─► Backbone.embed ─► x [B, T, D] ─► trunk ─► text branch ─► text logits [B, T, V]
                                                               └─► audio branch ─► audio logits [B, T, V]

Shapes: B rows, T positions, N codes, F feature width, D hidden size, V vocabulary, S samples at 16 kHz.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from kimi_mm.audio.tokenizer import AudioTokenizer
from kimi_mm.config import ModelConfig
from kimi_mm.processing import ModelInputs
from kimi_mm.text.backbone import Backbone
from kimi_mm.text.cache import BackboneCache


@dataclass
class ModelOutput:
    """Hidden states after the final norm of each branch, [B, T, D]; `audio_hidden` is None without an audio branch."""

    text_hidden: torch.Tensor
    audio_hidden: torch.Tensor | None


class Model(nn.Module):
    """Audio tokenizer and backbone behind one forward.

    Args:
        config: sizes of all parts; `config.backbone.vocab_size` covers text, special ids and audio codes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.audio = AudioTokenizer(config.audio)
        self.backbone = Backbone(config.backbone)

    def forward(self, inputs: ModelInputs, cache: BackboneCache | None = None) -> ModelOutput:
        """Runs the backbone over a batch whose codes and features are already in place.

        Args:
            inputs: ids [B, T], `lengths` [B], features [B, T, F] where `feature_mask` [B, T] is set.
            cache: continues earlier positions and is updated in place; None starts afresh and keeps nothing.
        """
        x = self.backbone.embed(inputs.text_ids, inputs.audio_ids, inputs.features, inputs.feature_mask)
        output = self.backbone(x, lengths=inputs.lengths, cache=cache)
        return ModelOutput(output.text_hidden, output.audio_hidden)

    def step(self, text_ids: torch.Tensor, audio_ids: torch.Tensor, cache: BackboneCache) -> ModelOutput:
        """Decodes one position: ids [B] of both streams to hidden states [B, 1, D]."""
        x = self.backbone.embed(text_ids[:, None], audio_ids[:, None], None, None)
        output = self.backbone(x, cache=cache)
        return ModelOutput(output.text_hidden, output.audio_hidden)
