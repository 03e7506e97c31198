"""Batches of pictures and conversations about them, drawn by worker processes while training goes on.

    batch number ─► (in a worker) SceneDrawer ─► slot of shared memory ─► (here) SceneBatch

Batch n is a pure function of (settings, seed, n): the state of the loader is n, and any number of processes gives the
same batches. A bucket fixes the size of every picture, so that a training step can be captured once per bucket.

A batch is tens of MB. Through the pipe of a process pool it would come in pieces of 64 KiB, for each of which this
process has to stop what it is at; so it stays where it was drawn until it is copied out, once.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from kimi_mm.data import scene_worker
from kimi_mm.data.loader import NOT_MINE, _Place
from kimi_mm.data.scene_drawer import Bucket, Drawn, Grid, SceneDrawer, carve
from kimi_mm.data.slots import Slots
from kimi_mm.processing import Processor
from kimi_mm.training.upload import capturing
from kimi_mm.training.vision_config import SceneDataConfig


@dataclass
class SceneBatch:
    """Pictures of sizes `grids`, with conversations: the tensors are the arrays of `Drawn`."""

    patches: torch.Tensor
    text_ids: torch.Tensor
    audio_ids: torch.Tensor
    vision_at: torch.Tensor
    shown: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    grids: tuple[Grid, ...]


class SceneLoader(_Place):
    """Endless iterator of `SceneBatch`; its state is the number of the next batch.

    Args:
        config: settings.
        processor: of the model; lays out prompts.
        seed: of everything.
    """

    def __init__(self, config: SceneDataConfig, processor: Processor, seed: int) -> None:
        self.config = config
        self._drawer = SceneDrawer(config, processor, seed)
        tokenizer = processor.tokenizer
        self._settings = scene_worker.Settings(config, processor.vocab, tokenizer.to_json(), tokenizer.leads, seed)

    @property
    def buckets(self) -> list[Bucket]:
        return self._drawer.buckets

    def __iter__(self) -> Iterator[SceneBatch]:
        processes = self.config.processes
        if processes < 0:
            processes = max(1, _cores() - 2)
        batches = self._drawn_here() if processes == 0 else self._drawn_by_workers(processes)
        for batch in batches:
            self.cursor += 1
            yield batch

    def _drawn_here(self) -> Iterator[SceneBatch]:
        for mine in self._mine():
            yield self._batch(self._drawer.draw(self.cursor)) if mine else NOT_MINE

    def _drawn_by_workers(self, processes: int) -> Iterator[SceneBatch]:
        ahead: deque[tuple[Future[int], int] | None] = deque()
        free = deque(range(2 * processes))
        slots = Slots(len(free), max(bucket.nbytes for bucket in self.buckets))
        settings = np.frombuffer(pickle.dumps(self._settings), np.uint8)
        shared = Slots(1, len(settings))
        shared[0][: len(settings)] = settings
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(processes, spawn, initializer=scene_worker.start, initargs=(shared, slots))
        number, mine = self.cursor, self._mine()
        try:
            while True:
                while len(ahead) < 2 * processes * self.groups:
                    slot = free.popleft() if next(mine) else None
                    ahead.append(None if slot is None else (pool.submit(scene_worker.draw, number, slot), slot))
                    number += 1
                drawing = ahead.popleft()
                if drawing is None:
                    yield NOT_MINE
                    continue
                future, slot = drawing
                drawn = carve(slots[slot], self._drawer.bucket(self.cursor), future.result())
                batch = self._batch(drawn, copy=True)
                free.append(slot)
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _batch(self, drawn: Drawn, *, copy: bool = False) -> SceneBatch:
        """Returns the next batch, on the memory that it was drawn in or in a copy."""
        tensors = [torch.from_numpy(array) for array in vars(drawn).values()]
        return SceneBatch(*map(_copied, tensors) if copy else tensors, grids=self._drawer.bucket(self.cursor).grids)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy; where there is a GPU it can read it at once, so that this is the only one."""
    if not torch.cuda.is_available():
        return tensor.clone()
    with capturing:
        return tensor.pin_memory()


def _cores() -> int:
    """Returns this process's share of the cores that it may run on; a launcher starts one for each GPU of a host."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
