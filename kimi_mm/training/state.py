"""Checkpoints of a training run: everything that an exact resume needs, written so that a kill loses nothing.

RUN/.step-0000500.tmp/                               being written; what a killed run left goes at the next start
RUN/step-0000500/{model.safetensors, training.pt}    named once whole and on the disk; older ones go after that
RUN/model/                                           the model as users load it, written at the end
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kimi_mm.errors import CheckpointError

DAMAGE = (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError)  # how reading a broken file ends


def save_state(
    run: Path,
    step: int,
    module: torch.nn.Module,
    extra: dict[str, Any],
    keep: int = 2,
    leave: frozenset[str] = frozenset(),
) -> Path:
    """Writes `RUN/step-N` aside, renames it, and removes all but the newest `keep`.

    Args:
        leave: names of tensors that never change and that whoever resumes has anyway.

    Raises:
        CheckpointError: when it cannot be written, as on a full disk; what was written of it is gone then, and all
            earlier checkpoints are as they were.
    """
    with written_aside(run, step) as aside:
        kept = {name: tensor for name, tensor in module.state_dict().items() if name not in leave}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}
        shared: dict[int, str] = {}
        for name in list(tensors):
            # Tied tensors are stored once; load_state_dict fills every name again from the module's own tying.
            pointer = kept[name].data_ptr()
            if pointer and shared.setdefault(pointer, name) != name:
                del tensors[name]
        save_file(tensors, aside / "model.safetensors")
        torch.save(extra, aside / "training.pt")
        flush(aside)
    return name_whole(run, step, keep)


@contextlib.contextmanager
def written_aside(run: Path, step: int) -> Iterator[Path]:
    """Gives an empty folder to write the checkpoint of a step into; trouble there removes it again.

    Raises:
        CheckpointError: in the place of whatever error writing ended with.
    """
    aside = aside_of(run, step)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save tells of a full disk by RuntimeError
        shutil.rmtree(aside, ignore_errors=True)
        raise not_written(run, step, str(error).strip().splitlines()[0]) from None


def not_written(run: Path, step: int, reason: str) -> CheckpointError:
    """Returns the error that says what is left."""
    states = list_states(run)
    whole = f"the last whole one is {states[-1].name}" if states else "there is no earlier one"
    return CheckpointError(f"{run}: checkpoint of step {step} could not be written ({reason}); {whole}.")


def flush(folder: Path) -> None:
    """Waits until all files of a folder, and the folder itself, are on the disk."""
    for path in (*folder.iterdir(), folder):
        _fsync(path)


def name_whole(run: Path, step: int, keep: int) -> Path:
    """Gives a folder that is written and flushed its name, then removes all but the newest `keep`."""
    target = run / f"step-{step:07d}"
    if target.exists():
        _remove(target)
    os.replace(aside_of(run, step), target)
    _fsync(run)
    for old in list_states(run)[:-keep]:
        _remove(old)
    return target


def remove_leftovers(run: Path) -> None:
    """Removes what a run that was killed while saving left behind."""
    for path in run.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def aside_of(run: Path, step: int) -> Path:
    """Returns the folder that the checkpoint of a step is written into before it has its name."""
    return run / f".step-{step:07d}.tmp"


def _remove(state: Path) -> None:
    """Removes a checkpoint; a kill half-way leaves nothing that looks like a whole one."""
    gone = state.with_name(f".{state.name}.old.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(state, gone)
    shutil.rmtree(gone, ignore_errors=True)


def list_states(run: Path) -> list[Path]:
    """Returns the whole checkpoints of a run, oldest first."""
    return sorted(path for path in run.glob("step-*") if (path / "training.pt").is_file())


def load_state(path: Path, module: torch.nn.Module, leave: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Restores a module in place, but for what `save_state` was told to leave, and returns the rest of the state.

    Raises:
        CheckpointError: if the checkpoint is damaged, or of another model.
    """
    try:
        tensors = load_file(path / "model.safetensors")
        extra = torch.load(path / "training.pt", map_location="cpu", weights_only=True)
    except DAMAGE as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: damaged training checkpoint ({first}); delete it to go on from the one before."
        ) from None
    try:
        missing, unexpected = module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{path}: does not fit this recipe's model ({last}); --no-resume starts anew.") from None
    own = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    loaded = {own[name] for name in tensors if name in own}
    lost = [name for name in missing if own[name] not in loaded and name not in leave]
    if lost or unexpected:
        raise CheckpointError(f"{path}: tensor '{(lost + unexpected)[0]}' does not fit this recipe's model.")
    return extra
