import pytest

from kimi_mm.data.numbers import cardinal, ordinal, spell_digits, spell_number, year
from kimi_mm.evaluation.normalize import SAME, normalize_english


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "zero"),
        (15, "fifteen"),
        (40, "forty"),
        (342, "three hundred forty two"),
        (1_000_001, "one million one"),
        (70_000_000_000, "seventy billion"),
    ],
)
def test_cardinal(value: int, words: str) -> None:
    assert cardinal(value) == words


def test_ordinals_and_years() -> None:
    assert [ordinal(n) for n in (1, 12, 20, 23, 100)] == [
        "first",
        "twelfth",
        "twentieth",
        "twenty third",
        "one hundredth",
    ]
    assert [year(n) for n in (1066, 1900, 1905, 1998, 2000, 2007, 2024)] == [
        "ten sixty six",
        "nineteen hundred",
        "nineteen oh five",
        "nineteen ninety eight",
        "two thousand",
        "two thousand seven",
        "twenty twenty four",
    ]


def test_numbers_are_read_as_people_do() -> None:
    assert spell_number("007") == "zero zero seven"
    assert spell_number("4242") == "four two four two"
    assert spell_number("8500") == "eighty five hundred"
    assert spell_number("12,345") == "twelve thousand three hundred forty five"
    assert spell_digits("Pay $4.50 at 7:05, on the 3rd.") == (
        "Pay four dollars and fifty cents at seven oh five, on the third."
    )
    assert spell_digits("It is 28.8 degrees") == "It is twenty eight point eight degrees"


@pytest.mark.parametrize(
    ("written", "other"),
    [
        ("Press # or *, OK?", "press pound or star okay"),
        ("It's 7 P.M.", "it is seven pm"),
        ("check your Voice-Mail", "check your voicemail"),
        ("I can't re-enter it", "i cannot reenter it"),
        ("They won't; we're sure I'm right", "they will not we are sure i am right"),
        ("the party’s name", "the party's name"),
        ("U.S. e-mail [noise]", "us email"),
        ("3D", "three d"),
        ("Let's go", "let us go"),
        ("100 %", "one hundred percent"),
    ],
)
def test_spellings_of_the_same_speech_agree(written: str, other: str) -> None:
    assert normalize_english(written) == normalize_english(other)


def test_different_words_stay_different() -> None:
    assert normalize_english("one to mute") != normalize_english("one to unmute")
    assert normalize_english("seven o'clock") != normalize_english("seven")
    assert normalize_english("") == ""
    assert normalize_english(" ... ") == ""


def test_normalising_twice_changes_nothing() -> None:
    texts = [*SAME, *SAME.values(), "Don't press #4, it's 10:30 p.m. on the 21st!", "extension 1234's greeting"]
    for text in texts:
        once = normalize_english(text)
        assert normalize_english(once) == once
