"""The human test set: the English Asterisk prompts (Allison Smith, CC-BY-SA 3.0), 16 kHz from G.722.

    core-sounds-en.txt ─► clean prompts ─► components over shared 4-grams ─► adapt half │ test half
    *.g722 ─► decode ─► <key>.flac                                                + manifest.jsonl

The halves share no sentence (after normalisation) and no run of four or more words, so a model adapted on one half has
not read the other. Prompts of three words and more are scored (`scored`); shorter ones are kept beside them.
"""

from __future__ import annotations

import gzip
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kimi_mm.data.g722 import decode
from kimi_mm.data.numbers import spell_digits
from kimi_mm.data.packages import PackageError, debian_package
from kimi_mm.evaluation.normalize import normalize_english

SAMPLE_RATE = 16_000
SHARED_WORDS = 4
SCORED_WORDS = 3
LONGEST_SECONDS = 30.0
ATTRIBUTION = (
    "Asterisk core sounds, English (asterisk-core-sounds 1.6.1), spoken by Allison Smith, copyright Digium, Inc.\n"
    "https://downloads.asterisk.org/pub/telephony/sounds/\n"
    "Licence: Creative Commons Attribution-ShareAlike 3.0 (https://creativecommons.org/licenses/by-sa/3.0/).\n"
    "Changes: decoded from G.722 to 16 kHz FLAC; file names and transcripts cleaned. The clips in this folder are\n"
    "shared under the same licence; it does not extend to the software beside them.\n"
)

_UNUSABLE = re.compile(r"[(\[<]|\.\.\.$|^[A-Z]( [A-Z])+$")
_SKIPPED_FOLDERS = ("letters/", "phonetic/", "silence/")
# Slips of the written texts; the recordings are right.
_CORRECTIONS = (
    (re.compile(r"\bi\b"), "I"),
    (re.compile(r"\bUn-indentified\b"), "Unidentified"),
    (re.compile(r"\bwitheld\b"), "withheld"),
    (re.compile(r"\brepresenatives\b"), "representatives"),
    (re.compile(r"\bumute\b"), "unmute"),
    (re.compile(r"\bfourtieth\b"), "fortieth"),
)
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True)
class Prompt:
    """One prompt: `half` is "adapt" or "test", `scored` when it has three words or more; `seconds` of audio."""

    key: str
    text: str
    half: str = ""
    scored: bool = False
    seconds: float = 0.0


def read_transcripts(packages: str | Path | None = None) -> list[Prompt]:
    """Returns every prompt of the package as it is written there, unusable ones included."""
    root = debian_package("asterisk-core-sounds-en", packages)
    found = sorted(root.rglob("core-sounds-en.txt.gz"))
    if not found:
        raise PackageError(f"{root.name}: holds no core-sounds-en.txt.gz; the package's layout has changed.")
    prompts = []
    for line in gzip.decompress(found[0].read_bytes()).decode("utf-8").splitlines():
        key, colon, text = line.partition(":")
        if colon and not line.startswith(";"):
            prompts.append(Prompt(key.strip(), _SPACES.sub(" ", text).strip()))
    return prompts


def clean_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Drops prompts whose text is not what is said, and marks the scored ones.

    Dropped: notes and tones in brackets, sentences cut at the end ("..."), spelled initialisms, the folders of letters,
    phonetic alphabet and silence. Digits, "#" and "*" of the others are written as spoken.
    """
    kept = []
    for prompt in prompts:
        if prompt.key.startswith(_SKIPPED_FOLDERS) or _UNUSABLE.search(prompt.text) or not prompt.text:
            continue
        text = spoken_text(prompt.text)
        kept.append(replace(prompt, text=text, scored=len(normalize_english(text).split()) >= SCORED_WORDS))
    return kept


def spoken_text(text: str) -> str:
    """Returns a prompt as it is said: digits, "#" and "*" in words, a capital at the start, a mark at the end."""
    text = spell_digits(text.replace("#", " pound ").replace("*", " star ").lstrip(".")).strip(" :")
    for pattern, right in _CORRECTIONS:
        text = pattern.sub(right, text)
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text.rstrip(",;") + "."


def split_halves(prompts: Sequence[Prompt], adapt_share: float = 0.5) -> tuple[list[Prompt], list[int]]:
    """Assigns every prompt to "adapt" or "test".

    Prompts that share a normalised sentence or a run of `SHARED_WORDS` words are joined to components; components, the
    largest first (ties by their first key), go to the half that is further from its share of words. A component larger
    than a half's share goes whole to "adapt".

    Args:
        prompts: cleaned prompts.
        adapt_share: share of all words wanted in "adapt".

    Returns:
        The prompts with `half` set, in the order given, and the sizes of the components in words, largest first.
    """
    normal = [normalize_english(prompt.text).split() for prompt in prompts]
    parent = list(range(len(prompts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    owner: dict[tuple[str, ...], int] = {}
    for i, words in enumerate(normal):
        grams = [tuple(words[j : j + SHARED_WORDS]) for j in range(len(words) - SHARED_WORDS + 1)]
        for gram in [("=", *words), *grams]:
            parent[root(i)] = root(owner.setdefault(gram, i))
    components: dict[int, list[int]] = defaultdict(list)
    for i in range(len(prompts)):
        components[root(i)].append(i)
    sized = [(sum(len(normal[i]) for i in group), group) for group in components.values()]
    sized.sort(key=lambda item: (-item[0], prompts[item[1][0]].key))
    total = sum(size for size, _ in sized)
    missing = {"adapt": adapt_share * total, "test": (1 - adapt_share) * total}
    halves = [""] * len(prompts)
    for size, group in sized:
        half = "adapt" if missing["adapt"] >= missing["test"] or size > (1 - adapt_share) * total else "test"
        missing[half] -= size
        for i in group:
            halves[i] = half
    return [replace(p, half=half) for p, half in zip(prompts, halves, strict=True)], [size for size, _ in sized]


def load_audio(
    keys: Sequence[str], packages: str | Path | None = None, *, package: str = "asterisk-core-sounds-en-g722"
) -> dict[str, np.ndarray]:
    """Decodes prompts to int16 at 16 kHz, those over 30 s left out.

    Args:
        keys: prompt names as in the transcripts; names without a file are an error.
        packages: folder of downloaded packages.
        package: the Debian package with the `.g722` files.
    """
    paths = _g722_files(package, packages)
    missing = [key for key in keys if key not in paths]
    if missing:
        raise PackageError(f"{package}: holds no recording '{missing[0]}.g722'; its version differs from the texts'.")
    usable = [key for key in keys if paths[key].stat().st_size * 2 <= LONGEST_SECONDS * SAMPLE_RATE]
    return dict(zip(usable, decode([paths[key].read_bytes() for key in usable]), strict=True))


def list_recordings(package: str, packages: str | Path | None = None) -> dict[str, float]:
    """Returns the names of all recordings of a package, sorted, with their lengths in seconds."""
    paths = _g722_files(package, packages)
    return {key: paths[key].stat().st_size * 2 / SAMPLE_RATE for key in sorted(paths)}


def prepare_prompts(
    packages: str | Path | None = None, *, progress: Callable[[str], None] = lambda _: None
) -> tuple[list[Prompt], dict[str, np.ndarray], list[int]]:
    """Returns cleaned, split prompts with their lengths, their audio by key, and the component sizes in words."""
    # The texts name a few prompts that were never recorded.
    recorded = list_recordings("asterisk-core-sounds-en-g722", packages)
    prompts = [p for p in clean_prompts(read_transcripts(packages)) if p.key in recorded]
    progress(f"decoding {len(prompts)} recordings")
    audio = load_audio([prompt.key for prompt in prompts], packages)
    prompts = [replace(p, seconds=round(len(audio[p.key]) / SAMPLE_RATE, 3)) for p in prompts if p.key in audio]
    prompts, sizes = split_halves(prompts)
    return prompts, audio, sizes


def _g722_files(package: str, packages: str | Path | None) -> dict[str, Path]:
    root = debian_package(package, packages)
    found = sorted(root.rglob("*.g722"))
    if not found:
        raise PackageError(f"{package}: holds no .g722 recordings; the package's layout has changed.")
    # The voice's folder is the one right below "sounds"; keys are paths below it.
    base = next(parent for parent in found[0].parents if parent.parent.name == "sounds")
    return {path.relative_to(base).with_suffix("").as_posix(): path for path in found}
