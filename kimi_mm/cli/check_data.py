"""`kimi-mm check-data`: every line of a data set that training could not use, before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kimi_mm.cli.progress import progress_bar
from kimi_mm.errors import UserError


def check_data(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help=".jsonl files or WebDataset .tar files.")],
    documents: Annotated[
        bool, typer.Option("--documents", help="Rows are documents for pretraining, not conversations.")
    ] = False,
    fast: Annotated[bool, typer.Option("--fast", help="Media only have to exist; do not decode them.")] = False,
    limit: Annotated[int, typer.Option(min=0, help="How many bad lines to show.")] = 20,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="OUT.jsonl", help="Write all bad lines as JSON lines.")
    ] = None,
) -> None:
    """Check training data: which lines cannot be used, and why."""
    from kimi_mm.cli.outputs import check_writable
    from kimi_mm.data.check import check_files

    if json_file is not None:
        check_writable(json_file)
    with progress_bar("checking") as show:
        total, done = _lines(files), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if show:
                show(done / max(1, total))

        report = check_files(files, documents=documents, fast=fast, progress=advance)
    if json_file is not None:
        report.write(json_file)
    for line in report.lines(limit):
        print(line)
    if report.problems:
        raise UserError(f"{len(report.problems)} of {report.samples} samples cannot be used.")


def _lines(files: list[str]) -> int:
    """Counts lines for the progress bar; wrong for a tar, where it does not matter."""
    total = 0
    for name in files:
        if name.endswith(".jsonl") and Path(name).is_file():
            with Path(name).open("rb") as file:
                total += sum(1 for _ in file)
    return total
