"""Batches of pictures and conversations about them, drawn by worker processes while training goes on.

    batch number ─► (in a worker) bucket ─► scenes ─► questions ─► patches uint8, streams ─► SceneBatch

Batch n is a pure function of (settings, seed, n): the state of the loader is n, and any number of processes gives the
same batches. A bucket fixes the size of every picture, so that a training step can be captured once per bucket.

Shapes: B rows, T positions of the bucket, P patches of all pictures, p pixels a side of one, M vision rows, L labels.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from kimi_mm.config import ConfigError, VocabConfig
from kimi_mm.data.art import Art
from kimi_mm.data.loader import NOT_MINE, _Place
from kimi_mm.data.questions import Asker, Question
from kimi_mm.data.scenes import KINDS, compose, fits
from kimi_mm.processing import IGNORE, Processor, Streams
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.training.vision_config import SceneDataConfig

PATCH, CELL = 14, 28
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Bucket:
    """Pictures of one batch: `grids` (1, h, w) in patches, one for each row, equal ones together; T `positions`."""

    grids: tuple[Grid, ...]
    positions: int


@dataclass
class SceneBatch:
    """Pictures with conversations.

    `patches` [P, 3, p, p] uint8, picture after picture, of sizes `grids`; ids [B, T] int64; `vision_at` [M] are the
    flat positions b * T + t of vision rows; `labels` [L] are the ids to predict and `positions` [L] where, flat too.
    """

    patches: torch.Tensor
    text_ids: torch.Tensor
    audio_ids: torch.Tensor
    vision_at: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    grids: tuple[Grid, ...]


def make_buckets(config: SceneDataConfig, prompt_positions: int) -> list[Bucket]:
    """Lays down the sizes of all batches.

    Args:
        config: settings.
        prompt_positions: of a row without picture rows and conversation.
    """
    buckets, below = [], 3
    for cells in config.cells:
        least = max(below, 0.55 * cells) if buckets else below
        sizes = [
            (rows, columns)
            for rows in range(2, 40)
            for columns in range(2, 40)
            if least < rows * columns <= cells and max(rows, columns) <= 4 * min(rows, columns)
        ]
        if not sizes:
            raise ConfigError(f"cells: no picture has between {below + 1} and {cells} cells; take other limits.")
        # All proportions from tall to wide, those near square more often.
        sizes.sort(key=lambda size: size[0] / size[1])
        spread = np.linspace(-1, 1, config.grids)
        picked = [sizes[round(i)] for i in (1 + spread * abs(spread)) / 2 * (len(sizes) - 1)]
        positions = cells + prompt_positions + config.text_tokens
        count = max(1, config.batch_positions // positions)
        grids = sorted((1, 2 * rows, 2 * columns) for rows, columns in (picked[i % config.grids] for i in range(count)))
        buckets.append(Bucket(tuple(grids), positions))
        below = cells
    return buckets


class SceneDrawer:
    """Makes batches by number; lives in the trainer's process or in each worker.

    Args:
        config: settings.
        processor: lays out prompts.
        seed: of everything.
    """

    def __init__(self, config: SceneDataConfig, processor: Processor, seed: int) -> None:
        self.config, self.processor, self.seed = config, processor, seed
        unknown = sorted(set(config.kinds) - set(KINDS))
        if unknown:
            raise ConfigError(f"scenes.kinds: '{unknown[0]}' is unknown; known: {', '.join(KINDS)}.")
        self.art = Art(config.art)
        self.asker = Asker(self.art.things)
        empty = processor.streams([{"role": "user", "content": [{"type": "image", "num_tokens": 1}]}])
        self.prompt = len(empty) - 1
        self.buckets = make_buckets(config, self.prompt)

    def draw(self, number: int) -> SceneBatch:
        """Returns batch `number`."""
        rng = np.random.default_rng((self.seed, number))
        shares = np.asarray(self.config.cell_shares)
        bucket = self.buckets[rng.choice(len(self.buckets), p=shares / shares.sum())]
        patches, rows = [], []
        for row, grid in enumerate(bucket.grids):
            pixels, streams = self._row(grid, bucket.positions, np.random.default_rng((self.seed, number, row)))
            patches.append(pixels)
            rows.append(streams)
        return _pack(patches, rows, bucket, self.processor.ids["pad"])

    def _row(self, grid: Grid, positions: int, rng: np.random.Generator) -> tuple[np.ndarray, Streams]:
        """Draws a picture that fills a grid, up to the padding of its last cells, and talks about it."""
        rows, columns = grid[1] // 2, grid[2] // 2
        size = tuple(int(CELL * n - (rng.integers(0, CELL) if rng.random() < 0.7 else 0)) for n in (rows, columns))
        size = (max(size[0], CELL), max(size[1], CELL))
        kinds = {kind: share for kind, share in self.config.kinds.items() if share and fits(kind, size)} or {"one": 1.0}
        shares = np.asarray(list(kinds.values()))
        kind = list(kinds)[rng.choice(len(kinds), p=shares / shares.sum())]
        scene = compose(self.art, kind, size, rng)
        canvas = np.zeros((CELL * rows, CELL * columns, 3), np.uint8)
        canvas[: size[0], : size[1]] = scene.image
        asked = self.asker.questions(scene, rng)
        wanted = [q for q in asked if q.kind in self.config.questions] if self.config.questions else asked
        return cut_patches(canvas), self._talk(wanted or asked[:1], rows * columns, positions)

    def _talk(self, asked: Sequence[Question], num_tokens: int, positions: int) -> Streams:
        """Lays out as many questions and answers as there is room for."""
        encode, room = self.processor.tokenizer.encode, positions - num_tokens - self.prompt
        messages, used = [], 0
        for question in asked[: self.config.max_questions]:
            # Besides the words, a turn has the markers of two messages and the end of the answer.
            used += 5 + len(encode(question.text)) + len(encode(question.answer))
            if messages and used > room:
                break
            parts = [] if messages else [{"type": "image", "num_tokens": num_tokens}]
            messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question.text}]})
            messages.append({"role": "assistant", "content": question.answer})
        return self.processor.streams(messages, add_assistant_start=False)


def cut_patches(canvas: np.ndarray) -> np.ndarray:
    """Cuts [H, W, 3] uint8 into patches [h * w, 3, p, p] in reading order, as `vision.processing.patchify` does."""
    height, width, _ = canvas.shape
    cut = canvas.reshape(height // PATCH, PATCH, width // PATCH, PATCH, 3)
    return np.ascontiguousarray(cut.transpose(0, 2, 4, 1, 3).reshape(-1, 3, PATCH, PATCH))


def _pack(patches: list[np.ndarray], rows: list[Streams], bucket: Bucket, pad: int) -> SceneBatch:
    size, length = len(rows), bucket.positions
    text, audio = (np.full((size, length), pad, np.int64) for _ in range(2))
    at, positions, labels = [], [], []
    for b, row in enumerate(rows):
        # A row that is too long loses its end; the first question always fits in what the settings allow.
        used = min(len(row), length)
        text[b, :used], audio[b, :used] = row.text[:used], row.audio[:used]
        wanted = np.asarray(row.text_labels[:used])
        where = np.flatnonzero(wanted != IGNORE)
        at.append(np.flatnonzero(np.asarray(row.item_index) >= 0) + b * length)
        positions.append(where + b * length)
        labels.append(wanted[where])
    arrays = (np.concatenate(patches), text, audio, *(np.concatenate(part) for part in (at, positions, labels)))
    return SceneBatch(*(torch.from_numpy(array) for array in arrays), grids=bucket.grids)


class SceneLoader(_Place):
    """Endless iterator of `SceneBatch`; its state is the number of the next batch.

    Args:
        config: settings.
        processor: of the model; lays out prompts.
        seed: of everything.
    """

    def __init__(self, config: SceneDataConfig, processor: Processor, seed: int) -> None:
        self.config, self.seed = config, seed
        self._drawer = SceneDrawer(config, processor, seed)
        self._vocab, self._tokenizer = processor.vocab, processor.tokenizer.to_json()

    @property
    def buckets(self) -> list[Bucket]:
        return self._drawer.buckets

    def __iter__(self) -> Iterator[SceneBatch]:
        processes = self.config.processes
        if processes < 0:
            processes = max(1, (os.cpu_count() or 1) - 2)
        batches = self._drawn_here() if processes == 0 else self._drawn_by_workers(processes)
        for batch in batches:
            self.cursor += 1
            yield batch

    def _drawn_here(self) -> Iterator[SceneBatch]:
        for mine in self._mine():
            yield self._drawer.draw(self.cursor) if mine else NOT_MINE

    def _drawn_by_workers(self, processes: int) -> Iterator[SceneBatch]:
        settings = (self.config, self._vocab, self._tokenizer, self.seed)
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=_start_worker, initargs=settings)
        ahead: deque[Future | None] = deque()
        number, mine = self.cursor, self._mine()
        try:
            while True:
                while len(ahead) < 2 * processes * self.groups:
                    ahead.append(pool.submit(_draw, number) if next(mine) else None)
                    number += 1
                future = ahead.popleft()
                if future is None:
                    yield NOT_MINE
                    continue
                arrays, grids = future.result()
                yield SceneBatch(*(torch.from_numpy(array) for array in arrays), grids=grids)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_worker: list[SceneDrawer] = []


def _start_worker(config: SceneDataConfig, vocab: VocabConfig, tokenizer: str, seed: int) -> None:
    torch.set_num_threads(1)
    _worker.append(SceneDrawer(config, Processor(vocab, TextTokenizer(Tokenizer.from_str(tokenizer))), seed))


def _draw(number: int) -> tuple[list[np.ndarray], tuple[Grid, ...]]:
    """Worker: draws a batch; arrays travel better than tensors, which would need shared memory."""
    batch = _worker[0].draw(number)
    tensors = (batch.patches, batch.text_ids, batch.audio_ids, batch.vision_at, batch.positions, batch.labels)
    return [tensor.numpy() for tensor in tensors], batch.grids
