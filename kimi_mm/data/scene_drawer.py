"""Draws batches of pictures and conversations about them, by number.

    batch number ─► bucket ─► scenes ─► questions ─► patches uint8, streams ─► Drawn

Batch n is a pure function of (settings, seed, n). Nothing here takes torch, so that worker processes start at once.

Shapes: B rows, T positions of the bucket, P patches of all pictures, p pixels a side of one, M vision rows, S ids for
what a row shows, L labels.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kimi_mm.config import ConfigError
from kimi_mm.data.art import Art
from kimi_mm.data.drawing import pick
from kimi_mm.data.questions import Asker, Question
from kimi_mm.data.scenes import KINDS, compose, fits, shown
from kimi_mm.layout import IGNORE, Layout, Streams
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.training.vision_config import SceneDataConfig

PATCH, CELL = 14, 28
SHOWN = 6  # S: ids at most of what a row is said to show
READING = ("read", "line", "spell")  # kinds of questions that are answered letter by letter
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Bucket:
    """Pictures of one batch: `grids` (1, h, w) in patches, one for each row, equal ones together; T `positions`."""

    grids: tuple[Grid, ...]
    positions: int

    @property
    def patches(self) -> int:
        """Patches of all pictures, P."""
        return sum(h * w for _, h, w in self.grids)

    @property
    def nbytes(self) -> int:
        """Bytes of a batch that learns every position, which none exceeds."""
        return sum(
            math.prod(shape) * dtype.itemsize for shape, dtype in _arrays(self, len(self.grids) * self.positions)
        )


@dataclass
class Drawn:
    """The arrays of a batch.

    `patches` [P, 3, p, p] uint8, picture after picture, of the sizes of its bucket; ids [B, T] int64; `vision_at` [M]
    are the flat positions b * T + t of vision rows, and `shown` [M, S] the ids of the words for what each of them
    shows, IGNORE behind; `labels` [L] are the ids to predict and `positions` [L] where, flat too.
    """

    patches: np.ndarray
    text_ids: np.ndarray
    audio_ids: np.ndarray
    vision_at: np.ndarray
    shown: np.ndarray
    positions: np.ndarray
    labels: np.ndarray


def _arrays(bucket: Bucket, labels: int) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Shapes and types of the arrays of a batch, in the order of `Drawn`."""
    ids = (len(bucket.grids), bucket.positions)
    rows = bucket.patches // 4
    shapes: list[tuple[int, ...]] = [ids, ids, (rows,), (rows, SHOWN), (labels,), (labels,)]
    patches = ((bucket.patches, 3, PATCH, PATCH), np.dtype(np.uint8))
    return [patches, *((shape, np.dtype(np.int64)) for shape in shapes)]


def carve(memory: np.ndarray, bucket: Bucket, labels: int) -> Drawn:
    """Returns the arrays of a batch with L `labels` as views of `memory` [bytes] uint8, one behind the other."""
    views, at = [], 0
    for shape, dtype in _arrays(bucket, labels):
        size = math.prod(shape) * dtype.itemsize
        views.append(memory[at : at + size].view(dtype).reshape(shape))
        at += size  # always a multiple of 8: pictures are made of whole cells
    return Drawn(*views)


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


class _Remembering(TextTokenizer):
    """A tokenizer that keeps its answers: every text is measured, then laid out, and wordings come again and again."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.encode = functools.lru_cache(1 << 14)(tokenizer.encode)
        self.encode_letters = functools.lru_cache(1 << 14)(tokenizer.encode_letters)


class SceneDrawer:
    """Makes batches by number; lives in the trainer's process or in each worker.

    Args:
        config: settings.
        layout: lays out prompts.
        seed: of everything.
    """

    def __init__(self, config: SceneDataConfig, layout: Layout, seed: int) -> None:
        self.config, self.layout, self.seed = config, copy.copy(layout), seed
        self.layout.tokenizer = _Remembering(layout.tokenizer)
        unknown = sorted(set(config.kinds) - set(KINDS))
        if unknown:
            raise ConfigError(f"scenes.kinds: '{unknown[0]}' is unknown; known: {', '.join(KINDS)}.")
        self.art = Art(config.art)
        self.asker = Asker(self.art.things)
        empty = layout.streams([{"role": "user", "content": [{"type": "image", "num_tokens": 1}]}])
        self.prompt = len(empty) - 1
        self.buckets = make_buckets(config, self.prompt)

    def bucket(self, number: int) -> Bucket:
        """Returns the sizes of batch `number`."""
        return self.buckets[pick(np.random.default_rng((self.seed, number)), self.config.cell_shares)]

    def draw(self, number: int, memory: np.ndarray | None = None) -> Drawn:
        """Returns batch `number`, as views of `memory` where it is given: [bytes] uint8, at least `bucket.nbytes`."""
        bucket = self.bucket(number)
        if memory is None:
            memory = np.empty(bucket.nbytes, np.uint8)
        drawn, at, rows = carve(memory, bucket, 0), 0, []
        for row, grid in enumerate(bucket.grids):
            canvas, cells, streams = self._row(grid, bucket.positions, np.random.default_rng((self.seed, number, row)))
            count = grid[1] * grid[2]
            cut_patches(canvas, drawn.patches[at : at + count])
            drawn.shown[at // 4 : (at + count) // 4] = cells
            at += count
            rows.append(streams)
        return _pack(memory, rows, bucket, self.layout.ids["pad"])

    def _row(self, grid: Grid, positions: int, rng: np.random.Generator) -> tuple[np.ndarray, list[list[int]], Streams]:
        """Draws a picture that fills a grid, up to the padding of its last cells, and talks about it.

        Returns:
            The picture, what each of its cells shows, and the conversation.
        """
        rows, columns = grid[1] // 2, grid[2] // 2
        size = tuple(int(CELL * n - (rng.integers(0, CELL) if rng.random() < 0.7 else 0)) for n in (rows, columns))
        size = (max(size[0], CELL), max(size[1], CELL))
        kinds = {kind: share for kind, share in self.config.kinds.items() if share and fits(kind, size)} or {"one": 1.0}
        kind = list(kinds)[pick(rng, tuple(kinds.values()))]
        scene = compose(self.art, kind, size, rng)
        canvas = np.zeros((CELL * rows, CELL * columns, 3), np.uint8)
        canvas[: size[0], : size[1]] = scene.image
        asked = self.asker.questions(scene, rng)
        wanted = [q for q in asked if q.kind in self.config.questions] if self.config.questions else asked
        cells = [self._ids(words) for words in shown(scene, rows, columns, CELL)]
        return canvas, cells, self._talk(wanted or asked[:1], rows * columns, positions)

    def _ids(self, words: Sequence[str]) -> list[int]:
        """Ids of words, as many as there is room for, and IGNORE behind."""
        encode = self.layout.tokenizer.encode
        # Digits stand alone in the vocabulary: what comes before them is a space.
        ids = [id for word in words for id in (encode(word)[-1:] if word.isdigit() else encode(word))][:SHOWN]
        return ids + [IGNORE] * (SHOWN - len(ids))

    def _talk(self, asked: Sequence[Question], num_tokens: int, positions: int) -> Streams:
        """Lays out as many questions and answers as there is room for."""
        tokenizer, room = self.layout.tokenizer, positions - num_tokens - self.prompt
        messages, used = [], 0
        for question in asked[: self.config.max_questions]:
            # Besides the words, a turn has the markers of two messages and the end of the answer.
            letters = question.kind in READING
            answer = tokenizer.encode_letters(question.answer) if letters else tokenizer.encode(question.answer)
            used += 5 + len(tokenizer.encode(question.text)) + len(answer)
            if messages and used > room:
                break
            parts = [] if messages else [{"type": "image", "num_tokens": num_tokens}]
            messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question.text}]})
            said = {"type": "text", "text": question.answer, "letters": letters}
            messages.append({"role": "assistant", "content": [said]})
        return self.layout.streams(messages, add_assistant_start=False)


def cut_patches(canvas: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Cuts [H, W, 3] uint8 into patches [h * w, 3, p, p] in reading order, as `vision.processing.patchify` does."""
    height, width, _ = canvas.shape
    h, w = height // PATCH, width // PATCH
    if out is None:
        out = np.empty((h * w, 3, PATCH, PATCH), np.uint8)
    out.reshape(h, w, 3, PATCH, PATCH)[:] = canvas.reshape(h, PATCH, w, PATCH, 3).transpose(0, 2, 4, 1, 3)
    return out


def _pack(memory: np.ndarray, rows: list[Streams], bucket: Bucket, pad: int) -> Drawn:
    """Puts the streams behind the patches that are in `memory` already."""
    length, at, positions, labels = bucket.positions, [], [], []
    for b, row in enumerate(rows):
        # A row that is too long loses its end; the first question always fits in what the settings allow.
        wanted = np.asarray(row.text_labels[:length])
        where = np.flatnonzero(wanted != IGNORE)
        at.append(np.flatnonzero(np.asarray(row.item_index) >= 0) + b * length)
        positions.append(where + b * length)
        labels.append(wanted[where])
    drawn = carve(memory, bucket, sum(map(len, labels)))
    for b, row in enumerate(rows):
        for ids, values in ((drawn.text_ids, row.text), (drawn.audio_ids, row.audio)):
            ids[b, : len(values)] = values[:length]
            ids[b, len(values) :] = pad
    np.concatenate(at, out=drawn.vision_at)
    np.concatenate(positions, out=drawn.positions)
    np.concatenate(labels, out=drawn.labels)
    return drawn
