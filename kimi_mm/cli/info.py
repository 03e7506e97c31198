"""`kimi-mm info`: what a checkpoint is, read from its files without loading the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"


def info(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="A shipped model's name or a folder.")] = "nano",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show a model's parts, parameters, size and card."""
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.table import Table

    facts = describe_checkpoint(model)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(title=f"{facts['name']}  ({facts['folder']})", show_header=False)
    for key, value in facts["summary"].items():
        table.add_row(key, str(value))
    console = Console()
    console.print(table)
    parts = Table("part", "parameters", "tensors")
    for part, (parameters, tensors) in facts["parts"].items():
        parts.add_row(part, f"{parameters:,}", str(tensors))
    console.print(parts)
    if facts["card"]:
        console.print(Markdown(facts["card"]))


def describe_checkpoint(model: str) -> dict[str, Any]:
    """Reads a checkpoint's config, the headers of its weight files, and the first part of its card.

    Args:
        model: a shipped model's name or a checkpoint folder.

    Returns:
        name, folder, `summary` (text to text), `parts` (part -> [parameters, tensors]) and `card`.

    Raises:
        CheckpointError: no such model, or a damaged weight file (named).
    """
    from kimi_mm.config import ModelConfig

    folder = _folder(model)
    config = ModelConfig.from_yaml(folder / "config.yaml")
    parts: dict[str, list[int]] = {}
    size = 0
    for file in sorted(folder.glob("*.safetensors")):
        size += file.stat().st_size
        for name, shape in _shapes(file).items():
            if name.endswith(".scale"):
                continue
            count = parts.setdefault(".".join(name.split(".")[:2]), [0, 0])
            count[0] += _product(shape)
            count[1] += 1
    backbone = config.backbone
    return {
        "name": config.name,
        "folder": str(folder),
        "summary": {
            "parameters": f"{sum(count for count, _ in parts.values()):,}",
            "weight files": f"{size / 2**20:.1f} MiB",
            "audio": f"{config.audio.mel.num_mel_bins} mel bins, {config.audio.encoder.num_layers} encoder layers of "
            f"{config.audio.encoder.hidden_size}, one codebook of {config.audio.quantizer.codebook_size} at "
            f"{config.audio.mel.sample_rate / config.audio.samples_per_code:g} Hz",
            "backbone": f"width {backbone.hidden_size}, residual {backbone.residual}",
            "trunk": " ".join(backbone.trunk) or "-",
            "text branch": " ".join(backbone.text_branch) or "-",
            "audio branch": " ".join(backbone.audio_branch) or "-",
            "vocabulary": f"{config.vocab.num_text_tokens} text, {len(config.vocab.specials)} special, "
            f"{config.vocab.num_audio_codes} audio",
        },
        "parts": parts,
        "card": _excerpt(folder / "README.md"),
    }


def _folder(model: str) -> Path:
    from kimi_mm.errors import CheckpointError

    shipped = PRETRAINED / model
    folder = shipped if not Path(model).is_dir() and shipped.is_dir() else Path(model)
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"model '{model}' is neither a checkpoint folder nor shipped; the shipped one is 'nano'.")
    return folder


def _shapes(file: Path) -> dict[str, list[int]]:
    """Returns tensor name -> shape from a safetensors header (8 bytes of length, then JSON)."""
    from kimi_mm.errors import CheckpointError

    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("header longer than the file")
            header = json.loads(stream.read(length))
        return {name: _whole(entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: damaged, not a safetensors file ({error}).") from None


def _whole(entry: dict) -> list[int]:
    """The shape of a tensor; of one in six bits, that of its values."""
    *lead, last = entry["shape"] or [1]
    return [*lead, last * 8 // 6] if entry["dtype"] == "U8" else entry["shape"]


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _excerpt(card: Path, sections: int = 2) -> str:
    """Returns the card up to its second heading of level two."""
    if not card.is_file():
        return ""
    kept: list[str] = []
    for line in card.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            sections -= 1
            if sections == 0:
                break
        kept.append(line)
    return "\n".join(kept).strip()
