"""`kimi-mm say`: a text of any length, spoken."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_mm.cli.errors import UsageError, complain
from kimi_mm.cli.outputs import check_writable, write_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kimi_mm.types import Event


def say(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to say; '-' reads standard input.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="OUT.wav", help="24 kHz mono WAV; '-': standard output, as made.")
    ],
    voice: Annotated[
        str | None, typer.Option(metavar="FILE", help="Speak like this recording; default: the model's voice.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the choice of codes; 0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among the K likeliest codes; 0: all.")] = 10,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Solver steps for each piece; default: the model's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    model: Annotated[str, typer.Option(help="A shipped model's name or a checkpoint folder.")] = "nano",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Speak a text."""
    path = wav_path(output)
    if path is None and sys.stdout.isatty():
        raise UsageError("sound would go to the terminal; give a file with --output, or pipe it into a player.")
    if text == "-":
        text = sys.stdin.read()

    import torch

    import kimi_mm
    from kimi_mm.generation_speech import SpeechSampling, TokenSampling

    engine = kimi_mm.load(model, device=device)
    streaming = engine.detokenizer.config.streaming
    events = engine.speak_stream(
        text,
        sampling=SpeechSampling(audio=TokenSampling(temperature=temperature, top_k=top_k)),
        generator=torch.Generator().manual_seed(seed),
        voice=None if voice is None else engine.voice(voice),
        streaming=streaming if steps is None else streaming.replace(steps=steps),
    )
    put(events, path, engine.detokenizer.sample_rate)


def wav_path(output: str) -> Path | None:
    """Returns where a WAV goes; None is standard output. UsageError, UserError: it cannot go there."""
    if output == "-":
        return None
    if Path(output).suffix.lower() != ".wav":
        raise UsageError(f"{output}: results are WAV; give a name that ends in .wav, or '-'.")
    check_writable(Path(output))
    return Path(output)


def put(events: Iterator[Event], path: Path | None, rate: int) -> None:
    """Writes speech to a file when it is whole, or to standard output as it comes (a WAV of unknown length)."""
    import numpy as np
    import torch

    from kimi_mm.audio.io import pcm16, wav_stream_header
    from kimi_mm.cli.resynth import encode_wav
    from kimi_mm.types import Stopped, WavePiece

    pieces = []
    if path is None:
        sys.stdout.buffer.write(wav_stream_header(rate))
    for event in events:
        if isinstance(event, WavePiece) and path is None:
            sys.stdout.buffer.write(pcm16(event.wave))
            sys.stdout.buffer.flush()
        elif isinstance(event, WavePiece):
            pieces.append(event.wave)
        elif isinstance(event, Stopped) and event.audio == "budget":
            complain("the speech was cut off where it became too long for its text.")
    if path is not None:
        write_file(path, encode_wav(torch.from_numpy(np.concatenate(pieces)), rate))
