"""Sentences from patterns: telephony, numbers, dates, money, spelled letters, everyday requests.

    phrases/*.txt ──► pattern ──[a|b|] and {slot} filled by a seeded generator──► sentence, numbers in words

A `{Slot}` with a capital is filled and capitalised. Slots are lists of `phrases/slots.txt` or one of `GENERATORS`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

from kimi_mm.data.numbers import cardinal, digits, year

PHRASES = Path(__file__).with_name("phrases")
LETTER_WORDS = (
    "alpha apple bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec "
    "romeo sierra tango uniform victor whiskey xray yankee zulu"
)

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")


def generate(kind: str, count: int, seed: int = 0) -> list[str]:
    """Returns distinct sentences made from the patterns of one file.

    Args:
        kind: "telephony" or "everyday".
        count: how many; fewer are returned when the patterns do not yield that many.
        seed: of the draws; the same seed gives the same list.
    """
    patterns = _lines(PHRASES / f"{kind}.txt")
    slots = read_slots()
    rng = random.Random(f"{kind}-{seed}")
    made: dict[str, None] = {}
    for attempt in range(4 * count):
        if len(made) >= count:
            break
        # Every pattern is used once before any is used again.
        if attempt % len(patterns) == 0:
            rng.shuffle(patterns)
        made[fill(patterns[attempt % len(patterns)], slots, rng)] = None
    return list(made)


def fill(pattern: str, slots: dict[str, list[str]], rng: random.Random) -> str:
    """Returns one sentence of a pattern.

    Raises:
        KeyError: when the pattern names a slot that does not exist.
    """
    text = _CHOICE.sub(lambda m: rng.choice(m[1].split("|")), pattern)
    while match := _SLOT.search(text):
        name = match[1]
        if name.lower() in GENERATORS:
            words = GENERATORS[name.lower()](rng)
        else:
            words = rng.choice(slots[name.lower()])
        if name[0].isupper():
            words = words[0].upper() + words[1:] if words[0] != "{" else "{" + words[1].upper() + words[2:]
        text = text[: match.start()] + words + text[match.end() :]
    text = re.sub(r"\s+([,.?])", r"\1", " ".join(text.split()))
    text = re.sub(r"([.?] )([a-z])", lambda m: m[1] + m[2].upper(), text.replace("A.M.", "AM").replace("P.M.", "PM"))
    return text[0].upper() + text[1:]


def _number(rng: random.Random) -> str:
    return cardinal(int(10 ** rng.uniform(0, rng.choice((2, 3, 4, 6)))))


def _digit_string(rng: random.Random) -> str:
    return digits("".join(rng.choice("0123456789") for _ in range(rng.choice((1, 2, 3, 3, 4, 4, 4, 5, 6)))))


def _slow_digits(rng: random.Random) -> str:
    return ", ".join(digits(rng.choice("0123456789")) for _ in range(rng.randint(2, 7)))


def _phone(rng: random.Random) -> str:
    groups = ["".join(rng.choice("0123456789") for _ in range(n)) for n in rng.choice(((3, 4), (3, 3, 4), (4,)))]
    words = ", ".join(digits(g) for g in groups)
    return words.replace("zero", "oh") if rng.random() < 0.2 else words


def _money(rng: random.Random) -> str:
    dollars = int(10 ** rng.uniform(0, 4))
    text = f"{cardinal(dollars)} dollar{'' if dollars == 1 else 's'}"
    return f"{text} and {cardinal(rng.randint(2, 99))} cents" if rng.random() < 0.5 else text


def _year(rng: random.Random) -> str:
    return year(rng.randint(1500, 2039))


def _letter(rng: random.Random) -> str:
    return rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def _spelled(rng: random.Random) -> str:
    return " ".join(_letter(rng) for _ in range(rng.randint(2, 6)))


def _letter_word(rng: random.Random) -> str:
    word = rng.choice(LETTER_WORDS.split())
    return f"{word[0].upper()} as in {word}"


GENERATORS: dict[str, Callable[[random.Random], str]] = {
    "number": _number,
    "digitstring": _digit_string,
    "digits_slow": _slow_digits,
    "phone": _phone,
    "money": _money,
    "year": _year,
    "letter": _letter,
    "letterword": _letter_word,
    "spelled": _spelled,
}


def read_slots() -> dict[str, list[str]]:
    """Returns the lists of `phrases/slots.txt` by name."""
    slots = {}
    for line in _lines(PHRASES / "slots.txt"):
        name, _, words = line.partition(":")
        slots[name.strip()] = [word.strip() for word in words.split("|")]
    return slots


def _lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
