"""Settings that all tests share, and a model that only hears."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, by whichever test does it

# Tests run side by side; more threads than cores make them wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ears(tmp_path_factory) -> str:
    """The shipped model without eyes, voice and audio branch: what it says to pictures, and when it is to speak."""
    from kimi_mm.checkpoint import find_checkpoint, load_tensors, save_checkpoint
    from kimi_mm.config import ModelConfig
    from kimi_mm.model import Model
    from kimi_mm.text.tokenizer import TextTokenizer

    nano, folder = find_checkpoint("nano"), tmp_path_factory.mktemp("models") / "ears"
    config = ModelConfig.from_yaml(nano / "config.yaml")
    backbone = config.backbone.replace(audio_branch=(), audio_head=False)
    model = Model(config.replace(name="ears", vision=None, detokenizer=None, backbone=backbone))
    left = load_tensors(model, nano, spare=("vision.", "detokenizer.", "backbone.audio."))
    assert left == ["backbone.audio.", "detokenizer.", "vision."]
    save_checkpoint(folder, model, TextTokenizer.load(nano / "tokenizer.json"))
    return str(folder)
