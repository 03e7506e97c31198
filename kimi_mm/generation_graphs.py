"""One decoding step after another; on CUDA as a graph, captured once and replayed.

    prefilled cache ─► Steps ─► Steps(text_ids, audio_ids) ─► hidden states of the next position ─► ...
                         │ CUDA, one row
                         └─► Slot: cache of fixed capacity, ids in, hidden states out, graph       kept with the model

A step of a large model is some hundred kernel launches; eagerly, Python takes longer to make them than the device to
run them. A slot belongs to one reply at a time; another reply meanwhile gets one of its own.

Shapes: B rows, D hidden size.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from kimi_mm.model import Model, ModelOutput
from kimi_mm.quantized import QuantizedExperts
from kimi_mm.text.cache import BackboneCache

CAPACITY = 1024  # tokens by which the room of a slot is rounded up


class Slot:
    """A cache of fixed capacity and the graph that moves it on by one token.

    Args:
        model: on a CUDA device, or anywhere with `capture` False.
        cache: whose rows it starts with; what it holds is copied.
        capacity: tokens that there is room for.
        capture: False runs the same step eagerly, which is for tests of it.
    """

    def __init__(self, model: Model, cache: BackboneCache, capacity: int, capture: bool = True) -> None:
        self.cache = cache.reserve(capacity)
        device = self.cache.lengths.device
        self._ids = torch.zeros(2, self.cache.batch_size, dtype=torch.int64, device=device)
        # A slot is kept with its model, which it must not keep alive in turn.
        self._model, self._graph, self._output = weakref.ref(model), None, None
        if capture:
            self._capture(cache)

    @torch.inference_mode()
    def __call__(self, text_ids: Tensor, audio_ids: Tensor) -> ModelOutput:
        """Decodes one position; ids [B] to hidden states [B, 1, D], which the next call overwrites."""
        self._ids[0].copy_(text_ids)
        self._ids[1].copy_(audio_ids)
        if self._graph is None:
            return self._step()
        self._graph.replay()
        self.cache.max_length += 1
        assert self._output is not None
        return self._output

    @property
    def full(self) -> bool:
        return self.cache.max_length >= self.cache.capacity

    def fits(self, cache: BackboneCache, capacity: int) -> bool:
        """Whether it can go on from another cache, with room for `capacity` tokens."""
        mine = self.cache
        return mine.capacity >= capacity and mine.batch_size == cache.batch_size and mine.dtypes == cache.dtypes

    def _step(self) -> ModelOutput:
        model = self._model()
        assert model is not None
        return model.step(self._ids[0], self._ids[1], self.cache)

    @torch.inference_mode()
    def _capture(self, cache: BackboneCache) -> None:
        if self.cache.capacity - cache.max_length < 2:
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()  # kernels are compiled and libraries loaded before the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the device meanwhile
            self._output = self._step()
        self._graph = graph
        self.cache.fill(cache)


class Steps:
    """Decodes position after position of a prefilled batch.

    Args:
        model: decoded with.
        cache: of the prompt, prefilled.
        room: tokens that are likely to be decoded, at most.
        graphs: True takes CUDA graphs for any number of rows, False none; None takes them for one row on a CUDA device
            where the model can be captured.
    """

    def __init__(self, model: Model, cache: BackboneCache, room: int, graphs: bool | None = None) -> None:
        self.model, self.cache, self.room = model, cache, room
        self._graphs = graphs
        self._slot: Slot | None = None
        if self._wanted():
            self._take()

    def __call__(self, text_ids: Tensor, audio_ids: Tensor) -> ModelOutput:
        """Decodes one position; ids [B] to hidden states [B, 1, D], valid until the next call."""
        if self._slot is None:
            return self.model.step(text_ids, audio_ids, self.cache)
        if self._slot.full:
            self.cache, full = self._slot.cache, self._slot
            self._take()
            _give(self.model, full)
        return self._slot(text_ids, audio_ids)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps some of the rows, in this order."""
        cache = self.cache if self._slot is None else self._slot.cache
        self.close()
        self.cache = cache.select(list(rows))
        if self._graphs:
            self._take()

    def close(self) -> None:
        """Gives the slot back for the next reply; more than once is fine."""
        if self._slot is not None:
            _give(self.model, self._slot)
            self._slot = None

    def _wanted(self) -> bool:
        if self._graphs is not None:
            return self._graphs and self.cache.lengths.is_cuda
        return self.cache.lengths.is_cuda and self.cache.batch_size == 1 and can_be_captured(self.model)

    def _take(self) -> None:
        room = self.cache.max_length + max(self.room, 1)
        capacity = -(-room // CAPACITY) * CAPACITY
        with _LOCK:
            free = _SLOTS.setdefault(self.model, [])
            fits = [slot for slot in free if slot.fits(self.cache, capacity)]
            if fits:
                free.remove(fits[0])
        if fits:
            self._slot = fits[0]
            self._slot.cache.fill(self.cache)
        else:
            self._slot = Slot(self.model, self.cache, capacity)


def can_be_captured(model: Model) -> bool:
    """Whether a step reads nothing back from the device and moves no weights: no four-bit experts, no offloading."""
    return not any(isinstance(module, QuantizedExperts) or hasattr(module, "_hf_hook") for module in model.modules())


_LOCK = threading.Lock()
_SLOTS: weakref.WeakKeyDictionary[Model, list[Slot]] = weakref.WeakKeyDictionary()  # those that no reply holds
KEPT = 2


def _give(model: Model, slot: Slot) -> None:
    with _LOCK:
        free = _SLOTS.setdefault(model, [])
        free.append(slot)
        del free[:-KEPT]
