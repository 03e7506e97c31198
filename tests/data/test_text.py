from pathlib import Path

import pytest

from kimi_mm.data.templates import PHRASES, generate
from kimi_mm.data.text import (
    Overlap,
    Sentence,
    clean,
    is_held_out,
    read_sentences,
    sentence_id,
    write_texts,
)
from kimi_mm.errors import UserError


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("force out  the air", "Force out the air."),
        ("“Are you ready?”", "Are you ready?"),
        ("He was born in 1998, they say;", "He was born in nineteen ninety eight, they say."),
        ("she said—quietly—that it’s over", "She said, quietly, that it's over."),
        ("the brothers’ house is old", "The brothers house is old."),
    ],
)
def test_clean_keeps_what_is_said(written: str, spoken: str) -> None:
    assert clean(written) == spoken


@pytest.mark.parametrize(
    "text",
    [
        "two words",
        "naïve words are foreign here",
        "see e.g. the manual",
        "the IBM machine is old",
        "a + b equals c",
        "word " * 30,
        "He met Mr.",
        "x = y * z for all",
        "visit site one.com now",
        "",
    ],
)
def test_clean_refuses_what_cannot_be_read_aloud(text: str) -> None:
    assert clean(text) is None


def test_overlap_finds_equal_sentences_and_five_shared_words() -> None:
    overlap = Overlap(["Thank you.", "Press 1 to hear the next message now."])
    assert overlap.touches("thank you!")
    assert overlap.touches("Please press one to hear the news.")
    assert not overlap.touches("Press one to hear a song.")
    assert not overlap.touches("Thank you very much.")


def test_ids_ignore_case_and_punctuation_and_hold_out_a_fiftieth() -> None:
    assert sentence_id("Hello, World!") == sentence_id("hello world")
    share = sum(is_held_out(sentence_id(f"sentence number {i}")) for i in range(5000)) / 5000
    assert 0.015 < share < 0.025


def test_texts_round_trip_and_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    texts = ["One, two.", "A definition: of a thing."]
    rows = [Sentence(sentence_id(t), t, "web", i == 0, i == 0) for i, t in enumerate(texts)]
    write_texts(tmp_path / "a.jsonl.gz", rows)
    write_texts(tmp_path / "b.jsonl.gz", rows)
    assert read_sentences(tmp_path / "a.jsonl.gz") == rows
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_damaged_texts_name_file_and_line(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a b", "source": "web"}\n{"text": 3}\n'))
    with pytest.raises(UserError, match=r"t\.jsonl\.gz:2: not a sentence"):
        read_sentences(path)
    path.write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read"):
        read_sentences(path)


@pytest.mark.parametrize("kind", ["telephony", "everyday"])
def test_templates_fill_every_pattern(kind: str) -> None:
    patterns = [line for line in (PHRASES / f"{kind}.txt").read_text().splitlines() if line and line[0] != "#"]
    sentences = generate(kind, 3 * len(patterns), seed=1)
    assert len(sentences) == len(set(sentences)) > 2 * len(patterns)
    assert sentences == generate(kind, 3 * len(patterns), seed=1)
    assert sentences != generate(kind, 3 * len(patterns), seed=2)
    for text in sentences:
        assert not set("{}[]|0123456789#*") & set(text), text
        assert text[0].isupper(), text
        assert text[-1] in ".?", text
