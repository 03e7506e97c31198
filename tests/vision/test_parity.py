"""The same rows as transformers' kimi_k25 from the weights it saves, and key maps that lose nothing."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_mm.errors import CheckpointError
from kimi_mm.vision.encoder import VisionEncoder
from kimi_mm.vision.key_maps import from_published, load_published, to_published, vision_config
from kimi_mm.vision.presets import PRESETS
from tests.vision.tiny import EYES, patches, shaken

transformers = pytest.importorskip("transformers")
kimi_k25 = pytest.importorskip("transformers.models.kimi_k25.modeling_kimi_k25")

GRIDS = [(1, 4, 6), (3, 8, 8), (1, 8, 8), (4, 2, 10), (1, 4, 6), (1, 20, 14), (2, 6, 4)]
TEXT = {
    "model_type": "deepseek_v3",
    "vocab_size": 64,
    "hidden_size": 40,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "first_k_dense_replace": 1,
}
VISION = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
}


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    config = transformers.Kimi_K25Config(
        text_config=TEXT, vision_config=VISION, projection_hidden_size=48, image_token_id=1, video_token_id=2
    )
    return shaken(kimi_k25.Kimi_K25ForConditionalGeneration(config)).float()


@pytest.fixture(scope="module")
def saved(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    theirs.save_pretrained(folder)
    return folder


def test_rows_equal_transformers(theirs, saved):
    """Ours packed; theirs one by one, since theirs cannot mix items of several lengths in time."""
    ours = load_published(saved)
    pixels = patches(GRIDS)
    with torch.no_grad():
        got = ours(pixels, GRIDS)
        for rows, grid, piece in zip(got, GRIDS, pixels.split([t * h * w for t, h, w in GRIDS]), strict=True):
            cells = theirs.model.vision_tower(piece, grid_thw=torch.tensor([grid])).pooler_output
            want = theirs.model.mm_projector(cells).squeeze(1)
            assert want.std() > 1
            torch.testing.assert_close(rows, want, atol=1e-5, rtol=1e-5)


def test_names_are_the_published_ones(saved):
    """What transformers saves, but for two names that it leaves half translated."""
    state = from_published(load_file(saved / "model.safetensors"))
    names = set(to_published(state))
    assert len(names) == 12 * 3 + 5 + 6
    assert {"vision_tower.patch_embed.pos_emb.weight", "vision_tower.encoder.blocks.2.wqkv.bias"} <= names
    assert "mm_projector.proj.2.weight" in names
    left = {n for n in load_file(saved / "model.safetensors") if "vision_tower" in n or "mm_projector" in n} - names
    assert all(n.startswith(("model.mm_projector.pre_norm", "vision_tower.encoder.patch_embed.proj")) for n in left)


@pytest.mark.parametrize("model_type", ["kimi_k25", "kimi_vl"])
def test_key_map_round_trip(model_type, tmp_path):
    ours = shaken(VisionEncoder(EYES))
    state = to_published(ours.state_dict(), model_type)
    assert state["vision_tower.patch_embed.proj.weight"].shape == (24, 3, 14, 14)
    assert ("multi_modal_projector.linear_1.weight" in state) == (model_type == "kimi_vl")
    back = from_published({**state, "language_model.lm_head.weight": torch.zeros(1)})
    assert back.keys() == ours.state_dict().keys()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(back[key], tensor), key


def published(model_type: str) -> dict:
    if model_type == "kimi_vl":
        vision = {
            "patch_size": 14,
            "init_pos_emb_height": 64,
            "init_pos_emb_width": 64,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "merge_kernel_size": [2, 2],
        }
        return {"model_type": model_type, "vision_config": vision, "text_config": {"hidden_size": 2048}}
    vision = {
        "patch_size": 14,
        "init_pos_emb_height": 64,
        "init_pos_emb_width": 64,
        "init_pos_emb_time": 4,
        "vt_hidden_size": 1152,
        "vt_num_hidden_layers": 27,
        "vt_num_attention_heads": 16,
        "vt_intermediate_size": 4304,
        "merge_kernel_size": [2, 2],
        "text_hidden_size": 7168,
    }
    return {"model_type": model_type, "vision_config": vision, "text_config": {}}


@pytest.mark.parametrize("model_type", ["kimi_k25", "kimi_vl"])
def test_published_configs(model_type):
    assert vision_config(published(model_type)) == PRESETS[model_type]


def test_bad_configs():
    with pytest.raises(CheckpointError, match="'llava' is not one of"):
        vision_config({"model_type": "llava"})
    values = published("kimi_k25")
    del values["vision_config"]["vt_hidden_size"]
    with pytest.raises(CheckpointError, match="lacks 'vt_hidden_size'"):
        vision_config(values)
    values = published("kimi_vl")
    values["vision_config"]["merge_kernel_size"] = [2, 1]
    with pytest.raises(CheckpointError, match="not square"):
        vision_config(values)


def test_unknown_tensors_are_named():
    with pytest.raises(CheckpointError, match=r"vision_tower\.encoder\.blocks\.0\.gate"):
        from_published({"vision_tower.encoder.blocks.0.gate": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="no vision tensors"):
        from_published({"language_model.lm_head.weight": torch.zeros(1)})


def test_only_shards_with_eyes_are_read(saved, tmp_path):
    """As in the published checkpoints, whose eyes lie in the last two or three of 64 files."""
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    state = {k: v for k, v in load_file(saved / "model.safetensors").items() if "language_model" not in k}
    names = sorted(state)
    index = {
        "language_model.model.norm.weight": "model-1.safetensors",
        "language_model.lm_head.weight": "model-1.safetensors",
    }
    for number, part in enumerate((names[::2], names[1::2]), start=2):
        save_file({name: state[name] for name in part}, tmp_path / f"model-{number}.safetensors")
        index.update(dict.fromkeys(part, f"model-{number}.safetensors"))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    whole, parts = load_published(saved).state_dict(), load_published(tmp_path).state_dict()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    (tmp_path / "model-3.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"model-3\.safetensors: damaged"):
        load_published(tmp_path)


def test_missing_files_and_shapes(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        load_published(tmp_path)
    values = json.loads((saved / "config.json").read_text())
    values["vision_config"]["intermediate_size"] = 65
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    with pytest.raises(
        CheckpointError, match=r"'tower\.layers\.0\.fc1\.bias' has shape \[64\], config.json says \[65\]"
    ):
        load_published(tmp_path)
