"""Prepared dialogs: questions in many voices at 16 kHz, answers in the canonical voice as targets at 24 kHz.

    out/{train,test}/dialogs.jsonl        {"id", "turns": [{"kind", "key", "question", "answer", "expect", "judge"}]}
    out/{train,test}/questions/shard-*    what is asked, each text in up to `MOST_VOICES` voices
    out/{train,test}/answers/target-*     what is answered, see `kimi_mm.data.targets`

Texts connect the three: a question or answer is found by what is said in it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from kimi_mm.data.dialogs import Dialog, Turn, make_dialogs
from kimi_mm.data.manifest import ManifestError, read_rows, write_rows
from kimi_mm.data.synthesis import PlannedClip, SynthesisReport, make_plan, synthesise
from kimi_mm.data.targets import CANONICAL, TARGETS
from kimi_mm.data.text import Sentence, sentence_id

COUNTS = {"train": 20_000, "test": 300}
MOST_VOICES = 8
DIALOGS = "dialogs.jsonl"


def prepare_dialogs(
    sentences: Sequence[Sentence],
    out: str | Path,
    processes: int | None = None,
    *,
    seed: int = 0,
    tools: str | Path | None = None,
    count: int | None = None,
    voice_weights: dict[str, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict]:
    """Draws dialogs for training and for testing and speaks them; goes on where it was interrupted.

    Args:
        sentences: of `read_sentences`.
        out: folder for both sets.
        processes, seed, tools, progress: as for `synthesise`.
        count: training dialogs instead of 20,000; test dialogs are then at most as many.
        voice_weights: of the questions; None is the standard mixture.

    Returns:
        For each set the dialogs, questions, answers, hours and utterances that could not be spoken.
    """
    reports = {}
    for name, standard in COUNTS.items():
        size = standard if count is None else min(count, standard if name == "test" else count)
        folder = Path(out) / name
        dialogs = make_dialogs(sentences, size, seed=seed, held_out=name == "test")
        plans = {
            "questions": make_plan(
                _sentences(turn.question for turn in _turns(dialogs)), voice_weights=voice_weights, seed=seed
            ),
            "answers": [
                PlannedClip(s.id, s.text, CANONICAL) for s in _sentences((t.answer for t in _turns(dialogs)), most=1)
            ],
        }
        write_rows(folder / DIALOGS, [dataclasses.asdict(dialog) for dialog in dialogs])
        made: dict[str, SynthesisReport] = {}
        for part, plan in plans.items():
            kind = TARGETS if part == "answers" else None
            made[part] = synthesise(
                plan, folder / part, processes, seed=seed, tools=tools, progress=progress, kind=kind
            )
        reports[name] = {
            "dialogs": len(dialogs),
            **{part: report.utterances for part, report in made.items()},
            "hours": round(sum(report.hours for report in made.values()), 3),
            "skipped": sum(len(report.skipped) for report in made.values()),
        }
    return reports


def read_dialogs(folder: str | Path) -> list[Dialog]:
    """Reads the dialogs of one prepared set.

    Raises:
        ManifestError: names the file and the line that is not right.
    """
    path = Path(folder) / DIALOGS
    if not path.is_file():
        raise ManifestError(f"{path}: no such file; run 'kimi-mm prepare dialogs' first.")
    dialogs = []
    for number, row in enumerate(read_rows(path, {"id": str, "turns": list}), start=1):
        try:
            dialogs.append(Dialog(row["id"], tuple(Turn(**turn) for turn in row["turns"])))
        except TypeError as error:
            raise ManifestError(f"{path}:{number}: not a dialog ({error}).") from None
    return dialogs


def _turns(dialogs: Iterable[Dialog]) -> list[Turn]:
    return [turn for dialog in dialogs for turn in dialog.turns]


def _sentences(texts: Iterable[str], most: int = MOST_VOICES) -> list[Sentence]:
    """Returns each text as often as it occurs, but at most `most` times."""
    counts = Counter(texts)
    return [
        Sentence(sentence_id(text), text, "dialogs", held_out=False)
        for text, n in counts.items()
        for _ in range(min(n, most))
    ]
