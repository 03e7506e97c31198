"""Text tokenizer: exact round trips, no special ids from text, clear errors."""

import pytest

from kimi_mm.errors import CheckpointError
from kimi_mm.text.tokenizer import TextTokenizer

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Press 1 for sales, or 2 for support.", "naïve café ☎ 東京"]


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(TEXTS * 20, 384)


@pytest.mark.parametrize("text", [*TEXTS, "unseen wörds & symbols <|text_eos|>", "a", ""])
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < len(tokenizer) for i in ids)


@pytest.mark.parametrize("lead", [True, False])
@pytest.mark.parametrize("text", [*TEXTS, "two  spaces ", ""])
def test_letters_decode_to_the_same_text(tokenizer, text, lead):
    tokenizer = TextTokenizer.from_json(tokenizer.to_json(), lead)
    ids = tokenizer.encode_letters(text)
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(text))
    assert len(ids) >= len(text.replace(" ", ""))


@pytest.mark.parametrize(
    "text", [*TEXTS, 'I don\'t jump; "quickly" they do (or not), well-known 12th', "two  spaces ", ""]
)
def test_words_by_letter_decode_to_the_same_text(tokenizer, text):
    plain = tokenizer.encode(text)
    assert tokenizer.encode_words(text, lambda ids: False) == plain
    everything = tokenizer.encode_words(text, lambda ids: True)
    assert tokenizer.decode(everything) == tokenizer.decode(plain)


def test_words_by_letter_are_those_that_were_chosen(tokenizer):
    asked = []

    def several(ids: int) -> bool:
        asked.append(ids)
        return ids > 1

    ids = tokenizer.encode_words("The quack, don't over 2 fox.", several)
    assert asked == [1, len(tokenizer.encode("quack")), 1, 1]  # words with an apostrophe and numbers are never chosen
    rest = tokenizer.encode("don't over 2 fox.")
    shown = [tokenizer.decode([i]) for i in ids[: -len(rest)]]
    assert list(filter(None, shown)) == ["The", "q", "u", "a", "c", "k", ","]
    assert ids[-len(rest) :] == rest


def test_saved_tokenizer_is_equal(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    again = TextTokenizer.load(path)
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert len(again) == len(tokenizer) <= 384


def test_decode_skips_ids_of_other_kinds(tokenizer):
    ids = tokenizer.encode("hello")
    assert tokenizer.decode([10_000, *ids, -1]) == "hello"


def test_damaged_file_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        TextTokenizer.load(path)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer file"):
        TextTokenizer.load(path)
