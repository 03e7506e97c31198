"""`kimi-mm chain`: trains a whole model in sittings, stage by stage."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from kimi_mm.cli.errors import complain


def chain(
    name: Annotated[str, typer.Argument(metavar="CHAIN", help="A chain such as nano-v1, or a YAML file.")],
    sitting: Annotated[str, typer.Argument(metavar="[SITTING]", help="Default: the first that is not done.")] = "",
    work: Annotated[Path, typer.Option("--work", metavar="DIR", help="Folder of the stages' runs.")] = Path(
        "runs/chain"
    ),
    minutes: Annotated[float, typer.Option(min=0.0, help="Save and stop after these; 0: no limit.")] = 0.0,
    once: Annotated[
        bool, typer.Option("--once", help="The minutes are all there is: stages are made shorter to end within them.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Small sizes and made-up data: a minute on a CPU.")] = False,
) -> None:
    """Train a model in sittings of one machine; the same command goes on where it stopped."""
    from kimi_mm.training.chain import load_chain, run_chain

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if not run_chain(load_chain(name), work, sitting=sitting, minutes=minutes, once=once, debug=debug, say=complain):
        raise typer.Exit(75)  # EX_TEMPFAIL: to be given again
