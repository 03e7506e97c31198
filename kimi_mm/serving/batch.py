"""Continuous batching: rows join a running batch after their prompt, share every step, and leave when they end.

    prompts of new rows ─► one prefill ─► their cache ──┐ join       (from where their conversations were left)
    running cache [B rows] ─────────────────────────────┴─► step ─► next id of every row ─► rows that end leave
                                                              ▲                    │
                                                              └────────────────────┘

Rows of text and rows that speak are two such batches, which step in turn: text alone needs neither the audio branch nor
a cache for it.
A row gets the ids that it would get alone, whether it is answered in text or in text and speech. Everything here runs
on one thread; `kimi_mm.serving.engine` owns it.
Shapes: B rows, T prompt positions, D hidden size, V text vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
    def aloud(self) -> bool:
        """Whether it is answered in speech, too."""
        return False

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
    def aloud(self) -> bool:
        return True

    @property
    def longest(self) -> int:
        return len(self.prompt) + self.reply.longest


@dataclass(frozen=True)
class News:
    """What a step gave to a row: a text id and a code, None where none."""

    row: Row
    text: int | None
    code: int | None = None


class _Group:
    """Rows of one kind, which share every step; those of text have no cache for the audio branch and do not run it.

    Args:
        model: whose streams are decoded.
        aloud: rows answer in text and speech.
    """

    def __init__(self, model: KimiMM, aloud: bool) -> None:
        self.kimi, self.aloud = model, aloud
        self.rows: list[Row] = []
        self.hidden: list[torch.Tensor] = []  # [B, 1, D] of each branch, where each row's next ids are chosen
        self.cache: BackboneCache | None = None
        empty = model.model.backbone.new_cache(1, device="cpu", audio=aloud)
        self._layers = len(empty.layers)
        self._fixed, self._per_token = _row_bytes(empty)

    def bytes_for(self, rows: Sequence[Row]) -> int:
        """Bytes that caches of such rows can grow to: buffers are as long as the longest row, and double."""
        longest = max((row.longest for row in rows), default=0)
        return len(rows) * (self._fixed + 2 * longest * self._per_token)

    def read(self, prompts: Sequence[Prompt], cache: BackboneCache | None = None) -> Kept:
        """Reads prompts, after what a cache holds; returns where they end."""
        if cache is None:
            cache = self.kimi.model.backbone.new_cache(len(prompts), audio=self.aloud)
        inputs = self.kimi.processor.collate(
            [prompt.streams for prompt in prompts],
            [prompt.clips for prompt in prompts],
            [prompt.items for prompt in prompts],
        ).to(self.kimi.device)
        last = torch.arange(len(prompts), device=inputs.lengths.device), inputs.lengths - 1
        return Kept(cache, [branch[last][:, None] for branch in _branches(self.kimi.model(inputs, cache))])

    def copy_of(self, kept: Kept) -> Kept:
        """Returns a copy without what these rows do not need."""
        cache = replace(kept.cache, layers=kept.cache.layers[: self._layers]).clone()
        return Kept(cache, kept.hidden if self.aloud else kept.hidden[:1])

    def join(self, rows: Sequence[Row], parts: Sequence[Kept]) -> None:
        """Adds rows, given what they hold, in order."""
        if not rows:
            return
        running = [] if self.cache is None else [Kept(self.cache, self.hidden)]
        parts = [*running, *parts]
        self.cache = BackboneCache.join([part.cache for part in parts])
        self.hidden = [torch.cat(branch) for branch in zip(*(part.hidden for part in parts), strict=True)]
        self.rows.extend(rows)

    def kept(self, row: Row) -> Kept:
        """Returns a copy of what a running row holds."""
        assert self.cache is not None
        slot = self.rows.index(row)
        return Kept(self.cache.row(slot, row.held), [branch[slot, None].clone() for branch in self.hidden])

    def step(self, chosen: Sequence[tuple[int, int]]) -> None:
        """Feeds every row its text and audio id."""
        if self.cache is not None:
            ids = torch.tensor(chosen, device=self.kimi.device)
            self.hidden = _branches(self.kimi.model.step(ids[:, 0], ids[:, 1], self.cache))

    def keep(self, slots: list[int]) -> None:
        """Lets all rows but these go."""
        self.rows = [self.rows[slot] for slot in slots]
        if not slots or self.cache is None:
            self.cache, self.hidden = None, []
            return
        self.cache = self.cache.select(slots).trim(max(row.held for row in self.rows))
        self.hidden = [branch[slots] for branch in self.hidden]


class RunningBatch:
    """Rows that decode together: those of text, and beside them those that speak.

    Args:
        model: whose streams are decoded.
        cache_bytes: most memory for their caches; see `fits`.
        max_rows: most rows at a time.
        reuse_bytes: memory for states that are kept from turn to turn.
    """

    def __init__(self, model: KimiMM, cache_bytes: int = 2**30, max_rows: int = 16, reuse_bytes: int = 2**27) -> None:
        self.kimi, self.cache_bytes, self.max_rows = model, cache_bytes, max_rows
        self.prefixes = Prefixes(reuse_bytes)
        self._written, self._spoken = self._groups = _Group(model, False), _Group(model, True)
        vocab = model.config.vocab
        self._eos, self._blank = vocab.special("text_eos"), vocab.special("text_blank")

    @property
    def rows(self) -> list[Row]:
        """All rows at work."""
        return [*self._written.rows, *self._spoken.rows]

    def bytes_for(self, rows: Sequence[Row]) -> int:
        """Returns what caches of these rows can grow to."""
        return sum(group.bytes_for(_of(group, rows)) for group in self._groups)

    def fits(self, row: Row, with_rows: Sequence[Row] | None = None) -> bool:
        """Tells whether a row may join the running rows (or `with_rows`) now."""
        rows = [*(self.rows if with_rows is None else with_rows), row]
        return len(rows) <= self.max_rows and self.bytes_for(rows) <= self.cache_bytes

    @torch.inference_mode()
    def admit(self, rows: Sequence[Row]) -> None:
        """Reads the prompts of new rows, those of a kind together, and adds them to the batch.

        Raises:
            UserError: a prompt cannot be used; none of the new rows has joined then.
        """
        for group, joined, parts in [(group, *self._read(group, _of(group, rows))) for group in self._groups]:
            group.join(joined, parts)
            for row in joined:
                if row.kept and row.reused < len(row.prompt):
                    self._remember(group, row)

    def _read(self, group: _Group, rows: Sequence[Row]) -> tuple[list[Row], list[Kept]]:
        """Reads what of the rows' prompts has not been read in an earlier turn; returns rows and what they hold."""
        fresh: list[Row] = []
        whole: list[tuple[Row, Kept]] = []
        going_on: list[tuple[Row, Prompt, Kept]] = []
        for row in rows:
            row.reused = 0
            found = self.prefixes.find(row.prompt.places, row.aloud) if row.kept else None
            rest = None if found is None else row.prompt.after(found[0])
            if found is None or rest is None:
                fresh.append(row)
                continue
            row.reused, kept = found[0], group.copy_of(found[1])
            if len(rest):
                going_on.append((row, rest, kept))
            else:
                whole.append((row, kept))
        parts = [kept for _, kept in whole]
        if fresh:
            parts.append(group.read([row.prompt for row in fresh]))
        if going_on:
            cache = BackboneCache.join([kept.cache for _, _, kept in going_on])
            parts.append(group.read([rest for _, rest, _ in going_on], cache))
        return [*(row for row, _ in whole), *fresh, *(row for row, _, _ in going_on)], parts

    def _remember(self, group: _Group, row: Row) -> None:
        """Keeps the state of a running row as it is."""
        if self.prefixes.most_bytes:
            places = np.concatenate([row.prompt.places, fed(row.fed)])
            self.prefixes.keep(places, group.kept(row))

    @torch.inference_mode()
    def step(self) -> list[News]:
        """Chooses the next ids of every row and runs one step of each kind. Rows that ended have left."""
        return [news for group in self._groups if group.rows for news in self._step(group)]

    def _step(self, group: _Group) -> list[News]:
        if group.aloud:
            chosen = self._speech(group)
            told = [self._take_spoken(row, *ids) for row, ids in zip(group.rows, chosen, strict=True)]
        else:
            texts = self._texts(group)
            chosen = [(token, self._blank) for token in texts]
            told = [News(row, self._take(row, token)) for row, token in zip(group.rows, texts, strict=True)]
        for row in group.rows:
            if row.kept and row.stop_reason in ("eos", "budget"):
                self._remember(group, row)
        keep = [slot for slot, row in enumerate(group.rows) if row.stop_reason is None]
        if len(keep) < len(group.rows):
            group.keep(keep)
        chosen = [chosen[slot] for slot in keep]
        for row, ids in zip(group.rows, chosen, strict=True):
            row.fed.append(ids)
        group.step(chosen)
        return told

    def _texts(self, group: _Group) -> list[int]:
        """Chooses the next id of rows of text."""
        logits = text_logits(self.kimi.model, group.hidden[0])
        ids = logits.argmax(-1).tolist()
        for slot, row in enumerate(group.rows):
            if row.sampling.temperature > 0:
                ids[slot] = int(choose_text(logits[slot, None], row.sampling, row.generator))
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

    def _speech(self, group: _Group) -> list[tuple[int, int]]:
        """Chooses the next ids of both streams of rows that speak."""
        replies = [row.reply for row in group.rows if isinstance(row, SpokenRow)]
        text, audio = (branch[:, -1] for branch in group.hidden)
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
        for group in self._groups:
            keep = [slot for slot, row in enumerate(group.rows) if id(row) not in gone]
            if len(keep) < len(group.rows):
                with torch.inference_mode():
                    group.keep(keep)

    @property
    def held_bytes(self) -> int:
        """Bytes of the caches as they are."""
        layers = [layer for group in self._groups if group.cache is not None for layer in group.cache.layers]
        return sum(_size(tensor) for layer in layers for tensor in layer.tensors().values())


def _of(group: _Group, rows: Sequence[Row]) -> list[Row]:
    """The rows that are of a group's kind."""
    return [row for row in rows if row.aloud == group.aloud]


def _branches(output: ModelOutput) -> list[torch.Tensor]:
    """The hidden states [B, T, D] of the branches that there are: text, audio."""
    return [output.text_hidden] if output.audio_hidden is None else [output.text_hidden, output.audio_hidden]


def _row_bytes(cache: BackboneCache) -> tuple[int, int]:
    """Bytes that a row of an empty cache holds whatever its length, and bytes for each of its positions."""
    fixed = per_token = 0
    for state in cache.layers:
        if isinstance(state, KDAState):
            fixed += sum(_size(tensor) for tensor in state.tensors().values())
        else:
            per_token += state.rows.shape[2:].numel() * state.rows.element_size()
    return fixed, per_token


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
