"""The past that a streaming DiT attends to: keys and values of frames already spoken, for any number of streams.

Keys are kept before rotation and rotated anew for each chunk: positions then always run from 0 to the length of the
window, however long a stream lasts, and a protected prompt stays next to what is left of the past.

Shapes: L layers, B streams, H heads, C cached frames, T new frames, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class DiTCache:
    """Keys and values [L, B, H, C, K], right-aligned: of stream b the last `lengths[b]` frames are there.

    The first `prompts[b]` of them are a speaker prompt and are never dropped. Tensors are not written in place, so
    copies may share them.
    """

    keys: torch.Tensor
    values: torch.Tensor
    lengths: tuple[int, ...]
    prompts: tuple[int, ...]

    @classmethod
    def stack(cls, caches: list[DiTCache]) -> DiTCache:
        """Puts streams side by side, padding shorter ones on the left."""
        if len(caches) == 1:
            return caches[0]
        width = max(cache.keys.shape[3] for cache in caches)
        even = [cache.padded(width) for cache in caches]
        return cls(
            torch.cat([cache.keys for cache in even], 1),
            torch.cat([cache.values for cache in even], 1),
            tuple(n for cache in caches for n in cache.lengths),
            tuple(n for cache in caches for n in cache.prompts),
        )

    def padded(self, width: int) -> DiTCache:
        """Returns the cache padded on the left to `width` frames."""
        room = (0, 0, width - self.keys.shape[3], 0)
        return replace(self, keys=F.pad(self.keys, room), values=F.pad(self.values, room))

    def visible(self, counts: list[int], always: bool = False) -> torch.Tensor | None:
        """Returns which of [C cached | T new] frames are there, [B, C + T] bool; row b has `counts[b]` new ones.

        None says all of them, unless the tensor is wanted `always`.
        """
        past = self.keys.shape[3]
        if not always and min(counts) == max(counts) and min(self.lengths) == past:
            return None
        places = torch.arange(past + max(counts))
        first = torch.tensor([past - n for n in self.lengths])[:, None]
        last = torch.tensor([past + n for n in counts])[:, None]
        return ((places >= first) & (places < last)).to(self.keys.device)

    def row(self, number: int) -> DiTCache:
        """Returns one stream's part, without padding."""
        first = self.keys.shape[3] - self.lengths[number]
        cut = (slice(None), slice(number, number + 1), slice(None), slice(first, None))
        return DiTCache(self.keys[cut], self.values[cut], (self.lengths[number],), (self.prompts[number],))

    def extended(self, keys: torch.Tensor, values: torch.Tensor, counts: list[int], limit: int) -> DiTCache:
        """Appends new frames and drops the oldest beyond `limit`, prompts apart.

        Args:
            keys, values: [L, B, H, T, K], left-aligned.
            counts: of the new frames, how many belong to each stream.
            limit: largest number of frames kept for a stream.
        """
        rows = [self._extended_row(b, keys, values, count, limit) for b, count in enumerate(counts)]
        return DiTCache.stack(rows)

    def protected(self) -> DiTCache:
        """Returns the cache with all frames so far marked as prompt."""
        return replace(self, prompts=self.lengths)

    def _extended_row(self, number: int, keys: torch.Tensor, values: torch.Tensor, count: int, limit: int) -> DiTCache:
        old, prompt = self.row(number), self.prompts[number]
        new = slice(number, number + 1)
        k = torch.cat([old.keys, keys[:, new, :, :count]], 3)
        v = torch.cat([old.values, values[:, new, :, :count]], 3)
        surplus = k.shape[3] - limit
        if surplus > 0:
            rest = prompt + surplus
            k = torch.cat([k[:, :, :, :prompt], k[:, :, :, rest:]], 3)
            v = torch.cat([v[:, :, :, :prompt], v[:, :, :, rest:]], 3)
        return DiTCache(k, v, (k.shape[3],), (prompt,))
