"""Attention over patches: the weights of the real layers, and the picture made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from kimi_mm.config import GQAConfig
from kimi_mm.errors import UserError
from kimi_mm.model import Model
from kimi_mm.pipeline import KimiMM
from kimi_mm.vision.explain import _queries_keys, attention_over_items, draw_attention

PICTURE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)


@pytest.fixture(scope="module", params=["mla/moe", "gqa/dense"])
def engine(request, seeing):
    config = seeing.config
    backbone = config.backbone.replace(text_branch=(request.param,), gqa=GQAConfig(head_dim=16))
    torch.manual_seed(0)
    return KimiMM(Model(config.replace(backbone=backbone)), seeing.processor.tokenizer)


def test_weights_are_those_of_the_layer(engine, monkeypatch):
    """Queries and keys that are recomputed meet the ones that the layer hands to the attention."""
    compared = []

    def watch(q, k, v, *args, **kwargs):
        compared.append((q[0].transpose(0, 1), k[0].transpose(0, 1)))
        return real(q, k, v, *args, **kwargs)

    real = F.scaled_dot_product_attention
    layer = engine.model.backbone.text.layers[0].mixer
    recomputed = []
    hook = layer.register_forward_pre_hook(lambda module, args: recomputed.append(_queries_keys(module, *args[:2])))
    inputs = engine.question_inputs(engine.look(PICTURE), "What?")
    inputs.pixel_values = inputs.pixel_values[:0]
    with torch.no_grad():
        inputs.vision_rows = torch.randn(len(inputs.vision_at), 32)
        monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
        engine.model(inputs)
    hook.remove()
    for ours, theirs in zip(recomputed[0], compared[-1], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_maps(engine):
    items = engine.look([PICTURE, PICTURE[:28, :28]])
    attention = attention_over_items(engine, items, "What is red?", "red dogs")
    assert attention.words == ["red", "dogs"]
    assert [maps.shape for maps in attention.maps] == [(2, 3, 4), (2, 1, 1)]
    np.testing.assert_allclose(sum(maps.sum((1, 2)) for maps in attention.maps), 1, atol=1e-5)
    assert all((maps > 0).all() for maps in attention.maps)
    alone = attention_over_items(engine, items, "What is red?", "red")
    np.testing.assert_allclose(alone.maps[0][0], attention.maps[0][0], atol=1e-5)  # later words change nothing


def test_picture(engine, tmp_path):
    items = engine.look([PICTURE, PICTURE[:28, :28]])
    attention = attention_over_items(engine, items, "What?", "red dogs")
    draw_attention(tmp_path / "out.png", items, attention, title="What?", caption="red dogs")
    with Image.open(tmp_path / "out.png") as image:
        assert image.width > image.height > 300
        assert len(set(np.asarray(image.convert("L")).ravel().tolist())) > 50
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_nothing_to_explain(engine, seeing):
    items = engine.look(PICTURE)
    with pytest.raises(UserError, match="answer is empty"):
        attention_over_items(engine, items, "What?", "")
    config = seeing.config
    backbone = config.backbone.replace(text_branch=("kda/dense",))
    recurrent = KimiMM(Model(config.replace(backbone=backbone)), seeing.processor.tokenizer)
    with pytest.raises(UserError, match="no layer of this backbone"):
        attention_over_items(recurrent, items, "What?", "red")
