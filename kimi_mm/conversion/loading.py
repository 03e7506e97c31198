"""A model out of tensors on disk, one at a time: nothing is drawn at random first, nothing is held twice.

    config ─► Model on the meta device (constants are real) ─► tensor by tensor: read ─► cast or quantize ─► place

The peak is what the model weighs in its final form plus the largest single tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from kimi_mm.audio.quantizer import VectorQuantizer
from kimi_mm.config import ModelConfig
from kimi_mm.conversion.files import Target
from kimi_mm.conversion.published import KEPT
from kimi_mm.errors import CheckpointError
from kimi_mm.model import Model
from kimi_mm.quantized import BITS, QuantizedExperts, QuantizedLinear, expand, quantize
from kimi_mm.text.moe import Experts, Router

_EXACT = ("A_log", "dt_bias", "router.bias", "quantizer.codebook")  # stay in the type that they are stored in
_TRAINING_ONLY = ("ema_count", "ema_sum")
# Parts that a config may leave out although the checkpoint has them.
OPTIONAL = ("backbone.audio.", "backbone.audio_head.", "detokenizer.", "vision.")
SMALLEST = 2**16  # matrices below it are not worth quantizing

Pair = tuple[Tensor, Tensor]


def fill(
    config: ModelConfig,
    targets: Iterable[Target],
    where: Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    weights: str | None = None,
    device: str | torch.device = "cpu",
    leave: tuple[str, ...] = (),
) -> Model:
    """Builds a model and fills it.

    Args:
        config: of the model; parts in `OPTIONAL` that it lacks are skipped.
        targets: our tensors, quantized or not.
        where: the checkpoint, for messages.
        dtype: of the weights; None keeps the stored ones.
        weights: "int8" or "int4" quantizes the matrices of the backbone; None does not. Experts that are stored in
            int4 are then kept so, whatever the choice.
        device: of the result.
        leave: beginnings of names whose parameters stay on the meta device, unread.

    Raises:
        CheckpointError: on a missing or unknown tensor, or another shape; names it.
    """
    if weights is not None and weights not in BITS:
        raise CheckpointError(f"weights='{weights}' must be one of {', '.join(BITS)}.")
    with torch.device("meta"):
        model = Model(config)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.endswith(_TRAINING_ONLY)}
    experts: dict[str, dict[str, Pair]] = {}
    seen: set[str] = set()
    chosen = (target for target in targets if not _left(target.name, leave))
    for name, tensor, scale in _assembled(chosen):
        if name not in wanted:
            if name.startswith(OPTIONAL) and not name.startswith(_parts(wanted)):
                continue
            raise CheckpointError(f"{where}: unknown tensor '{name}'; the config describes another model.")
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        packed = tensor.dtype == torch.int32 and scale is not None
        if scale is not None and not (weights and packed):
            tensor, scale = expand(tensor, scale, dtype or scale.dtype), None
        if scale is None and tensor.shape != wanted[name]:
            raise CheckpointError(
                f"{where}: tensor '{name}' has shape {list(tensor.shape)}, the config needs {list(wanted[name])}."
            )
        # Codes are the nearest of thousands: sixteen bits would pick others.
        narrow = name.startswith("audio.encoder.") and dtype in (torch.float16, torch.bfloat16)
        exact = name.endswith(_EXACT) or narrow
        if dtype is not None and scale is None and tensor.is_floating_point() and not exact:
            tensor = tensor.to(dtype)
        if isinstance(module, Experts) and weights:
            pair = (tensor, scale) if scale is not None else quantize(tensor, weights)
            experts.setdefault(parent, {})[leaf] = (pair[0].to(device), pair[1].to(device))
        elif weights and leaf == "weight" and _quantizable(name, module, tensor):
            values, scales = quantize(tensor, weights)
            _replace(model, parent, QuantizedLinear(values.to(device), scales.to(device)))
        else:
            _place(model, parent, leaf, tensor.to(device))
        seen.add(name)
    missing = sorted(name for name in set(wanted) - seen if not _left(name, leave))
    if missing:
        raise CheckpointError(f"{where}: tensor '{missing[0]}' is missing ({len(missing)} in all).")
    for parent, pairs in experts.items():
        _replace(model, parent, QuantizedExperts(pairs["gate_up_proj"], pairs["down_proj"]))
    for module in model.modules():
        if isinstance(module, VectorQuantizer):
            module.ema_count = torch.ones(len(module.codebook), device=module.codebook.device)
            module.ema_sum = module.codebook.clone()
    return (model if leave else model.to(device)).eval()


def _assembled(targets: Iterable[Target]) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yields (name, tensor, None), or (name, integers, scales) of a quantized one; weight norm is multiplied out."""
    waiting: dict[str, dict[str, Target]] = {}
    plain = list(targets)
    names = {target.name for target in plain}
    for target in plain:
        name = target.name
        if name.startswith(KEPT):
            continue
        for suffix, other in ((".packed", ".group_scale"), (".group_scale", ".packed"), ("_g", "_v"), ("_v", "_g")):
            stem = name.removesuffix(suffix)
            if stem != name and stem + other in names:
                waiting.setdefault(stem, {})[suffix] = target
                break
        else:
            stem = name.removesuffix(".scale")
            if stem != name and stem in names:
                waiting.setdefault(stem, {})[".scale"] = target
            elif f"{name}.scale" in names:
                stem = name
                waiting.setdefault(stem, {})[""] = target
            else:
                yield name, target.read(), None
                continue
        parts = waiting[stem]
        if len(parts) < 2:
            continue
        read = {suffix: part.read() for suffix, part in waiting.pop(stem).items()}
        if "_g" in read:
            v = read["_v"].float()
            whole = read["_g"].float() * v / v.norm(dim=(1, 2), keepdim=True)
            yield stem, whole.to(read["_v"].dtype), None
        elif "" in read:
            values, scale = read[""], read[".scale"].float()
            yield stem, values.float() * scale[(...,) + (None,) * (values.dim() - scale.dim())], None
        else:
            yield stem, read[".packed"], read[".group_scale"]


def _left(name: str, leave: tuple[str, ...]) -> bool:
    return bool(leave) and name.startswith(leave) and not name.endswith("router.bias")  # a buffer


def _quantizable(name: str, module: nn.Module, tensor: Tensor) -> bool:
    inside = name.startswith("backbone.") and not name.startswith("backbone.adaptor.")
    return inside and isinstance(module, nn.Linear) and tensor.numel() >= SMALLEST and tensor.shape[1] % 32 == 0


def _place(model: nn.Module, parent: str, leaf: str, tensor: Tensor) -> None:
    module = model.get_submodule(parent)
    if leaf in module._buffers or (isinstance(module, Router) and leaf == "bias"):
        module._buffers[leaf] = tensor
    elif isinstance(module, QuantizedLinear):  # its bias comes after its weight
        module.bias = nn.Parameter(tensor, requires_grad=False)
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    before = model.get_submodule(name)
    bias = getattr(before, "bias", None)
    if isinstance(module, QuantizedLinear) and isinstance(bias, Tensor) and not bias.is_meta:
        module.bias = nn.Parameter(bias.detach(), requires_grad=False)
    elif isinstance(module, QuantizedLinear) and isinstance(bias, Tensor):
        module.register_parameter("bias", None)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _parts(wanted: Iterable[str]) -> tuple[str, ...]:
    """Those of `OPTIONAL` that the model has."""
    names = list(wanted)
    return tuple(part for part in OPTIONAL if any(name.startswith(part) for name in names)) or ("\0",)
