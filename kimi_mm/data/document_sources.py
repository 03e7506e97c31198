"""Opens the data of a recipe.

    files ─► rows ─► DocumentMaker ─┬─► positions and group of the good ones ─► DocumentSource
                                    └─► Report of the bad ones

Every sample is laid out once, before training, so that all bad ones are known.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kimi_mm.data.check import Report, check_rows
from kimi_mm.data.document_config import DataSourceConfig, DocumentDataConfig
from kimi_mm.data.document_loader import DocumentSource
from kimi_mm.data.documents import DocumentMaker
from kimi_mm.data.rows import Row, RowError, open_rows


def open_sources(
    config: DocumentDataConfig, maker: DocumentMaker, progress: Callable[[int], None] | None = None
) -> tuple[list[DocumentSource], Report]:
    """Opens and checks all sources.

    Args:
        config: names the files and the longest document.
        maker: of the model that is trained.
        progress: called with 1 after each row.

    Returns:
        Sources with their good documents, and what is wrong with the others.

    Raises:
        UserError: a file cannot be opened at all.
    """
    report = Report()
    return [_open(source, config, maker, report, progress) for source in config.sources], report


def _open(
    source: DataSourceConfig,
    config: DocumentDataConfig,
    maker: DocumentMaker,
    report: Report,
    progress: Callable[[int], None] | None,
) -> DocumentSource:
    def examine(row: Row) -> tuple[int, str]:
        document = maker.make(row, source.layout)
        if len(document) > config.batch_positions:
            raise RowError(
                f"{len(document)} positions are more than a batch has ({config.batch_positions})",
                "shorten it, or raise data.batch_positions",
            )
        if document.group != "text":
            report.media[document.group] += 1
        return len(document), document.group

    files, index, lengths, groups = [], [], [], []
    for number, path in enumerate(source.files):
        files.append(open_rows(path))
        for row, (length, group) in check_rows(files[-1], examine, report, progress):
            index.append((number, row))
            lengths.append(length)
            groups.append(group)
    numbers = np.asarray(index, np.int64).reshape(-1, 2)
    return DocumentSource(source, tuple(files), numbers, np.asarray(lengths, np.int64), tuple(groups))
