"""`kimi-mm demo`: the shipped recordings of a real speaker, transcribed by the shipped model, and a picture.

A model with eyes also answers the questions about the shipped pictures. One with a voice says a sentence and speaks one
of the recordings again: two WAV files and their spectrograms.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kimi_mm.cli.errors import debugging, describe
from kimi_mm.cli.outputs import check_writable
from kimi_mm.errors import CheckpointError, UserError

if TYPE_CHECKING:
    import numpy as np

    from kimi_mm.pipeline import KimiMM
    from kimi_mm.types import Transcript

CLIPS = Path(__file__).resolve().parents[1] / "pretrained" / "demo"
PICTURES = CLIPS / "pictures"
PICTURE = "transcript.png"
SENTENCE = "Hello. I can hear you, and this is my voice."
SAID, SPOKEN_AGAIN, SPEECH_PICTURE, ANSWERS_PICTURE = "say.wav", "resynth.wav", "speech.png", "answers.png"


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the picture goes.")] = Path(
        "demo-output"
    ),
    model: Annotated[str, typer.Option(help="A shipped model's name or a checkpoint folder.")] = "nano",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Transcribe the shipped recordings, draw what the model makes of one; see and speak, if the model can."""
    clips = read_clips()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: the folder cannot be made ({error.strerror}).") from None
    check_writable(output / PICTURE)

    import kimi_mm
    from kimi_mm.audio.io import read_audio
    from kimi_mm.evaluation.asr import Utterance, recognise, score
    from kimi_mm.evaluation.report import percent
    from kimi_mm.evaluation.result import peak_memory_mib
    from kimi_mm.evaluation.wer import word_error_rate

    engine = kimi_mm.load(model, device=device)
    print(f"{len(clips)} real recordings, model '{model}', device {device}\n")
    results = []
    for clip in clips:
        wave, _ = read_audio(CLIPS / clip["file"])
        done = recognise(lambda wave: engine.transcribe(wave).text, [Utterance(clip["file"], wave, clip["text"])])[0]
        results.append(done)
        wer = word_error_rate([done.reference], [done.hypothesis], draws=0).rate
        print(f"{done.key}  {done.seconds:.1f} s  WER {percent(wer)} %")
        print(f"  said   {done.reference}\n  heard  {done.hypothesis}", flush=True)
    whole = score("demo", results)
    print(
        f"\nall: WER {percent(whole['wer'])} % of {whole['words']} words "
        f"(95 % interval {percent(whole['wer_low'])} to {percent(whole['wer_high'])}), "
        f"real-time factor {whole['real_time_factor']:.3f}, peak memory {peak_memory_mib():.0f} MiB"
    )
    shown = max(clips, key=lambda clip: -abs(clip["seconds"] - 6.0))
    draw_clip(engine, shown, output / PICTURE)
    print(f"picture: {output / PICTURE}")
    if engine.model.vision is not None:
        for line in answer_questions(engine, output):
            print(line)
    if engine.model.detokenizer is not None:
        for line in speak_clip(engine, shown, output):
            print(line)


def read_clips() -> list[dict[str, Any]]:
    """Returns the shipped clips' rows: file, text, seconds.

    Raises:
        CheckpointError: the list or one of its rows is damaged.
    """
    manifest = CLIPS / "manifest.jsonl"
    try:
        rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [{"file": row["file"], "text": row["text"], "seconds": float(row["seconds"])} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if debugging():
            raise
        raise CheckpointError(f"{manifest}: the list of the shipped recordings is damaged: {describe(error)}") from None


def draw_clip(engine: KimiMM, clip: dict[str, Any], path: Path) -> Transcript:
    """Draws one clip's waveform, mel, codes and text, and returns its transcript."""
    import numpy as np
    import torch

    from kimi_mm.audio.io import read_audio
    from kimi_mm.evaluation.picture import draw

    wave, _ = read_audio(CLIPS / clip["file"])
    transcript = engine.transcribe(wave)
    tokenizer = engine.tokenizer
    tokens = tokenizer.encode(wave, 16_000)
    padded = np.pad(wave, (0, -len(wave) % tokenizer.config.samples_per_code))
    with torch.inference_mode():
        mel = tokenizer.log_mel(torch.from_numpy(padded)[None].to(tokenizer.device))[0]
    draw(
        path,
        wave,
        mel.cpu().numpy(),
        tokens.codes.cpu().numpy(),
        transcript,
        title=f"{clip['file']}: waveform, log-mel, audio codes (12.5 a second) and text",
        caption=f"said: {clip['text']}",
    )
    return transcript


def answer_questions(engine: KimiMM, output: Path) -> list[str]:
    """Answers the questions about the shipped pictures, and draws pictures and answers.

    Returns:
        A line for each question, how many answers are right, and where the drawing is.
    """
    import numpy as np
    from PIL import Image

    from kimi_mm.data.scene_sets import read_set
    from kimi_mm.evaluation.picture import draw_answers
    from kimi_mm.evaluation.vision import Judge, answer_all

    judge = Judge()
    results = answer_all(lambda path, question: engine.describe(path, question), read_set(PICTURES))
    lines, drawn = ["\nquestions about pictures"], []
    for done in results:
        right = judge.right(done.question, done.said)
        mark = "right" if right else f"wrong: {done.question.answer}"
        lines.append(f"  {done.picture}  {done.question.text}  {done.said}  ({mark}; {done.elapsed:.1f} s)")
        with Image.open(PICTURES / done.picture) as picture:
            drawn.append((np.asarray(picture.convert("RGB")), done.question.text, done.said, right))
    draw_answers(output / ANSWERS_PICTURE, drawn, "questions about pictures, and the model's answers")
    count = sum(right for *_, right in drawn)
    return [*lines, f"{count} of {len(drawn)} answers right", f"picture: {output / ANSWERS_PICTURE}"]


def speak_clip(engine: KimiMM, clip: dict[str, Any], output: Path) -> list[str]:
    """Says a clip again from its codes, and a sentence, into WAV files, and draws all spectrograms.

    A model without an audio branch, which chooses no codes, says the clip only.

    Returns:
        A line for each file: what it is, how long it lasts, and how long it took.
    """
    import time

    import torch

    from kimi_mm.audio.io import read_audio, write_wav
    from kimi_mm.evaluation.picture import draw_speech

    detokenizer = engine.detokenizer
    rate, mel = detokenizer.sample_rate, detokenizer.config.mel
    recording, _ = read_audio(CLIPS / clip["file"], rate)

    def again(wave: np.ndarray) -> np.ndarray:
        return detokenizer.decode(engine.tokenizer.encode(wave, rate).codes).cpu().numpy()

    lines, waves = [], {f"recording: {clip['text']}": recording}
    makers = {SPOKEN_AGAIN: (f"{clip['file']} again, from its codes", lambda: again(recording))}
    if engine.model.backbone.audio is not None:
        makers[SAID] = (f'said: "{SENTENCE}"', lambda: engine.speak(SENTENCE))
    for name, (what, make) in makers.items():
        start = time.perf_counter()
        wave = make()
        took = time.perf_counter() - start
        write_wav(output / name, wave, rate)
        waves[what] = wave
        lines.append(f"{output / name}: {what}; {len(wave) / rate:.1f} s of speech in {took:.1f} s")
    with torch.inference_mode():
        spectra = {
            name: detokenizer.mel(torch.from_numpy(wave)[None].to(detokenizer.device))[0].cpu().numpy()
            for name, wave in waves.items()
        }
    draw_speech(output / SPEECH_PICTURE, spectra, mel.sample_rate / mel.hop_length, "what goes in, and what comes out")
    return [*lines, f"picture: {output / SPEECH_PICTURE}"]
