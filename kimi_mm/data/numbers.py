"""English number words: how digits in a text are spoken.

`spell_number` reads one token, `spell_digits` every number of a text. Both are used for training text (numbers are
written as they are said) and by the word error rate's normaliser, so the two agree.
"""

from __future__ import annotations

import re

UNITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
ONES = UNITS + TEENS
TENS = ("zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
SCALES = ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred"))
IRREGULAR_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}

_MONEY = re.compile(r"\$\s?(\d[\d,]*)(?:\.(\d\d))?(?!\d)")
_CLOCK = re.compile(r"\b(\d{1,2}):(\d\d)\b")
_ORDINAL = re.compile(r"\b(\d[\d,]*)(st|nd|rd|th)\b")
_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)|\d+")
_DECIMAL = re.compile(r"(?<![\d.])(\d[\d,]*)\.(\d+)(?!\.?\d)")


def cardinal(value: int) -> str:
    """Returns a whole number in words: 342 is "three hundred forty two".

    Args:
        value: from 0 to below 10**12.
    """
    if value < 20:
        return ONES[value]
    if value < 100:
        return TENS[value // 10] + (f" {ONES[value % 10]}" if value % 10 else "")
    for size, name in SCALES:
        if value >= size:
            rest = value % size
            return f"{cardinal(value // size)} {name}" + (f" {cardinal(rest)}" if rest else "")
    raise AssertionError(value)


def ordinal(value: int) -> str:
    """Returns an ordinal in words: 23 is "twenty third"."""
    head, _, last = cardinal(value).rpartition(" ")
    if last in IRREGULAR_ORDINALS:
        last = IRREGULAR_ORDINALS[last]
    else:
        last = last[:-1] + "ieth" if last.endswith("y") else last + "th"
    return f"{head} {last}".strip()


def digits(token: str) -> str:
    """Returns digits one by one: "407" is "four zero seven"."""
    return " ".join(ONES[int(c)] for c in token)


def year(value: int) -> str:
    """Returns a year from 1000 to 2999 as it is said: 1998 is "nineteen ninety eight"."""
    high, low = divmod(value, 100)
    if low == 0:
        return cardinal(value) if value % 1000 == 0 else f"{cardinal(high)} hundred"
    if value % 1000 < 10:
        return cardinal(value)
    return f"{cardinal(high)} {'oh ' if low < 10 else ''}{cardinal(low)}"


def spell_number(token: str) -> str:
    """Reads one number without sign.

    Numbers with commas and those of up to three digits are cardinals; a leading zero or five and more digits are read
    digit by digit; four digits are a year (1000 to 2099), hundreds (8500: "eighty five hundred") or digit by digit.
    """
    value = int(token.replace(",", ""))
    if "," in token:
        return cardinal(value) if value < 10**12 else digits(token.replace(",", ""))
    if (token[0] == "0" and len(token) > 1) or len(token) > 4:
        return digits(token)
    if len(token) < 4:
        return cardinal(value)
    if 1000 <= value < 2100:
        return year(value)
    if value % 1000 == 0:
        return cardinal(value)
    return f"{cardinal(value // 100)} hundred" if value % 100 == 0 else digits(token)


def spell_digits(text: str) -> str:
    """Replaces every number of a text by its words, dollars, clock times, ordinals and decimals included."""
    text = _MONEY.sub(_money, text)
    text = _CLOCK.sub(_clock, text)
    text = _ORDINAL.sub(_ordinal, text)
    text = _DECIMAL.sub(lambda m: f" {spell_number(m[1])} point {digits(m[2])} ", text)
    text = _NUMBER.sub(lambda m: f" {spell_number(m[0])} ", text)
    return re.sub(r"\s+([,.?!;:'])", r"\1", " ".join(text.split()))


def _money(match: re.Match[str]) -> str:
    whole = int(match[1].replace(",", ""))
    if whole >= 10**12:
        return match[0][1:]
    parts = [f"{cardinal(whole)} dollar{'' if whole == 1 else 's'}"] if whole or not match[2] else []
    if match[2] and int(match[2]):
        parts.append(f"{cardinal(int(match[2]))} cent{'' if int(match[2]) == 1 else 's'}")
    return f" {' and '.join(parts) or 'zero dollars'} "


def _clock(match: re.Match[str]) -> str:
    hour, minute = int(match[1]), int(match[2])
    if minute == 0:
        return f" {cardinal(hour)} o'clock "
    return f" {cardinal(hour)} {'oh ' if minute < 10 else ''}{cardinal(minute)} "


def _ordinal(match: re.Match[str]) -> str:
    value = int(match[1].replace(",", ""))
    return f" {ordinal(value)} " if value < 10**12 else match[0]
