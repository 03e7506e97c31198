"""States kept from turn to turn: a conversation that goes on is read from where it was left.

    end of a prompt, end of an answer ─► cache of one row, by the digest of all its positions ─► kept, oldest out first
    a new prompt ─► longest kept state whose positions are exactly its first ones ─► only the rest is read

A KDA state stands for all positions up to its own and cannot be cut back, so states are kept where turns end. Positions
are compared by a 256-bit digest of both streams' ids and of all that lies under them: codes and features of recordings,
pixels of pictures.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kimi_mm.processing import AudioClip, Streams
from kimi_mm.text.cache import BackboneCache
from kimi_mm.vision.processing import VisionItem

Key = tuple[int, bytes, bool]  # positions, their digest, and whether the audio branch has read them, too


@dataclass(frozen=True)
class Kept:
    """What a row held: its cache, and the hidden states [1, 1, D] of its last position."""

    cache: BackboneCache
    hidden: list[torch.Tensor]

    @property
    def aloud(self) -> bool:
        """Whether the audio branch has read the row, too."""
        return len(self.hidden) > 1

    @property
    def bytes(self) -> int:
        """Its memory."""
        tensors = [tensor for layer in self.cache.layers for tensor in layer.tensors().values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in [*tensors, *self.hidden])


class Prefixes:
    """States of rows by what they read, the least recently used given up first.

    Args:
        most_bytes: for all of them; 0 keeps none.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.held_bytes = most_bytes, 0
        self.hits = self.misses = self.positions = 0  # found, not found, and positions that were not read again
        self._kept: OrderedDict[Key, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, places: np.ndarray, kept: Kept) -> None:
        """Keeps the state after positions [T, 6], see `places_of`, if it is not larger than all the memory there is."""
        if kept.bytes > self.most_bytes:
            return
        key = len(places), _digest(places), kept.aloud
        if (before := self._kept.pop(key, None)) is not None:
            self.held_bytes -= before.bytes
        self._kept[key] = kept
        self.held_bytes += kept.bytes
        while self.held_bytes > self.most_bytes:
            _, gone = self._kept.popitem(last=False)
            self.held_bytes -= gone.bytes

    def find(self, places: np.ndarray, aloud: bool = False) -> tuple[int, Kept] | None:
        """Returns the longest kept state of the first positions of [T, 6], and how many those are.

        Args:
            aloud: for an answer in speech, which needs what the audio branch read; text takes either.
        """
        found, read, hasher = None, 0, hashlib.blake2b(digest_size=32)
        for length in sorted({length for length, *_ in self._kept if length <= len(places)}):
            hasher.update(places[read:length].tobytes())
            read = length
            digest = hasher.digest()
            for kind in (True,) if aloud else (True, False):
                if (key := (length, digest, kind)) in self._kept:
                    found = key
        if found is None:
            self.misses += 1
            return None
        self._kept.move_to_end(found)
        self.hits += 1
        self.positions += found[0]
        return found[0], self._kept[found]


def places_of(streams: Streams, clips: Sequence[AudioClip], items: Sequence[VisionItem]) -> np.ndarray:
    """Returns what lies at each position: [T, 6] int64 of audio id, text id and a digest of four numbers.

    Under a recording or a picture the digest is its own, and the audio id the number of its row.
    """
    places = np.zeros((len(streams), 6), np.int64)
    places[:, 0], places[:, 1] = streams.audio, streams.text
    index = np.asarray(streams.clip_index)
    for number, clip in enumerate(clips):
        at = index == number
        places[at, 0] = np.asarray(streams.clip_row)[at]
        places[at, 2:] = _numbers(clip.codes, *(() if clip.features is None else (clip.features,)))
    index = np.asarray(streams.item_index)
    for number, item in enumerate(items):
        places[index == number, 2:] = _numbers(item.pixel_values, torch.tensor(item.grid))
    return places


def fed(ids: Sequence[tuple[int, int]]) -> np.ndarray:
    """Returns the places [T, 6] of generated positions, given text and audio id of each."""
    places = np.zeros((len(ids), 6), np.int64)
    if ids:
        places[:, 1], places[:, 0] = zip(*ids, strict=True)
    return places


def _numbers(*tensors: torch.Tensor) -> np.ndarray:
    hasher = hashlib.blake2b(digest_size=32)
    for tensor in tensors:
        hasher.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        hasher.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return np.frombuffer(hasher.digest(), np.int64)


def _digest(places: np.ndarray) -> bytes:
    return hashlib.blake2b(places.tobytes(), digest_size=32).digest()
