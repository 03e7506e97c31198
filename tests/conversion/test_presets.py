"""Full-size skeletons on the meta device: tensors, parameters and bytes are those of the published indices."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from kimi_mm.config import ConfigError, ModelConfig
from kimi_mm.conversion.layouts import layout_of
from kimi_mm.conversion.presets import PRESETS, published_preset


def counted(name: str) -> tuple[Counter[str], Counter[str], list[str]]:
    """Tensors and parameters by folder, and all names of the root."""
    preset = PRESETS[name]
    pieces = [p for row in layout_of(preset.layout, preset.config).table.values() for p in row]
    tensors = Counter(piece.group for piece in pieces)
    parameters: Counter[str] = Counter()
    for piece in pieces:
        parameters[piece.group] += math.prod(piece.shape)
    return tensors, parameters, [piece.name for piece in pieces if not piece.group]


def test_kimi_audio():
    tensors, parameters, names = counted("kimi-audio-7b")
    layers = [name for name in names if name.endswith("q_proj.weight")]
    assert len(layers) == 34
    # The index also lists a stored rotary table, 64 bf16 numbers, for each layer.
    assert tensors[""] + len(layers) == 453
    assert parameters[""] == 9_766_334_464
    assert 2 * (parameters[""] + 64 * len(layers)) == 19_532_673_280
    assert tensors["audio_detokenizer"] == 171
    assert round(parameters["audio_detokenizer"] / 1e6, 2) == 1584.02
    activations = 7 * 4 * 6 + 1
    assert tensors["vocoder"] + 2 * activations == 1206
    assert tensors["glm-4-voice-tokenizer"] + 1 == 247  # embed_positions2, which no code needs
    assert parameters["glm-4-voice-tokenizer"] + 375 * 1280 == 343_599_360
    assert {"mimo_output.weight", "lm_head.weight", "model.vq_adaptor.layers.3.bias"} <= set(names)
    assert {"model.mimo_layers.5.mlp.up_proj.weight", "model.layers.27.self_attn.q_proj.bias"} <= set(names)


def test_kimi_linear():
    tensors, parameters, names = counted("kimi-linear-48b-a3b")
    # KDA layers, MLA layers, experts with router, bias and shared expert, one dense MLP, norms, and the ends.
    assert tensors[""] == 20 * 15 + 7 * 5 + 26 * (5 + 768) + 3 + 27 * 2 + 3
    assert parameters[""] == 49_122_681_728
    assert "model.layers.26.block_sparse_moe.experts.255.w3.weight" in names
    assert "model.layers.0.self_attn.A_log" in names
    assert "model.layers.3.self_attn.kv_a_proj_with_mqa.weight" in names


def test_kimi_k25():
    tensors, parameters, names = counted("kimi-k2.5")
    vision = [name for name in names if name.startswith(("vision_tower.", "mm_projector."))]
    assert len(vision) == 335
    experts = [name for name in names if ".experts." in name]
    # Each expert matrix is three tensors: packed values, scales, shape.
    assert tensors[""] + 2 * len(experts) == 208_550
    assert parameters[""] - 416_866_032 - 54_277_888 == 1_026_408_232_448


def test_kimi_vl():
    _, parameters, names = counted("kimi-vl-a3b")
    assert sum(name.startswith(("vision_tower.", "multi_modal_projector.")) for name in names) == 335
    assert parameters[""] == 16_407_656_048


@pytest.mark.parametrize("name", PRESETS)
def test_configs_survive_yaml(name, tmp_path):
    (tmp_path / "config.yaml").write_text(PRESETS[name].config.to_yaml())
    assert ModelConfig.from_yaml(tmp_path / "config.yaml") == PRESETS[name].config


def test_names():
    assert published_preset("moonshotai/Kimi-Audio-7B-Instruct").layout == "kimi_audio"
    with pytest.raises(ConfigError, match="did you mean 'kimi-k2"):
        published_preset("kimi-k25")


def test_kimi_audio_vocabulary():
    """Ids exactly as published (base 151643 + index)."""
    vocab = PRESETS["kimi-audio-7b"].config.vocab
    assert vocab.size == 168_448
    assert vocab.audio_offset == 152_064
    want = {"msg_end": 2, "user_start": 27, "assistant_start": 28, "text_blank": 23, "text_eos": 24}
    want |= {"media_begin": 18, "media_end": 20, "continue_text": 32, "continue_speech": 33, "pad": 420}
    assert {name: vocab.special(name) - 151_643 for name in want} == want
    with pytest.raises(ConfigError, match="no token 'system_start'"):
        vocab.special("system_start")
