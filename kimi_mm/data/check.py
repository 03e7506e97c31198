"""Every bad sample of a data set before any training: where it is, what is wrong, what to do.

    files ─► rows ─► examine (parse, open every medium) ─► results of the good ones, a Problem for each bad one

The report on the screen is bounded; the whole list can be written as JSON lines.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kimi_mm.data.conversations import parse_conversation, parse_document
from kimi_mm.data.manifest import write_aside
from kimi_mm.data.rows import Row, RowError, Rows, open_rows
from kimi_mm.errors import UserError

SHOWN = 20
Examine = Callable[[Row], Any]


@dataclass(frozen=True)
class Problem:
    """A sample that cannot be used; `line` counts from 1 (of a tar: samples, with their `key`)."""

    file: str
    line: int
    key: str
    reason: str
    fix: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" + (f" ({self.key})" if self.key else "")
        return f"{place}: {self.reason}" + (f"; {self.fix}." if self.fix else ".")


@dataclass
class Report:
    """What checking found: number of `samples`, good and bad, those with each medium, and the problems."""

    samples: int = 0
    media: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    def lines(self, shown: int = SHOWN) -> list[str]:
        """Returns the report for people: at most `shown` problems, then how many more, then the count."""
        lines = [str(problem) for problem in self.problems[:shown]]
        if len(self.problems) > shown:
            lines.append(f"... and {len(self.problems) - shown} more.")
        counts = ", ".join(f"{number} with {kind}" for kind, number in sorted(self.media.items()))
        lines.append(
            f"{self.samples} samples{f' ({counts})' if counts else ''}, {len(self.problems)} of them cannot be used."
        )
        return lines

    def write(self, path: Path) -> None:
        """Writes all problems as JSON lines."""
        write_aside(path, "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in self.problems).encode())


def check_rows(
    rows: Rows, examine: Examine, report: Report, progress: Callable[[int], None] | None = None
) -> list[tuple[int, Any]]:
    """Examines every row of a file.

    Args:
        rows: of `open_rows`.
        examine: called with a row; what it returns is kept, and a UserError makes the row a problem.
        report: counts and problems are added to it.
        progress: called with 1 after each row.

    Returns:
        (number, result) of the good rows.
    """
    good = []
    for number in range(len(rows)):
        row = rows[number]
        report.samples += 1
        try:
            good.append((number, examine(row)))
        except RowError as error:
            report.problems.append(Problem(row.file, row.line, row.key, error.reason, error.fix))
        except UserError as error:
            report.problems.append(Problem(row.file, row.line, row.key, str(error).rstrip("."), ""))
        if progress:
            progress(1)
    return good


def check_files(
    paths: Iterable[str | Path],
    *,
    documents: bool = False,
    fast: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Checks data files without a model: syntax, roles, paths, and that every medium can be read.

    Args:
        paths: `.jsonl` and `.tar` files; one that cannot be opened at all is a problem of its line 0.
        documents: rows are documents for pretraining rather than conversations.
        fast: media only have to exist; they are not decoded.
        progress: called with 1 after each row.
    """
    report = Report()

    def examine(row: Row) -> None:
        parsed = [{"content": parse_document(row)}] if documents else parse_conversation(row)
        parts = [part for message in parsed for part in message["content"]]
        for kind in sorted({part["type"] for part in parts} - {"text"}):
            report.media[kind] += 1
        for part in parts:
            if part["type"] != "text" and not fast:
                open_medium(part["type"], part[part["type"]])

    for path in paths:
        try:
            rows = open_rows(path)
        except UserError as error:
            report.problems.append(Problem(str(path), 0, "", str(error).removeprefix(f"{path}: ").rstrip("."), ""))
            continue
        check_rows(rows, examine, report, progress)
    return report


def open_medium(kind: str, source: Path | bytes) -> None:
    """Decodes a recording, picture or clip; UserError when that is not possible."""
    if kind == "audio":
        from kimi_mm.audio.io import read_audio

        read_audio(source)
    elif kind == "image":
        from kimi_mm.vision.image import read_image

        read_image(source)
    else:
        from kimi_mm.vision.image import MAX_PIXELS
        from kimi_mm.vision.video import read_clip

        clip = read_clip(source, None, MAX_PIXELS)
        next(iter(clip.frames([0])))
