"""Whisper's encoder out of a CTranslate2 `model.bin`, the form in which packages carry it.

The file (format 6, little-endian): uint32 version, string architecture, uint32 revision, uint32 number of variables;
then each variable: string name, uint8 rank, uint32 dimensions, uint8 type, uint32 size in bytes, data. A string is a
uint16 length, the final NUL included. Queries, keys and values are one matrix `linear_0`; keys have no bias.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from kimi_mm.errors import CheckpointError

_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_LAYER_PARTS = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
_SUFFIXES = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


def read_variables(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, array) of every variable; CheckpointError when the file is cut short or of another kind."""
    path = Path(path)
    try:
        data = memoryview(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    at = 0

    def take(size: int) -> memoryview:
        nonlocal at
        if size > len(data) - at:
            raise CheckpointError(f"{path}: ends at byte {len(data)} in the middle of a variable; copy it again.")
        at += size
        return data[at - size : at]

    def number(form: str) -> int:
        return struct.unpack("<" + form, take(struct.calcsize(form)))[0]

    def string() -> str:
        return bytes(take(number("H"))).rstrip(b"\0").decode("utf-8", "replace")

    version = number("I")
    if version != 6 or string() != "WhisperSpec":
        raise CheckpointError(f"{path}: not a CTranslate2 Whisper model of format 6.")
    number("I")
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        if kind not in _TYPES or size != math.prod(shape) * np.dtype(_TYPES[kind]).itemsize:
            raise CheckpointError(f"{path}: variable '{name}' has an impossible size or type.")
        yield name, np.frombuffer(take(size), _TYPES[kind]).reshape(shape)


def encoder_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Returns the encoder's tensors under the names of `AudioEncoder` (positions are recomputed, not read)."""
    state: dict[str, torch.Tensor] = {}
    for name, array in read_variables(path):
        if not name.startswith("encoder/") or "position_encodings" in name:
            continue
        if array.ndim and not np.issubdtype(array.dtype, np.floating):
            raise CheckpointError(f"{path}: variable '{name}' is quantized ({array.dtype}); convert with float16.")
        tensor = torch.from_numpy(array.copy())
        stem, _, suffix = name.removeprefix("encoder/").rpartition("/")
        if suffix not in _SUFFIXES:
            continue
        ours = _SUFFIXES[suffix]
        if stem.startswith("layer_") and "/" in stem:
            layer, _, part = stem.partition("/")
            prefix = f"layers.{layer.removeprefix('layer_')}"
            if part == "self_attention/linear_0":
                for piece, proj in zip(tensor.chunk(3), ("q_proj", "k_proj", "v_proj"), strict=True):
                    if not (proj == "k_proj" and suffix == "bias"):
                        state[f"{prefix}.self_attn.{proj}.{ours}"] = piece.contiguous()
            elif part in _LAYER_PARTS:
                state[f"{prefix}.{_LAYER_PARTS[part]}.{ours}"] = tensor
        else:
            state[f"{stem}.{ours}"] = tensor
    if "conv1.weight" not in state:
        raise CheckpointError(f"{path}: holds no Whisper encoder.")
    return state


def extract_whisper_encoder(model_bin: str | Path, out: str | Path) -> None:
    """Writes the encoder of `model.bin` as fp16 safetensors, aside first."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(out.name + ".tmp")
    save_file({name: tensor.half() for name, tensor in encoder_state(model_bin).items()}, aside)
    os.replace(aside, out)
