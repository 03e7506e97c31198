"""Batches of one fixed shape from target shards: speech at 24 kHz, and at 16 kHz what its codes are heard from.

The order of an epoch and every cut are functions of (seed, epoch, batch), so that the state of the loader is two
integers, as with the other loaders.

Shapes: B rows, N codes in a row, 1920 N samples at 24 kHz, 1280 N samples at 16 kHz.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kimi_mm.data.loader import NOT_MINE, _Place
from kimi_mm.data.manifest import read_rows
from kimi_mm.data.shards import KEYS
from kimi_mm.data.targets import CANONICAL, PITCH_HOP, TARGET_RATE, TARGETS, pitch_frames
from kimi_mm.errors import CheckpointError
from kimi_mm.training.speech_out_config import TargetDataConfig

SAMPLES_PER_CODE = 1920
ONSET = 0.2  # seconds of silence that a crop may begin before its utterance
PAUSES = (0.1, 0.6)  # seconds between utterances of a row


@dataclass
class TargetBatch:
    """Rows of speech.

    targets [B, 1920 N] int16 at 24 kHz; heard [B, 1280 N] int16 at 16 kHz, the same words in another voice; own [B]
    bool, codes are to be taken from the target itself; canonical [B] bool, the target is in the canonical voice; pitch
    [B, 8 N] fp32 of the target in Hz, 0 where there is none.
    """

    targets: torch.Tensor
    heard: torch.Tensor
    own: torch.Tensor
    canonical: torch.Tensor
    pitch: torch.Tensor


@dataclass(frozen=True)
class TargetUtterance:
    """Samples [start, start + samples) at 24 kHz of shard `shard`, starts multiples of 3; pitch begins at `pitch`."""

    shard: int
    start: int
    samples: int
    pitch: int
    speaker: str
    text: str = ""


class TargetShards:
    """Memory-mapped target shards of one or more folders."""

    def __init__(self, folders: tuple[str, ...], weights: tuple[float, ...] = ()) -> None:
        self.arrays: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.utterances: list[TargetUtterance] = []
        self.repeats: list[float] = []
        for number, folder in enumerate(folders):
            self._open(Path(folder), weights[number] if number < len(weights) else 1.0)
        if not self.utterances:
            raise CheckpointError("target.folders: no folder with targets is given; prepare them first.")

    def wave(self, item: TargetUtterance) -> np.ndarray:
        """Returns the target [samples] int16 at 24 kHz."""
        return self.arrays[item.shard][0][item.start : item.start + item.samples]

    def _open(self, folder: Path, weight: float) -> None:
        found = sorted(folder.glob(f"{TARGETS.name}-*.jsonl"))
        if not found:
            raise CheckpointError(f"{folder}: holds no target shards (target-*.jsonl); run kimi-mm prepare targets.")
        for index in found:
            try:
                ends = (".npy", ".heard.npy", ".pitch.npy")
                target, heard, pitch = (np.load(index.with_suffix(end), mmap_mode="r") for end in ends)
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"{index}: one of its arrays cannot be read ({error}); delete the shard and prepare it again."
                ) from None
            self.arrays.append((target, heard, pitch))
            at = 0
            for row in read_rows(index, KEYS):
                after = at + pitch_frames(row["samples"])
                fits = row["start"] + row["samples"] <= len(target) and after <= len(pitch)
                if not fits or 3 * len(heard) != 2 * len(target):
                    raise CheckpointError(f"{index}: does not fit its arrays; delete the shard and prepare it again.")
                speaker = row["voice"].partition(":")[0]
                number = len(self.arrays) - 1
                item = TargetUtterance(number, row["start"], row["samples"], at, speaker, row["text"])
                self.utterances.append(item)
                at = after
                self.repeats.append(weight)


class TargetLoader(TargetShards, _Place):
    """Endless iterator of `TargetBatch`; `state_dict` and `load_state_dict` restore its place."""

    def __init__(self, config: TargetDataConfig, seed: int) -> None:
        super().__init__(config.folders, config.weights)
        self.config, self.seed = config, seed
        self.row = config.row_codes * SAMPLES_PER_CODE

    def __iter__(self) -> Iterator[TargetBatch]:
        size, mine = self.config.batch_rows, self._mine()
        while True:
            rows = self._plan(self.epoch)
            if len(rows) < size:
                raise CheckpointError(
                    f"{', '.join(self.config.folders)}: {len(rows)} rows of {self.config.row_seconds:g} s are too few "
                    f"for a batch of {size}."
                )
            while (self.cursor + 1) * size <= len(rows):
                chosen = rows[self.cursor * size : (self.cursor + 1) * size]
                rng = np.random.default_rng((self.seed, self.epoch, self.cursor))
                batch = self._batch(chosen, rng) if next(mine) else NOT_MINE
                self.cursor += 1
                yield batch
            self.epoch, self.cursor = self.epoch + 1, 0

    def _plan(self, epoch: int) -> list[list[int]]:
        """Returns the epoch's rows, each a list of utterance numbers, in order of use."""
        rng = np.random.default_rng((self.seed, epoch, 2))
        copies = [int(weight + rng.random()) for weight in self.repeats]
        order = rng.permutation(np.repeat(np.arange(len(copies)), copies))
        if self.config.crops:
            rows = [[int(i)] for i in order for _ in range(max(1, round(self.utterances[i].samples / self.row)))]
            return [rows[i] for i in rng.permutation(len(rows))]
        waiting: dict[str, tuple[list[int], float]] = {}
        rows = []
        for i in order:
            item = self.utterances[i]
            row, filled = waiting.pop(item.speaker, ([], 0.0))
            row.append(int(i))
            # With the shortest pauses: what does not fit is cut off at the end of the row.
            filled += item.samples + PAUSES[0] * TARGET_RATE
            if filled >= self.row:
                rows.append(row)
            else:
                waiting[item.speaker] = (row, filled)
        rows += [row for row, filled in waiting.values() if filled > self.row / 2]
        return [rows[i] for i in rng.permutation(len(rows))]

    def _batch(self, rows: list[list[int]], rng: np.random.Generator) -> TargetBatch:
        size = len(rows)
        targets = np.zeros((size, self.row), np.int16)
        heard = np.zeros((size, self.row * 2 // 3), np.int16)
        pitch = np.zeros((size, self.row // PITCH_HOP), np.float32)
        for b, row in enumerate(rows):
            if self.config.crops:
                spare = self.utterances[row[0]].samples - self.row
                at = -rng.uniform(-ONSET * TARGET_RATE, max(spare, 0))
            else:
                at = rng.uniform(0.05, 0.5) * TARGET_RATE
            for i in row:
                start = int(at) // 3 * 3
                self._place_pitch(i, round(start / PITCH_HOP), pitch[b])
                at = self._place(i, start, targets[b], heard[b]) + rng.uniform(*PAUSES) * TARGET_RATE
        own = rng.random(size) < self.config.own_share
        canonical = np.asarray([self.utterances[row[0]].speaker == CANONICAL for row in rows])
        return TargetBatch(*(torch.from_numpy(array) for array in (targets, heard, own, canonical, pitch)))

    def _place(self, number: int, at: int, target: np.ndarray, heard: np.ndarray) -> int:
        """Copies an utterance into a row from sample `at` on, which may be negative; returns where it ends."""
        item = self.utterances[number]
        first, last = max(0, -at), min(item.samples, len(target) - at)
        if first < last:
            for array, out, up, down in zip(self.arrays[item.shard][:2], (target, heard), (1, 2), (1, 3), strict=True):
                begin, end = (item.start + first) * up // down, (item.start + last) * up // down
                place = (at + first) * up // down
                out[place : place + end - begin] = array[begin:end]
        return at + item.samples

    def _place_pitch(self, number: int, at: int, pitch: np.ndarray) -> None:
        """Copies the pitch of an utterance into a row from value `at` on, which may be negative."""
        item = self.utterances[number]
        first, last = max(0, -at), min(pitch_frames(item.samples), len(pitch) - at)
        if first < last:
            pitch[at + first : at + last] = self.arrays[item.shard][2][item.pitch + first : item.pitch + last]
