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
    return KimiMM(model, tokenizer)


@pytest.fixture(scope="session")
def checkpoint(seeing, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "seeing"
    save_checkpoint(path, seeing.model, seeing.processor.tokenizer, weights="fp32")
    return path
