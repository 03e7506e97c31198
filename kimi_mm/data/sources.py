"""Readers of the permissive and public-domain texts, as they lie in their packages.

| source    | package        | licence                    | reader            |
|-----------|----------------|----------------------------|-------------------|
| web       | sword-text-web | public domain              | `bible_verses`    |
| wordnet   | wordnet-base   | WordNet 3.0 (keep notice)  | `wordnet_entries` |
| jargon    | dict-jargon    | public domain              | `jargon_paragraphs` |
| devil     | dict-devil     | public domain              | `devil_paragraphs`  |
"""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from kimi_mm.data.packages import PackageError, debian_package

_HIDDEN = re.compile(r"<(note|title|reference)\b[^>]*?(?:/>|>.*?</\1>)", re.DOTALL)
_TAG = re.compile(r"<[^>]*>")


def bible_verses(packages: str | Path | None = None) -> Iterator[str]:
    """Yields the verses of the World English Bible in order, headings and notes left out.

    A SWORD "zText" module keeps, for each testament, verse records (`.bzv`: block, offset, length), block records
    (`.bzs`: offset, packed size, size) and zlib blocks (`.bzz`).
    """
    folder = _one(debian_package("sword-text-web", packages), "ot.bzv").parent
    for part in ("ot", "nt"):
        packed = (folder / f"{part}.bzz").read_bytes()
        blocks = list(struct.iter_unpack("<III", (folder / f"{part}.bzs").read_bytes()))
        number, block = -1, b""
        for index, offset, length in struct.iter_unpack("<IIH", (folder / f"{part}.bzv").read_bytes()):
            if not length:
                continue
            if index != number:
                start, size, _ = blocks[index]
                number, block = index, zlib.decompress(packed[start : start + size])
            verse = block[offset : offset + length].decode("utf-8", "replace")
            if 'type="introduction"' in verse or "<chapter" in verse:
                continue
            text = _TAG.sub("", re.sub(r"</?(?:l|lg|div)\b[^>]*>", " ", _HIDDEN.sub(" ", verse)))
            yield re.sub(r"\s+([,.;:?!])", r"\1", " ".join(text.split()))


def wordnet_entries(packages: str | Path | None = None) -> Iterator[tuple[str, str, list[str]]]:
    """Yields (first lemma, definition, usage examples) of every WordNet 3.0 synset."""
    root = debian_package("wordnet-base", packages)
    for part in ("noun", "verb", "adj", "adv"):
        for line in _one(root, f"data.{part}").read_text(encoding="latin-1").splitlines():
            if line.startswith("  ") or " | " not in line:
                continue
            head, _, gloss = line.partition(" | ")
            lemma = re.sub(r"\(\w+\)$", "", head.split()[4]).replace("_", " ")
            examples = re.findall(r'"([^"]+)"', gloss)
            yield lemma, gloss.split('"')[0].strip(" ;"), examples


def jargon_paragraphs(packages: str | Path | None = None) -> Iterator[str]:
    """Yields the running text of the Jargon File; headwords, pronunciations and cross-reference marks left out."""
    for paragraph in _dictionary("dict-jargon", "jargon", packages).split("\n\n"):
        lines = paragraph.split("\n")
        if not all(line.startswith("    ") for line in lines):
            continue
        text = " ".join(line.strip() for line in lines)
        text = re.sub(r"^\d+\. ", "", re.sub(r"\{\s*([^}]*?)\s*\}", r"\1", text))
        yield re.sub(r"\[[^\]]*\]\s*", "", text)


def devil_paragraphs(packages: str | Path | None = None) -> Iterator[str]:
    """Yields the prose of the Devil's Dictionary without headwords; verse (indented) is left out."""
    for paragraph in _dictionary("dict-devil", "devil", packages).split("\n\n"):
        if paragraph.startswith(" ") or not paragraph.strip():
            continue
        text = " ".join(paragraph.split())
        text = re.sub(r"^[A-Z][A-Z'\- ]+, (?:[a-z]\.?)+(?:[a-z.]*)\s", "", text)
        yield re.sub(r"\{([^}]*)\}", r"\1", re.sub(r"^\[[^\]]*\]\s*", "", text))


def _dictionary(package: str, name: str, packages: str | Path | None) -> str:
    path = _one(debian_package(package, packages), f"{name}.dict.dz")
    return gzip.decompress(path.read_bytes()).decode("utf-8", "replace")


def _one(root: Path, name: str) -> Path:
    found = sorted(root.rglob(name))
    if not found:
        raise PackageError(f"{root.name}: holds no file '{name}'; the package's layout has changed.")
    return found[0]
