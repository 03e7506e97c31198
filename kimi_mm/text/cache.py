"""What a backbone remembers between calls: one explicit object that can be copied, cut, moved and saved.

BackboneCache
├── lengths [B]           tokens seen by every row (rows may differ)
├── max_length, ragged    host-side bounds, so that no step has to read the device
└── layers
    ├── KDAState          last raw conv inputs [B, W-1, C], recurrent state [B, HV, V, K] fp32
    └── SequenceState     one growing buffer [B, S, ...] (MLA latents, or GQA keys and values)

A cache with a capacity does not grow: no tensor moves and no shape changes from step to step, as a CUDA graph wants it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_mm.errors import CheckpointError


@dataclass
class KDAState:
    """State of a KDA layer."""

    conv: Tensor
    recurrent: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> KDAState:
        return KDAState(change(self.conv), change(self.recurrent))

    def tensors(self) -> dict[str, Tensor]:
        return {"conv": self.conv, "recurrent": self.recurrent}


@dataclass
class SequenceState:
    """Rows kept per token, in a buffer that doubles when it is full."""

    rows: Tensor  # [B, S, ...], valid up to each row's length

    def map(self, change: Callable[[Tensor], Tensor]) -> SequenceState:
        return SequenceState(change(self.rows))

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows}

    def append(self, new: Tensor, where: Tensor | None, start: int) -> Tensor:
        """Writes new [B, T, ...] and returns the buffer up to `start + T`.

        Args:
            where: [B, T] int64 index of every new token, or None when all rows go to `start`.
            start: largest number of tokens any row holds.
        """
        end = start + new.shape[1]
        if end > self.rows.shape[1]:
            size = max(2 * self.rows.shape[1], end)
            grown = self.rows.new_zeros(self.rows.shape[0], size, *self.rows.shape[2:])
            grown[:, :start] = self.rows[:, :start]
            self.rows = grown
        if where is None:
            self.rows[:, start:end] = new
        else:
            batch = torch.arange(new.shape[0], device=new.device)[:, None]
            self.rows[batch, where] = new.to(self.rows.dtype)
        return self.rows[:, :end]


LayerState = KDAState | SequenceState


@dataclass
class BackboneCache:
    """State of all layers of a backbone, trunk first, then text branch, then audio branch."""

    layers: list[LayerState]
    lengths: Tensor  # [B] int64
    max_length: int = 0
    ragged: bool = False  # True: rows may hold fewer than max_length tokens
    capacity: int = 0  # tokens that all buffers have room for; 0: they grow

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Of all tensors of all layers."""
        return [tensor.dtype for layer in self.layers for tensor in layer.tensors().values()]

    def advance(self, tokens: int, lengths: Tensor | None) -> None:
        """Counts the tokens of one forward call; `lengths` [B] are the valid ones of each row."""
        self.max_length += tokens
        self.ragged = self.ragged or lengths is not None
        more = tokens if lengths is None else lengths
        self.lengths = self.lengths.add_(more) if self.capacity else self.lengths + more

    def clone(self) -> BackboneCache:
        """Returns an independent copy."""
        return self._map(torch.clone)

    def select(self, row_indices: Tensor | list[int]) -> BackboneCache:
        """Returns a copy that holds the given rows, in that order; a row may appear more than once."""
        index = torch.as_tensor(row_indices, dtype=torch.int64, device=self.lengths.device)
        return self._map(lambda tensor: tensor.index_select(0, index))

    def row(self, index: int, length: int) -> BackboneCache:
        """Returns a copy of one row alone, which holds `length` tokens."""
        one = self.select([index]).trim(length)
        return BackboneCache(one.layers, one.lengths, length, ragged=False)

    @staticmethod
    def join(parts: Sequence[BackboneCache]) -> BackboneCache:
        """Returns the rows of several caches of one model as one batch, in order.

        Every row goes on as it would have alone; buffers are padded to the longest part.

        Raises:
            ValueError: if there are no parts, or they belong to different models.
        """
        if not parts:
            raise ValueError("There are no caches to join.")
        if len(parts) == 1:
            return parts[0]
        longest = max(part.max_length for part in parts)
        layers: list[LayerState] = []
        for states in zip(*(part.layers for part in parts), strict=True):
            if len({type(state) for state in states}) > 1:
                raise ValueError("The caches belong to different models.")
            if isinstance(states[0], KDAState):
                layers.append(KDAState(torch.cat([s.conv for s in states]), torch.cat([s.recurrent for s in states])))
            else:
                layers.append(SequenceState(torch.cat([_stretch(s.rows, longest) for s in states])))
        ragged = any(part.ragged or part.max_length != longest for part in parts)
        return BackboneCache(layers, torch.cat([part.lengths for part in parts]), longest, ragged)

    def reserve(self, capacity: int) -> BackboneCache:
        """Returns a copy with room for `capacity` tokens in all, which is decoded in place, one token a step.

        Raises:
            ValueError: if a row may hold more already.
        """
        if capacity <= self.max_length:
            raise ValueError(
                f"The cache holds up to {self.max_length} tokens, and needs room for more than {capacity}."
            )
        layers: list[LayerState] = [
            SequenceState(_stretch(s.rows, capacity)) if isinstance(s, SequenceState) else s.map(torch.clone)
            for s in self.layers
        ]
        return BackboneCache(layers, self.lengths.clone(), self.max_length, self.ragged, capacity)

    def fill(self, other: BackboneCache) -> None:
        """Takes over what another cache of the model holds, in place; self has a capacity that is large enough."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            for name, tensor in mine.tensors().items():
                given = theirs.tensors()[name]
                if isinstance(mine, SequenceState):
                    tensor[:, : other.max_length].copy_(given[:, : other.max_length])
                else:
                    tensor.copy_(given)
        self.lengths.copy_(other.lengths)
        self.max_length, self.ragged = other.max_length, other.ragged

    def trim(self, max_length: int) -> BackboneCache:
        """Returns a cache whose buffers end at `max_length` tokens, the most that any row still holds.

        A batch that rows join and leave would otherwise stay as long as its longest row ever was. Only the host's
        knowledge is used; the device is not read.
        """
        if max_length >= self.max_length:
            return self
        layers: list[LayerState] = [
            SequenceState(_stretch(s.rows, max_length)) if isinstance(s, SequenceState) else s for s in self.layers
        ]
        return BackboneCache(layers, self.lengths, max_length, self.ragged)

    def to(self, device: torch.device | str) -> BackboneCache:
        """Returns the cache on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def state_dict(self) -> dict[str, Any]:
        """Returns copies of all tensors by name, and the two host-side bounds.

        Copies, since decoding goes on in place.
        """
        state: dict[str, Any] = {
            f"layers.{i}.{name}": tensor.clone()
            for i, layer in enumerate(self.layers)
            for name, tensor in layer.tensors().items()
        }
        return {**state, "lengths": self.lengths, "max_length": self.max_length, "ragged": self.ragged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned; batch size and buffer sizes may differ from this cache's.

        Raises:
            CheckpointError: if a tensor is missing or belongs to another kind of layer.
        """
        layers: list[LayerState] = []
        for i, layer in enumerate(self.layers):
            found: dict[str, Tensor] = {}
            for name, own in layer.tensors().items():
                tensor = state.get(f"layers.{i}.{name}")
                if tensor is None or tensor.dim() != own.dim():
                    raise CheckpointError(f"layers.{i}.{name} is missing or has another shape: not this model's cache.")
                found[name] = tensor.to(own.device, own.dtype, copy=True)
            layers.append(type(layer)(**found))
        self.layers = layers
        self.lengths = state["lengths"].to(self.lengths.device)
        self.max_length, self.ragged = int(state["max_length"]), bool(state["ragged"])

    def _map(self, change: Callable[[Tensor], Tensor]) -> BackboneCache:
        return BackboneCache(
            [layer.map(change) for layer in self.layers], change(self.lengths), self.max_length, self.ragged
        )


def _stretch(rows: Tensor, length: int) -> Tensor:
    """Cuts or pads rows [B, S, ...] to [B, length, ...]."""
    if rows.shape[1] >= length:
        return rows[:, :length].clone()
    padded = rows.new_zeros(rows.shape[0], length, *rows.shape[2:])
    padded[:, : rows.shape[1]] = rows
    return padded
