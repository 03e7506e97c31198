"""Speech to be learnt as output: 24 kHz, clean, with the same words in another voice at 16 kHz to take the codes from.

    text ─► hibari's network, once ─┬─ its own voice, or a numbered morph ─► 24 kHz target
                                    └─ another morph, in step with it ─────► 16 kHz, what the tokenizer hears

A detokenizer trained on such pairs speaks in the target's voice whoever the codes were heard from.

    target-00012.npy           int16 24 kHz, utterances one after the other
    target-00012.heard.npy     int16 16 kHz, the same instants: sample 2 n lies where sample 3 n of the target does
    target-00012.pitch.npy     float16, pitch of the target in Hz, 100 a second, each utterance from its start on
    target-00012.jsonl         {"id", "text", "voice", "start", "samples"} a line, in samples at 24 kHz
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from kimi_mm.data.manifest import write_rows
from kimi_mm.data.shards import shard_path, write_array
from kimi_mm.data.synthesis import PlannedClip, ShardKind, check_speech, resample, speech_bounds, to_int16
from kimi_mm.data.voices import VoiceError, draw_morph, hibari_engine, scale_pitch, warp_axis

TARGET_RATE = 24_000
PITCH_HOP = 240  # samples at 24 kHz for each value of pitch
UNVOICED_HZ = 40.0  # hibari takes pitch below for none
CANONICAL = "hibari-heart"  # the voice that speech comes in unless a prompt says otherwise
TARGET_WEIGHTS = {CANONICAL: 0.75, "hibari-morph": 0.25}
SPEAKERS = 96  # morphs that targets use; rows of several utterances keep to one

Morph = tuple[float, float, float]  # pitch factor, vocal tract warp, expressiveness


@dataclass(frozen=True)
class TargetClip:
    """One utterance twice: `target` [3 n] int16 at 24 kHz in voice `voice`, `heard` [2 n] int16 at 16 kHz.

    `pitch` [ceil(3 n / 240)] is that of the target in Hz, 0 where there is none; None stands for none at all.
    """

    id: str
    text: str
    voice: str
    target: np.ndarray
    heard: np.ndarray
    pitch: np.ndarray | None = None


def speak_target(clip: PlannedClip, seed: int = 0) -> TargetClip:
    """Makes one pair; depends on (seed, sentence id, voice, copy) alone.

    Args:
        clip: in a voice of `TARGET_WEIGHTS`.
        seed: of every draw.

    Raises:
        VoiceError: when the voice cannot be a target, or returns something that cannot be this sentence.
    """
    if clip.voice not in TARGET_WEIGHTS:
        raise VoiceError(f"Voice '{clip.voice}' cannot be a target; only {', '.join(TARGET_WEIGHTS)} are clean enough.")
    key = f"{seed}:{clip.id}:{clip.voice}:{clip.copy}:target".encode()
    rng = np.random.default_rng(np.frombuffer(hashlib.sha256(key).digest(), np.uint32))
    speed = round(float(rng.uniform(0.85, 1.2)), 3)
    name, morph = CANONICAL, None
    if clip.voice != CANONICAL:
        speaker = int(rng.integers(SPEAKERS))
        name, morph = f"{clip.voice}-{speaker:03d}", draw_morph(np.random.default_rng((0xC0DE, speaker)))
    waves, pitch = _render(clip.text, speed, int(rng.integers(2**31)), morph, draw_morph(rng))
    target, heard = waves
    start, end = speech_bounds(target, TARGET_RATE)
    end -= (end - start) % 3
    target = target[start:end]
    check_speech(target, TARGET_RATE, clip.text)
    heard = resample(heard, TARGET_RATE)[start * 2 // 3 : end * 2 // 3]
    pitch = pitch[start // PITCH_HOP : start // PITCH_HOP - (start - end) // PITCH_HOP]
    return TargetClip(clip.id, clip.text, f"{name}:speed={speed}", to_int16(target), to_int16(heard), pitch)


def write_target_shard(folder: str | Path, number: int, clips: Sequence[TargetClip]) -> None:
    """Writes one shard; the index comes last."""
    rows, pitches, start = [], [], 0
    for clip in clips:
        size = len(clip.target)
        if 2 * size != 3 * len(clip.heard):
            raise VoiceError(f"{clip.id}: {size} samples at 24 kHz do not last as long as {len(clip.heard)} at 16 kHz.")
        pitches.append(np.zeros(pitch_frames(size)) if clip.pitch is None else clip.pitch)
        if len(pitches[-1]) != pitch_frames(size):
            raise VoiceError(f"{clip.id}: {len(pitches[-1])} values of pitch for {size} samples.")
        rows.append({"id": clip.id, "text": clip.text, "voice": clip.voice, "start": start, "samples": size})
        start += size
    index = shard_path(folder, number, TARGETS.name)
    write_array(index.with_suffix(".npy"), [clip.target for clip in clips])
    write_array(index.with_suffix(".heard.npy"), [clip.heard for clip in clips])
    write_array(index.with_suffix(".pitch.npy"), [pitch.astype(np.float16) for pitch in pitches])
    write_rows(index, rows)


def pitch_frames(samples: int) -> int:
    """Returns how many values of pitch an utterance has, one for each 10 ms begun."""
    return -(-samples // PITCH_HOP)


def _make_shard(folder: str, number: int, clips: Sequence[PlannedClip], seed: int, tools: str) -> list[str]:
    """Worker of `synthesise`."""
    made, skipped = [], []
    for clip in clips:
        try:
            made.append(speak_target(clip, seed))
        except VoiceError as error:
            skipped.append(f"{clip.id} {clip.voice}: {error}")
    write_target_shard(folder, number, made)
    return skipped


TARGETS = ShardKind("target", TARGET_RATE, _make_shard)


def _render(text: str, speed: float, seed: int, *morphs: Morph | None) -> tuple[list[np.ndarray], np.ndarray]:
    """Speaks a text once and gives it several voices, sample for sample in step; None is the voice itself.

    Returns:
        The waves [S] at 24 kHz, and the pitch of the first one [ceil(S / 240)] in Hz.
    """
    engine, dsp = _engine()
    plain = dsp.synth
    waves: list[list[np.ndarray]] = [[] for _ in morphs]
    curves: list[np.ndarray] = []

    def several(lh, th, ln, lr, phi, f0, noise):
        for number, morph in enumerate(morphs):
            curve, spectra = f0, (lh, th, ln, lr)
            if morph is not None:
                pitch, warp, liveliness = morph
                spectra = tuple(warp_axis(x, warp) for x in spectra)
                curve = scale_pitch(f0, pitch, liveliness)
            waves[number].append(plain(*spectra, phi, curve, noise))
            if not number:
                curves.append(np.asarray(curve, np.float32))
        return waves[0][-1]

    try:
        dsp.synth = several
        engine(text, speed=speed, seed=seed)
    finally:
        dsp.synth = plain
    joined = [np.concatenate(pieces) if pieces else np.zeros(0, np.float32) for pieces in waves]
    return joined, _pitch_track(curves, len(joined[0]))


def _pitch_track(curves: list[np.ndarray], samples: int) -> np.ndarray:
    """Reads hibari's curves every 10 ms, between neighbours as hibari does."""
    curve = np.concatenate([*curves, np.zeros(1 if not samples else 0, np.float32)])
    places = (np.arange(pitch_frames(samples)) + 0.5) * PITCH_HOP
    track = np.interp(places * len(curve) / max(samples, 1), np.arange(len(curve)) + 0.5, curve)
    return np.where(track > UNVOICED_HZ, track, 0.0).astype(np.float32)


@lru_cache(maxsize=1)
def _engine() -> tuple[Any, Any]:
    return hibari_engine()
