"""`kimi-mm train`: runs a training recipe."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe such as asr/nano, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Replace values: optim.lr=1e-4.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", metavar="FILE", help="Your .jsonl or .tar file, for sft and pretrain; repeatable."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model", metavar="MODEL", help="What to start from: a name, a folder, or a published model (owner/name)."
        ),
    ] = "",
    debug: Annotated[bool, typer.Option("--debug", help="The recipe's small size: seconds on a CPU.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Default: runs/RECIPE.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint in the output folder.")] = True,
) -> None:
    """Train by a recipe."""
    folder = output or Path("runs") / Path(recipe).with_suffix("").relative_to(Path(recipe).anchor)

    from kimi_mm.training.parallel import leave_processes
    from kimi_mm.training.run import train as run

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        run(
            recipe,
            debug=debug,
            output=folder,
            resume=resume,
            overrides=overrides or [],
            data=data or [],
            model=model,
        )
    finally:
        leave_processes()
