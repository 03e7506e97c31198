"""Speech recognition scored on prepared test sets: the numbers of the model card.

    DATA/<folder of a set>: clips or shards ─► transcribe, one at a time ─► WER, interval, real-time factor, errors

Utterances are decoded one at a time, as `kimi-mm transcribe` does it, so that the real-time factor is the user's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kimi_mm.data.human import read_clips
from kimi_mm.data.shards import read_shards
from kimi_mm.errors import CheckpointError, UserError
from kimi_mm.evaluation.report import KIND, VERSION
from kimi_mm.evaluation.result import conditions
from kimi_mm.evaluation.wer import NORMALIZER_VERSION, show_alignment, word_error_rate

SAMPLE_RATE = 16_000
SETS = {
    "human-test": "human/test",
    "human-adapt": "human/adapt",
    "sent": "test_sent",
    "voice": "test_voice",
}


@dataclass(frozen=True)
class Utterance:
    """One recording and what is said in it; `wave` [S] float32 at 16 kHz."""

    key: str
    wave: np.ndarray
    text: str


@dataclass(frozen=True)
class Scored:
    """One utterance after recognition; `seconds` of audio, `elapsed` seconds of work."""

    key: str
    reference: str
    hypothesis: str
    seconds: float
    elapsed: float


def read_set(data: Path, name: str) -> list[Utterance]:
    """Reads a prepared test set.

    Args:
        data: the folder that `kimi-mm prepare` filled.
        name: a key of `SETS`.

    Raises:
        UserError: an unknown name.
        CheckpointError: the set has not been prepared there.
        ManifestError: it is damaged; names the file and the line.
    """
    if name not in SETS:
        raise UserError(f"test set '{name}' is unknown; known: {', '.join(SETS)}, all.")
    folder = data / SETS[name]
    if (folder / "manifest.jsonl").is_file():
        clips = read_clips(folder, scored_only=True)
    elif any(folder.glob("shard-*.jsonl")):
        clips = list(read_shards(folder))
    else:
        raise CheckpointError(f"{folder}: holds no prepared recordings; run 'kimi-mm prepare' first.")
    return [Utterance(clip.id, clip.wave.astype(np.float32) / 32768.0, clip.text) for clip in clips]


def recognise(
    transcribe: Callable[[np.ndarray], str],
    utterances: Sequence[Utterance],
    progress: Callable[[float], None] | None = None,
) -> list[Scored]:
    """Transcribes utterances one at a time and times each.

    Args:
        transcribe: from a wave [S] float32 at 16 kHz to text.
        utterances: at least one.
        progress: called with the share done, 0 to 1.
    """
    results = []
    for number, item in enumerate(utterances, start=1):
        start = time.perf_counter()
        text = transcribe(item.wave)
        elapsed = time.perf_counter() - start
        results.append(Scored(item.key, item.text, text, len(item.wave) / SAMPLE_RATE, elapsed))
        if progress is not None:
            progress(number / len(utterances))
    return results


def score(name: str, results: Sequence[Scored], worst: int = 10) -> dict[str, Any]:
    """Sums a set up.

    Args:
        name: of the set.
        results: from `recognise`.
        worst: how many of the utterances with the most errors are shown with their alignment.

    Returns:
        Plain values: `utterances`, `words` and `seconds` of the set, `wer` and its 95 % bootstrap interval `wer_low`,
        `wer_high` (fractions), `substitutions`, `deletions`, `insertions`, `real_time_factor` (work / audio), `worst`
        (key, reference, hypothesis, errors, alignment).
    """
    rate = word_error_rate([r.reference for r in results], [r.hypothesis for r in results])
    order = sorted(range(len(results)), key=lambda i: (-rate.utterances[i].errors, results[i].key))
    seconds = sum(r.seconds for r in results)
    return {
        "set": name,
        "utterances": len(results),
        "words": rate.edits.reference,
        "seconds": round(seconds, 2),
        "substitutions": rate.edits.substitutions,
        "deletions": rate.edits.deletions,
        "insertions": rate.edits.insertions,
        "wer": rate.rate,
        "wer_low": rate.low,
        "wer_high": rate.high,
        "real_time_factor": sum(r.elapsed for r in results) / seconds,
        "worst": [
            {
                "key": results[i].key,
                "reference": results[i].reference,
                "hypothesis": results[i].hypothesis,
                "errors": rate.utterances[i].errors,
                "alignment": show_alignment(results[i].reference, results[i].hypothesis),
            }
            for i in order[:worst]
            if rate.utterances[i].errors
        ],
    }


def collect(label: str, model: str, device: str, beams: int, sets: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Returns the machine-readable result of an evaluation: the sets' scores and how they were measured.

    Args:
        label: what tables call the model.
        model: name or folder that was loaded.
        device: where it ran.
        beams: of the search; 1 is greedy decoding.
        sets: from `score`.
    """
    return {
        **conditions(KIND, VERSION, label, model, device),
        "beams": beams,
        "normalizer": NORMALIZER_VERSION,
        "sets": list(sets),
    }
