"""`kimi-mm convert`: published checkpoints to our layout, back again, and ours to transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kimi_mm.cli.errors import UsageError


def convert(
    source: Annotated[str, typer.Argument(help="A folder, or a repository of the Hugging Face hub (owner/name).")],
    dest: Annotated[Path, typer.Argument(help="Folder to write; a stopped run goes on where it was.")],
    audio_tokenizer: Annotated[
        str | None, typer.Option(help="Folder or repository of GLM-4-Voice's tokenizer, for Kimi-Audio.")
    ] = None,
    keep_unused: Annotated[
        bool, typer.Option(help="Also keep what the model never reads (Whisper's decoder), for the way back.")
    ] = False,
    shard_gib: Annotated[float, typer.Option(min=0.001, help="Largest weight file, GiB.")] = 4.0,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="LAYOUT",
            help="'transformers': one of our own models for its Auto classes. 'kimi-audio', ...: a converted or "
            "fine-tuned model back to the layout that it was published in (which needs no option).",
        ),
    ] = None,
    check: Annotated[bool, typer.Option(help="Read the result again and compare checksums.")] = False,
) -> None:
    """Convert a published checkpoint to this package's layout; a converted or fine-tuned one goes back, bit for bit."""
    from kimi_mm.cli.progress import progress_bar
    from kimi_mm.conversion.convert import convert as run
    from kimi_mm.conversion.convert import export
    from kimi_mm.conversion.files import verify
    from kimi_mm.conversion.layouts import LAYOUTS

    if to == "transformers":
        print(export(source, dest))
        return
    layouts = [name.replace("_", "-") for name in LAYOUTS]
    if to is not None and to not in layouts:
        raise UsageError(f"--to '{to}' must be one of transformers, {', '.join(layouts)}.")
    with progress_bar("converting") as advance:
        run(
            source,
            dest,
            audio_tokenizer=audio_tokenizer,
            keep_unused=keep_unused,
            to=to,
            shard_bytes=int(shard_gib * 2**30),
            progress=None if advance is None else lambda done, total: advance(done / max(1, total)),
        )
    files = verify(dest) if check else None
    print(f"{dest}" + (f": {files} files agree with their checksums." if files is not None else ""))
