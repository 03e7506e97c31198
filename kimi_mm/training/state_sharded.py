"""Checkpoints that all processes of a run write together, and that any number of processes can go on from.

    RUN/step-0000500/shards/       weights and optimiser by name, as torch.distributed.checkpoint lays them out
    RUN/step-0000500/training.pt   the rest, the same on all ranks

Weights and optimiser states are saved as tensors that know their place in the whole (`kimi_mm.training.sharding`), so
that a rank of another layout, or a single process, picks what it needs. `read_any` takes this form and that of
`kimi_mm.training.state` alike. A checkpoint gets its name when every rank has written its part, or not at all.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn

from kimi_mm.errors import CheckpointError
from kimi_mm.training.sharding import as_global, expert_places, local, part_of, whole
from kimi_mm.training.state import DAMAGE, aside_of, flush, name_whole, not_written

SHARDS = "shards"


def save_sharded(
    run: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any], keep: int = 2
) -> Path:
    """Writes `RUN/step-N`; all ranks call this together, on a file system that all of them see.

    Args:
        extra: plain values and tensors beside weights and optimiser; that of rank 0 is written.

    Raises:
        CheckpointError: on every rank, when one of them could not write its part.
    """
    main = dist.get_rank() == 0
    failed: CheckpointError | None = None
    aside = aside_of(run, step)
    try:
        if main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        dcp.save(_places(module, optimizer), checkpoint_id=aside / SHARDS)
        if main:
            torch.save(extra, aside / "training.pt")
            flush(aside / SHARDS)
            flush(aside)
    except (OSError, RuntimeError, CheckpointError, dcp.CheckpointException) as error:
        failed = not_written(run, step, str(error).strip().splitlines()[-1])
    bad = torch.tensor([float(failed is not None)])
    dist.all_reduce(bad)  # on the CPU: join_processes gives every run a backend for it
    if bad.item():
        if main:
            shutil.rmtree(aside, ignore_errors=True)
        raise failed or CheckpointError(f"{run}: checkpoint of step {step}: another process could not write its part.")
    if main:
        name_whole(run, step, keep)
    dist.barrier()
    return run / f"step-{step:07d}"


def read_any(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Any]:
    """Restores module and optimiser in place from either form, whatever number of processes wrote it.

    Args:
        names: of the optimiser's parameters, in the order in which one process numbers them.

    Returns:
        The rest of the state.

    Raises:
        CheckpointError: if the checkpoint is damaged or does not fit.
    """
    try:
        extra = torch.load(path / "training.pt", map_location="cpu", weights_only=True)
        if (path / SHARDS).is_dir():
            _read_sharded(path / SHARDS, module, optimizer)
        else:
            _read_whole(path, module, optimizer, extra["optimizer"], names)
    except (*DAMAGE, dcp.CheckpointException) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: damaged training checkpoint ({first}); delete it to go on from the one before."
        ) from None
    for group in optimizer.param_groups:
        group.update(extra["groups"].get(group["name"], {}) if "groups" in extra else {})
    return extra


def group_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns what parameter groups remember between steps, by their names."""
    return {g["name"]: {"adamw_steps": g["adamw_steps"]} for g in optimizer.param_groups if "adamw_steps" in g}


def whole_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns a module's tensors by name, whole and on the CPU, on rank 0; nothing on others. All ranks call this."""
    places = expert_places(module)
    main, found = not dist.is_initialized() or dist.get_rank() == 0, {}
    for name, tensor in module.state_dict().items():
        full = whole(tensor.detach(), places.get(name))
        if main:
            found[name] = full.cpu()
    return found


def _places(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, as views that know their places."""
    places = expert_places(module)
    found = {f"model.{name}": as_global(t.detach(), places.get(name)) for name, t in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"optim.{key}.{name}"] = as_global(value, places.get(name) if value.dim() else None)
    return found


def _read_sharded(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    reader = dcp.FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    for name, parameter in module.named_parameters():
        for key in ("momentum", "exp_avg", "exp_avg_sq", "step"):
            if f"optim.{key}.{name}" in stored:
                step = torch.zeros((), device=_step_device(optimizer, parameter))
                empty = step if key == "step" else torch.zeros_like(parameter, dtype=torch.float32)
                optimizer.state[parameter][key] = empty
    wanted = _places(module, optimizer)
    if lost := sorted(set(wanted) - set(stored)):
        raise CheckpointError(f"{folder.parent}: tensor '{lost[0]}' does not fit this recipe's model.")
    if extra := sorted(name for name in set(stored) - set(wanted) if name.startswith("model.")):
        raise CheckpointError(f"{folder.parent}: tensor '{extra[0]}' does not fit this recipe's model.")
    dcp.load(wanted, storage_reader=reader, no_dist=not dist.is_initialized())


@torch.no_grad()
def _read_whole(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], names: list[str]
) -> None:
    """What one process wrote: every rank reads it all and keeps its parts."""
    tensors = load_file(path / "model.safetensors")
    parameters, places, own = dict(module.named_parameters()), expert_places(module), module.state_dict()
    if unexpected := sorted(set(tensors) - set(own)):
        raise CheckpointError(f"{path}: tensor '{unexpected[0]}' does not fit this recipe's model.")
    for name, full in tensors.items():
        local(own[name]).copy_(part_of(full, own[name], places.get(name)))
    for number, values in state["state"].items():
        parameter = parameters[names[number]]
        for key, full in values.items():
            if not full.dim():
                optimizer.state[parameter][key] = full.to(_step_device(optimizer, parameter), copy=True)
                continue
            kept = torch.zeros_like(parameter, dtype=torch.float32)
            local(kept).copy_(part_of(full, kept, places.get(names[number])))
            optimizer.state[parameter][key] = kept
    for group in optimizer.param_groups:
        saved = next((g for g in state["param_groups"] if g.get("name") == group["name"]), {})
        group.update({key: saved[key] for key in ("adamw_steps",) if key in saved})


def _step_device(optimizer: torch.optim.Optimizer, parameter: Tensor) -> torch.device:
    """Where AdamW wants a parameter's step count: fused kernels read it on their own device."""
    return parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
