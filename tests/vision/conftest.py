"""A tiny untrained model with eyes, as an object and as a checkpoint folder."""

from __future__ import annotations

import pytest
import torch

from kimi_mm.checkpoint import save_checkpoint
from kimi_mm.config import ModelConfig
from kimi_mm.model import Model
from kimi_mm.pipeline import KimiMM
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.training.recipe import recipes_root
from tests.vision.tiny import EYES, shaken


@pytest.fixture(scope="session")
def seeing() -> KimiMM:
    torch.manual_seed(1)
    config = ModelConfig.from_yaml(recipes_root() / "models" / "debug.yaml").replace(name="seeing", vision=EYES)
    tokenizer = TextTokenizer.train(["What is in the image? a video of 0123456789:. red dogs"] * 9, 384)
    model = Model(config)
    assert model.vision is not None
    shaken(model.vision)
    shaken(model.backbone, seed=1)
    # Of random ids, most would be halves of characters or nothing at all; letters shall win.
    table = model.backbone.embed_tokens.weight
    silent = [i for i in range(384) if not tokenizer.decode([i]).isascii() or not tokenizer.decode([i]).isprintable()]
    with torch.no_grad():
        table[[*silent, *range(len(tokenizer), 384), config.vocab.special("text_eos")]] *= 0.1
    return KimiMM(model, tokenizer)


@pytest.fixture(scope="session")
def checkpoint(seeing, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "seeing"
    save_checkpoint(path, seeing.model, seeing.processor.tokenizer, weights="fp32")
    return path
