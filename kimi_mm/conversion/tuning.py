"""Published models as the start and the result of training.

    published or converted folder ─► start: config, vocabulary, tensors ─► Model, which learns
                                          │                                     │ what it holds
                                          └─ what it does not ──────────────────┴─► RUN/model ─► `convert` ─► published

Training needs no voice, so that it is not loaded; RUN/model has it all the same. Tensors that did not learn are copied
byte for byte.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kimi_mm.config import ModelConfig
from kimi_mm.conversion.configs import without
from kimi_mm.conversion.convert import COMPANIONS, ORIGIN, SHARD_BYTES, native_targets, origin, write_native
from kimi_mm.conversion.files import NAMES, Stored, Target
from kimi_mm.conversion.hub import resolve
from kimi_mm.conversion.load import text_tokenizer
from kimi_mm.conversion.loading import fill
from kimi_mm.conversion.published import companion_path, open_published, plan
from kimi_mm.model import Model
from kimi_mm.quantized import quantize
from kimi_mm.text.tokenizer import TextTokenizer


@dataclass(frozen=True)
class PublishedStart:
    """A published model that a run starts from; `whole` is its config with a voice, where it has one."""

    folder: Path
    layout: str
    whole: ModelConfig
    targets: tuple[Target, ...]
    companions: Mapping[str, Path]  # small files by their published names

    @property
    def config(self) -> ModelConfig:
        """Of the model that is trained: without the voice."""
        return without(self.whole, voice=True)

    def tokenizer(self) -> TextTokenizer:
        """Reads the vocabulary."""
        return text_tokenizer(self.folder, self.whole)

    def model(self, dtype: torch.dtype | None) -> Model:
        """Builds the model on the CPU; `dtype` of its floats, None: as stored."""
        return fill(self.config, self.targets, self.folder, dtype=dtype)

    def write(self, dest: Path, model: Model, shard_bytes: int = SHARD_BYTES) -> Path:
        """Writes a trained model in our layout, aside first; `kimi_mm.load` reads it, `convert` takes it back.

        Args:
            dest: folder; what was there is replaced when the new one is whole.
            model: of `self.config`. Parameters that require gradients are written from it, in the types that they were
                published in (four-bit experts are rounded anew); the rest is copied from the start.

        Raises:
            CheckpointError: names the file; on any error `dest` is as it was.
        """
        learned = _learned(model)
        aside = dest.with_name(f".{dest.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            targets = self._learned_targets(learned)
            write_native(aside, targets, self.whole, self.layout, self.companions, shard_bytes)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        shutil.rmtree(dest, ignore_errors=True)
        os.replace(aside, dest)
        return dest

    def _learned_targets(self, learned: Mapping[str, torch.Tensor]) -> list[Target]:
        dtypes = {target.name: target.dtype for target in self.targets}
        found = []
        for target in self.targets:
            stem, _, suffix = target.name.rpartition(".")
            if target.name in learned:
                found.append(self._live(target.name, target.dtype, learned[target.name]))
            elif suffix == "packed" and stem in learned:
                scales = f"{stem}.group_scale"
                values, scale = quantize(learned[stem].float(), "int4")
                found += [self._live(target.name, "I32", values), self._live(scales, dtypes[scales], scale)]
            elif not (suffix == "group_scale" and stem in learned):
                found.append(target)
        return found

    def _live(self, name: str, dtype: str, tensor: torch.Tensor) -> Target:
        file = self.folder / ("config.yaml" if (self.folder / ORIGIN).is_file() else "config.json")
        stored = Stored(file, name, dtype, tuple(tensor.shape), tensor=tensor)
        return Target(name, dtype, stored.shape, ((stored, 0, stored.size),))


def published_start(source: str | Path, audio_tokenizer: str | Path | None = None) -> PublishedStart | None:
    """Opens a published or converted model, or returns None for a checkpoint of this package's own.

    Args:
        source: folder, or repository of the hub.
        audio_tokenizer: folder or repository of GLM-4-Voice's tokenizer, for Kimi-Audio as downloaded.

    Raises:
        CheckpointError: names the file, and the tensor where there is one.
    """
    if Path(source).is_dir() and not is_published(source):
        return None
    folder, glm = resolve(source, audio_tokenizer)
    if (folder / ORIGIN).is_file():
        inside = folder / COMPANIONS
        companions = {str(path.relative_to(inside)): path for path in sorted(inside.rglob("*")) if path.is_file()}
        config = ModelConfig.from_yaml(folder / "config.yaml")
        return PublishedStart(folder, origin(folder), config, tuple(native_targets(folder)), companions)
    opened = open_published(folder, glm)
    companions = {name: companion_path(opened, name, glm) for name in opened.companions}
    return PublishedStart(folder, opened.layout, opened.config, tuple(plan(opened)), companions)


def is_published(folder: str | Path) -> bool:
    """Tells whether a folder holds a published model, as downloaded or converted."""
    return any((Path(folder) / name).is_file() for name in (ORIGIN, "config.json"))


def widen(model: Model) -> None:
    """Gives what learns fp32 weights: steps of an optimiser are too small for sixteen bits."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def _learned(model: Model) -> dict[str, torch.Tensor]:
    """What training may have changed: parameters with gradients, and the selection biases of routers that learn."""
    found: dict[str, torch.Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in model.state_dict().items():
        if name.endswith("router.bias") and name.replace("router.bias", "router.weight") in found:
            found[name] = tensor
    assert all(tensor.dtype in NAMES for tensor in found.values())
    return found
