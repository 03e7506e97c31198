import random

import pytest

from kimi_mm.errors import UserError
from kimi_mm.evaluation.wer import Edits, align, character_error_rate, count_edits, show_alignment, word_error_rate


def test_counts_of_a_known_pair() -> None:
    edits = count_edits(list("abcdaf"), list("abxdfy"))
    assert edits == Edits(hits=4, substitutions=1, deletions=1, insertions=1)
    assert edits.rate == pytest.approx(3 / 6)


def test_agrees_with_jiwer() -> None:
    jiwer = pytest.importorskip("jiwer")
    rng = random.Random(0)
    words = ["alpha", "bravo", "charlie", "delta", "echo"]
    references = [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(40)]
    hypotheses = [" ".join(rng.choices(words, k=rng.randint(0, 12))) for _ in range(40)]
    assert word_error_rate(references, hypotheses).rate == pytest.approx(jiwer.wer(references, hypotheses))
    assert character_error_rate(references, hypotheses).rate == pytest.approx(jiwer.cer(references, hypotheses))


def test_alignment_restores_both_sides() -> None:
    rng = random.Random(1)
    for _ in range(50):
        reference = rng.choices("abcd", k=rng.randint(0, 9))
        hypothesis = rng.choices("abcd", k=rng.randint(0, 9))
        pairs = align(reference, hypothesis)
        assert [r for r, _ in pairs if r is not None] == reference
        assert [h for _, h in pairs if h is not None] == hypothesis
        assert (None, None) not in pairs


def test_normalised_spellings_cost_nothing() -> None:
    assert word_error_rate(["Press #, it's OK."], ["press pound it is okay"]).edits.errors == 0


def test_interval_holds_the_rate_and_is_repeatable() -> None:
    references = ["a b c d"] * 30
    hypotheses = ["a b c d", "a x c d", "a b c"] * 10
    first, second = word_error_rate(references, hypotheses), word_error_rate(references, hypotheses)
    assert first.low < first.rate < first.high
    assert (first.low, first.high) == (second.low, second.high)
    perfect = word_error_rate(references, references)
    assert (perfect.low, perfect.rate, perfect.high) == (0.0, 0.0, 0.0)


def test_empty_references() -> None:
    assert word_error_rate(["", "one"], ["two", "one"]).rate == 1.0
    with pytest.raises(UserError, match="no words"):
        word_error_rate(["", "..."], ["x", ""])
    with pytest.raises(UserError, match="2 references but 1"):
        word_error_rate(["a", "b"], ["a"])


def test_show_alignment_marks_errors() -> None:
    lines = show_alignment("the cat sat on it", "a cat sat it now").splitlines()
    assert lines[2].split() == ["S", "D", "I"]
    assert len(lines) == 3
