"""Layers that live in main memory or on disk, and come to the device one at a time, by accelerate's hooks.

Embeddings, norms and heads stay on the device; each decoder layer is brought in whole before it runs, since some of
its matrices are read directly, and let go afterwards. On disk a layer lies in the converted checkpoint itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kimi_mm.conversion.published import folder_entries
from kimi_mm.errors import UserError
from kimi_mm.model import Model
from kimi_mm.text.backbone import DecoderLayer

PLACES = ("cpu", "disk")
LAYERS = ("backbone.trunk.", "backbone.text.layers.", "backbone.audio.layers.")


def offload_layers(
    model: Model, place: str, device: str | torch.device, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Moves the backbone's layers away from the device, and the rest to it.

    Args:
        model: on the CPU; for "disk" its layers may still be on the meta device.
        place: "cpu" or "disk".
        device: where layers run.
        folder: for "disk", a checkpoint in our layout.
        dtype: for "disk", of the layers' floats; None: as stored.

    Raises:
        UserError: when accelerate is missing.
    """
    try:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module
        from accelerate.utils import OffloadedWeightsLoader
    except ModuleNotFoundError:
        raise UserError("offloading needs the package 'accelerate': pip install 'kimi-mm[train]'.") from None
    stored: Mapping[str, Tensor] = {}
    if place == "disk":
        stored = OffloadedWeightsLoader(index=_index(folder, dtype))
    for name, layer in model.named_modules():
        if not isinstance(layer, DecoderLayer):
            continue
        weights = _Below(stored, f"{name}.") if place == "disk" else dict(layer.named_parameters())
        hook = AlignDevicesHook(
            execution_device=torch.device(device),
            offload=True,
            io_same_device=True,
            weights_map=weights,
            place_submodules=True,
        )
        add_hook_to_module(layer, hook)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[key] = nn.Parameter(parameter.to(device), parameter.requires_grad)
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[key] = buffer.to(device)


class _Below(Mapping[str, Tensor]):
    """A mapping of tensors seen from below a prefix."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str) -> None:
        self.weights, self.prefix = weights, prefix

    def __getitem__(self, key: str) -> Tensor:
        return self.weights[self.prefix + key]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self.prefix) for key in self.weights if key.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _index(folder: Path, dtype: torch.dtype | None) -> dict[str, dict[str, Any]]:
    index: dict[str, dict[str, Any]] = {}
    for entry in folder_entries(folder):
        if entry.name.startswith(LAYERS):
            index[entry.name] = {"safetensors_file": str(entry.file), "weight_name": entry.name}
            if dtype is not None and entry.dtype in ("F32", "F16", "BF16"):
                index[entry.name]["dtype"] = str(dtype).removeprefix("torch.")
    return index
