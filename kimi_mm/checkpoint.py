"""Model checkpoints on disk: safetensors shards, a config, a tokenizer; nothing is ever unpickled.

    DIR/config.yaml                           ModelConfig
    DIR/tokenizer.json                        text BPE
    DIR/model-00001-of-0000N.safetensors ...  weights, at most `shard_bytes` a file
    DIR/model.safetensors.index.json          tensor name -> file

Matrices may be stored as int8 with one fp16 scale per output row: `NAME` int8 [R, C] and `NAME.scale` [R]; or in six
bits with one for each `GROUP` columns: `NAME` uint8 [R, C * 6 / 8] and `NAME.scale` [R, C / GROUP]. Stacks of matrices
have E in front of both.
Everything is written aside and renamed, the index last, so that a half-written checkpoint is never taken for one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kimi_mm.audio.quantizer import VectorQuantizer
from kimi_mm.config import ModelConfig
from kimi_mm.errors import CheckpointError
from kimi_mm.model import Model
from kimi_mm.text.tokenizer import TextTokenizer

INDEX = "model.safetensors.index.json"
FORMATS = ("fp32", "fp16", "int8", "int6")
GROUP = 64  # columns that share a scale in six bits
PRETRAINED = Path(__file__).parent / "pretrained"
# Only training needs the moving averages of the codebook; a loaded model starts them from the codebook.
_TRAINING_ONLY = ("quantizer.ema_count", "quantizer.ema_sum")
_SENSITIVE = ("A_log", "dt_bias", "codebook", "norm", "query", "score_correction", "load")


def save_checkpoint(
    path: str | Path,
    model: Model,
    tokenizer: TextTokenizer,
    *,
    weights: str = "fp16",
    shard_bytes: int = 15 * 2**20,
) -> int:
    """Writes a checkpoint folder and returns its size in bytes.

    Args:
        path: folder, made if missing.
        weights: "fp32", "fp16", "int8" (matrices by row, the rest fp16), or "int6" (matrices by group of columns,
            those that cannot be cut into groups as int8, the rest fp16). Parameters whose range matters more than their
            size (decays, norms, codebook) stay fp32.
        shard_bytes: largest size of one weight file.
    """
    if weights not in FORMATS:
        raise CheckpointError(f"weights='{weights}' must be one of {', '.join(FORMATS)}.")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    _write_text(path / "config.yaml", model.config.to_yaml())
    _write_text(path / "tokenizer.json", tokenizer.to_json())
    return save_tensors(path, dict(_encode(model.state_dict(), weights)), shard_bytes)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], shard_bytes: int = 15 * 2**20) -> int:
    """Writes tensors as numbered safetensors shards with an index; returns the bytes written."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room and shards[-1] and not name.endswith(".scale"):  # which stays with what it scales
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= size
    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        aside = path / (file + ".tmp")
        save_file(shard, aside, metadata={"format": "pt"})
        os.replace(aside, path / file)
        total += (path / file).stat().st_size
        index.update(dict.fromkeys(shard, file))
    _write_text(path / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1))
    for stale in path.glob("model-*.safetensors"):
        if stale.name not in set(index.values()):
            stale.unlink()
    return total


def find_checkpoint(name_or_path: str | Path) -> Path:
    """Returns the folder of a shipped checkpoint such as "nano", or else the path as it is."""
    path = Path(name_or_path)
    shipped = PRETRAINED / path
    return shipped if not path.is_dir() and (shipped / "config.yaml").is_file() else path


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> tuple[Model, TextTokenizer]:
    """Reads a checkpoint folder into an fp32 model in eval mode; see `conversion.load` for converted, large ones.

    Raises:
        CheckpointError: names the file, and the tensor where one is missing, unknown or of another shape.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder.")
    config = ModelConfig.from_yaml(path / "config.yaml")
    tokenizer = TextTokenizer.load(path / "tokenizer.json")
    model = Model(config)
    load_tensors(model, path)
    return model.to(device).eval(), tokenizer


def join_checkpoints(path: str | Path, base: Path, parts: Mapping[str, Path], *, weights: str = "fp16") -> int:
    """Writes a checkpoint with parts of other ones, which were trained from the same start; returns its size in bytes.

    Args:
        path: folder to write, see `save_checkpoint`.
        base: checkpoint that all else is taken from.
        parts: name of the part ("vision", "detokenizer", "audio") -> checkpoint that it is taken from.
        weights: format of what is written.

    Raises:
        CheckpointError: a checkpoint cannot be read, or has no such part.
    """
    config = ModelConfig.from_yaml(base / "config.yaml")
    for name, source in parts.items():
        part = getattr(ModelConfig.from_yaml(source / "config.yaml"), name, None)
        if part is None:
            raise CheckpointError(f"{source}: has no part '{name}' that could be taken.")
        config = config.replace(**{name: part})
    model = Model(config)
    load_tensors(model, base, optional=tuple(f"{name}." for name in parts))
    for name, source in parts.items():
        load_tensors(getattr(model, name), source, prefix=f"{name}.")
    return save_checkpoint(path, model, TextTokenizer.load(base / "tokenizer.json"), weights=weights)


def load_tensors(
    model: torch.nn.Module,
    path: Path,
    *,
    prefix: str = "",
    optional: tuple[str, ...] = (),
    spare: tuple[str, ...] = (),
) -> list[str]:
    """Copies a checkpoint's tensors (those that start with `prefix`, which is cut off) into a module, all or error.

    Parts of the module whose names start with one of `optional` may be missing; they keep their values. Tensors whose
    names start with one of `spare` are left out where the module has none of that name.

    Returns:
        Those of `spare` that were left out.
    """
    wanted = model.state_dict()
    seen, left = set(), set()
    for name, tensor, file in read_tensors(path):
        if not name.startswith(prefix):
            continue
        key = name[len(prefix) :]
        if key not in wanted and key.startswith(spare):
            left |= {part for part in spare if key.startswith(part)}
            continue
        if key not in wanted:
            raise CheckpointError(f"{file}: unknown tensor '{name}'; the config describes another model.")
        if tensor.shape != wanted[key].shape:
            raise CheckpointError(
                f"{file}: tensor '{name}' has shape {list(tensor.shape)}, the config needs {list(wanted[key].shape)}."
            )
        with torch.no_grad():
            wanted[key].copy_(tensor)
        seen.add(key)
    missing = sorted(n for n in set(wanted) - seen if not n.endswith(_TRAINING_ONLY) and not n.startswith(optional))
    if missing:
        raise CheckpointError(f"{path}: tensor '{prefix}{missing[0]}' is missing ({len(missing)} in all).")
    for module in model.modules():
        if isinstance(module, VectorQuantizer):
            module.restart_averages()
    return sorted(left)


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor, Path]]:
    """Yields (name, dequantised tensor, file) of a checkpoint folder, one at a time."""
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except OSError as error:
        raise CheckpointError(f"{path / INDEX}: cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path / INDEX}: not a checkpoint index.") from None
    for file in sorted(set(index.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{path / INDEX}: file '{file}' points outside the checkpoint.")
        try:
            with safe_open(path / file, framework="pt") as shard:
                names = set(shard.keys())
                for name in sorted(names):
                    if name.endswith(".scale") and name.removesuffix(".scale") in names:
                        continue
                    tensor = shard.get_tensor(name)
                    if f"{name}.scale" in names:
                        scale = shard.get_tensor(f"{name}.scale").float()
                        if tensor.dtype == torch.uint8:
                            tensor = expand_groups(tensor, scale)
                        else:
                            tensor = tensor.float() * scale[(...,) + (None,) * (tensor.dim() - scale.dim())]
                    yield name, tensor, path / file
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path / file}: damaged or missing ({error}).") from None


def quantize_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 by row.

    Args:
        tensor: [R, C], a stack [E, R, C] with C >= 16, or a convolution [R, C, k].

    Returns:
        int8 values of the same shape and fp16 scales, [R] or [E, R].
    """
    lead = tensor.shape[:2] if tensor.dim() == 3 and tensor.shape[-1] >= 16 else tensor.shape[:1]
    flat = tensor.float().reshape(*lead, -1)
    scale = (flat.abs().amax(-1) / 127).clamp_min(1e-7).half()
    values = (flat / scale.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
    return values.reshape(tensor.shape), scale


def quantize_groups(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric six bits by group of columns, each with the scale of least squared error among a few.

    Args:
        tensor: [..., C], C a multiple of `GROUP`.

    Returns:
        Four values in three bytes, uint8 [..., C * 6 / 8], and fp16 scales [..., C / GROUP].
    """
    groups = tensor.float().unflatten(-1, (-1, GROUP))
    peak = groups.abs().amax(-1, keepdim=True)
    least = torch.full_like(peak, torch.inf)
    values, scale = torch.zeros_like(groups), torch.zeros_like(peak)
    for clipped in (1.0, 0.93, 0.86, 0.8, 0.74, 0.68):  # the largest value costs the others less when it is cut
        tried = (peak * clipped / 31).clamp_min(1e-7).half().float()
        rounded = (groups / tried).round().clamp(-31, 31)
        error = (rounded * tried - groups).square().sum(-1, keepdim=True)
        better = error < least
        least, scale = torch.where(better, error, least), torch.where(better, tried, scale)
        values = torch.where(better, rounded, values)
    a, b, c, d = (values.flatten(-2) + 32).to(torch.uint8).unflatten(-1, (-1, 4)).unbind(-1)
    three = torch.stack([a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2], -1)
    return three.flatten(-2), scale.squeeze(-1).half()


def expand_groups(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Undoes `quantize_groups`, but for rounding: uint8 [..., C * 6 / 8], scales [..., C / GROUP] to fp32 [..., C]."""
    a, b, c = packed.unflatten(-1, (-1, 3)).unbind(-1)
    values = torch.stack([a & 63, (a >> 6 | b << 2) & 63, (b >> 4 | c << 4) & 63, c >> 2], -1)
    groups = values.flatten(-2).float().sub_(32.0).unflatten(-1, (-1, GROUP))
    return groups.mul_(scale.float()[..., None]).flatten(-2)


def _encode(state: dict[str, torch.Tensor], weights: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in state.items():
        if name.endswith(_TRAINING_ONLY):
            continue
        tensor = tensor.detach().cpu().contiguous()
        plain = weights == "fp32" or not tensor.is_floating_point() or any(part in name for part in _SENSITIVE)
        if plain:
            yield name, tensor
        elif weights in ("int8", "int6") and tensor.dim() >= 2 and tensor.shape[0] > 1:
            grouped = weights == "int6" and tensor.dim() <= 3 and tensor.shape[-1] % GROUP == 0
            values, scale = quantize_groups(tensor) if grouped else quantize_rows(tensor)
            yield name, values
            yield f"{name}.scale", scale
        else:
            yield name, tensor.half()


def _write_text(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
