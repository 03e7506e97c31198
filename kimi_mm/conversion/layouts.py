"""Where every tensor of a published model lies in ours: one table for reading, writing and counting.

    ours  backbone.trunk.1.mlp.experts.gate_up_proj [E, 2 I, D]
          = experts.0.w1 | experts.0.w3 | experts.1.w1 | ...         one after another, byte for byte

A published tensor is a contiguous stretch of one of our tensors, so that conversion copies bytes and never computes;
both directions are exact. What our model has no place for is either kept word for word (`kept`: small constants such
as stored rotary frequencies) or left out on purpose (`unused`: Whisper's decoder).

    kimi_linear  qwen2  deepseek_v3                          one folder of safetensors
    kimi_k25  kimi_vl                                        the same, text under language_model., and vision
    kimi_audio   "" audio_detokenizer vocoder whisper-large-v3 glm-4-voice-tokenizer       folders, "groups" below

Sources: facts of the published indices as in the reports named in `presets`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_mm.audio.key_maps import dit_names, vocoder_names
from kimi_mm.config import BackboneConfig, ModelConfig
from kimi_mm.errors import CheckpointError
from kimi_mm.model import Model
from kimi_mm.text.key_maps import to_transformers
from kimi_mm.vision import key_maps as vision_maps

LAYOUTS = ("kimi_linear", "deepseek_v3", "qwen2", "kimi_k25", "kimi_vl", "kimi_audio")
DIT, VOCODER, WHISPER, GLM = "audio_detokenizer", "vocoder", "whisper-large-v3", "glm-4-voice-tokenizer"
_TRAINING_ONLY = ("ema_count", "ema_sum")


@dataclass(frozen=True)
class Piece:
    """One published tensor: its folder ("" is the root), name and shape, and other names that it goes by."""

    group: str
    name: str
    shape: tuple[int, ...]
    also: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.also)


@dataclass(frozen=True)
class Layout:
    """A published layout of one config: `table` lists, for each of our tensors, its pieces in order."""

    name: str
    table: Mapping[str, tuple[Piece, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    kept: tuple[tuple[str, str], ...] = ()  # (group, pattern of names)
    unused: tuple[tuple[str, str], ...] = ()

    @property
    def groups(self) -> tuple[str, ...]:
        """Folders that tensors come from, the root first."""
        return tuple(sorted({piece.group for pieces in self.table.values() for piece in pieces}))

    def fate(self, group: str, name: str) -> str | None:
        """Returns "kept" or "unused" for a published tensor that is no piece; None: it is unknown."""
        for fate, patterns in (("kept", self.kept), ("unused", self.unused)):
            if any(group == g and re.fullmatch(pattern, name) for g, pattern in patterns):
                return fate
        return None


def layout_of(name: str, config: ModelConfig) -> Layout:
    """Returns the layout of a config; nothing is allocated.

    Raises:
        CheckpointError: on an unknown layout, or a model with parts that it has no names for.
    """
    if name not in LAYOUTS:
        raise CheckpointError(f"layout '{name}' is not one of {', '.join(LAYOUTS)}.")
    with torch.device("meta"):
        model = Model(config)
    table: dict[str, tuple[Piece, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    own = {key: value for key, value in model.state_dict().items() if not key.endswith(_TRAINING_ONLY)}
    for key, tensor in own.items():
        part, _, rest = key.partition(".")
        if part == "backbone":
            pieces = tuple(_text(rest, tensor, config.backbone, name))
        elif part == "vision":
            pieces = (_vision(rest, tensor, name),)
        elif part == "audio":
            pieces = (_audio(rest, tensor),)
        else:
            continue
        table[key], shapes[key] = pieces, tuple(tensor.shape)
    if config.detokenizer is not None:
        _add_detokenizer(model, table, shapes)
    if name != "kimi_audio":
        return Layout(name, table, shapes, kept=(("", r".*rotary_emb\.inv_freq"),))
    return Layout(
        name,
        table,
        shapes,
        kept=(
            ("", r".*rotary_emb\.inv_freq"),
            (VOCODER, r".*\.filter"),
            (GLM, r"(model\.encoder\.)?(ema_count|ema_weight|embed_positions2\.weight)"),
            (DIT, r"(?!speech_model\.).*"),
        ),
        unused=(
            (WHISPER, r"(model\.)?decoder\..*|proj_out\..*"),
            (GLM, r"(model\.encoder\.)?(layer_norm\..*|layers\.(1[6-9]|[2-9]\d)\..*)|model\.decoder\..*|proj_out\..*"),
        ),
    )


# ---- text ------------------------------------------------------------------------------------------------------


def _text(key: str, tensor: Tensor, config: BackboneConfig, layout: str) -> Iterator[Piece]:
    """Yields the pieces of one backbone tensor."""
    if layout == "kimi_audio":
        yield Piece("", _kimi_audio_name(key, tensor, config), tuple(tensor.shape))
        return
    ((name, shaped),) = to_transformers({key: tensor}, config).items()
    prefix = "language_model." if layout in ("kimi_k25", "kimi_vl") else ""
    for piece, shape in _split(name, tuple(shaped.shape), config, layout):
        # What transformers 5.23 writes differs: it translates one name too many, each time.
        other = piece
        if layout == "kimi_linear":
            other = piece.replace(".mlp.", ".block_sparse_moe.")
        elif prefix:
            other = piece.replace(".layers.", ".blocks.")
        yield Piece("", prefix + piece, shape, (prefix + other,) if other != piece else ())


def _split(
    name: str, shape: tuple[int, ...], config: BackboneConfig, layout: str
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Takes the merged tensors of transformers apart into published ones."""
    linear = layout == "kimi_linear"
    name = name.replace(".forget_gate.", ".")
    if ".mlp.experts." in name or ".mlp.gate." in name or ".mlp.shared_experts." in name:
        name = name.replace(".mlp.", ".block_sparse_moe.") if linear else name
    if name.endswith("self_attn.conv1d.weight"):
        assert config.kda is not None
        keys, values = config.kda.num_heads * config.kda.head_dim, config.kda.value_heads * config.kda.value_dim
        for part, rows in (("q", keys), ("k", keys), ("v", values)):
            yield name.replace("conv1d", f"{part}_conv1d"), (rows, *shape[1:])
    elif name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        stem, _, kind = name.rpartition(".")
        halves = kind == "gate_up_proj"
        parts = ("w1", "w3") if linear else ("gate_proj", "up_proj")
        if not halves:
            parts = ("w2",) if linear else ("down_proj",)
        size = (shape[1] // 2, shape[2]) if halves else shape[1:]
        for expert in range(shape[0]):
            for part in parts:
                yield f"{stem}.{expert}.{part}.weight", size
    else:
        yield name, shape


def _kimi_audio_name(key: str, tensor: Tensor, config: BackboneConfig) -> str:
    special = {
        "audio.norm.weight": "model.mimo_norm.weight",
        "audio_head.weight": "mimo_output.weight",
        **{
            f"adaptor.{ours}.{kind}": f"model.vq_adaptor.layers.{theirs}.{kind}"
            for ours, theirs in ((0, 0), (2, 3), (3, 4))  # theirs has a dropout between
            for kind in ("weight", "bias")
        },
    }
    if key in special:
        return special[key]
    branch = key.startswith("audio.layers.")
    as_text = key.replace("audio.layers.", "trunk.") if branch else key
    (name,) = to_transformers({as_text: tensor}, config)
    return name.replace("model.layers.", "model.mimo_layers.") if branch else name


# ---- eyes, ears and voice ----------------------------------------------------------------------------------------


def _vision(key: str, tensor: Tensor, layout: str) -> Piece:
    ((name, shaped),) = vision_maps.to_published({key: tensor}, layout).items()
    # transformers, when it saves, leaves two names half translated.
    half = name.replace("vision_tower.patch_embed.", "vision_tower.encoder.patch_embed.")
    others = {half, f"model.{name}", f"model.{half}"} - {name}
    return Piece("", name, tuple(shaped.shape), tuple(sorted(others)))


def _audio(key: str, tensor: Tensor) -> Piece:
    part, _, rest = key.partition(".")
    if part == "feature_encoder":
        name = "embed_positions.weight" if rest == "positions" else rest
        return Piece(WHISPER, f"model.encoder.{name}", tuple(tensor.shape), (f"encoder.{name}", name))
    own = {"encoder.positions": "embed_positions.weight", "quantizer.codebook": "codebook.weight"}
    if part == "quantizer" and key not in own:
        raise CheckpointError(f"'audio.{key}' has no published layout: the published tokenizer has no such layer.")
    name = own.get(key, rest)
    return Piece(GLM, name, tuple(tensor.shape), (f"model.encoder.{name}",))


def _add_detokenizer(model: Model, table: dict, shapes: dict) -> None:
    """DiT and vocoder; the vocoder's convolutions stay apart as length `weight_g` and direction `weight_v`."""
    assert model.detokenizer is not None
    dit, vocoder = model.detokenizer.dit, model.detokenizer.vocoder
    for theirs, ours in dit_names(dit).items():
        shape = tuple(dit.state_dict()[ours].shape)
        key = f"detokenizer.dit.{ours}"
        table[key], shapes[key] = (Piece(DIT, "speech_model." + theirs, shape),), shape
    state = vocoder.state_dict()
    for theirs, ours in vocoder_names(vocoder).items():  # type: ignore[arg-type]  (dit_names refused other vocoders)
        if ours is None:
            continue
        shape = tuple(state[ours].shape)
        key = f"detokenizer.vocoder.{ours}"
        if theirs.endswith(("weight_g", "weight_v")):
            key += theirs[-2:]
            shape = (shape[0], 1, 1) if theirs.endswith("_g") else shape
        table[key], shapes[key] = (Piece(VOCODER, theirs, shape),), shape
