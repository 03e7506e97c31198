"""Beam search over the text stream: several readings of each prompt go on side by side, the best whole one is taken.

    prefill once ─► beams x rows ─► log-probabilities ─► the best of all continuations ─► caches follow their parents
                                                              └─► text_eos: a whole reading, kept with its score

A reading's score is its log-probability divided by (its length)^length_power, ends counted (Wu et al. 2016, section 7,
without the constant). Shapes: B prompts, R rows alive (at most beams for each prompt), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kimi_mm.generation import TextResult, loop_period, text_logits
from kimi_mm.model import Model
from kimi_mm.processing import ModelInputs

BEAMS = 4  # what transcription takes unless told otherwise


@dataclass
class _Reading:
    """One way to read a prompt so far."""

    ids: list[int]
    logprob: float


@dataclass
class _Search:
    """All that is known of one prompt's readings."""

    limit: int
    beams: int
    power: float
    alive: list[_Reading] = field(default_factory=lambda: [_Reading([], 0.0)])
    whole: list[TextResult] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    runaway: _Reading | None = None  # the first that only repeated itself, in case all do

    def keep(self, reading: _Reading, reason: str) -> None:
        """Keeps a reading that ended."""
        length = len(reading.ids) + (reason == "eos")
        self.scores.append(reading.logprob / max(1, length) ** self.power)
        self.whole.append(TextResult(reading.ids, reading.logprob / max(1, length), reason))

    def extend(self, found: list[tuple[float, int, int]], eos: int) -> list[int]:
        """Takes the best of continuations (log-probability, number of the parent, id), best first.

        An end counts only among the first `beams`, since ends that nobody would choose must not end the search; it
        takes no place from those that go on. Returns the parents of the readings that do.
        """
        parents, readings, places = [], [], self.beams
        for rank, (logprob, parent, token) in enumerate(found):
            ids = self.alive[parent].ids
            if token == eos:
                if rank < self.beams:
                    self.keep(_Reading(ids, logprob), "eos")
                continue
            longer = _Reading([*ids, token], logprob)
            places -= 1
            if period := loop_period(longer.ids):
                self.runaway = self.runaway or _Reading(longer.ids[: len(longer.ids) - 2 * period], logprob)
            elif len(longer.ids) >= self.limit:
                self.keep(longer, "budget")
            else:
                parents.append(parent)
                readings.append(longer)
            if not places:
                break
        if self._decided(readings):
            parents, readings = [], []
        self.alive = readings
        return parents

    def _decided(self, readings: list[_Reading]) -> bool:
        """True when no reading alive can still become better than the best whole one."""
        if not self.scores or not readings:
            return not readings
        hoped = max(reading.logprob for reading in readings) / self.limit**self.power
        return len(self.whole) >= self.beams or hoped < max(self.scores)

    def best(self) -> TextResult:
        if not self.whole and self.runaway is not None:
            self.keep(self.runaway, "loop")
        return self.whole[max(range(len(self.whole)), key=self.scores.__getitem__)]


@torch.inference_mode()
def beam_search(
    model: Model, inputs: ModelInputs, *, beams: int = BEAMS, budgets: list[int], length_power: float = 0.6
) -> list[TextResult]:
    """Finds a likely text for every prompt of a batch.

    Args:
        inputs: prompts, right-padded; each ends with `assistant_start`.
        beams: readings of each prompt that go on at a time; 1 is greedy decoding.
        budgets: most tokens per prompt.
        length_power: 0 compares sums of log-probabilities, which favours short texts, 1 compares means.

    Returns:
        One `TextResult` per prompt, in order; see `generate_text`.

    Raises:
        ValueError: for fewer than one beam.
    """
    if beams < 1:
        raise ValueError(f"beams={beams}: at least one reading has to go on.")
    vocab, device, count = model.config.vocab, inputs.text_ids.device, len(inputs.lengths)
    eos, blank = vocab.special("text_eos"), vocab.special("text_blank")
    searches = [_Search(limit, beams, length_power) for limit in budgets]
    cache = model.backbone.new_cache(count, device=device, audio=False)
    hidden = model(inputs, cache).text_hidden
    hidden = hidden[torch.arange(count, device=device), inputs.lengths.to(device) - 1][:, None]
    for search in searches:
        if search.limit < 1:
            search.keep(search.alive.pop(), "budget")
    if rows := [row for row, search in enumerate(searches) if search.alive]:
        cache, hidden = cache.select(rows), hidden[rows]
    while any(search.alive for search in searches):
        logprobs = text_logits(model, hidden).log_softmax(-1)
        values, ids = logprobs.topk(min(2 * beams, logprobs.shape[-1]), dim=-1)
        values, ids = values.tolist(), ids.tolist()
        parents: list[int] = []
        start = 0
        for search in searches:
            if not search.alive:
                continue
            found = [
                (reading.logprob + value, number, token)
                for number, reading in enumerate(search.alive)
                for value, token in zip(values[start + number], ids[start + number], strict=True)
            ]
            found = sorted(found, reverse=True)[: 2 * beams]
            first, start = start, start + len(search.alive)
            parents += [first + parent for parent in search.extend(found, eos)]
        if not parents:
            break
        if parents != list(range(cache.batch_size)):
            cache = cache.select(parents)
        chosen = torch.tensor([r.ids[-1] for search in searches for r in search.alive], device=device)
        hidden = model.step(chosen, torch.full_like(chosen, blank), cache).text_hidden
    return [search.best() for search in searches]
