"""Batches of fixed shapes from speech shards and from text, in an order that a checkpoint can restore.

The order of an epoch is a pure function of (seed, epoch), so the state of a loader is two integers, and a resumed run
sees exactly the batches that an uninterrupted one would have seen.

Shapes: B rows, S samples of the bucket, N = S / 1280 codes, T positions of the bucket.
"""

from __future__ import annotations

import gzip
import itertools
import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kimi_mm.data.dialogs import Turn, make_dialogs
from kimi_mm.data.drills import make_drills
from kimi_mm.data.text import WORDS, Sentence
from kimi_mm.errors import CheckpointError
from kimi_mm.evaluation.normalize import normalize_english
from kimi_mm.processing import IGNORE, Processor
from kimi_mm.text.sentences import polish as polish
from kimi_mm.training.recipe import SpeechDataConfig, TextDataConfig

SAMPLE_RATE = 16_000
SAMPLES_PER_CODE = 1280
NOT_MINE: Any = None  # stands for a batch that another process makes
CHARACTERS = " abcdefghijklmnopqrstuvwxyz'"
PROMPT_POSITIONS = 6  # user_start, media_begin, media_end, continue_text, msg_end, assistant_start


@dataclass
class SpeechBatch:
    """Joined utterances of one bucket.

    waves [B, S] int16, wave_lengths [B]; ids [B, T] int64; `feature_row` [B, T] is the code that a position shows, -1
    elsewhere; `labels` [P] are the ids to predict and `positions` [P] where, counted over the flattened rows, since
    most positions have none. `characters` are the CTC targets of all rows in a row, `character_lengths` [B] of each.
    Sizes that operations want on the host are tuples: `code_counts` and `character_counts` of the B rows.
    """

    waves: torch.Tensor
    wave_lengths: torch.Tensor
    text_ids: torch.Tensor
    audio_ids: torch.Tensor
    feature_row: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    characters: torch.Tensor
    character_lengths: torch.Tensor
    code_counts: tuple[int, ...]
    character_counts: tuple[int, ...]


@dataclass
class TextBatch:
    """Packed sentences: ids of both streams and labels, [B, T] int64."""

    text_ids: torch.Tensor
    audio_ids: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Utterance:
    """Where an utterance lies: `samples` samples from `start` in shard array number `shard`."""

    shard: int
    start: int
    samples: int
    text: str


def spell(text: str) -> np.ndarray:
    """Returns the CTC targets of a text: its normalised characters, numbered from 1 (0 is the blank)."""
    return np.asarray([CHARACTERS.index(c) + 1 for c in normalize_english(text) if c in CHARACTERS], np.int64)


def _join(spelled: list[np.ndarray]) -> np.ndarray:
    gap = np.asarray([CHARACTERS.index(" ") + 1], np.int64)
    return np.concatenate([part for word in spelled for part in (word, gap)][:-1])


class SpeechShards:
    """Memory-mapped shards of one or more folders: speech (shard-*), or targets (target-*) in the other voice."""

    def __init__(self, folders: tuple[str, ...], weights: tuple[float, ...] = ()) -> None:
        self.arrays: list[np.ndarray] = []
        self.utterances: list[Utterance] = []
        self.repeats: list[float] = []
        for number, folder in enumerate(folders):
            self._open(Path(folder), weights[number] if number < len(weights) else 1.0)

    def _open(self, folder: Path, weight: float) -> None:
        before = len(self.arrays)
        # Samples of an index to those of its array: that of targets counts at 24 kHz.
        for name, end, up, down in (("shard", ".npy", 1, 1), ("target", ".heard.npy", 2, 3)):
            for index in sorted(folder.glob(f"{name}-*.jsonl")):
                self.arrays.append(np.load(index.with_suffix(end), mmap_mode="r"))
                for line in index.read_text(encoding="utf-8").splitlines():
                    row = json.loads(line)
                    start, samples = (row[key] * up // down for key in ("start", "samples"))
                    self.utterances.append(Utterance(len(self.arrays) - 1, start, samples, row["text"]))
                    self.repeats.append(weight)
        if len(self.arrays) == before:
            raise CheckpointError(f"{folder}: holds no speech shards (shard-*.jsonl); prepare the data first.")

    def wave(self, item: Utterance) -> np.ndarray:
        return self.arrays[item.shard][item.start : item.start + item.samples]


class _Place:
    """Where a loader is: the next batch is number `cursor` of `epoch`.

    Of every `groups` batches in a row only number `group` is made; NOT_MINE stands for the others, which other
    processes make (`kimi_mm.training.parallel.Dealt`).
    """

    epoch = 0
    cursor = 0
    group = 0
    groups = 1

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.cursor = state["epoch"], state["cursor"]

    def _mine(self) -> Iterator[bool]:
        """Yields for each batch, from where the iteration begins, whether it is to be made here."""
        for number in itertools.cycle(range(self.groups)):
            yield number == self.group


class SpeechLoader(_Place):
    """Endless iterator of `SpeechBatch`; `state_dict` and `load_state_dict` restore its place.

    Utterances with an empty text are speech without a transcript: they train the tokenizer's encoder only.
    """

    def __init__(self, config: SpeechDataConfig, processor: Processor, seed: int) -> None:
        self.config, self.processor, self.seed = config, processor, seed
        self.shards = SpeechShards(config.folders, config.weights)
        self.texts = [polish(item.text) for item in self.shards.utterances]
        self.tokens = [np.asarray(ids, np.int64) for ids in processor.tokenizer.encode_batch(self.texts)]
        self._spelled: dict[int, np.ndarray] = {}

    def __iter__(self) -> Iterator[SpeechBatch]:
        mine = self._mine()
        while True:
            plan = self._plan(self.epoch)
            if not plan:
                raise CheckpointError(f"{', '.join(self.config.folders)}: too few utterances for a single batch.")
            while self.cursor < len(plan):
                bucket, rows = plan[self.cursor]
                rng = np.random.default_rng((self.seed, self.epoch, self.cursor))
                batch = self._batch(bucket, rows, rng) if next(mine) else NOT_MINE
                self.cursor += 1
                yield batch
            self.epoch, self.cursor = self.epoch + 1, 0

    def _plan(self, epoch: int) -> list[tuple[float, list[list[int]]]]:
        """Returns the epoch's batches: (bucket seconds, rows of utterance numbers)."""
        config, rng = self.config, np.random.default_rng((self.seed, epoch))
        copies = [int(weight + rng.random()) for weight in self.shards.repeats]
        order = rng.permutation(np.repeat(np.arange(len(copies)), copies))
        waiting: dict[float, list[list[int]]] = {bucket: [] for bucket in config.buckets}
        plan, at = [], 0
        while at < len(order):
            row = [int(order[at])]
            at += 1
            seconds = self._seconds(row[0])
            if rng.random() < config.join_probability:
                goal = rng.uniform(4.0, config.max_seconds)
                while at < len(order) and seconds + 1.0 + self._seconds(int(order[at])) <= goal:
                    row.append(int(order[at]))
                    seconds += 1.0 + self._seconds(row[-1])
                    at += 1
            # One second of slack a joint, and a little for the pause before the first word.
            bucket = next((b for b in config.buckets if seconds + 0.4 <= b), None)
            tokens = sum(len(self.tokens[i]) for i in row)
            if bucket is None or tokens + 1 > self._text_room(bucket):
                continue
            waiting[bucket].append(row)
            if len(waiting[bucket]) == self._rows(bucket):
                plan.append((bucket, waiting[bucket]))
                waiting[bucket] = []
        return [plan[i] for i in rng.permutation(len(plan))]

    def _characters(self, number: int) -> np.ndarray:
        """CTC targets of an utterance; spelling a large corpus ahead would hold up the start by many seconds."""
        if number not in self._spelled:
            self._spelled[number] = spell(self.texts[number])
        return self._spelled[number]

    def _seconds(self, number: int) -> float:
        return self.shards.utterances[number].samples / SAMPLE_RATE

    def _rows(self, bucket: float) -> int:
        return max(1, int(self.config.batch_seconds / bucket))

    def _text_room(self, bucket: float) -> int:
        return int(bucket * self.config.tokens_per_second) + 12

    def _batch(self, bucket: float, rows: list[list[int]], rng: np.random.Generator) -> SpeechBatch:
        samples = round(bucket * SAMPLE_RATE)
        length = PROMPT_POSITIONS + samples // SAMPLES_PER_CODE + self._text_room(bucket)
        ids, size = self.processor.ids, len(rows)
        waves = np.zeros((size, samples), np.int16)
        wave_lengths = np.zeros(size, np.int64)
        text = np.full((size, length), ids["pad"], np.int64)
        audio = np.full((size, length), ids["pad"], np.int64)
        feature_row = np.full((size, length), -1, np.int64)
        positions, labels, spelled, code_counts = [], [], [], []
        for b, row in enumerate(rows):
            speech = sum(self.shards.utterances[i].samples for i in row)
            # The slack left by the bucket becomes pauses: before, between and after.
            pauses = rng.dirichlet(np.ones(len(row) + 2)) * min(samples - speech, SAMPLE_RATE * (0.4 + 0.6 * len(row)))
            at = int(pauses[0])
            for number, i in enumerate(row):
                wave = self.shards.wave(self.shards.utterances[i])
                waves[b, at : at + len(wave)] = wave
                at += len(wave) + int(pauses[number + 1])
            wave_lengths[b] = min(at, samples)
            codes = -(-int(wave_lengths[b]) // SAMPLES_PER_CODE)
            tokens = np.concatenate([*(self.tokens[i] for i in row), [ids["text_eos"]]])
            start = PROMPT_POSITIONS + codes
            audio[b, :2] = ids["user_start"], ids["media_begin"]
            audio[b, 2 : 2 + codes] = ids["media_pad"]
            audio[b, 2 + codes : start] = ids["media_end"], ids["continue_text"], ids["msg_end"], ids["assistant_start"]
            audio[b, start : start + len(tokens)] = ids["text_blank"]
            text[b, :start] = ids["text_blank"]
            text[b, start : start + len(tokens)] = tokens
            feature_row[b, 2 : 2 + codes] = np.arange(codes)
            positions.append(b * length + start - 1 + np.arange(len(tokens)))
            labels.append(tokens)
            code_counts.append(codes)
            parts = [self._characters(i) for i in row]
            # A row with speech that nobody transcribed has no target at all.
            spelled.append(_join(parts) if all(map(len, parts)) else parts[0][:0])
        sizes = np.asarray([len(part) for part in spelled])
        rows_of = (waves, wave_lengths, text, audio, feature_row)
        arrays = (*rows_of, np.concatenate(positions), np.concatenate(labels), np.concatenate(spelled), sizes)
        tensors = [torch.from_numpy(array) for array in arrays]
        return SpeechBatch(*tensors, code_counts=tuple(code_counts), character_counts=tuple(sizes.tolist()))


class TextLoader(_Place):
    """Endless iterator of `TextBatch`: sentences, "assistant_start sentence text_eos", and written dialogs, in rows."""

    def __init__(self, config: TextDataConfig, processor: Processor, seed: int) -> None:
        self.config, self.processor, self.seed = config, processor, seed
        ids, parts = processor.ids, []
        for tokens in processor.tokenizer.encode_batch(training_texts(config.path)):
            tokens.append(ids["text_eos"])
            audio = [ids["assistant_start"], *([ids["text_blank"]] * len(tokens))]
            parts.append(([ids["text_blank"], *tokens], audio, [*tokens, IGNORE]))
        parts += self._dialogs()
        self.starts = np.cumsum([0, *(len(part[0]) for part in parts)])
        joined = (np.asarray(list(itertools.chain.from_iterable(part)), np.int64) for part in zip(*parts, strict=True))
        self.text, self.audio, self.labels = joined
        if len(self.text) < config.batch_rows * config.row_tokens:
            raise CheckpointError(f"{config.path}: too little text for one batch.")

    def __iter__(self) -> Iterator[TextBatch]:
        rows, width = self.config.batch_rows, self.config.row_tokens
        per_batch = rows * width
        while True:
            order = self._order(self.epoch)
            while (self.cursor + 1) * per_batch <= len(order):
                cut = order[self.cursor * per_batch : (self.cursor + 1) * per_batch].reshape(rows, width)
                self.cursor += 1
                yield TextBatch(*(torch.from_numpy(values[cut]) for values in (self.text, self.audio, self.labels)))
            self.epoch, self.cursor = self.epoch + 1, 0

    def _order(self, epoch: int) -> np.ndarray:
        """Returns the places of all tokens, conversations in the random order of an epoch."""
        sizes = np.diff(self.starts)
        chosen = np.random.default_rng((self.seed, epoch, 1)).permutation(len(sizes))
        ends = np.cumsum(sizes[chosen])
        return np.arange(ends[-1]) + np.repeat(self.starts[chosen] - ends + sizes[chosen], sizes[chosen])

    def _dialogs(self) -> list[tuple[list[int], list[int], list[int]]]:
        """Returns text, audio and labels of written dialogs and drills."""
        if not (self.config.dialogs or self.config.drills):
            return []
        written, sentences = (
            [],
            [  # without their ids, which nothing here asks for and which take a while
                Sentence("", row["text"], row.get("source", ""), row.get("held_out", False), row.get("speech", True))
                for row in read_texts(self.config.path)
            ],
        )
        dialogs: list[tuple[Turn, ...]] = []
        if self.config.dialogs:
            dialogs = [dialog.turns for dialog in make_dialogs(sentences, self.config.dialogs, seed=self.seed)]
        for turns in itertools.chain(dialogs, make_drills(sentences, self.config.drills, seed=self.seed)):
            said = ((("user", turn.question), ("assistant", turn.answer)) for turn in turns)
            messages = [{"role": role, "content": text} for turn in said for role, text in turn]
            streams = self.processor.streams(messages, add_assistant_start=False)
            written.append((streams.text, streams.audio, streams.text_labels))
        return written


def training_texts(path: str | Path) -> list[str]:
    """Returns the sentences of `texts.jsonl.gz` that language training may read: sensible, and not held out."""
    rows = read_texts(path)
    return [polish(row["text"]) for row in rows if not row.get("held_out") and row.get("source") != WORDS]


def read_texts(path: str | Path) -> list[dict]:
    """Reads `texts.jsonl` or `texts.jsonl.gz`: objects with at least `text`."""
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from None
    rows = []
    for number, line in enumerate(data.decode("utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise CheckpointError(f"{path}:{number}: not a JSON object.") from None
    return rows


class Prefetcher:
    """Runs an iterator in a thread, a few batches ahead.

    `state` is the loader's state as it was after the batch last handed out, which is what a checkpoint must hold; the
    loader itself is already ahead.

    Args:
        loader: endless, with `state_dict`.
        depth: batches that wait at most.
        upload: brings batches to a device, its `send` in the thread (see `kimi_mm.training.upload.Upload`).
    """

    def __init__(self, loader: Any, depth: int = 4, upload: Any = None) -> None:
        self.state = loader.state_dict()
        self._upload = upload
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(loader,), daemon=True)
        self._thread.start()

    def _fill(self, loader: Any) -> None:
        try:
            for batch in loader:
                state = loader.state_dict()
                if not self._put((batch if self._upload is None else self._upload.send(batch), state)):
                    return
        except Exception as error:
            self._put((error, None))

    def _put(self, item: object) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def next(self) -> Any:
        batch, state = self._queue.get()
        if isinstance(batch, Exception):
            raise batch
        self.state = state
        return batch if self._upload is None else self._upload.receive(batch)

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
