"""A published model on disk: what it is, its config as ours, and its tensors as byte ranges.

config.json ─► layout and ModelConfig
*.safetensors, index; audio_detokenizer/model.pt, vocoder/model.pt ─► (group, name) -> Stored
plan: our tensors, each with its parts ─► a conversion, or a model in memory
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_mm.config import ModelConfig
from kimi_mm.conversion.configs import layout_name, model_config
from kimi_mm.conversion.files import Stored, Target, pickled_entries, safetensors_entries
from kimi_mm.conversion.layouts import DIT, GLM, VOCODER, WHISPER, Layout, Piece, layout_of
from kimi_mm.errors import CheckpointError

PICKLED = {DIT: "state_dict", VOCODER: "generator"}  # groups in `.pt` files, and the key that the tensors lie under
KEPT = "published:"  # our name of a tensor that is only kept: published:GROUP/NAME
INT4_GROUP = 32  # values that share a scale in K2.5's experts
# Small files that travel along; Python files do not, since nothing here runs them.
COMPANIONS = (".json", ".model", ".jinja", ".txt", ".yaml", ".md")


@dataclass(frozen=True)
class PublishedModel:
    """An opened folder. `tensors` are keyed by (group, published name)."""

    folder: Path
    layout: str
    config: ModelConfig
    tensors: Mapping[tuple[str, str], Stored]
    companions: tuple[str, ...]  # relative paths of config and tokenizer files


def open_published(folder: Path, audio_tokenizer: Path | None = None, with_voice: bool = True) -> PublishedModel:
    """Opens a folder in a published layout; reads headers only.

    Args:
        folder: with `config.json`.
        audio_tokenizer: folder of GLM-4-Voice's tokenizer, which Kimi-Audio's repository does not hold; None looks
            in the subfolder `glm-4-voice-tokenizer`.
        with_voice: False leaves Kimi-Audio's detokenizer and vocoder alone; they need not be there.

    Raises:
        CheckpointError: names the file or key that is missing, damaged or of another kind.
    """
    values = read_json(folder / "config.json")
    layout = layout_name(values, folder / "config.json")
    groups: dict[str, Path] = {"": folder}
    extra: dict[str, dict[str, Any]] = {}
    if layout == "kimi_audio":
        groups |= {WHISPER: folder / WHISPER, GLM: audio_tokenizer or folder / GLM}
        if not (groups[GLM] / "model.safetensors").is_file():
            raise CheckpointError(
                f"{groups[GLM] / 'model.safetensors'}: no such file; Kimi-Audio's codes come from "
                "THUDM/glm-4-voice-tokenizer: download it there or name its folder (--audio-tokenizer)."
            )
        if with_voice:
            groups |= {DIT: folder / DIT, VOCODER: folder / VOCODER}
        for group, path in groups.items():
            config = path / ("config.yaml" if group == DIT else "config.json")
            extra[group] = read_config(config) if group else values
    config = model_config(layout, values, extra, folder / "config.json")
    tensors: dict[tuple[str, str], Stored] = {}
    for group, path in groups.items():
        if group in PICKLED:
            entries = pickled_entries(path / "model.pt", PICKLED[group])
        else:
            entries = folder_entries(path)
        tensors.update({(group, entry.name): entry for entry in entries})
    companions = sorted(
        str(file.relative_to(path) if not group else Path(group) / file.name)
        for group, path in groups.items()
        for file in path.iterdir()
        if file.is_file() and file.suffix in COMPANIONS and not file.name.endswith("safetensors.index.json")
    )
    return PublishedModel(folder, layout, config, tensors, tuple(companions))


def companion_path(model: PublishedModel, name: str, audio_tokenizer: Path | None) -> Path:
    """Where a companion file lies; GLM's may be in a folder of their own."""
    if audio_tokenizer is not None and name.startswith(f"{GLM}/"):
        return audio_tokenizer / name.removeprefix(f"{GLM}/")
    return model.folder / name


def plan(model: PublishedModel, layout: Layout | None = None, keep_unused: bool = False) -> list[Target]:
    """Lists our tensors with the published bytes that they are made of.

    Args:
        model: opened.
        layout: of `model.config`, when it is known already.
        keep_unused: also keep what the model never reads, such as Whisper's decoder.

    Raises:
        CheckpointError: on a tensor that is missing, unknown, or of another shape or type; names file and tensor.
    """
    layout = layout or layout_of(model.layout, model.config)
    targets: list[Target] = []
    used: set[tuple[str, str]] = set()
    for ours, pieces in layout.table.items():
        if _find(model, pieces[0], "_packed"):
            targets += _packed(model, ours, layout.shapes[ours], pieces, used)
            continue
        found = [_take(model, piece, used) for piece in pieces]
        dtypes = {stored.dtype for stored in found}
        if len(dtypes) > 1:
            raise CheckpointError(f"{found[0].file}: the tensors of '{ours}' mix types ({', '.join(sorted(dtypes))}).")
        parts = tuple((stored, 0, stored.size) for stored in found)
        targets.append(Target(ours, found[0].dtype, layout.shapes[ours], parts))
    for (group, name), stored in sorted(model.tensors.items()):
        if (group, name) in used:
            continue
        fate = layout.fate(group, name)
        if fate is None:
            raise CheckpointError(
                f"{stored.file}: unknown tensor '{name}'; the layout '{layout.name}' has no such one."
            )
        if fate == "kept" or keep_unused:
            kept = f"{KEPT}{group}/{name}"
            targets.append(Target(kept, stored.dtype, stored.shape, ((stored, 0, stored.size),)))
    return targets


def _take(model: PublishedModel, piece: Piece, used: set[tuple[str, str]]) -> Stored:
    stored = _find(model, piece)
    if stored is None:
        raise CheckpointError(f"{model.folder / piece.group}: tensor '{piece.name}' is missing from its files.")
    if stored.shape != piece.shape:
        raise CheckpointError(
            f"{stored.file}: tensor '{stored.name}' has shape {list(stored.shape)}, "
            f"config.json says {list(piece.shape)}."
        )
    used.add((piece.group, stored.name))
    return stored


def _find(model: PublishedModel, piece: Piece, suffix: str = "") -> Stored | None:
    return next((s for name in piece.names if (s := model.tensors.get((piece.group, name + suffix)))), None)


def _packed(
    model: PublishedModel, ours: str, shape: tuple[int, ...], pieces: tuple[Piece, ...], used: set[tuple[str, str]]
) -> list[Target]:
    """INT4 experts: eight values to an int32, a bf16 scale for every 32 values, and the true shape, checked here."""
    values, scales = [], []
    for piece in pieces:
        rows, columns = piece.shape
        for suffix, size, out in (
            ("_packed", (rows, columns // 8), values),
            ("_scale", (rows, columns // INT4_GROUP), scales),
        ):
            out.append(_take(model, Piece(piece.group, piece.name + suffix, size), used))
        stored = _take(model, Piece(piece.group, piece.name + "_shape", (2,)), used)
        if tuple(int.from_bytes(b"".join(stored.blocks())[i : i + 4], "little") for i in (0, 4)) != piece.shape:
            raise CheckpointError(f"{stored.file}: '{stored.name}' differs from config.json's {list(piece.shape)}.")
    lead, columns = shape[:-1], shape[-1]
    return [
        Target(f"{ours}.packed", "I32", (*lead, columns // 8), tuple((s, 0, s.size) for s in values)),
        Target(
            f"{ours}.group_scale",
            scales[0].dtype,
            (*lead, columns // INT4_GROUP),
            tuple((s, 0, s.size) for s in scales),
        ),
    ]


def folder_entries(folder: Path) -> list[Stored]:
    """All tensors of a folder's safetensors files; the index, if there is one, must agree with them."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder}: holds no safetensors file.")
        return [entry for file in files for entry in safetensors_entries(file)]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise CheckpointError(f"{index}: not a checkpoint index.")
    entries: dict[str, Stored] = {}
    for file in sorted(set(names.values())):
        if not file or Path(file).name != file:
            raise CheckpointError(f"{index}: file '{file}' points outside the checkpoint.")
        if not (folder / file).is_file():
            count = sum(1 for value in names.values() if value == file)
            first = next(name for name, value in names.items() if value == file)
            raise CheckpointError(f"{folder / file}: no such file; {count} tensors are in it, '{first}' is the first.")
        entries.update({entry.name: entry for entry in safetensors_entries(folder / file)})
    for name, file in names.items():
        if name not in entries:
            raise CheckpointError(f"{folder / file}: lacks the tensor '{name}' that the index promises.")
    return list(entries.values())


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; CheckpointError names the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object.")
    return values


def read_config(path: Path) -> dict[str, Any]:
    """Reads a JSON or YAML mapping."""
    if path.suffix == ".json":
        return read_json(path)
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    except yaml.YAMLError as error:
        raise CheckpointError(f"{path}: not valid YAML ({str(error).splitlines()[0]}).") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a mapping.")
    return values
