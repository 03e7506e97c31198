"""Checkpoints: round trips in every weight format, and damage that is named."""

import json

import pytest
import torch

from kimi_mm.checkpoint import (
    INDEX,
    expand_groups,
    join_checkpoints,
    load_checkpoint,
    quantize_groups,
    quantize_rows,
    save_checkpoint,
)
from kimi_mm.config import ModelConfig
from kimi_mm.errors import CheckpointError
from kimi_mm.model import Model
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.training.recipe import recipes_root


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Model(ModelConfig.from_yaml(recipes_root() / "models" / "debug.yaml")).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(["one two three"] * 3, 300)


@pytest.mark.parametrize(("weights", "tolerance"), [("fp32", 0.0), ("fp16", 1e-3), ("int8", 1e-2), ("int6", 6e-2)])
def test_round_trip(model, tokenizer, tmp_path, weights, tolerance):
    save_checkpoint(tmp_path, model, tokenizer, weights=weights, shard_bytes=50_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again, words = load_checkpoint(tmp_path)
    assert again.config == model.config
    assert words.encode("two") == tokenizer.encode("two")
    for name, tensor in model.state_dict().items():
        if "ema_" in name:
            continue  # training only
        copy = again.state_dict()[name]
        assert (copy - tensor).abs().max() <= tolerance * tensor.abs().max(), name


def test_saving_again_leaves_no_stale_shard(model, tokenizer, tmp_path):
    save_checkpoint(tmp_path, model, tokenizer, shard_bytes=20_000)
    save_checkpoint(tmp_path, model, tokenizer)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 1
    assert not list(tmp_path.glob("*.tmp"))
    load_checkpoint(tmp_path)


def test_quantised_rows_are_within_half_a_step():
    for shape in [(7, 33), (3, 5, 32), (6, 4, 3)]:
        tensor = torch.randn(shape)
        values, scale = quantize_rows(tensor)
        step = scale.float()[(...,) + (None,) * (tensor.dim() - scale.dim())]
        assert values.dtype == torch.int8
        # fp16 scales move the grid by up to 2^-11 of 127 steps.
        assert ((values.float() * step - tensor).abs() <= 0.57 * step).all()


def test_six_bits_are_within_half_a_step_unless_clipping_is_better():
    for shape in [(7, 64), (3, 5, 128)]:
        tensor = torch.randn(shape)
        tensor[..., 0] = 9.0  # far out: cutting it costs less than coarse steps for 63 others
        packed, scale = quantize_groups(tensor)
        assert packed.dtype == torch.uint8
        assert packed.shape == (*shape[:-1], shape[-1] * 6 // 8)
        assert scale.shape == (*shape[:-1], shape[-1] // 64)
        again = expand_groups(packed, scale)
        step = scale.float().repeat_interleave(64, -1)
        inside = tensor.abs() <= 31.4 * step
        assert ((again - tensor).abs() <= 0.52 * step)[inside].all()
        assert torch.equal(again[~inside], (31 * step * tensor.sign())[~inside])
        plain = (tensor / (9.0 / 31)).round() * (9.0 / 31)
        assert (again - tensor).square().mean() <= (plain - tensor).square().mean()


@pytest.mark.parametrize("weights", ["int8", "int6"])
def test_scales_stay_with_what_they_scale(model, tokenizer, tmp_path, weights):
    """However the files are cut."""
    for size in (3_000, 20_000, 21_111):
        save_checkpoint(tmp_path, model, tokenizer, weights=weights, shard_bytes=size)
        index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
        scales = [name for name in index if name.endswith(".scale")]
        assert scales
        assert all(index[name] == index[name.removesuffix(".scale")] for name in scales)
        load_checkpoint(tmp_path)


def test_parts_trained_apart_are_joined(tokenizer, tmp_path):
    models = {}
    for name in ("debug", "debug-vision", "debug-all"):
        models[name] = Model(ModelConfig.from_yaml(recipes_root() / "models" / f"{name}.yaml"))
        save_checkpoint(tmp_path / name, models[name], tokenizer, weights="fp32")
    parts = {"vision": tmp_path / "debug-vision", "detokenizer": tmp_path / "debug-all"}
    join_checkpoints(tmp_path / "joined", tmp_path / "debug", parts, weights="fp32")
    joined, words = load_checkpoint(tmp_path / "joined")
    assert words.encode("two") == tokenizer.encode("two")
    sources = {"vision": "debug-vision", "detokenizer": "debug-all", "backbone": "debug", "audio": "debug"}
    for part, source in sources.items():
        want = getattr(models[source], part).state_dict()
        for name, tensor in getattr(joined, part).state_dict().items():
            assert name.endswith(("ema_count", "ema_sum")) or torch.equal(tensor, want[name]), f"{part}.{name}"
    with pytest.raises(CheckpointError, match="has no part 'vision'"):
        join_checkpoints(tmp_path / "none", tmp_path / "debug", {"vision": tmp_path / "debug"})
    assert not (tmp_path / "none").exists()


def test_damage_is_named(model, tokenizer, tmp_path):
    save_checkpoint(tmp_path, model, tokenizer)
    shard = next(tmp_path.glob("model-*.safetensors"))
    whole, index = shard.read_bytes(), (tmp_path / INDEX).read_text()

    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=shard.name):
        load_checkpoint(tmp_path)
    shard.write_bytes(whole)

    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="outside"):
        load_checkpoint(tmp_path)
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(CheckpointError, match="not a checkpoint index"):
        load_checkpoint(tmp_path)
    (tmp_path / INDEX).write_text(index)

    config = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("intermediate_size: 16", "intermediate_size: 32"))
    with pytest.raises(CheckpointError, match=r"tensor '.*experts.*' has shape"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.yaml").write_text(config)
    load_checkpoint(tmp_path)

    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "nothing")
