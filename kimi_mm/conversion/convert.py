"""Published checkpoints to our layout and back, byte for byte.

    SOURCE (config.json)  ─► plan ─► DEST/model-*.safetensors, config.yaml, tokenizer, published/ (companions)
    SOURCE (config.yaml)  ─► the same table backwards ─► DEST as published
    RUN (of training)     ─► RUN/model, likewise

Both ways run in a few MiB of memory, go on where they were stopped, and leave SHA-256 sums.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from kimi_mm.config import ModelConfig
from kimi_mm.conversion.files import DTYPES, Part, Stored, Target, Writer, fingerprint
from kimi_mm.conversion.hub import resolve
from kimi_mm.conversion.layouts import Layout, layout_of
from kimi_mm.conversion.published import (
    INT4_GROUP,
    KEPT,
    PICKLED,
    companion_path,
    folder_entries,
    open_published,
    plan,
    read_json,
)
from kimi_mm.errors import CheckpointError, UserError

ORIGIN = "published.json"  # in a converted folder: which layout it came from
COMPANIONS = "published"  # and the small files that came with it
SHARD_BYTES = 4 * 2**30
_TOKENIZERS = ("tiktoken.model", "tokenizer.json", "tokenizer_config.json")

Progress = Callable[[int, int], None]


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    audio_tokenizer: str | Path | None = None,
    keep_unused: bool = False,
    to: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Converts a published checkpoint to our layout, or a converted or fine-tuned one back.

    Args:
        source: a folder, or a repository of the hub ("moonshotai/Kimi-Linear-48B-A3B-Instruct"). A folder with
            `config.yaml` is ours and goes back, and so does that of a training run which started from such a model.
        dest: folder, made if missing. Finished files of an earlier, stopped run are taken over.
        audio_tokenizer: folder or repository of GLM-4-Voice's tokenizer, for Kimi-Audio.
        keep_unused: also carry along what the model never reads (Whisper's decoder).
        to: on the way back, the layout that the model must have ("kimi-audio"); None takes it as it is.
        shard_bytes: largest size of a weight file.
        progress: called with the bytes written and the bytes in all.

    Returns:
        `dest`.

    Raises:
        CheckpointError: names the file, and the tensor where there is one. Half-written files do not remain.
    """
    folder, glm = resolve(source, audio_tokenizer)
    dest = Path(dest)
    if dest.resolve() == folder.resolve():
        raise CheckpointError(f"{dest}: source and destination are the same folder.")
    if not (folder / "config.json").is_file() and (folder / "model" / "config.yaml").is_file():
        folder = folder / "model"
    if (folder / "config.yaml").is_file():
        return _back(folder, dest, to, shard_bytes, progress)
    if to is not None:
        raise CheckpointError(f"{folder}: is published already; --to is for converted and fine-tuned models.")
    model = open_published(folder, glm)
    companions = {name: companion_path(model, name, glm) for name in model.companions}
    targets = plan(model, keep_unused=keep_unused)
    return write_native(dest, targets, model.config, model.layout, companions, shard_bytes, progress)


def write_native(
    dest: Path,
    targets: list[Target],
    config: ModelConfig,
    layout: str,
    companions: Mapping[str, Path],
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Writes a published model in our layout; see `convert`.

    Args:
        dest: folder, made if missing.
        targets: our tensors.
        config: of the model.
        layout: that it goes back to.
        companions: small files that came with it, by their names there.
    """
    writer = Writer(dest, fingerprint(targets, "native", shard_bytes))
    total = sum(target.size for target in targets)
    writer.check_room(total)
    writer.shards(targets, shard_bytes, progress=_counter(progress, total))
    for name, path in companions.items():
        writer.copy(path, f"{COMPANIONS}/{name}")
        if name in _TOKENIZERS:
            writer.copy(path, name)
    writer.text(ORIGIN, json.dumps({"layout": layout}))
    writer.text("config.yaml", config.to_yaml())
    writer.finish()
    return dest


def export(source: str | Path, dest: str | Path) -> Path:
    """Writes one of our models (not a converted one) as a folder for transformers' Auto classes, weights in fp32.

    Args:
        source: "nano" or a checkpoint folder.
        dest: folder, made if missing.

    Raises:
        CheckpointError: names the file, and the tensor where there is one.
        UserError: transformers is not installed.
    """
    from kimi_mm.checkpoint import find_checkpoint, load_checkpoint

    folder = find_checkpoint(source)
    try:
        from kimi_mm.hf import KimiMMConfig, KimiMMForConditionalGeneration
    except ModuleNotFoundError as error:
        raise UserError(f"this needs the package '{error.name}': pip install 'kimi-mm[train]'.") from None
    model, tokenizer = load_checkpoint(folder)
    with torch.device("meta"):
        wrapped = KimiMMForConditionalGeneration(KimiMMConfig(model.config.to_dict()))
    wrapped.model = model
    wrapped.save_pretrained(dest)
    writer = Writer(Path(dest), "export")
    writer.text("tokenizer.json", tokenizer.to_json())
    for name in ("README.md", "NOTICE"):
        if (folder / name).is_file():
            writer.copy(folder / name, name)
    (Path(dest) / "conversion.json").unlink(missing_ok=True)
    return Path(dest)


# ---- and back ----------------------------------------------------------------------------------------------------


def published_targets(entries: dict[str, Stored], layout: Layout, where: Path) -> dict[str, list[Target]]:
    """Lists the published tensors of every group, with the bytes of ours that they are made of.

    Raises:
        CheckpointError: a tensor of the layout is missing or has another shape; names it.
    """
    groups: dict[str, list[Target]] = {}

    def add(group: str, name: str, dtype: str, shape: tuple[int, ...], *parts: Part) -> None:
        groups.setdefault(group, []).append(Target(name, dtype, shape, parts))

    for ours, pieces in layout.table.items():
        packed, scales = entries.get(f"{ours}.packed"), entries.get(f"{ours}.group_scale")
        whole = entries.get(ours)
        if whole is None and (packed is None or scales is None):
            raise CheckpointError(f"{where}: tensor '{ours}' is missing.")
        if whole is not None and whole.shape != layout.shapes[ours]:
            raise CheckpointError(
                f"{whole.file}: tensor '{ours}' has shape {list(whole.shape)}, the config needs "
                f"{list(layout.shapes[ours])}."
            )
        at = 0
        for piece in pieces:
            count = 1
            for size in piece.shape:
                count *= size
            if whole is not None:
                width = DTYPES[whole.dtype].itemsize
                add(piece.group, piece.name, whole.dtype, piece.shape, (whole, at * width, count * width))
            elif packed is not None and scales is not None:
                rows, columns = piece.shape
                four, width = DTYPES[packed.dtype].itemsize, DTYPES[scales.dtype].itemsize
                span = (packed, at // 8 * four, count // 8 * four)
                add(piece.group, f"{piece.name}_packed", packed.dtype, (rows, columns // 8), span)
                span = (scales, at // INT4_GROUP * width, count // INT4_GROUP * width)
                add(piece.group, f"{piece.name}_scale", scales.dtype, (rows, columns // INT4_GROUP), span)
                size = rows.to_bytes(4, "little") + columns.to_bytes(4, "little")
                add(piece.group, f"{piece.name}_shape", "I32", (2,), size)
            at += count
    for name, stored in entries.items():
        if name.startswith(KEPT):
            group, _, rest = name.removeprefix(KEPT).partition("/")
            if layout.fate(group, rest) is None:  # groups become folders
                raise CheckpointError(f"{stored.file}: unknown tensor '{name}'; '{layout.name}' has no such one.")
            add(group, rest, stored.dtype, stored.shape, (stored, 0, stored.size))
    return groups


def origin(folder: Path) -> str:
    """Returns the layout that a converted folder goes back to; CheckpointError when there is none."""
    if not (folder / ORIGIN).is_file():
        raise CheckpointError(
            f"{folder}: was not converted from a published checkpoint; use --to transformers to hand it to others."
        )
    return str(read_json(folder / ORIGIN).get("layout"))


def _back(folder: Path, dest: Path, to: str | None, shard_bytes: int, progress: Progress | None) -> Path:
    name = origin(folder)
    if to is not None and to.replace("-", "_") != name:
        raise CheckpointError(f"{folder}: goes back to the layout '{name.replace('_', '-')}', not to '{to}'.")
    layout = layout_of(name, ModelConfig.from_yaml(folder / "config.yaml"))
    entries = {entry.name: entry for entry in folder_entries(folder)}
    groups = published_targets(entries, layout, folder)
    everything = [target for targets in groups.values() for target in targets]
    writer = Writer(dest, fingerprint(everything, "published", shard_bytes))
    total = sum(target.size for target in everything)
    writer.check_room(total)
    count = _counter(progress, total)
    for group, targets in sorted(groups.items()):
        if group in PICKLED:
            _pickled(writer, f"{group}/model.pt", targets, PICKLED[group], count)
        else:
            writer.shards(targets, shard_bytes if not group else 2**62, prefix=group, progress=count)
    for path in sorted((folder / COMPANIONS).rglob("*")):
        if path.is_file():
            writer.copy(path, str(path.relative_to(folder / COMPANIONS)))
    writer.finish()
    return dest


def _pickled(writer: Writer, name: str, targets: list[Target], top: str, count: Callable[[int], None] | None) -> None:
    """Writes a `.pt` file as torch does; its tensors are mapped from ours, not loaded."""
    if name in writer.done and (writer.folder / name).is_file():
        return
    tensors = {target.name: _mapped(target) for target in targets}
    path = writer.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    try:
        torch.save({top: tensors}, aside)
    except (OSError, RuntimeError, pickle.PicklingError) as error:
        aside.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: writing failed ({error}); make room and run the command again.") from None
    writer.adopt(aside, name)
    if count:
        count(sum(target.size for target in targets))


def _mapped(target: Target) -> torch.Tensor:
    """A tensor over the bytes of its only part, mapped from the file: torch.save wants all of them at once."""
    (part,) = target.parts
    assert not isinstance(part, bytes)
    stored, offset, size = part
    data = np.memmap(stored.file, np.uint8, "c", stored.start + offset, (size,))
    return torch.from_numpy(data).view(DTYPES[target.dtype]).view(target.shape)


def _counter(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    return count


def native_targets(folder: Path) -> Iterator[Target]:
    """Lists the tensors of a folder in our layout, for `loading.fill`."""
    for entry in folder_entries(folder):
        yield Target(entry.name, entry.dtype, entry.shape, ((entry, 0, entry.size),))
