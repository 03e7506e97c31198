"""Checkpoints of a training run: everything that an exact resume needs, written so that a kill loses nothing.

RUN/step-000500/{model.safetensors, training.pt}     named once whole; older ones are removed after that
RUN/model/                                           the model as users load it, written at the end
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kimi_mm.errors import CheckpointError


def save_state(run: Path, step: int, module: torch.nn.Module, extra: dict[str, Any], keep: int = 2) -> Path:
    """Writes `RUN/step-N` aside, renames it, and removes all but the newest `keep`."""
    target = run / f"step-{step:07d}"
    aside = run / f".step-{step:07d}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    shared: dict[int, str] = {}
    for name in list(tensors):
        # Tied tensors are stored once; load_state_dict fills every name again from the module's own tying.
        pointer = module.state_dict()[name].data_ptr()
        if pointer and shared.setdefault(pointer, name) != name:
            del tensors[name]
    save_file(tensors, aside / "model.safetensors")
    torch.save(extra, aside / "training.pt")
    for file in aside.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)
    for old in list_states(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def list_states(run: Path) -> list[Path]:
    """Returns the whole checkpoints of a run, oldest first."""
    return sorted(path for path in run.glob("step-*") if (path / "training.pt").is_file())


def load_state(path: Path, module: torch.nn.Module) -> dict[str, Any]:
    """Restores a module in place and returns the rest of the state."""
    try:
        tensors = load_file(path / "model.safetensors")
        extra = torch.load(path / "training.pt", map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: damaged training checkpoint ({error}); delete it to go on from the one before."
        ) from None
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    own = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    loaded = {own[name] for name in tensors if name in own}
    lost = [name for name in missing if own[name] not in loaded]
    if lost or unexpected:
        raise CheckpointError(f"{path}: tensor '{(lost + unexpected)[0]}' does not fit this recipe's model.")
    return extra
