"""Published eyes as our `VisionEncoder`: configs, tensor names both ways, and reading a checkpoint folder.

    kimi_k25   vision_tower.* and mm_projector.{pre_norm, proj.0, proj.2}                       (K2.5, K2.6)
    kimi_vl    vision_tower.* and multi_modal_projector.{pre_norm, linear_1, linear_2}          (Kimi-VL)

Both towers have the same names. Tensors are the same too, but for the shape of the patch convolution: queries, keys
and values stay one matrix, and rotary pairs stay interleaved.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kimi_mm.config import VisionConfig, VisionInputConfig, VisionTowerConfig
from kimi_mm.errors import CheckpointError
from kimi_mm.vision.encoder import VisionEncoder

MODEL_TYPES = ("kimi_k25", "kimi_vl")

_TOP = {
    "vision_tower.patch_embed.proj.weight": "tower.patch_embed.weight",
    "vision_tower.patch_embed.proj.bias": "tower.patch_embed.bias",
    "vision_tower.patch_embed.pos_emb.weight": "tower.positions",
    "vision_tower.encoder.final_layernorm.weight": "tower.final_norm.weight",
    "vision_tower.encoder.final_layernorm.bias": "tower.final_norm.bias",
}
_LAYER = {
    "norm0": "norm_1",
    "norm1": "norm_2",
    "wqkv": "attention.qkv",
    "wo": "attention.out",
    "mlp.fc0": "fc1",
    "mlp.fc1": "fc2",
}
_PROJECTOR = {
    "kimi_k25": {
        "mm_projector.pre_norm": "pre_norm",
        "mm_projector.proj.0": "linear_1",
        "mm_projector.proj.2": "linear_2",
    },
    "kimi_vl": {f"multi_modal_projector.{name}": name for name in ("pre_norm", "linear_1", "linear_2")},
}
_LAYER_BACK = {ours: theirs for theirs, ours in _LAYER.items()}
_TOP_BACK = {ours: theirs for theirs, ours in _TOP.items()}
_PREFIXES = ("vision_tower.", "mm_projector.", "multi_modal_projector.")


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the vision tensors of a published checkpoint to ours; tensors of the text model are left out.

    Args:
        state: tensors of K2.5 or Kimi-VL under their published names.

    Returns:
        State dict for `VisionEncoder.load_state_dict`.

    Raises:
        CheckpointError: on a vision tensor that neither layout has, or when there is none at all.
    """
    renamed = {_our_name(key): tensor for key, tensor in state.items() if _is_vision(key)}
    if not renamed:
        raise CheckpointError(f"no vision tensors; their names start with {', '.join(_PREFIXES)}.")
    weight = renamed.get("tower.patch_embed.weight")
    if weight is not None:
        renamed["tower.patch_embed.weight"] = weight.flatten(1)
    return renamed


def to_published(state: Mapping[str, Tensor], model_type: str = "kimi_k25") -> dict[str, Tensor]:
    """Inverse of `from_published`, in the layout of one of `MODEL_TYPES`."""
    _check_type(model_type)
    projector = {ours: theirs for theirs, ours in _PROJECTOR[model_type].items()}
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        match = re.fullmatch(r"tower\.layers\.(\d+)\.(.+)", module)
        if match:
            renamed[f"vision_tower.encoder.blocks.{match[1]}.{_LAYER_BACK[match[2]]}.{leaf}"] = tensor
        elif module.startswith("projector."):
            renamed[f"{projector[module.removeprefix('projector.')]}.{leaf}"] = tensor
        else:
            patch = round((tensor.shape[-1] // 3) ** 0.5)
            shaped = tensor.view(-1, 3, patch, patch) if key == "tower.patch_embed.weight" else tensor
            renamed[_TOP_BACK[key]] = shaped
    return renamed


def vision_config(values: Mapping[str, Any]) -> VisionConfig:
    """Translates the `config.json` of a published model, or what transformers writes of one.

    Raises:
        CheckpointError: on another model type, or a missing key (named).
    """
    model_type = str(values.get("model_type"))
    _check_type(model_type)
    vision, video = values.get("vision_config") or {}, model_type == "kimi_k25"
    merge = _either(vision, "merge_kernel_size")
    tower = VisionTowerConfig(
        patch_size=_either(vision, "patch_size"),
        hidden_size=_either(vision, "vt_hidden_size", "hidden_size"),
        num_layers=_either(vision, "vt_num_hidden_layers", "num_hidden_layers"),
        num_heads=_either(vision, "vt_num_attention_heads", "num_attention_heads"),
        intermediate_size=_either(vision, "vt_intermediate_size", "intermediate_size"),
        position_height=_either(vision, "init_pos_emb_height", "pos_emb_height"),
        position_width=_either(vision, "init_pos_emb_width", "pos_emb_width"),
        max_frames=_either(vision, "init_pos_emb_time", "pos_emb_time") if video else 1,
    )
    if merge[0] != merge[1]:
        raise CheckpointError(f"merge_kernel_size={list(merge)} is not square.")
    rules = VisionInputConfig(alpha="drop", max_patches=16_384 if video else 4096)
    size = vision.get("text_hidden_size") or _either(values.get("text_config") or {}, "hidden_size")
    return VisionConfig(input=rules, tower=tower, merge_size=merge[0], output_size=size)


def load_published(folder: str | Path, dtype: torch.dtype = torch.float32) -> VisionEncoder:
    """Reads the eyes of a published checkpoint folder; only the files that hold vision tensors are opened.

    Args:
        folder: with `config.json` and safetensors files, one or many.
        dtype: of the result.

    Returns:
        The encoder in eval mode.

    Raises:
        CheckpointError: names the file or tensor that is missing, unknown, damaged or of another shape.
    """
    folder = Path(folder)
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: cannot be read ({error}).") from None
    encoder = VisionEncoder(vision_config(values)).to(dtype)
    state = from_published(dict(_vision_tensors(folder)))
    wanted = encoder.state_dict()
    for key in sorted(set(wanted) | set(state)):
        theirs, ours = (list(s[key].shape) if key in s else None for s in (state, wanted))
        if theirs != ours:
            raise CheckpointError(f"{folder}: '{key}' has shape {theirs}, config.json says {ours}.")
    encoder.load_state_dict(state)
    return encoder.eval()


def _vision_tensors(folder: Path) -> Iterable[tuple[str, Tensor]]:
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / file for file in sorted({f for name, f in names.items() if _is_vision(name)})]
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118  (not a mapping)
                    if _is_vision(name):
                        yield name, shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: damaged or missing ({error}).") from None


def _our_name(key: str) -> str:
    """Returns our name of a vision tensor; transformers, when it saves, leaves two names half translated."""
    key = key.removeprefix("model.").replace("vision_tower.encoder.patch_embed.", "vision_tower.patch_embed.")
    if key in _TOP:
        return _TOP[key]
    module, _, leaf = key.rpartition(".")
    match = re.fullmatch(r"vision_tower\.encoder\.blocks\.(\d+)\.(.+)", module)
    if match and match[2] in _LAYER:
        return f"tower.layers.{match[1]}.{_LAYER[match[2]]}.{leaf}"
    for names in _PROJECTOR.values():
        if module in names:
            return f"projector.{names[module]}.{leaf}"
    raise CheckpointError(f"'{key}' belongs to none of the known layouts ({', '.join(MODEL_TYPES)}).")


def _is_vision(key: str) -> bool:
    return key.removeprefix("model.").startswith(_PREFIXES)


def _either(values: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if name in values:
            return values[name]
    raise CheckpointError(f"config.json lacks '{names[0]}'.")


def _check_type(model_type: str) -> None:
    if model_type not in MODEL_TYPES:
        raise CheckpointError(f"model_type '{model_type}' is not one of {', '.join(MODEL_TYPES)}.")
