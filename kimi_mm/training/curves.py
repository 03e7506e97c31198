"""Curves of a run for TensorBoard; they are a help, so a run goes on without them where they cannot be written."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Curves:
    """Writes numbers to `run/tensorboard`; after a failure (a full disk, mostly) it says so once and writes no more."""

    def __init__(self, run: Path) -> None:
        self._writer: Any = None
        self._guarded(lambda: self._open(run))

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """Adds one point to each curve."""

        def write() -> None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)

        if self._writer is not None:
            self._guarded(write)

    def close(self) -> None:
        """Writes out what is pending."""
        if self._writer is not None:
            self._guarded(self._writer.close)

    def _open(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"))

    def _guarded(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            self._writer = None
            log.warning("curves for TensorBoard end here: %s.", error.strerror or error)
