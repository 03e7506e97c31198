"""Text that is to be spoken: what can be said, in sentences short enough for one breath.

text ─► marks and accents made plain, numbers in words ─► sentences ─► pieces of at most `LONGEST` characters
"""

from __future__ import annotations

import re
import unicodedata

from kimi_mm.data.numbers import spell_digits
from kimi_mm.errors import UserError

LONGEST = 160  # characters, about ten seconds of speech

_MARKS = str.maketrans({"’": "'", "‘": "'", "–": ", ", "—": ", ", "…": ".", "\u00a0": " ", "`": "'"})
_SIGNS = {"&": " and ", "%": " percent ", "@": " at ", "+": " plus ", "=": " equals ", "°": " degrees "}
_UNSPEAKABLE = re.compile(r"[^A-Za-z ,.?!';:\-]+")
_ENDS = re.compile(r"(?<=[.?!])\s+|\s*\n+\s*")
_BREATHS = re.compile(r"(?<=[,;:])\s+")


def polish(text: str) -> str:
    """Returns a sentence as it should be written: capital first letter, closing punctuation."""
    text = " ".join(text.split())
    if text and text[0].islower():
        text = text[0].upper() + text[1:]
    return text if not text or text[-1:] in ".?!" else text.rstrip(",;:-") + "."


def speakable(text: str) -> list[str]:
    """Returns the sentences of a text as they are spoken.

    Args:
        text: of any length; numbers and common signs are put into words, accents and other signs are dropped.

    Returns:
        One or more pieces of at most `LONGEST` characters, cut at sentence ends, else at commas, else between words.

    Raises:
        UserError: nothing in it can be spoken.
    """
    plain = text.translate(_MARKS)
    for sign, words in _SIGNS.items():
        plain = plain.replace(sign, words)
    plain = unicodedata.normalize("NFKD", spell_lines(plain))
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    pieces: list[str] = []
    for sentence in _ENDS.split(plain):
        spoken = " ".join(_UNSPEAKABLE.sub(" ", sentence).split()).strip(" ,;:-'")
        if any(c.isalpha() for c in spoken):
            pieces += [polish(part) for part in _pieces(spoken)]
    if not pieces:
        shown = text.strip()[:40]
        raise UserError(f"'{shown}' has nothing that can be spoken; give a text with letters or digits.")
    return pieces


def spell_lines(text: str) -> str:
    """Puts the numbers of a text into words, and keeps its lines apart."""
    return "\n".join(spell_digits(line) for line in text.splitlines())


def _pieces(sentence: str) -> list[str]:
    """Cuts a sentence into pieces of at most `LONGEST` characters."""
    units = [sentence] if len(sentence) <= LONGEST else _BREATHS.split(sentence)
    words: list[str] = []
    for unit in units:
        words += [unit] if len(unit) <= LONGEST else unit.split()
    pieces = [""]
    for word in (long[at : at + LONGEST] for long in words for at in range(0, len(long), LONGEST)):
        joined = f"{pieces[-1]} {word}".strip()
        if len(joined) <= LONGEST:
            pieces[-1] = joined
        else:
            pieces.append(word)
    # Pieces without a letter, such as a lone mark, would be spoken as noise.
    return [piece for piece in pieces if any(c.isalpha() for c in piece)]
