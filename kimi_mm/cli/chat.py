"""`kimi-mm chat`: a conversation by voice or text, answered in text and speech; the model remembers every turn.

Turns come from the command line, in its order (`--text`, `--audio`), from a terminal, or line by line from a pipe. A
line is what the user writes, `/audio FILE` a recording, `/quit` the end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from kimi_mm.cli.errors import complain, debugging, describe
from kimi_mm.cli.outputs import check_writable, write_file
from kimi_mm.errors import UserError

if TYPE_CHECKING:
    from kimi_mm.conversation import Conversation

Turn = tuple[str, str]  # "text" or "audio", and the text or the file
_ORDER = "kimi_mm.turns"


class TurnsInOrder(TyperCommand):
    """Notes in which order `--text` and `--audio` were given, which their two lists no longer tell."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses as usual."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta[_ORDER] = [parameter.name for parameter in order if parameter.name in ("text", "audio")]
        return super().parse_args(ctx, args)


def chat(
    context: typer.Context,
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="A written turn; may be repeated.")] = None,
    audio: Annotated[
        list[str] | None, typer.Option("--audio", "-a", metavar="FILE", help="A spoken turn; may be repeated.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where replies go: reply-001.wav, ...")
    ] = Path("chat-output"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a reply.")] = False,
    voice: Annotated[
        str | None, typer.Option(metavar="FILE", help="Answer in the voice of this recording; default: the model's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    model: Annotated[str, typer.Option(help="A shipped model's name or a checkpoint folder.")] = "nano",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Talk with the model: text or recordings in, text and speech out."""
    given = {"text": iter(text or []), "audio": iter(audio or [])}
    turns: list[Turn] = [(kind, next(given[kind])) for kind in context.meta[_ORDER]]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: the folder cannot be made ({error.strerror}).") from None
    check_writable(output / "reply-001.wav")

    import torch

    import kimi_mm
    from kimi_mm.conversation import Conversation

    engine = kimi_mm.load(model, device=device)
    prompt = None if voice is None else engine.voice(voice)
    conversation = Conversation(engine, generator=torch.Generator().manual_seed(seed), voice=prompt)
    failed = 0
    for number, (kind, content) in enumerate(turns or _typed(), start=1):
        path = output / f"reply-{number:03d}.wav"
        try:
            _answer(conversation, kind, content, path, as_json)
        except UserError as error:
            if debugging():
                raise
            complain(describe(error))
            failed += 1
    if failed:
        raise typer.Exit(1)


def _answer(conversation: Conversation, kind: str, content: str, path: Path, as_json: bool) -> None:
    """Gives one turn to the conversation, prints the reply as it comes and writes its speech."""
    import numpy as np
    import torch

    from kimi_mm.cli.resynth import encode_wav
    from kimi_mm.types import Stopped, TextPiece, WavePiece

    text, waves, stopped = "", [], Stopped("audio", "eos")
    for event in conversation.say(content) if kind == "text" else conversation.say(audio=content):
        if isinstance(event, TextPiece):
            text += event.text
            if not as_json:
                print(event.text, end="", flush=True)
        elif isinstance(event, WavePiece):
            waves.append(event.wave)
        elif isinstance(event, Stopped):
            stopped = event
    wave = np.concatenate(waves) if waves else np.zeros(0, np.float32)
    if len(wave):
        write_file(path, encode_wav(torch.from_numpy(wave), conversation.sample_rate))
    seconds = len(wave) / conversation.sample_rate
    if as_json:
        row = {"turn": {kind: content}, "text": text, "audio": str(path) if waves else None}
        row |= {"seconds": round(seconds, 2), "stopped": {"text": stopped.text, "audio": stopped.audio}}
        print(json.dumps(row, ensure_ascii=False), flush=True)
        return
    print(f"  [{path}, {seconds:.1f} s]" if waves else "  [no speech]", flush=True)


def _typed() -> Iterator[Turn]:
    """Yields the turns that are typed, or come through a pipe, until the end or `/quit`."""
    asks = sys.stdin.isatty()
    if asks:
        print("Write, or /audio FILE for a recording; /quit or Ctrl-D ends.", file=sys.stderr)
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        command, _, rest = line.strip().partition(" ")
        if command == "/audio":
            yield "audio", rest.strip()
        elif line.strip():
            yield "text", line.strip()
