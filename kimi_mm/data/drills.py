"""Written drills: sums beyond those that dialogs ask, and the spelling of every word there is.

Dialogs ask for some six hundred sums, which a model learns by heart and then knows no other. Sums of larger numbers
are too many for that; what is held out of dialogs is held out of drills.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from kimi_mm.data.dialogs import SIGNS, Turn, is_held_out, spelling_turn, sum_turn, word_uses
from kimi_mm.data.text import Sentence

SPELLING_SHARE = 0.35
# Operands, each as often; products have operands of up to an eighth of it, and 12 at least.
LARGEST = (20, 40, 100, 200)
LEAST_USES = 2

_WORD = re.compile(r"[a-z]{3,10}$")


def make_drills(sentences: Sequence[Sentence], count: int, *, seed: int = 0) -> list[tuple[Turn, ...]]:
    """Draws single questions for training.

    Args:
        sentences: prepared text, whose words are spelled.
        count: how many.
        seed: of every draw.
    """
    if not count:
        return []
    rng = random.Random(f"drills-{seed}")
    uses = word_uses(sentence.text for sentence in sentences if not sentence.held_out)
    words = sorted(word for word, n in uses.items() if n >= LEAST_USES and _WORD.match(word))
    made: list[tuple[Turn, ...]] = []
    while len(made) < count:
        turn = spelling_turn(rng.choice(words), rng) if words and rng.random() < SPELLING_SHARE else _sum(rng)
        if not is_held_out(turn.kind, turn.key):
            made.append((turn,))
    return made


def _sum(rng: random.Random) -> Turn:
    sign, most = rng.choice(SIGNS), rng.choice(LARGEST)
    if sign == "times":
        most = max(12, most // 8)
    return sum_turn(rng.randint(1, most), sign, rng.randint(1, most), rng)
