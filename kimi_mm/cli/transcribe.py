"""`kimi-mm transcribe`: recordings in, text or subtitles out."""

from __future__ import annotations

from typing import Annotated

import typer

from kimi_mm.cli.errors import complain, for_each
from kimi_mm.cli.formats import SUFFIXES, TranscriptFormat, render
from kimi_mm.cli.outputs import Destination
from kimi_mm.cli.progress import progress_bar
from kimi_mm.errors import AudioError


def transcribe(
    files: Annotated[list[str], typer.Argument(metavar="FILES...", help="Recordings; '-' is standard input.")],
    format: Annotated[
        TranscriptFormat, typer.Option("--format", "-f", help="JSON is one object a line.")
    ] = TranscriptFormat.text,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE|DIR", help="Default: standard output.")
    ] = None,
    model: Annotated[str, typer.Option(help="A shipped model's name or a checkpoint folder.")] = "nano",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    beams: Annotated[int, typer.Option(min=1, max=32, help="Readings followed side by side; 1 is fastest.")] = 4,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Transcribe recordings of any format, rate and length."""
    joinable = format in (TranscriptFormat.text, TranscriptFormat.json)
    destination = Destination(files, output, SUFFIXES[format], joinable)
    label = len(files) > 1 and destination.folder is None

    import kimi_mm
    from kimi_mm.audio.io import read_audio

    engine = kimi_mm.load(model, device=device)

    def work(name: str) -> None:
        wave, _ = read_audio(name)
        with progress_bar(name, quiet) as progress:
            transcript = engine.transcribe(wave, sample_rate=16_000, beams=beams, progress=progress)
        if not transcript.text.strip():
            raise AudioError("no speech was found.")
        destination.put(name, render(transcript, format, name, model, label).encode("utf-8", "backslashreplace"))

    failed = for_each(files, work)
    destination.close()
    if failed:
        if len(files) > 1:
            complain(f"{failed} of {len(files)} recordings could not be transcribed.")
        raise typer.Exit(1)
