"""Training text: cleaned sentences of the permissive sources and of templates, without anything of the human test.

    sources.py, templates.py ─► clean ─► no duplicates ─► no overlap with the Asterisk prompts ─► held-out flag

A sentence is what is spoken: numbers in words, case and punctuation kept. Its id is the SHA-1 of its normalised form;
ids that are 0 modulo 50 are held out and are never trained on, in any voice.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kimi_mm.data import sources, templates
from kimi_mm.data.asterisk import clean_prompts, read_transcripts
from kimi_mm.data.numbers import spell_digits
from kimi_mm.data.salad import word_salads
from kimi_mm.errors import UserError
from kimi_mm.evaluation.normalize import normalize_english

HELD_OUT_MODULUS = 50
OVERLAP_WORDS = 5
TEMPLATES = {"telephony": 14_000, "everyday": 9_000}
WORDS, SALADS = "words", 40_000  # sentences without sense; text training leaves them out

_STRAIGHT = str.maketrans(
    {"“": "", "”": "", '"': "", "‘": "", "’": "'", "`": "'", "—": ", ", "–": "-", "\u00a0": " ", "…": "..."}
)
_ALLOWED = re.compile(r"[A-Za-z ,.?!';:\-]+")
_ABBREVIATION = re.compile(r"\b(Mr|Mrs|Dr|St|vs|etc|usu|esp|poss|orig|prob|cf|var|pl|abbrev|syn)\.$")
_SPLIT = re.compile(r"(?<=[.?!])\s+(?=[A-Z])")


@dataclass(frozen=True)
class Sentence:
    """One sentence. `speech` is False for dictionary definitions, which only text training reads."""

    id: str
    text: str
    source: str
    held_out: bool
    speech: bool = True


@dataclass
class TextReport:
    """What `build_texts` kept and dropped, by source."""

    kept: Counter[str] = field(default_factory=Counter)
    held_out: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    overlaps: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict:
        return {
            "kept": dict(self.kept),
            "held_out": dict(self.held_out),
            "duplicates": self.duplicates,
            "overlaps": dict(self.overlaps),
        }


def sentence_id(text: str) -> str:
    """Returns the first 12 hexadecimal digits of the SHA-1 of the normalised sentence."""
    return hashlib.sha1(normalize_english(text).encode()).hexdigest()[:12]


def is_held_out(identity: str) -> bool:
    """Whether the sentence of this id belongs to validation and test."""
    return int(identity, 16) % HELD_OUT_MODULUS == 0


def clean(text: str, min_words: int = 3, max_words: int = 25) -> str | None:
    """Returns a sentence ready to be spoken, or None when it is not plain English of a usable length.

    Quotation marks are dropped, numbers become words, the first letter becomes a capital and the end gets a full stop
    when it has no mark. Refused: other characters, marks inside (abbreviations), words in capitals, fewer than 72 %
    letters.

    Args:
        text: a sentence or phrase.
        min_words: fewest words.
        max_words: most words.
    """
    text = " ".join(text.translate(_STRAIGHT).split())
    if _ABBREVIATION.search(text) or re.search(r"\d[^\w\s,.:;?!]|[^\W\d]\d|\d[^\W\dsnrt]", text):
        return None
    text = re.sub(r"(?<![A-Za-z])'|'(?![A-Za-z])", "", spell_digits(text))
    text = re.sub(r"\s+([,.?!;:])", r"\1", " ".join(text.split())).strip(" ,;:-")
    text = re.sub(r",(?=[A-Za-z])", ", ", re.sub(r"[,;:]+(?=[,;:.?!])", "", text))
    if not text or not _ALLOWED.fullmatch(text) or re.search(r"[.?!].", text) or not text[0].isalpha():
        return None
    words = text.split()
    if not min_words <= len(words) <= max_words or sum(c.isalpha() for c in text) < 0.72 * len(text):
        return None
    if re.search(r"\b[A-Z]{2,}|--|\b[B-HJ-Zb-hj-z]\b(?<!')(?!')", re.sub(r"'\w+", "", text)):
        return None
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text + "."


def build_texts(packages: str | Path | None = None, seed: int = 0) -> tuple[list[Sentence], TextReport]:
    """Collects all sentences, in a fixed order.

    Args:
        packages: folder of downloaded packages, or None to download by name.
        seed: of the template sentences.

    Returns:
        The sentences, and the counts of what was kept and dropped. No sentence equals an Asterisk prompt or has five
        consecutive words of one, be it in the adaptation or the test half.
    """
    prompts = read_transcripts(packages)
    # As written, with all their notes and slips, and as corrected.
    overlap = Overlap(prompt.text for prompt in (*prompts, *clean_prompts(prompts)))
    report, seen, sentences = TextReport(), set(), []

    def candidates() -> Iterator[tuple[str, str, bool]]:
        yield from _candidates(packages, seed)
        # Made of the sentences collected until here, so last.
        known = [sentence.text for sentence in sentences if not sentence.held_out]
        yield from ((WORDS, text, True) for text in word_salads(known, SALADS, seed))

    for source, text, speech in candidates():
        identity = sentence_id(text)
        if identity in seen:
            report.duplicates += 1
            continue
        seen.add(identity)
        if overlap.touches(text):
            report.overlaps[source] += 1
            continue
        sentence = Sentence(identity, text, source, is_held_out(identity), speech)
        sentences.append(sentence)
        report.kept[source] += 1
        report.held_out[source] += sentence.held_out
    return sentences, report


class Overlap:
    """Finds sentences that equal one of the given texts or share `OVERLAP_WORDS` consecutive words with one."""

    def __init__(self, texts: Iterable[str]) -> None:
        normal = [normalize_english(text) for text in texts]
        self.whole = set(normal)
        self.grams = {gram for text in normal for gram in word_grams(text, OVERLAP_WORDS)}

    def touches(self, text: str) -> bool:
        normal = normalize_english(text)
        return normal in self.whole or any(gram in self.grams for gram in word_grams(normal, OVERLAP_WORDS))


def word_grams(normalized: str, n: int) -> Iterator[tuple[str, ...]]:
    """Yields the runs of n consecutive words of a normalised text."""
    words = normalized.split()
    return zip(*(words[i:] for i in range(n)), strict=False)


def write_texts(path: str | Path, sentences: list[Sentence]) -> None:
    """Writes `texts.jsonl.gz`: one object a line with text and source; held_out and speech only where they differ.

    The bytes depend on the sentences alone (no time stamp).
    """
    lines = []
    for s in sentences:
        row: dict = {"text": s.text, "source": s.source}
        if s.held_out:
            row["held_out"] = True
        if not s.speech:
            row["speech"] = False
        lines.append(json.dumps(row, separators=(",", ":")))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), 9, mtime=0))
    aside.rename(path)


def read_sentences(path: str | Path) -> list[Sentence]:
    """Reads what `write_texts` wrote.

    Raises:
        UserError: names the file and the line that is not right.
    """
    try:
        data = gzip.decompress(Path(path).read_bytes()).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as texts.jsonl.gz ({error}); prepare the text again.") from None
    sentences = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            row = json.loads(line)
            identity = sentence_id(row["text"])
            sentences.append(
                Sentence(identity, row["text"], row["source"], row.get("held_out", False), row.get("speech", True))
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: not a sentence ({error!r}); prepare the text again.") from None
    return sentences


def _candidates(packages: str | Path | None, seed: int) -> Iterator[tuple[str, str, bool]]:
    """Yields (source, clean text, speech) of all sources in turn."""
    for kind, count in TEMPLATES.items():
        for text in templates.generate(kind, count, seed):
            yield kind, text, True
    glosses = []
    for lemma, definition, examples in sources.wordnet_entries(packages):
        for example in examples:
            if text := clean(example):
                yield "wordnet", text, True
        # Names (of species, mostly) would fill the text with words that nobody says.
        if lemma.islower() and (text := clean(re.sub(r"\s*\([^)]*\)\s*", " ", definition), max_words=30)):
            entry = f"{lemma[0].upper()}{lemma[1:]}: {text[0].lower()}{text[1:]}"
            if _ALLOWED.fullmatch(entry):
                glosses.append(entry)
    yield from (("web", text, True) for text in _without_rare_names(_bible_sentences(packages)))
    for source, paragraphs in (
        ("jargon", sources.jargon_paragraphs(packages)),
        ("devil", sources.devil_paragraphs(packages)),
    ):
        for paragraph in paragraphs:
            for piece in _SPLIT.split(paragraph.translate(_STRAIGHT)):
                if piece[:1].isupper() and piece[-1:] in ".?!" and not piece.startswith(("See ", "Compare ", "Also ")):
                    text = clean(piece, min_words=4)
                    if text:
                        yield source, text, True
    yield from (("gloss", text, False) for text in glosses)


def _bible_sentences(packages: str | Path | None) -> list[str]:
    joined = " ".join(sources.bible_verses(packages)).translate(_STRAIGHT)
    found = (clean(piece, min_words=4) for piece in _SPLIT.split(" ".join(joined.split())))
    return [text for text in found if text]


def _without_rare_names(texts: list[str], least: int = 12) -> list[str]:
    """Drops sentences with a capitalised word, not at the start, that the whole text has fewer than `least` times."""
    names = [re.findall(r"(?<=[\w,;:] )[A-Z][a-z]+", text) for text in texts]
    counts = Counter(name for found in names for name in found)
    return [text for text, found in zip(texts, names, strict=True) if all(counts[name] >= least for name in found)]
