"""`kimi_mm.load` for published models, as downloaded or converted: open, leave parts out, fill, find the vocabulary."""

from __future__ import annotations

from pathlib import Path

import torch

from kimi_mm.config import ModelConfig
from kimi_mm.conversion.configs import without
from kimi_mm.conversion.convert import ORIGIN, native_targets
from kimi_mm.conversion.hub import resolve
from kimi_mm.conversion.loading import fill
from kimi_mm.conversion.offload import LAYERS, PLACES, offload_layers
from kimi_mm.conversion.published import open_published, plan
from kimi_mm.errors import CheckpointError, UserError
from kimi_mm.model import Model
from kimi_mm.text.tiktoken import TiktokenTokenizer
from kimi_mm.text.tokenizer import TextTokenizer

PARTS = ("voice", "audio_branch", "vision")


def load_model(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    weights: str | None = None,
    drop: tuple[str, ...] = (),
    audio_tokenizer: str | Path | None = None,
    offload: str | None = None,
) -> tuple[Model, TextTokenizer]:
    """Loads a model and its vocabulary; arguments as for `kimi_mm.load`.

    Raises:
        CheckpointError: names the file, and the tensor where there is one.
        UserError: on an unknown part or type.
    """
    unknown = set(drop) - set(PARTS)
    if unknown:
        raise UserError(f"drop: '{min(unknown)}' must be one of {', '.join(PARTS)}.")
    folder, glm = resolve(source, audio_tokenizer)
    native = (folder / "config.yaml").is_file()
    if native:
        config, targets = ModelConfig.from_yaml(folder / "config.yaml"), native_targets(folder)
    else:
        opened = open_published(folder, glm, with_voice=not {"voice", "audio_branch"} & set(drop))
        config, targets = opened.config, plan(opened)
    config = without(config, voice="voice" in drop, audio_branch="audio_branch" in drop)
    if "vision" in drop:
        config = config.replace(vision=None)
    own = native and not (folder / ORIGIN).is_file()
    kind = _dtype(dtype) or (torch.float32 if own else None)
    tokenizer = text_tokenizer(folder, config, own)
    if offload is None:
        return fill(config, targets, folder, dtype=kind, weights=weights, device=device), tokenizer
    if offload not in PLACES:
        raise UserError(f"offload '{offload}' must be one of {', '.join(PLACES)}.")
    if weights is not None:
        raise UserError("offload moves layers as they are stored; leave out 'weights'.")
    if offload == "disk" and not native:
        raise UserError("offload 'disk' reads layers from a converted checkpoint; convert it first.")
    leave = LAYERS if offload == "disk" else ()
    model = fill(config, targets, folder, dtype=kind, weights=weights, leave=leave)
    offload_layers(model, offload, device, folder, kind)
    return model, tokenizer


def text_tokenizer(folder: Path, config: ModelConfig, own: bool = False) -> TextTokenizer:
    """Reads the vocabulary that lies beside a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if (folder / "tiktoken.model").is_file():
        return TiktokenTokenizer.from_folder(folder, "qwen" if config.hears else "k2")
    if (folder / "tokenizer.json").is_file():
        return TextTokenizer.load(folder / "tokenizer.json", lead=own)
    raise CheckpointError(f"{folder}: has neither tiktoken.model nor tokenizer.json; copy the vocabulary there.")


def _dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    if name is None or isinstance(name, torch.dtype):
        return name
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name not in known:
        raise UserError(f"dtype '{name}' must be one of {', '.join(known)}.")
    return known[name]
