"""Memory that processes share, cut into slots of one size, for what is too large to go through a pipe.

It has no name: the kernel drops it with the last process that holds it, however that process ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from multiprocessing import reduction
from typing import Any

import numpy as np


class Slots:
    """`count` slots of `size` bytes; travels to another process among the arguments of its start.

    Pages are taken from the system when they are first written.
    """

    def __init__(self, count: int, size: int) -> None:
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if hasattr(os, "memfd_create"):
            file = os.memfd_create("kimi-mm")
        else:
            with tempfile.TemporaryFile() as unnamed:
                file = os.dup(unnamed.fileno())
        os.ftruncate(file, count * self.size)
        self._file = file
        self._bytes = np.frombuffer(mmap.mmap(file, count * self.size), np.uint8)
        weakref.finalize(self, os.close, file)

    def __getitem__(self, number: int) -> np.ndarray:
        """Returns slot `number`, [size] uint8; writes are seen by all processes."""
        return self._bytes[number * self.size : (number + 1) * self.size]

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size, "total": len(self._bytes), "file": reduction.DupFd(self._file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.size, self._file = state["size"], state["file"].detach()
        self._bytes = np.frombuffer(mmap.mmap(self._file, state["total"]), np.uint8)
        weakref.finalize(self, os.close, self._file)
