"""Speech from sentences, in many processes, as shards.

    sentences ─► make_plan ─► [(id, text, voice), ...] shuffled ─► shard jobs ─► N processes ─► shard-*.npy + .jsonl

Each utterance depends on (seed, sentence id, voice, copy) alone, so the result is the same for any number of processes.
Finished shards are never made again; a folder that holds another plan is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from kimi_mm.data.manifest import read_rows, write_aside
from kimi_mm.data.shards import KEYS, SAMPLE_RATE, Clip, finish, shard_path, write_shard
from kimi_mm.data.text import Sentence
from kimi_mm.data.voices import TRAINING_WEIGHTS, UNSEEN, VOICES, Speech, VoiceError, make_voice
from kimi_mm.errors import UserError

log = logging.getLogger(__name__)
PLAN = "plan.json"
# Seconds of speech that a word takes, pauses at both ends included; only `hours` in `make_plan` uses it.
SECONDS_PER_WORD, SECONDS_PER_SENTENCE = 0.33, 0.45
TARGET_RMS, PEAK = 0.06, 0.95
MARGIN_SECONDS, MAX_SECONDS = 0.12, 25.0
PROBE = "One, two."  # said by every voice before a long run
SKIPPED_SHARE = 0.05  # of a voice's utterances, from which a warning is due


@dataclass(frozen=True)
class PlannedClip:
    """One utterance to be made; `copy` tells repetitions of a sentence in the same voice apart."""

    id: str
    text: str
    voice: str
    copy: int = 0


@dataclass(frozen=True)
class SynthesisReport:
    """What `synthesise` made: utterances, hours, those skipped (with reasons), and seconds it took."""

    utterances: int
    hours: float
    skipped: tuple[str, ...]
    seconds: float


def make_plan(
    sentences: Sequence[Sentence],
    *,
    hours: float | None = None,
    count: int | None = None,
    voice_weights: dict[str, float] | None = None,
    seed: int = 0,
    allow_unseen: bool = False,
) -> list[PlannedClip]:
    """Draws sentences and voices for a corpus.

    Every sentence is used once before any is used again, each time in a voice drawn by weight. The plan is shuffled, so
    each shard is a fair sample.

    Args:
        sentences: those to speak; held-out or text-only ones are refused unless `allow_unseen`.
        hours: about how much speech (from the number of words), or
        count: exactly how many utterances; without both every sentence once.
        voice_weights: voice names to relative weights; None is `TRAINING_WEIGHTS`.
        seed: of the draws.
        allow_unseen: for evaluation sets: permits held-out sentences and the voices kept out of training.

    Raises:
        UserError: on an unknown or forbidden voice, a held-out sentence, or nothing to speak.
    """
    weights = dict(voice_weights or TRAINING_WEIGHTS)
    for voice, weight in weights.items():
        if voice not in VOICES:
            raise UserError(f"Unknown voice '{voice}'; known are {', '.join(VOICES)}.")
        if voice in UNSEEN and not allow_unseen:
            raise UserError(f"Voice '{voice}' is kept for testing and must not be trained on.")
        if not weight >= 0:
            raise UserError(f"Voice '{voice}' has the weight {weight}; weights must not be negative.")
    if sum(weights.values()) <= 0 or not sentences:
        raise UserError("Nothing to synthesise: give at least one sentence and one voice with a positive weight.")
    if not allow_unseen and any(s.held_out or not s.speech for s in sentences):
        raise UserError("The plan has held-out or text-only sentences; take those with speech=True, held_out=False.")
    rng = np.random.default_rng((seed, 0x5EED))
    names = list(weights)
    shares = np.array([weights[name] for name in names]) / sum(weights.values())
    plan: list[PlannedClip] = []
    copies: dict[tuple[str, str], int] = {}
    seconds = 0.0
    while not _full(plan, seconds, count, hours, len(sentences)):
        for i in rng.permutation(len(sentences)):
            if _full(plan, seconds, count, hours, len(sentences)):
                break
            sentence, voice = sentences[i], names[rng.choice(len(names), p=shares)]
            copy = copies.get((sentence.id, voice), 0)
            copies[sentence.id, voice] = copy + 1
            plan.append(PlannedClip(sentence.id, sentence.text, voice, copy))
            seconds += SECONDS_PER_SENTENCE + SECONDS_PER_WORD * len(sentence.text.split())
    return [plan[i] for i in rng.permutation(len(plan))]


def synthesise(
    plan: Sequence[PlannedClip],
    out_dir: str | Path,
    processes: int | None = None,
    *,
    seed: int = 0,
    per_shard: int = 256,
    tools: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    kind: ShardKind | None = None,
) -> SynthesisReport:
    """Speaks a plan into shards.

    Args:
        plan: from `make_plan`.
        out_dir: folder for the shards; one that holds a part of the same plan is completed.
        processes: worker processes (spawned, one thread each); None is one per core.
        seed: of pitch, pace and noise.
        per_shard: utterances in a shard.
        tools: root of unpacked flite and espeak-ng packages, see `voices.find_program`.
        progress: called with (utterances done, utterances in all) after each shard.
        kind: of shards; None is speech at 16 kHz.

    Returns:
        The report; utterances that a voice could not speak are listed in it and left out.

    Raises:
        UserError: when a voice of the plan cannot be used here, or the folder holds another plan.
    """
    out_dir, started, kind = Path(out_dir), time.monotonic(), kind or SPEECH
    out_dir.mkdir(parents=True, exist_ok=True)
    _claim(out_dir, plan, seed, per_shard, kind)
    for voice in sorted({clip.voice for clip in plan}):
        try:
            make_voice(voice, tools)(PROBE, np.random.default_rng(seed))
        except VoiceError as error:  # else every one of its utterances would be left out, hours later
            raise VoiceError(f"Voice '{voice}' cannot say a word here: {error}") from None
    jobs = [
        (number, plan[number * per_shard : (number + 1) * per_shard])
        for number in range(math.ceil(len(plan) / per_shard))
    ]
    todo = [(number, clips) for number, clips in jobs if not shard_path(out_dir, number, kind.name).exists()]
    done = len(plan) - sum(len(clips) for _, clips in todo)
    skipped: list[str] = []
    if progress:
        progress(done, len(plan))
    if todo:
        with _OneThread(), _pool(min(processes or os.cpu_count() or 1, len(todo))) as pool:
            futures = {
                pool.submit(kind.make, str(out_dir), number, clips, seed, str(tools or "")): len(clips)
                for number, clips in todo
            }
            for future in as_completed(futures):
                skipped += future.result()
                done += futures[future]
                if progress:
                    progress(done, len(plan))
    _warn_of_skipped(skipped, [clip for _, clips in todo for clip in clips])
    rows = [row for number, _ in jobs for row in read_rows(shard_path(out_dir, number, kind.name), KEYS)]
    hours = sum(row["samples"] for row in rows) / kind.rate / 3600
    meta = {"utterances": len(rows), "hours": round(hours, 4), "seed": seed, "skipped": sorted(skipped)}
    finish(out_dir, meta, kind.name)
    return SynthesisReport(len(rows), hours, tuple(sorted(skipped)), time.monotonic() - started)


def speak(clip: PlannedClip, seed: int = 0, tools: str | Path | None = None) -> Clip:
    """Makes one utterance: synthesis, 16 kHz, ends trimmed, level set.

    Raises:
        VoiceError: when the voice fails or returns something that cannot be this sentence.
    """
    key = f"{seed}:{clip.id}:{clip.voice}:{clip.copy}".encode()
    rng = np.random.default_rng(np.frombuffer(hashlib.sha256(key).digest(), np.uint32))
    speech = _voice(clip.voice, str(tools or ""))(clip.text, rng)
    wave = trim(resample(speech.wave, speech.sample_rate))
    check_speech(wave, SAMPLE_RATE, clip.text)
    return Clip(clip.id, clip.text, f"{clip.voice}:{speech.settings}", to_int16(wave))


def check_speech(wave: np.ndarray, rate: int, text: str) -> None:
    """Raises VoiceError when a wave [S] cannot be this sentence: too long or short for its letters, or not finite."""
    seconds, letters = len(wave) / rate, sum(c.isalpha() for c in text)
    if not 0.15 <= seconds <= MAX_SECONDS or not 1.5 <= letters / seconds <= 40.0 or not np.isfinite(wave).all():
        raise VoiceError(f"{seconds:.2f} s of speech for {letters} letters")


def to_int16(wave: np.ndarray) -> np.ndarray:
    """Brings speech [S] to the level of the corpus, without clipping, as int16."""
    level = min(TARGET_RMS / float(np.sqrt(np.mean(wave**2))), PEAK / float(np.abs(wave).max()))
    return np.round(wave * level * 32767).astype(np.int16)


def resample(wave: np.ndarray, rate: int) -> np.ndarray:
    """Resamples [S] float32 from `rate` Hz to 16 kHz with a polyphase filter."""
    if rate == SAMPLE_RATE:
        return wave
    from scipy.signal import resample_poly

    common = math.gcd(rate, SAMPLE_RATE)
    return resample_poly(wave, SAMPLE_RATE // common, rate // common).astype(np.float32)


def trim(wave: np.ndarray) -> np.ndarray:
    """Cuts both ends of [S] at 16 kHz as `speech_bounds` says."""
    start, end = speech_bounds(wave, SAMPLE_RATE)
    return wave[start:end]


def speech_bounds(wave: np.ndarray, rate: int) -> tuple[int, int]:
    """Returns where speech begins and ends: 0.12 s beyond the first and last 10 ms frame within 45 dB of the loudest.

    Both are multiples of 10 ms, unless the recording itself ends before.
    """
    size = rate // 100
    power = np.square(wave[: len(wave) // size * size].reshape(-1, size)).mean(1)
    loud = np.flatnonzero(power > power.max(initial=0.0) * 10**-4.5)
    if not len(loud):
        return 0, 0
    margin = round(MARGIN_SECONDS * rate)
    return max(0, int(loud[0]) * size - margin), min(len(wave), (int(loud[-1]) + 1) * size + margin)


def _warn_of_skipped(skipped: Sequence[str], clips: Sequence[PlannedClip]) -> None:
    """Says which voices left out many of their utterances, with one of the reasons."""
    wanted = Counter(clip.voice for clip in clips)
    voices = [line.split()[1].rstrip(":") for line in skipped]
    reasons = dict(zip(voices, skipped, strict=True))
    for voice, lost in Counter(voices).items():
        if lost > SKIPPED_SHARE * wanted[voice]:
            log.warning("voice '%s' left out %d of %d utterances (%s)", voice, lost, wanted[voice], reasons[voice])


def _full(plan: list, seconds: float, count: int | None, hours: float | None, once: int) -> bool:
    if count is None and hours is None:
        return len(plan) >= once
    return (count is not None and len(plan) >= count) or (hours is not None and seconds >= hours * 3600)


def _claim(out_dir: Path, plan: Sequence[PlannedClip], seed: int, per_shard: int, kind: ShardKind) -> None:
    """Notes which plan the folder holds, and refuses a folder that holds another."""
    what = [[asdict(clip) for clip in plan], seed, per_shard, *([] if kind == SPEECH else [kind.name])]
    body = json.dumps(what, sort_keys=True)
    values = {"sha256": hashlib.sha256(body.encode()).hexdigest(), "utterances": len(plan)}
    path = out_dir / PLAN
    if path.exists():
        try:
            same = json.loads(path.read_text(encoding="utf-8"))["sha256"] == values["sha256"]
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise UserError(f"{out_dir}: holds speech of another plan; choose another folder or empty this one.")
    elif shard_path(out_dir, 0, kind.name).exists():
        raise UserError(f"{out_dir}: holds shards of unknown origin; choose another folder or empty this one.")
    else:
        write_aside(path, json.dumps(values).encode())


def _make_shard(out_dir: str, number: int, clips: Sequence[PlannedClip], seed: int, tools: str) -> list[str]:
    """Worker: makes one shard and returns a line for each utterance that was skipped."""
    made, skipped = [], []
    for clip in clips:
        try:
            made.append(speak(clip, seed, tools))
        except VoiceError as error:
            skipped.append(f"{clip.id} {clip.voice}: {error}")
    write_shard(out_dir, number, made)
    return skipped


@dataclass(frozen=True)
class ShardKind:
    """What `synthesise` writes: shards named `name`-*, samples at `rate` Hz, made by `make` in a worker process.

    `make(folder, number, clips, seed, tools)` writes one shard and returns a line for each utterance it skipped.
    """

    name: str
    rate: int
    make: Callable[[str, int, Sequence[PlannedClip], int, str], list[str]]


SPEECH = ShardKind("shard", SAMPLE_RATE, _make_shard)


@lru_cache(maxsize=len(VOICES))
def _voice(name: str, tools: str) -> Callable[[str, np.random.Generator], Speech]:
    return make_voice(name, tools or None)


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))


class _OneThread:
    """Sets the thread-count variables that spawned workers read while they import numpy and onnxruntime."""

    NAMES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.NAMES}
        os.environ.update(dict.fromkeys(self.NAMES, "1"))

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
