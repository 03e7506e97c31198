"""`kimi-mm tokenize`: recordings in, audio codes (12.5 a second) and continuous features out."""

from __future__ import annotations

import enum
import io
import json
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_mm.cli.errors import complain, for_each
from kimi_mm.cli.outputs import Destination

if TYPE_CHECKING:
    from torch import Tensor


class CodesFormat(str, enum.Enum):
    """Names of the formats of `kimi-mm tokenize`."""

    jsonl = "jsonl"
    npy = "npy"
    safetensors = "safetensors"


def tokenize(
    files: Annotated[list[str], typer.Argument(metavar="FILES...", help="Recordings; '-' is standard input.")],
    format: Annotated[
        CodesFormat, typer.Option("--format", "-f", help="npy: codes; safetensors: codes and features.")
    ] = CodesFormat.jsonl,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE|DIR", help="Default: standard output (jsonl only).")
    ] = None,
    model: Annotated[str, typer.Option(help="A shipped model's name or a checkpoint folder.")] = "nano",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Turn recordings into audio codes and features."""
    lines = format is CodesFormat.jsonl
    destination = Destination(files, output, f".{format.value}", joinable=lines, binary=not lines)

    import kimi_mm
    from kimi_mm.audio.io import read_audio

    tokenizer = kimi_mm.load(model, device=device).tokenizer

    def work(name: str) -> None:
        wave, seconds = read_audio(name)
        tokens = tokenizer.encode(wave, 16_000)
        destination.put(name, _encode(format, name, model, seconds, tokens.codes, tokens.features))

    failed = for_each(files, work)
    destination.close()
    if failed:
        if len(files) > 1:
            complain(f"{failed} of {len(files)} recordings could not be tokenized.")
        raise typer.Exit(1)


def _encode(how: CodesFormat, name: str, model: str, seconds: float, codes: Tensor, features: Tensor) -> bytes:
    """Returns one result as bytes; `codes` [N] int64, `features` [N, F], 12.5 rows a second."""
    if how is CodesFormat.jsonl:
        line = {"file": name, "model": model, "duration": round(seconds, 3), "rate": 12.5, "codes": codes.tolist()}
        return (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    if how is CodesFormat.npy:
        import numpy as np

        buffer = io.BytesIO()
        np.save(buffer, codes.cpu().numpy(), allow_pickle=False)
        return buffer.getvalue()
    from safetensors.torch import save

    tensors = {"codes": codes.cpu().contiguous(), "features": features.float().cpu().contiguous()}
    return save(tensors, metadata={"model": model, "duration": f"{seconds:.3f}", "rate": "12.5"})
