"""Sentences without sense, so that a recogniser has to listen.

Where every sentence is likely, a decoder learns to complete sentences rather than to hear them, and invents words when
a new voice is hard to understand. Half of these shuffle the words of a real sentence; half draw words from the whole
vocabulary, rare ones as often as common ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

_WORD = re.compile(r"[a-z]{2,14}(?:'[a-z]{1,2})?$")


def word_salads(sentences: Sequence[str], count: int, seed: int = 0) -> Iterator[str]:
    """Yields `count` texts of two to nine words.

    Args:
        sentences: where words and their frequencies come from.
        count: how many.
        seed: of every draw.
    """
    rng = np.random.default_rng((seed, 0x5A1AD))
    split = [[w.strip(".,;:!?\"'") for w in text.lower().split()] for text in sentences]
    counts = Counter(word for words in split for word in words if _WORD.match(word))
    vocabulary = sorted(word for word, n in counts.items() if n >= 2)
    rarity = np.array([counts[word] for word in vocabulary]) ** 0.3
    chance = (rarity / rarity.sum()).cumsum()
    chance /= chance[-1]
    for number in range(count):
        if number % 2:
            draws = rng.random(rng.integers(2, 8))
            words = [vocabulary[i] for i in chance.searchsorted(draws, side="right")]
        else:
            source = [word for word in split[rng.integers(len(split))] if _WORD.match(word)]
            words = list(rng.permutation(source)[:9])
        if len(words) >= 2:
            text = " ".join(words)
            yield text[0].upper() + text[1:] + "."
