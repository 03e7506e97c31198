"""Speech that a model makes, scored by judges: the numbers of the model card.

    DATA/eval-speech: recordings ─┬─ as they are ──────────────────────────────► teacher
                                  ├─ codes ─► detokenizer, as a stream ────────► resynthesis   (and of another voice)
                                  └─ their text ─► both streams ─► detokenizer ► reading
                                            each: transcript (Whisper), quality (DNSMOS), voice (Resemblyzer)

Spoken answers are scored in `kimi_mm.evaluation.answers`. The teacher's row is what the judges say of the recordings
that the voice was learnt from: their own error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kimi_mm.audio.io import resample
from kimi_mm.audio.seams import seam_energy, seam_positions
from kimi_mm.data.target_loader import TargetShards
from kimi_mm.data.targets import TARGET_RATE
from kimi_mm.errors import CheckpointError
from kimi_mm.evaluation.judges import SAMPLE_RATE, Judges
from kimi_mm.evaluation.result import conditions
from kimi_mm.evaluation.wer import NORMALIZER_VERSION, show_alignment, word_error_rate

if TYPE_CHECKING:
    from kimi_mm.audio.detokenizer import Detokenizer
    from kimi_mm.pipeline import KimiMM

KIND = "kimi_mm.speech"
VERSION = 1
SETS = ("teacher", "resynthesis", "conversion", "reading", "teacher-answers", "answers")

Progress = Callable[[float], None] | None


@dataclass(frozen=True)
class Recording:
    """A held-out sentence: `wave` [3 n] at 24 kHz in the teacher's voice, `heard` [2 n] at 16 kHz in another, fp32."""

    key: str
    text: str
    wave: np.ndarray
    heard: np.ndarray


@dataclass(frozen=True)
class Made:
    """Speech to be judged, `wave` [S] float32 at 16 kHz, and the seconds it took to make."""

    key: str
    text: str
    wave: np.ndarray
    elapsed: float


def read_recordings(data: Path) -> list[Recording]:
    """Reads `data`/eval-speech; CheckpointError where it is not prepared."""
    folder = data / "eval-speech"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; run 'kimi-mm prepare eval-speech' first.")
    shards = TargetShards((str(folder),))
    found = []
    for number, item in enumerate(shards.utterances):
        heard = shards.arrays[item.shard][1][item.start * 2 // 3 : (item.start + item.samples) * 2 // 3]
        found.append(Recording(f"{number:03d}", item.text, floats(shards.wave(item)), floats(heard)))
    return found


def floats(samples: np.ndarray) -> np.ndarray:
    """Returns int16 samples as float32 in [-1, 1]."""
    return samples.astype(np.float32) / 32768.0


class Voice:
    """The teacher's voice, told from its recordings; each speech is compared with the other recordings.

    Args:
        judges: embed.
        recordings: of the voice, two or more.
    """

    def __init__(self, judges: Judges, recordings: Sequence[Recording]) -> None:
        self.rows = {r.key: judges.voice(resample(r.wave, TARGET_RATE, SAMPLE_RATE)) for r in recordings}
        self.sum = np.sum(list(self.rows.values()), 0)

    def likeness(self, key: str, embedding: np.ndarray) -> float:
        """Cosine between an embedding [256] and the mean of all recordings but `key`."""
        mean = self.sum - self.rows.get(key, 0.0)
        return float(mean @ embedding / max(float(np.linalg.norm(mean)), 1e-9))


def make_all(
    recordings: Sequence[Recording], make: Callable[[Recording], np.ndarray], rate: int, progress: Progress = None
) -> list[Made]:
    """Makes speech of each recording and times it.

    Args:
        recordings: at least one.
        make: from a recording to a wave [S] float32.
        rate: of what is made, Hz.
        progress: called with the share done, 0 to 1.
    """
    made = []
    for number, item in enumerate(recordings, start=1):
        start = time.perf_counter()
        wave = make(item)
        elapsed = time.perf_counter() - start
        made.append(Made(item.key, item.text, resample(wave, rate, SAMPLE_RATE), elapsed))
        if progress is not None:
            progress(number / len(recordings))
    return made


def maker(engine: KimiMM, name: str) -> tuple[Callable[[Recording], np.ndarray], int]:
    """Returns what makes the speech of a set, and its rate: "teacher", "resynthesis", "conversion" or "reading"."""

    def again(wave: np.ndarray, rate: int) -> np.ndarray:
        return engine.detokenizer.decode(engine.tokenizer.encode(wave, rate).codes).cpu().numpy()

    makers: dict[str, Callable[[Recording], np.ndarray]] = {
        "resynthesis": lambda r: again(r.wave, TARGET_RATE),
        "conversion": lambda r: again(r.heard, SAMPLE_RATE),
        "reading": lambda r: engine.speak(r.text),
    }
    if name == "teacher":
        return (lambda r: r.wave), TARGET_RATE
    return makers[name], engine.detokenizer.sample_rate


def score(
    name: str, made: Sequence[Made], judges: Judges, voice: Voice, progress: Progress = None, worst: int = 10
) -> dict[str, Any]:
    """Judges the speech of a set.

    Args:
        name: of the set.
        made: at least one.
        judges: all three.
        voice: that the speech should be in.
        progress: called with the share done, 0 to 1.
        worst: how many of the utterances with the most errors are shown.

    Returns:
        Plain values: `utterances`, `words`, `seconds`; `wer` with its 95 % bootstrap interval `wer_low`, `wer_high`
        (fractions); means `ovrl`, `sig`, `bak` (1 to 5) and `cosine`; `real_time_factor` (work / audio; None
        for the teacher); `worst` (key, reference, hypothesis, errors, alignment).
    """
    heard, quality, cosines = [], [], []
    for number, item in enumerate(made, start=1):
        heard.append(judges.transcript(item.wave))
        quality.append(judges.quality(item.wave))
        cosines.append(voice.likeness(item.key, judges.voice(item.wave)))
        if progress is not None:
            progress(number / len(made))
    rate = word_error_rate([m.text for m in made], heard)
    order = sorted(range(len(made)), key=lambda i: (-rate.utterances[i].errors, made[i].key))
    seconds, elapsed = (sum(part) for part in zip(*((len(m.wave) / SAMPLE_RATE, m.elapsed) for m in made), strict=True))
    return {
        "set": name,
        "utterances": len(made),
        "words": rate.edits.reference,
        "seconds": round(seconds, 2),
        "wer": rate.rate,
        "wer_low": rate.low,
        "wer_high": rate.high,
        **{part: float(np.mean([getattr(q, part) for q in quality])) for part in ("ovrl", "sig", "bak")},
        "cosine": float(np.mean(cosines)),
        "real_time_factor": elapsed / max(seconds, 1e-9) if name != "teacher" else None,
        "worst": [
            {
                "key": made[i].key,
                "reference": made[i].text,
                "hypothesis": heard[i],
                "errors": rate.utterances[i].errors,
                "alignment": show_alignment(made[i].text, heard[i]),
            }
            for i in order[:worst]
            if rate.utterances[i].errors
        ],
    }


def measure_stream(engine: KimiMM, recordings: Sequence[Recording], progress: Progress = None) -> dict[str, Any]:
    """Pushes the codes of recordings into streams one by one, as a model makes them, and takes times.

    Returns:
        `first_chunk_codes`; p50, p90, p99 of `first_audio_seconds`, the computing time from the last code that the
        first sound needs to that sound; `real_time_factor` of detokenizer and vocoder (median); `seam_energy` of all
        speech at once (see `kimi_mm.audio.seams`), and `seam_energy_teacher`, that of the recordings at the same
        places; None where no recording has a seam.
    """
    detokenizer = engine.detokenizer
    codes = [engine.tokenizer.encode(r.wave, TARGET_RATE).codes.tolist() for r in recordings]
    _timed_stream(detokenizer, codes[0])  # warm
    firsts, factors, waves, seams, at = [], [], [], [], 0
    for number, row in enumerate(codes, start=1):
        wave, first, total = _timed_stream(detokenizer, row)
        firsts.append(first)
        factors.append(total / (len(wave) / detokenizer.sample_rate))
        seams += [at + place for place in seam_positions(detokenizer.config, len(row))]
        waves.append(wave)
        at += len(wave)
        if progress is not None:
            progress(number / len(codes))
    p50, p90, p99 = np.quantile(firsts, (0.5, 0.9, 0.99))
    taught = [np.pad(r.wave, (0, len(wave)))[: len(wave)] for r, wave in zip(recordings, waves, strict=True)]
    return {
        "first_chunk_codes": detokenizer.config.streaming.first_chunk_codes,
        "first_audio_seconds": {"p50": float(p50), "p90": float(p90), "p99": float(p99), "runs": len(firsts)},
        "real_time_factor": float(np.median(factors)),
        "seam_energy": seam_energy(torch.cat(waves), seams) if seams else None,
        "seam_energy_teacher": seam_energy(torch.from_numpy(np.concatenate(taught)), seams) if seams else None,
    }


def _timed_stream(detokenizer: Detokenizer, codes: Sequence[int]) -> tuple[torch.Tensor, float, float]:
    """Speaks codes, pushed one by one; returns the wave [S], seconds to the first sound, and seconds in all."""
    stream, pieces, total, first = detokenizer.stream(), [], 0.0, 0.0
    for place in range(len(codes) + 1):
        start = time.perf_counter()
        piece = stream.push([codes[place]]) if place < len(codes) else stream.flush()
        pieces.append(piece.cpu())
        took = time.perf_counter() - start
        total += took
        if len(piece) and not first:
            first = took
    return torch.cat(pieces), first, total


def collect(
    label: str, model: str, device: str, sets: Iterable[dict[str, Any]], stream: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns the machine-readable result of an evaluation.

    Args:
        label: what tables call the model.
        model: name or folder that was loaded.
        device: where it ran; the judges run on the CPU.
        sets: of `score` and of `answers.score`.
        stream: of `measure_stream`; None where it was not measured.
    """
    return {
        **conditions(KIND, VERSION, label, model, device),
        "normalizer": NORMALIZER_VERSION,
        "stream": stream,
        "sets": list(sets),
    }
