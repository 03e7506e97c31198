"""A corpus of a few seconds for debug runs: buzzes for words, so that every recipe runs without any download."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np

_WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "left",
    "right",
    "up",
    "down",
    "stop",
    "go",
]


def write_debug_data(folder: Path, count: int = 48, seed: int = 0) -> tuple[Path, Path]:
    """Writes `folder/speech` (one shard) and `folder/texts.jsonl.gz`; returns both paths.

    Each word is a vowel-like buzz of its own pitch, 0.2 s long; sentences have two to six words.
    """
    rng = np.random.default_rng(seed)
    speech = folder / "speech"
    speech.mkdir(parents=True, exist_ok=True)
    pieces, rows, at = [], [], 0
    time = np.arange(3200) / 16_000
    for number in range(count):
        words = rng.choice(len(_WORDS), size=rng.integers(2, 7))
        tones = [sum(np.sin(2 * np.pi * (110 + 15 * w) * h * time) / h for h in range(1, 9)) for w in words]
        wave = (np.concatenate(tones) * 3000).astype(np.int16)
        text = " ".join(_WORDS[w] for w in words)
        rows.append({"id": f"debug-{number}", "text": text, "voice": "buzz", "start": at, "samples": len(wave)})
        pieces.append(wave)
        at += len(wave)
    np.save(speech / "shard-00000.npy", np.concatenate(pieces))
    (speech / "shard-00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = folder / "texts.jsonl.gz"
    lines = "".join(json.dumps({"id": row["id"], "text": row["text"]}) + "\n" for row in rows)
    texts.write_bytes(gzip.compress(lines.encode(), mtime=0))
    return speech, texts
