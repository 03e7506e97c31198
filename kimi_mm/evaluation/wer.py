"""Word and character error rates over a corpus, with an alignment to show and a bootstrap interval.

references, hypotheses ──normalizer──► words ──Levenshtein──► hits, substitutions, deletions, insertions
                                                                 └──► sum over the corpus / reference words
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kimi_mm.errors import UserError
from kimi_mm.evaluation.normalize import NORMALIZER_VERSION, normalize_english


@dataclass(frozen=True)
class Edits:
    """Edit counts of one or many utterances; `reference` is the number of reference units."""

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def reference(self) -> int:
        return self.hits + self.substitutions + self.deletions

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per reference unit; with an empty reference 0 if nothing was inserted, else infinity."""
        if self.reference == 0:
            return float("inf") if self.errors else 0.0
        return self.errors / self.reference

    def __add__(self, other: Edits) -> Edits:
        return Edits(
            self.hits + other.hits,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )


@dataclass(frozen=True)
class ErrorRate:
    """A corpus error rate; `low` and `high` bound the 95 % bootstrap interval over utterances."""

    rate: float
    low: float
    high: float
    edits: Edits
    utterances: list[Edits] = field(default_factory=list, repr=False)
    normalizer: str = NORMALIZER_VERSION

    def __str__(self) -> str:
        e = self.edits
        return (
            f"{100 * self.rate:.2f} % [{100 * self.low:.2f}, {100 * self.high:.2f}] "
            f"({e.substitutions} sub, {e.deletions} del, {e.insertions} ins of {e.reference})"
        )


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """Aligns two sequences with the fewest edits (Levenshtein, all costs 1).

    Args:
        reference: R units (words or characters).
        hypothesis: H units.

    Returns:
        Pairs in order; (r, None) is a deletion, (None, h) an insertion. Of the alignments with the fewest edits it is
        one with the most hits, so that it reads well.
    """
    rows, columns = len(reference), len(hypothesis)
    # An edit outweighs any number of hits.
    edit = rows + columns + 1
    cost = [[j * edit for j in range(columns + 1)]]
    for i in range(1, rows + 1):
        above, unit, row = cost[-1], reference[i - 1], [i * edit]
        for j in range(1, columns + 1):
            diagonal = above[j - 1] + (-1 if unit == hypothesis[j - 1] else edit)
            row.append(min(diagonal, above[j] + edit, row[j - 1] + edit))
        cost.append(row)
    pairs: list[tuple[str | None, str | None]] = []
    i, j = rows, columns
    while i or j:
        step = -1 if i and j and reference[i - 1] == hypothesis[j - 1] else edit
        if i and j and cost[i][j] == cost[i - 1][j - 1] + step:
            i, j = i - 1, j - 1
            pairs.append((reference[i], hypothesis[j]))
        elif i and cost[i][j] == cost[i - 1][j] + edit:
            i -= 1
            pairs.append((reference[i], None))
        else:
            j -= 1
            pairs.append((None, hypothesis[j]))
    return pairs[::-1]


def count_edits(reference: Sequence[str], hypothesis: Sequence[str]) -> Edits:
    """Counts hits, substitutions, deletions and insertions of the alignment of `align`."""
    counts = {"hits": 0, "substitutions": 0, "deletions": 0, "insertions": 0}
    for r, h in align(reference, hypothesis):
        kind = "hits" if r == h else "insertions" if r is None else "deletions" if h is None else "substitutions"
        counts[kind] += 1
    return Edits(**counts)


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str], *, draws: int = 2000) -> ErrorRate:
    """Corpus word error rate after `normalize_english`: all errors over all reference words.

    Args:
        references: what was said, one text per utterance.
        hypotheses: what was recognised, in the same order.
        draws: bootstrap resamples (of utterances, seed 0) behind the interval.

    Raises:
        UserError: when the lists differ in length or hold no reference word.
    """
    return _error_rate(references, hypotheses, str.split, draws)


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str], *, draws: int = 2000) -> ErrorRate:
    """Corpus character error rate after `normalize_english`, single spaces counted; arguments as `word_error_rate`."""
    return _error_rate(references, hypotheses, list, draws)


def show_alignment(reference: str, hypothesis: str) -> str:
    """Returns three lines: reference words, hypothesis words, and S, D or I under each error."""
    lines: tuple[list[str], list[str], list[str]] = ([], [], [])
    for r, h in align(normalize_english(reference).split(), normalize_english(hypothesis).split()):
        mark = "" if r == h else "I" if r is None else "D" if h is None else "S"
        width = max(len(r or ""), len(h or ""))
        for line, cell in zip(lines, (r or "*" * width, h or "*" * width, mark), strict=True):
            line.append(cell.ljust(width))
    return "\n".join(" ".join(line).rstrip() for line in lines)


def _error_rate(
    references: Sequence[str], hypotheses: Sequence[str], split: Callable[[str], list[str]], draws: int
) -> ErrorRate:
    if len(references) != len(hypotheses):
        raise UserError(f"{len(references)} references but {len(hypotheses)} hypotheses; give one of each per clip.")
    utterances = [
        count_edits(split(normalize_english(r)), split(normalize_english(h)))
        for r, h in zip(references, hypotheses, strict=True)
    ]
    total = sum(utterances, Edits())
    if total.reference == 0:
        raise UserError("The references hold no words, so an error rate is undefined; check the manifest's texts.")
    errors = np.array([u.errors for u in utterances], np.float64)
    sizes = np.array([u.reference for u in utterances], np.float64)
    picks = np.random.default_rng(0).integers(0, len(utterances), (draws, len(utterances)))
    rates = errors[picks].sum(1) / np.maximum(sizes[picks].sum(1), 1.0)
    low, high = np.quantile(rates, (0.025, 0.975)) if draws else (float("nan"), float("nan"))
    return ErrorRate(total.rate, float(low), float(high), total, utterances)
