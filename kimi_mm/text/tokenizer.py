"""Text tokenizer: byte-level BPE whose ids are the first part of the joint vocabulary.

    text ──NFC──► pre-tokens (" word", digits one by one) ──BPE──► ids 0 .. num_text_tokens - 1

Special ids (see `VocabConfig.SPECIALS`) are never produced from text: a user who types a marker gets its letters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from kimi_mm.errors import CheckpointError

_WORD = re.compile(r"(\s*[A-Za-z])([A-Za-z]*)([^\w\s']*)")  # its first letter, the others, and the signs behind it


class TextTokenizer:
    """Encodes and decodes text with a trained BPE; safe to share between threads.

    Args:
        tokenizer: of the tokenizers library.
        lead: a text is given the space that words inside a sentence have; published vocabularies do not want it.
    """

    def __init__(self, tokenizer: Tokenizer, lead: bool = True) -> None:
        self._tokenizer, self.leads = tokenizer, lead

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> TextTokenizer:
        """Learns merges from texts.

        Args:
            texts: any number of sentences.
            vocab_size: number of ids, the 256 bytes included; the result has exactly that many or fewer when the
                texts hold no more pairs worth merging.
        """
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            min_frequency=2,
            show_progress=False,
        )
        tokenizer.train_from_iterator((_lead(text) for text in texts), trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path, lead: bool = True) -> TextTokenizer:
        """Reads `tokenizer.json`; CheckpointError names the file when it is missing or damaged."""
        try:
            return cls(Tokenizer.from_str(Path(path).read_text(encoding="utf-8")), lead)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
        except Exception as error:  # tokenizers raises bare Exception on malformed files
            raise CheckpointError(f"{path}: not a tokenizer file ({error}).") from None

    @classmethod
    def from_json(cls, text: str, lead: bool = True) -> TextTokenizer:
        """Makes a tokenizer from what `to_json` returned."""
        return cls(Tokenizer.from_str(text), lead)

    def to_json(self) -> str:
        """Returns the text that `load` reads."""
        return json.dumps(json.loads(self._tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Returns the BPE ids of a text; markers of special tokens inside it stay plain characters."""
        return self._ids(_lead(text) if self.leads else text)

    def encode_letters(self, text: str) -> list[int]:
        """Returns ids of a text letter by letter, each with the space before it: as what is copied is best learnt.

        They decode to the same text as those of `encode`.
        """
        pieces = re.findall(r"\s*\S|\s+", _lead(text) if self.leads else text)
        return [id for piece in pieces for id in self._ids(piece)]

    def encode_words(self, text: str, by_letter: Callable[[int], bool]) -> list[int]:
        """Returns ids of a text in which some words stand letter by letter: who learns from both to read out says words
        of pieces that it rarely met better.

        They decode to the same text as those of `encode`.

        Args:
            by_letter: told how many ids a word has (without the signs behind it), says whether it is given by letter.
        """
        ids: list[int] = []
        for word in re.findall(r"\s*\S+|\s+", _lead(text) if self.leads else text):
            pieces: tuple[str, ...] = (word,)
            if match := _WORD.fullmatch(word):
                first, letters, signs = match.groups()
                if by_letter(len(self._ids(first + letters))):
                    pieces = (first, *letters, signs)
            ids += [id for piece in pieces for id in self._ids(piece)]
        return ids

    def _ids(self, piece: str) -> list[int]:
        return self._tokenizer.encode(piece, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of many texts, in parallel."""
        led = [_lead(text) if self.leads else text for text in texts]
        return [item.ids for item in self._tokenizer.encode_batch(led, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; ids outside the BPE part are skipped."""
        limit = len(self)
        text = self._tokenizer.decode([i for i in ids if 0 <= i < limit], skip_special_tokens=False)
        return text.strip() if self.leads else text


class TextPieces:
    """Turns ids that come one by one into pieces of text, whole characters each."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.text = ""

    def push(self, token: int) -> str:
        """Takes the next id, and returns the text that became certain: maybe none."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        # A character of several bytes is whole only when its last id has come.
        if len(text) <= len(self.text) or text.endswith("\ufffd"):
            return ""
        piece, self.text = text[len(self.text) :], text
        return piece


def _lead(text: str) -> str:
    """Gives a text the space that words inside a sentence have, so that a word has one spelling in ids."""
    return f" {text}" if text else text
