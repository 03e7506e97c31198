"""`kimi-mm report`: the curves of a training run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `kimi-mm train` wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PAGE.html", help="Default: RUN/report.html.")
    ] = None,
) -> None:
    """Draw a training run: losses, rates, expert loads and norms on one page."""
    from kimi_mm.cli.outputs import check_writable
    from kimi_mm.evaluation.run_report import read_run, write_report

    target = output or run / "report.html"
    read_run(run)
    check_writable(target)
    print(write_report(run, target))
