"""`kimi-mm resynth`: a recording to codes and back to speech, in the model's voice or that of another recording."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_mm.cli.errors import UsageError
from kimi_mm.cli.outputs import check_writable, write_file

if TYPE_CHECKING:
    from torch import Tensor


def resynth(
    source: Annotated[str, typer.Argument(metavar="IN", help="A recording; '-' is standard input.")],
    output: Annotated[str, typer.Argument(metavar="OUT.wav", help="24 kHz mono WAV; '-' is standard output.")],
    voice: Annotated[
        str | None, typer.Option(metavar="FILE", help="Speak like this recording; default: the model's voice.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Solver steps for each piece; default: the model's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise that speech is made from.")] = 0,
    model: Annotated[str, typer.Option(help="A shipped model's name or a checkpoint folder.")] = "nano",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Tokenize a recording and speak its codes again."""
    if output != "-":
        if Path(output).suffix.lower() != ".wav":
            raise UsageError(f"{output}: results are WAV; give a name that ends in .wav, or '-'.")
        check_writable(Path(output))
        if Path(source).exists() and Path(output).exists() and Path(output).samefile(source):
            raise UsageError(f"{output}: the result would replace the recording; give another name.")
    if voice == source == "-":
        raise UsageError("standard input ('-') can be read only once.")

    import torch

    import kimi_mm
    from kimi_mm.audio.io import read_audio

    engine = kimi_mm.load(model, device=device)
    detokenizer, tokenizer = engine.detokenizer, engine.tokenizer
    wave, _ = read_audio(source)
    prompt, rate = None, detokenizer.sample_rate
    if voice is not None:
        target, _ = read_audio(voice, rate)
        prompt = detokenizer.prompt(target, rate, tokenizer.encode(target, rate).codes)
    streaming = detokenizer.config.streaming
    if steps is not None:
        streaming = streaming.replace(steps=steps)
    codes, generator = tokenizer.encode(wave).codes, torch.Generator().manual_seed(seed)
    data = encode_wav(detokenizer.decode(codes, prompt=prompt, generator=generator, streaming=streaming), rate)
    if output == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        write_file(Path(output), data)


def encode_wav(wave: Tensor, sample_rate: int) -> bytes:
    """Returns a mono 16-bit WAV file of samples [S] in [-1, 1]."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, wave.cpu().numpy(), sample_rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()
