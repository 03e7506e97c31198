"""Continuous batching: rows join a running batch after their prompt, share every step, and leave when they end.

    prompts of new rows ─► one prefill ─► their cache ──┐ join       (from where their conversations were left)
    running cache [B rows] ─────────────────────────────┴─► step ─► next id of every row ─► rows that end leave
                                                              ▲                    │
                                                              └────────────────────┘

A row gets the ids that it would get alone, whether it is answered in text or in text and speech. Everything here runs
on one thread; `kimi_mm.serving.engine` owns it.
Shapes: B rows, T prompt positions, D hidden size, V text vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from kimi_mm.generation import TextSampling, choose_text, loop_period, text_logits
from kimi_mm.generation_speech import Reply, next_ids
from kimi_mm.model import ModelOutput
from kimi_mm.pipeline import KimiMM
from kimi_mm.processing import AudioClip, Streams
from kimi_mm.serving.prefixes import Kept, Prefixes, fed, places_of
from kimi_mm.serving.voices import Voice
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

    @cached_property
    def places(self) -> np.ndarray:
        """What lies at each position, see `kimi_mm.serving.prefixes`."""
        return places_of(self.streams, self.clips, self.items)

    def after(self, length: int) -> Prompt | None:
        """Returns what follows the first positions; None where they end within a recording or a picture."""
        cut = {name: values[length:] for name, values in vars(self.streams).items()}
        firsts = {}
        for name in ("clip_index", "item_index"):
            firsts[name] = max(vars(self.streams)[name][:length], default=-1) + 1
            if any(0 <= number < firsts[name] for number in cut[name]):
                return None
            cut[name] = [number - firsts[name] if number >= 0 else number for number in cut[name]]
        return Prompt(Streams(**cut), self.clips[firsts["clip_index"] :], self.items[firsts["item_index"] :])


@dataclass(eq=False)
class Row:
    """A prompt and its answer so far; `stop_reason` ("eos", "budget", "loop") is set when the answer has ended.

    The state of a row that is `kept` stays for the next turn of its conversation; of its own prompt the first `reused`
    positions were there already. `fed` are the text and audio ids that were read after the prompt.
    """

    prompt: Prompt
    sampling: TextSampling = field(default_factory=TextSampling)
    generator: torch.Generator | None = None
    kept: bool = False
    ids: list[int] = field(default_factory=list)
    stop_reason: str | None = None
    reused: int = 0
    fed: list[tuple[int, int]] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """Most positions that the row can come to hold."""
        return len(self.prompt) + self.sampling.max_tokens

    @property
    def held(self) -> int:
        """Positions that it holds."""
        return len(self.prompt) + len(self.fed)


@dataclass(eq=False)
class SpokenRow(Row):
    """A prompt that is answered in text and speech; `ids` are those of the text.

    `voice` makes the codes heard, and is closed behind this row when it is the `last` of what it says.
    """

    reply: Reply = field(kw_only=True)
    voice: Voice = field(kw_only=True)
    last: bool = True

    @property
    def longest(self) -> int:
        return len(self.prompt) + self.reply.longest


@dataclass(frozen=True)
class News:
    """What a step gave to a row: a text id and a code, None where none."""

    row: Row
    text: int | None
    code: int | None = None


class RunningBatch:
    """Rows that decode together.

    Args:
        model: whose streams are decoded.
        cache_bytes: most memory for their caches; see `fits`.
        max_rows: most rows at a time.
        reuse_bytes: memory for states that are kept from turn to turn.
    """

    def __init__(self, model: KimiMM, cache_bytes: int = 2**30, max_rows: int = 16, reuse_bytes: int = 2**27) -> None:
        self.kimi, self.cache_bytes, self.max_rows = model, cache_bytes, max_rows
        self.prefixes = Prefixes(reuse_bytes)
        self.rows: list[Row] = []
        self._cache: BackboneCache | None = None
        self._hidden: list[torch.Tensor] = []  # [B, 1, D] of each branch, where each row's next ids are chosen
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
        fresh: list[Row] = []
        parts: list[tuple[list[Row], BackboneCache, list[torch.Tensor]]] = []
        going_on: list[tuple[Row, Prompt, Kept]] = []
        for row in rows:
            row.reused = 0
            if not row.kept or (found := self.prefixes.find(row.prompt.places)) is None:
                fresh.append(row)
                continue
            length, kept = found
            rest = row.prompt.after(length)
            if rest is None:
                fresh.append(row)
                continue
            row.reused = length
            if len(rest):
                going_on.append((row, rest, kept))
            else:
                parts.append(([row], kept.cache.clone(), kept.hidden))
        if fresh:
            cache = self.kimi.model.backbone.new_cache(len(fresh))
            parts.append((fresh, cache, self._read([row.prompt for row in fresh], cache)))
        if going_on:
            cache = BackboneCache.join([kept.cache.clone() for _, _, kept in going_on])
            hidden = self._read([rest for _, rest, _ in going_on], cache)
            parts.append(([row for row, _, _ in going_on], cache, hidden))
        joined = [row for part, _, _ in parts for row in part]
        cache = BackboneCache.join([*([] if self._cache is None else [self._cache]), *(part for _, part, _ in parts)])
        hidden = [*([self._hidden] if self._hidden else []), *(part for _, _, part in parts)]
        self._cache, self._hidden = cache, [torch.cat(branch) for branch in zip(*hidden, strict=True)]
        self.rows.extend(joined)
        for row in joined:
            if row.kept and row.reused < len(row.prompt):
                self._remember(row)

    def _read(self, prompts: Sequence[Prompt], cache: BackboneCache) -> list[torch.Tensor]:
        """Reads prompts into a cache; returns the hidden states [B, 1, D] of each one's last position."""
        inputs = self.kimi.processor.collate(
            [prompt.streams for prompt in prompts],
            [prompt.clips for prompt in prompts],
            [prompt.items for prompt in prompts],
        ).to(self.kimi.device)
        last = torch.arange(len(prompts), device=inputs.lengths.device), inputs.lengths - 1
        return [branch[last][:, None] for branch in _branches(self.kimi.model(inputs, cache))]

    def _remember(self, row: Row) -> None:
        """Keeps the state of a running row as it is."""
        if self._cache is None or not self.prefixes.most_bytes:
            return
        slot = self.rows.index(row)
        kept = Kept(self._cache.row(slot, row.held), [branch[slot, None].clone() for branch in self._hidden])
        self.prefixes.keep(np.concatenate([row.prompt.places, fed(row.fed)]), kept)

    @torch.inference_mode()
    def step(self) -> list[News]:
        """Chooses the next ids of every row and runs one step. Rows that ended have left."""
        if self._cache is None:
            return []
        written = [slot for slot, row in enumerate(self.rows) if not isinstance(row, SpokenRow)]
        spoken = [slot for slot, row in enumerate(self.rows) if isinstance(row, SpokenRow)]
        chosen: dict[int, tuple[int, int]] = {}  # text and audio id of each slot
        news: dict[int, News] = {}
        if written:
            for slot, token in zip(written, self._texts(written), strict=True):
                chosen[slot] = token, self._blank
                news[slot] = News(self.rows[slot], self._take(self.rows[slot], token))
        if spoken:
            for slot, ids in zip(spoken, self._speech(spoken), strict=True):
                chosen[slot] = ids
                news[slot] = self._take_spoken(self.rows[slot], *ids)
        for row in self.rows:
            if row.kept and row.stop_reason in ("eos", "budget"):
                self._remember(row)
        keep = [slot for slot, row in enumerate(self.rows) if row.stop_reason is None]
        told = [news[slot] for slot in range(len(self.rows))]
        if len(keep) < len(self.rows):
            self._keep(keep)
        if self._cache is not None:
            for row, slot in zip(self.rows, keep, strict=True):
                row.fed.append(chosen[slot])
            ids = torch.tensor([chosen[slot] for slot in keep], device=self.kimi.device)
            self._hidden = _branches(self.kimi.model.step(ids[:, 0], ids[:, 1], self._cache))
        return told

    def _texts(self, slots: list[int]) -> list[int]:
        """Chooses the next id of rows of text."""
        logits = text_logits(self.kimi.model, self._hidden[0][slots])
        ids = logits.argmax(-1).tolist()
        for place, slot in enumerate(slots):
            row = self.rows[slot]
            if row.sampling.temperature > 0:
                ids[place] = int(choose_text(logits[place, None], row.sampling, row.generator))
        return ids

    def _take(self, row: Row, token: int) -> int | None:
        """Books the next id of a row of text and returns it, or None where the row ends without one."""
        if token == self._eos or not row.sampling.max_tokens:
            row.stop_reason = "eos" if token == self._eos else "budget"
            return None
        row.ids.append(token)
        if period := loop_period(row.ids):
            del row.ids[len(row.ids) - 2 * period :]
            row.stop_reason = "loop"
            return None
        if len(row.ids) >= row.sampling.max_tokens:
            row.stop_reason = "budget"
        return token

    def _speech(self, slots: list[int]) -> list[tuple[int, int]]:
        """Chooses the next ids of both streams of rows that speak."""
        replies = [row.reply for slot in slots if isinstance(row := self.rows[slot], SpokenRow)]
        text, audio = (branch[slots, -1] for branch in self._hidden)
        return list(zip(*next_ids(self.kimi.model, replies, text, audio), strict=True))

    def _take_spoken(self, row: Row, text: int, audio: int) -> News:
        """Books the next ids of a row that speaks."""
        assert isinstance(row, SpokenRow)
        step, result = row.reply.take(text, audio), row.reply.result
        row.ids = result.text_ids
        if result.done:
            stops = {result.text_stop, result.audio_stop} - {"eos", "audio"}
            row.stop_reason = next(iter(sorted(filter(None, stops))), "eos")
        return News(row, step.text, step.code)

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
            self._cache, self._hidden = None, []
            return
        longest = max(row.held for row in self.rows)
        self._cache = self._cache.select(slots).trim(longest)
        self._hidden = [branch[slots] for branch in self._hidden]


def _branches(output: ModelOutput) -> list[torch.Tensor]:
    """The hidden states [B, T, D] of the branches that there are: text, audio."""
    return [output.text_hidden] if output.audio_hidden is None else [output.text_hidden, output.audio_hidden]


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
