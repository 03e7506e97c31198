"""Speech shards: one long int16 array at 16 kHz and its index.

    shard-00012.npy      int16 [samples], utterances one after the other
    shard-00012.jsonl    {"id", "text", "voice", "start", "samples"} a line

The index is renamed into place last: a shard whose `.jsonl` exists is complete, so an interrupted run goes on where it
stopped and readers can start while later shards are still being made.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kimi_mm.data.manifest import ManifestError, read_rows, write_aside, write_manifest, write_rows

SAMPLE_RATE = 16_000
KEYS = {"id": str, "text": str, "voice": str, "start": int, "samples": int}


@dataclass(frozen=True)
class Clip:
    """One utterance. `wave` [S] int16 at 16 kHz; `voice` names who speaks and with which settings."""

    id: str
    text: str
    voice: str
    wave: np.ndarray


def shard_path(folder: str | Path, number: int, name: str = "shard") -> Path:
    """Returns the path of a shard's index; the array lies beside it with the suffix `.npy`."""
    return Path(folder) / f"{name}-{number:05d}.jsonl"


def write_shard(folder: str | Path, number: int, clips: Iterable[Clip]) -> list[dict[str, Any]]:
    """Writes one shard and returns its index rows."""
    rows, waves, start = [], [], 0
    for clip in clips:
        rows.append({"id": clip.id, "text": clip.text, "voice": clip.voice, "start": start, "samples": len(clip.wave)})
        waves.append(clip.wave)
        start += len(clip.wave)
    index = shard_path(folder, number)
    write_array(index.with_suffix(".npy"), waves)
    write_rows(index, rows)
    return rows


def write_array(path: Path, waves: list[np.ndarray]) -> None:
    """Writes waves [S] one after the other as one int16 array."""
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate(waves).astype(np.int16) if waves else np.zeros(0, np.int16))
    write_aside(path, buffer.getvalue())


def write_shards(folder: str | Path, clips: Iterable[Clip], per_shard: int = 256, meta: dict | None = None) -> int:
    """Writes clips as shards with a manifest and returns how many clips there were."""
    pending: list[Clip] = []
    count = number = 0
    for clip in clips:
        pending.append(clip)
        count += 1
        if len(pending) == per_shard:
            write_shard(folder, number, pending)
            pending, number = [], number + 1
    if pending or not count:
        write_shard(folder, number, pending)
    finish(folder, {"utterances": count, **(meta or {})})
    return count


def finish(folder: str | Path, meta: dict[str, Any], name: str = "shard") -> None:
    """Writes the manifest over all shards of a folder; its kind is "speech", or the name of other shards."""
    folder, kind = Path(folder), "speech" if name == "shard" else name
    write_manifest(folder, kind, [*folder.glob(f"{name}-*.npy"), *folder.glob(f"{name}-*.jsonl")], meta)


def read_shards(folder: str | Path) -> Iterator[Clip]:
    """Yields the utterances of all finished shards; waves are views of memory-mapped arrays.

    Raises:
        ManifestError: when there is no shard, or an index points outside its array.
    """
    found = sorted(Path(folder).glob("shard-*.jsonl"))
    if not found:
        raise ManifestError(f"{folder}: holds no speech shards (shard-*.jsonl); prepare the data first.")
    for index in found:
        try:
            array = np.load(index.with_suffix(".npy"), mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ManifestError(f"{index.with_suffix('.npy')}: cannot be read ({error}).") from None
        for number, row in enumerate(read_rows(index, KEYS), start=1):
            start, end = row["start"], row["start"] + row["samples"]
            if not 0 <= start <= end <= len(array):
                raise ManifestError(f"{index}:{number}: samples {start} to {end} lie outside the array.")
            yield Clip(row["id"], row["text"], row["voice"], array[start:end])
