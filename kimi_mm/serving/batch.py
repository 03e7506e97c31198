"""Continuous batching: rows join a running batch after their prompt, share every step, and leave when they end.

    prompts of new rows ─► one prefill ─► their cache ──┐ join
    running cache [B rows] ─────────────────────────────┴─► step ─► next id of every row ─► rows that end leave
                                                              ▲                    │
                                                              └────────────────────┘

A row gets the ids that it would get alone. Everything here runs on one thread; `kimi_mm.serving.engine` owns it.
Shapes: B rows, T prompt positions, D hidden size, V text vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kimi_mm.generation import TextSampling, choose_text, loop_period, text_logits
from kimi_mm.pipeline import KimiMM
from kimi_mm.processing import AudioClip, Streams
from kimi_mm.text.cache import BackboneCache, KDAState
from kimi_mm.vision.processing import VisionItem


@dataclass(frozen=True)
class Prompt:
    """One conversation, laid out and read: streams that end with `assistant_start`, its recordings, its pictures."""

    streams: Streams
    clips: Sequence[AudioClip] = ()
    items: Sequence[VisionItem] = ()

    def __len__(self) -> int:
        return len(self.streams)


@dataclass(eq=False)
class Row:
    """A prompt and its answer so far; `stop_reason` ("eos", "budget", "loop") is set when the answer has ended."""

    prompt: Prompt
    sampling: TextSampling = field(default_factory=TextSampling)
    generator: torch.Generator | None = None
    ids: list[int] = field(default_factory=list)
    stop_reason: str | None = None

    @property
    def longest(self) -> int:
        """Most positions that the row can come to hold."""
        return len(self.prompt) + self.sampling.max_tokens


class RunningBatch:
    """Rows that decode together.

    Args:
        model: whose text stream is decoded.
        cache_bytes: most memory for their caches; see `fits`.
        max_rows: most rows at a time.
    """

    def __init__(self, model: KimiMM, cache_bytes: int = 2**30, max_rows: int = 16) -> None:
        self.kimi, self.cache_bytes, self.max_rows = model, cache_bytes, max_rows
        self.rows: list[Row] = []
        self._cache: BackboneCache | None = None
        self._hidden = torch.empty(0)  # [B, 1, D], at the position that chooses each row's next id
        vocab = model.config.vocab
        self._eos, self._blank = vocab.special("text_eos"), vocab.special("text_blank")
        self._fixed, self._per_token = _row_bytes(model)

    def bytes_for(self, rows: Sequence[Row]) -> int:
        """Returns what caches of these rows can grow to: buffers are as long as the longest row, and double."""
        longest = max((row.longest for row in rows), default=0)
        return len(rows) * (self._fixed + 2 * longest * self._per_token)

    def fits(self, row: Row, with_rows: Sequence[Row] | None = None) -> bool:
        """Tells whether a row may join the running rows (or `with_rows`) now."""
        rows = [*(self.rows if with_rows is None else with_rows), row]
        return len(rows) <= self.max_rows and self.bytes_for(rows) <= self.cache_bytes

    @torch.inference_mode()
    def admit(self, rows: Sequence[Row]) -> None:
        """Reads the prompts of new rows, together, and adds them to the batch.

        Raises:
            UserError: a prompt cannot be used; none of the new rows has joined then.
        """
        model, processor = self.kimi.model, self.kimi.processor
        inputs = processor.collate(
            [row.prompt.streams for row in rows],
            [row.prompt.clips for row in rows],
            [row.prompt.items for row in rows],
        ).to(self.kimi.device)
        cache = model.backbone.new_cache(len(rows))
        hidden = model(inputs, cache).text_hidden
        last = torch.arange(len(rows), device=hidden.device), inputs.lengths.to(hidden.device) - 1
        hidden = hidden[last][:, None]
        if self._cache is None:
            self._cache, self._hidden = cache, hidden
        else:
            self._cache = BackboneCache.join([self._cache, cache])
            self._hidden = torch.cat([self._hidden, hidden])
        self.rows.extend(rows)

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, int | None]]:
        """Chooses the next id of every row and runs one step.

        Returns:
            Each row with its new id, or None for a row that ended without one. Rows that ended have left.
        """
        if self._cache is None:
            return []
        model = self.kimi.model
        logits = text_logits(model, self._hidden)
        chosen = logits.argmax(-1)
        for slot, row in enumerate(self.rows):
            if row.sampling.temperature > 0:
                chosen[slot] = choose_text(logits[slot, None], row.sampling, row.generator)[0]
        news: list[tuple[Row, int | None]] = []
        for row, token in zip(self.rows, chosen.tolist(), strict=True):
            if token == self._eos or not row.sampling.max_tokens:
                row.stop_reason = "eos" if token == self._eos else "budget"
                news.append((row, None))
                continue
            row.ids.append(token)
            if period := loop_period(row.ids):
                del row.ids[len(row.ids) - 2 * period :]
                row.stop_reason = "loop"
                news.append((row, None))
            else:
                if len(row.ids) >= row.sampling.max_tokens:
                    row.stop_reason = "budget"
                news.append((row, token))
        keep = [slot for slot, row in enumerate(self.rows) if row.stop_reason is None]
        if len(keep) < len(self.rows):
            chosen = chosen[keep]
            self._keep(keep)
        if self._cache is not None:
            self._hidden = model.step(chosen, torch.full_like(chosen, self._blank), self._cache).text_hidden
        return news

    def drop(self, rows: Sequence[Row]) -> None:
        """Takes rows out at once, wherever they stand; what they held is free."""
        gone = set(map(id, rows))
        keep = [slot for slot, row in enumerate(self.rows) if id(row) not in gone]
        if len(keep) < len(self.rows):
            with torch.inference_mode():
                self._keep(keep)

    @property
    def held_bytes(self) -> int:
        """Bytes of the caches as they are."""
        if self._cache is None:
            return 0
        return sum(_size(tensor) for layer in self._cache.layers for tensor in layer.tensors().values())

    def _keep(self, slots: list[int]) -> None:
        self.rows = [self.rows[slot] for slot in slots]
        if not slots or self._cache is None:
            self._cache, self._hidden = None, torch.empty(0)
            return
        longest = max(len(row.prompt) + len(row.ids) for row in self.rows)
        self._cache, self._hidden = self._cache.select(slots).trim(longest), self._hidden[slots]


def _row_bytes(model: KimiMM) -> tuple[int, int]:
    """Bytes that one row holds whatever its length, and bytes for each of its positions."""
    fixed = per_token = 0
    for state in model.model.backbone.new_cache(1, device="cpu").layers:
        if isinstance(state, KDAState):
            fixed += sum(_size(tensor) for tensor in state.tensors().values())
        else:
            per_token += state.rows.shape[2:].numel() * state.rows.element_size()
    return fixed, per_token


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
