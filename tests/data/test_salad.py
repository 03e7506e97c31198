"""Sentences without sense: reproducible, made of known words only."""

from kimi_mm.data.salad import word_salads

SENTENCES = ["The quick brown fox jumps over the lazy dog.", "A lazy dog sleeps over there.", "The fox is quick."]


def test_same_seed_same_sentences():
    first = list(word_salads(SENTENCES, 40, seed=3))
    assert first == list(word_salads(SENTENCES, 40, seed=3))
    assert first != list(word_salads(SENTENCES, 40, seed=4))


def test_words_are_known_and_written_like_sentences():
    known = {word.strip(".").lower() for text in SENTENCES for word in text.split()}
    for text in word_salads(SENTENCES, 60):
        words = text.rstrip(".").lower().split()
        assert 2 <= len(words) <= 9
        assert set(words) <= known
        assert text[0].isupper()
        assert text.endswith(".")
