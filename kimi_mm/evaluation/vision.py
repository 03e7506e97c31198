"""Questions about pictures scored on prepared test sets: the numbers of the model card.

    DATA/scenes/<set> ─► describe, one picture at a time, greedy ─► what the answer holds ─► accuracy or error rate

An answer is right when it holds what the truth says and nothing else of that kind: the names of things, the first
number word, colour, side, or yes or no. Reading is scored by characters, whatever their case.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kimi_mm.data.art_sources import read_things
from kimi_mm.data.drawing import COLORS, SHAPES
from kimi_mm.data.questions import NUMBERS, PHRASES, Question
from kimi_mm.data.scene_sets import SETS, read_set
from kimi_mm.errors import UserError
from kimi_mm.evaluation.result import conditions
from kimi_mm.evaluation.wer import Edits, count_edits

if TYPE_CHECKING:
    from kimi_mm.pipeline import KimiMM

log = logging.getLogger(__name__)
KIND = "kimi_mm.vision"
VERSION = 1
LATENCY_SIZE = 512
DRAWS = 2000  # bootstrap resamples


@dataclass(frozen=True)
class Answered:
    """A question, what the model said, and the seconds it took."""

    picture: str
    question: Question
    said: str
    elapsed: float


class Judge:
    """Decides what an answer holds.

    Args:
        names: plural by singular ("" where there is none) of all that pictures may show; None: things and shapes.
    """

    def __init__(self, names: dict[str, str] | None = None) -> None:
        if names is None:
            names = {thing.name: thing.plural for thing, _ in read_things()}
            names.update({shape: f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES})
        self._singular = {form: name for name, plural in names.items() for form in (name, plural) if form}
        # Longest first, so that a teddy bear is no bear.
        forms = sorted(self._singular, key=len, reverse=True)
        self._pattern = re.compile(rf"\b({'|'.join(map(re.escape, forms))})\b")

    def names(self, text: str) -> list[str]:
        """Returns the names of things in a text, in order, in the singular."""
        return [self._singular[found] for found in self._pattern.findall(text.lower())]

    def right(self, question: Question, said: str) -> bool:
        """Tells whether an answer holds the truth."""
        truth = question.truth[0] if question.truth else ""
        if truth in ("yes", "no"):
            return _first(said, ("yes", "no")) == truth
        if question.kind == "count":
            return _number(said) == truth
        if question.kind == "digit":
            return NUMBERS.index(_number(said) or "ten") == int(truth)
        if question.kind in ("color", "background"):
            return _first(said, COLORS) == truth
        if truth in PHRASES:
            return _first(said, PHRASES) == truth
        return sorted(self.names(said)) == sorted(self.names(" , ".join(question.truth)))


def answer_all(
    describe: Callable[[Path, str], str],
    examples: Sequence[tuple[Path, Question]],
    progress: Callable[[float], None] | None = None,
) -> list[Answered]:
    """Asks every question and times the answers.

    Args:
        describe: from a picture's path and a question to an answer.
        examples: of `read_set`.
        progress: called with the share done, 0 to 1.
    """
    results = []
    for number, (path, question) in enumerate(examples, start=1):
        start = time.perf_counter()
        said = describe(path, question.text)
        results.append(Answered(path.name, question, said, time.perf_counter() - start))
        if progress is not None:
            progress(number / len(examples))
    return results


def by_programs(engine: KimiMM, picture: Path, question: str) -> str:
    """Answers a question by programs that the model writes; "" where it comes to no answer."""
    turns = []
    try:
        turns.extend(engine.describe_by_programs(picture, question, max_tokens=96))
    except UserError as error:
        log.info("%s: %s", picture, error)
        return ""
    return turns[-1].text


def score(name: str, results: Sequence[Answered], judge: Judge, worst: int = 10) -> dict[str, Any]:
    """Sums a set up.

    Args:
        name: of the set.
        results: of `answer_all`, at least one.
        judge: decides.
        worst: how many wrong answers are shown.

    Returns:
        Plain values: `pictures`; `metric` "accuracy" or "character error rate"; its `value` and 95 % bootstrap
        interval `low`, `high` (fractions); `seconds_per_picture` (median); `worst` (picture, question, truth, said).
    """
    if name == "reading":
        edits = [_characters(r) for r in results]
        errors = np.asarray([e.errors for e in edits], np.float64)
        sizes = np.asarray([e.reference for e in edits], np.float64)
        metric = "character error rate"
    else:
        errors = np.asarray([judge.right(r.question, r.said) for r in results], np.float64)
        sizes, metric = np.ones(len(results)), "accuracy"
    picks = np.random.default_rng(0).integers(0, len(results), (DRAWS, len(results)))
    rates = errors[picks].sum(1) / np.maximum(sizes[picks].sum(1), 1.0)
    low, high = np.quantile(rates, (0.025, 0.975))
    bad = errors > 0 if name == "reading" else errors == 0
    order = sorted(np.flatnonzero(bad).tolist(), key=lambda i: (-errors[i], results[i].picture))
    return {
        "set": name,
        "pictures": len(results),
        "metric": metric,
        "value": float(errors.sum() / sizes.sum()),
        "low": float(low),
        "high": float(high),
        "seconds_per_picture": float(np.median([r.elapsed for r in results])),
        "worst": [
            {
                "picture": results[i].picture,
                "question": results[i].question.text,
                "truth": list(results[i].question.truth),
                "said": results[i].said,
            }
            for i in order[:worst]
        ],
    }


def first_word_latency(stream: Callable[[np.ndarray], Iterable[str]], runs: int = 20) -> dict[str, float]:
    """Measures the seconds from a picture of 512 x 512 pixels to the first word of an answer.

    Args:
        stream: from a picture [512, 512, 3] uint8 to the pieces of an answer.
        runs: timed ones; one more goes before them.

    Returns:
        p50, p90 and p99, and the number of `runs`.
    """
    rng, seconds = np.random.default_rng(0), []
    for _ in range(runs + 1):
        picture = rng.integers(0, 256, (LATENCY_SIZE, LATENCY_SIZE, 3), np.uint8)
        start = time.perf_counter()
        next(iter(stream(picture)), "")
        seconds.append(time.perf_counter() - start)
    p50, p90, p99 = np.quantile(seconds[1:], (0.5, 0.9, 0.99))
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "runs": float(runs)}


def read_sets(data: Path, chosen: str) -> dict[str, list[tuple[Path, Question]]]:
    """Reads one prepared set, or "all"; UserError for an unknown name, ManifestError where it is not prepared."""
    if chosen != "all" and chosen not in SETS:
        raise UserError(f"test set '{chosen}' is unknown; known: {', '.join(SETS)}, all.")
    return {name: read_set(data / "scenes" / name) for name in (SETS if chosen == "all" else (chosen,))}


def collect(
    label: str, model: str, device: str, sets: Iterable[dict[str, Any]], latency: dict[str, float] | None
) -> dict[str, Any]:
    """Returns the machine-readable result of an evaluation.

    Args:
        label: what tables call the model.
        model: name or folder that was loaded.
        device: where it ran.
        sets: of `score`.
        latency: of `first_word_latency`; None where it was not measured.
    """
    return {
        **conditions(KIND, VERSION, label, model, device),
        "first_word_seconds": latency,
        "sets": list(sets),
    }


def _first(text: str, words: Iterable[str]) -> str:
    found = re.search(rf"\b({'|'.join(words)})\b", text.lower())
    return found.group(1) if found else ""


def _number(text: str) -> str:
    """Returns the first number of a text as a word; single digits count."""
    found = re.search(rf"\b({'|'.join(NUMBERS)}|[0-9])\b", text.lower())
    word = found.group(1) if found else ""
    return NUMBERS[int(word)] if word.isdigit() else word


def _characters(result: Answered) -> Edits:
    """Edits between what is written and what was read, without quotes and a full stop at the end."""
    quoted = re.search(r'"(.+)"', result.said)
    said = quoted.group(1) if quoted else result.said.strip().rstrip(".")
    return count_edits(list(result.question.truth[0].casefold()), list(" ".join(said.split()).casefold()))
