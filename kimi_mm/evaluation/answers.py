"""Spoken answers to spoken questions, judged from what Whisper hears in them.

    DATA/dialogs/test: recorded questions ─► Conversation ─► spoken replies ─► transcript ─► right or wrong, by `Turn`

The recorded answers themselves are judged, too: what is wrong there is the recogniser's or the rule's error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kimi_mm.audio.io import resample
from kimi_mm.conversation import Conversation
from kimi_mm.data.dialog_sets import read_dialogs
from kimi_mm.data.dialogs import Dialog, Turn
from kimi_mm.data.loader import SpeechShards
from kimi_mm.data.target_loader import TargetShards
from kimi_mm.data.targets import TARGET_RATE
from kimi_mm.errors import CheckpointError
from kimi_mm.evaluation.judges import SAMPLE_RATE, Judges
from kimi_mm.evaluation.normalize import normalize_english
from kimi_mm.evaluation.speech import floats
from kimi_mm.evaluation.wer import count_edits
from kimi_mm.generation_speech import SpeechSampling
from kimi_mm.types import WavePiece

if TYPE_CHECKING:
    from kimi_mm.pipeline import KimiMM

MOST_WRONG = 0.2  # share of words by which a "near" answer may differ
DRAWS = 2000  # bootstrap resamples
LIMITS = SpeechSampling(max_text_tokens=64, max_audio_codes=250)  # 20 s, far more than any right answer needs


@dataclass(frozen=True)
class Answered:
    """A turn of a dialog, and what Whisper heard in the reply."""

    turn: Turn
    heard: str


class SpokenDialogs:
    """Held-out dialogs and their recordings.

    Args:
        data: the folder that `kimi-mm prepare dialogs` filled.
        limit: only so many dialogs; None for all.

    Raises:
        CheckpointError, ManifestError: the dialogs or their recordings are not there.
    """

    def __init__(self, data: Path, limit: int | None = None) -> None:
        folder = data / "dialogs" / "test"
        prepared = read_dialogs(folder)
        shards = SpeechShards((str(folder / "questions"),))
        self.questions = {item.text: shards.wave(item) for item in shards.utterances}
        targets = TargetShards((str(folder / "answers"),))
        self.answers = {item.text: targets.wave(item) for item in targets.utterances}
        spoken = [d for d in prepared if all(self._recorded(turn) for turn in d.turns)]
        if not spoken:
            raise CheckpointError(f"{folder}: no dialog there has all its recordings; prepare the dialogs again.")
        self.dialogs = spoken[:limit]

    def teacher(self, dialog: Dialog) -> list[np.ndarray]:
        """Returns the recorded answers of a dialog, [S] float32 at 16 kHz each."""
        return [resample(floats(self.answers[turn.answer]), TARGET_RATE, SAMPLE_RATE) for turn in dialog.turns]

    def replies(self, engine: KimiMM, dialog: Dialog) -> list[np.ndarray]:
        """Asks the questions of a dialog in turn; returns the spoken replies, [S] float32 at 16 kHz each."""
        talk, replies = Conversation(engine, sampling=LIMITS), []
        for turn in dialog.turns:
            events = talk.say(audio=floats(self.questions[turn.question]))
            pieces = [event.wave for event in events if isinstance(event, WavePiece)]
            wave = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
            replies.append(resample(wave, talk.sample_rate, SAMPLE_RATE))
        return replies

    def _recorded(self, turn: Turn) -> bool:
        return turn.question in self.questions and turn.answer in self.answers


def answer_all(
    dialogs: Sequence[Dialog],
    reply: Callable[[Dialog], list[np.ndarray]],
    judges: Judges,
    progress: Callable[[float], None] | None = None,
) -> list[Answered]:
    """Takes the replies of all dialogs and writes down what is heard in them.

    Args:
        dialogs: at least one.
        reply: from a dialog to a wave [S] float32 at 16 kHz for each turn.
        judges: hear.
        progress: called with the share done, 0 to 1.
    """
    results = []
    for number, dialog in enumerate(dialogs, start=1):
        results += [
            Answered(turn, judges.transcript(wave)) for turn, wave in zip(dialog.turns, reply(dialog), strict=True)
        ]
        if progress is not None:
            progress(number / len(dialogs))
    return results


def right(turn: Turn, heard: str) -> bool:
    """Tells whether a transcript answers a turn, as its `judge` says.

    "exact": the same letters (a recogniser joins and parts spelt ones at will); "ends": it ends in what is expected;
    "near": one word in five may differ.
    """
    said, expected = normalize_english(heard).split(), normalize_english(turn.expect).split()
    if turn.judge == "exact":
        return _letters(said) == _letters(expected)
    if turn.judge == "ends":
        return said[-len(expected) :] == expected
    return count_edits(expected, said).errors <= MOST_WRONG * len(expected)


def score(name: str, results: Sequence[Answered], worst: int = 10) -> dict[str, Any]:
    """Sums up answers.

    Returns:
        Plain values: `turns`, `accuracy` with its 95 % bootstrap interval `low`, `high` (fractions), `kinds` (turns and
        accuracy by kind), `worst` (question, expected, heard) of the first wrong ones.
    """
    hits = np.asarray([right(r.turn, r.heard) for r in results], np.float64)
    picks = np.random.default_rng(0).integers(0, len(hits), (DRAWS, len(hits)))
    low, high = np.quantile(hits[picks].mean(1), (0.025, 0.975))
    kinds = {}
    for kind in sorted({r.turn.kind for r in results}):
        own = hits[[r.turn.kind == kind for r in results]]
        kinds[kind] = {"turns": len(own), "accuracy": float(own.mean())}
    wrong = [r for r, hit in zip(results, hits, strict=True) if not hit]
    return {
        "set": name,
        "turns": len(hits),
        "accuracy": float(hits.mean()),
        "low": float(low),
        "high": float(high),
        "kinds": kinds,
        "worst": [{"question": r.turn.question, "expected": r.turn.expect, "heard": r.heard} for r in wrong[:worst]],
    }


def _letters(words: Sequence[str]) -> str:
    """Joins words; the normaliser takes a spelt "o, k" for "okay"."""
    return "".join(words).replace("okay", "ok")
