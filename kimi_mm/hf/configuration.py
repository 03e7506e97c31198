"""`ModelConfig` as a transformers config: `config.json` holds it whole under "kimi_mm"."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from kimi_mm.config import ModelConfig


class KimiMMConfig(PreTrainedConfig):
    """Config of a model of this package.

    Args:
        kimi_mm: `ModelConfig.to_dict()`; None takes the defaults.
    """

    model_type = "kimi_mm"

    def __init__(self, kimi_mm: dict[str, Any] | None = None, **options: Any) -> None:
        config = ModelConfig() if kimi_mm is None else ModelConfig.from_dict(kimi_mm, "config.json: kimi_mm")
        self.kimi_mm = config.to_dict()
        self.vocab_size = config.vocab.size
        self.hidden_size = config.backbone.hidden_size
        options.setdefault("pad_token_id", config.vocab.special("pad"))
        options.setdefault("eos_token_id", config.vocab.special("text_eos"))
        options.setdefault("tie_word_embeddings", config.backbone.tie_word_embeddings)
        super().__init__(**options)

    @property
    def model_config(self) -> ModelConfig:
        """The config as this package's models take it."""
        return ModelConfig.from_dict(self.kimi_mm)
