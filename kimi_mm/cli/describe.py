"""`kimi-mm describe`: pictures and clips and a question in, an answer out, and a picture of where it looked.

With `--programs` the model writes programs over a picture, which are run; they and their results go to standard error.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_mm.cli.errors import UsageError, complain, for_each
from kimi_mm.cli.outputs import check_writable

if TYPE_CHECKING:
    from kimi_mm.pipeline import KimiMM
    from kimi_mm.vision.processing import VisionItem

_PICTURE_NAME = re.compile(r"(?i).\.(png|jpe?g|webp|gif|bmp|tiff?|ppm|svg|pdf|heic|avif|mp4|mov|mkv|webm|avi)$")


def describe(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE... [QUESTION]", help="Pictures or clips; '-' is standard input. Then a question."
        ),
    ],
    question: Annotated[
        str | None, typer.Option("--question", "-Q", help="The question, where it could be taken for a file.")
    ] = None,
    each: Annotated[bool, typer.Option("--each", help="One answer per picture instead of one about all.")] = False,
    explain: Annotated[
        Path | None, typer.Option("--explain", metavar="OUT.png", help="Draw the answer's attention over patches.")
    ] = None,
    programs: Annotated[
        bool,
        typer.Option("--programs", help="Let the model answer by programs over the picture (crop, count, read...)."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object an answer.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    model: Annotated[str, typer.Option(help="A shipped model's name or a checkpoint folder.")] = "nano",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Describe pictures and clips, or answer a question about them."""
    if question is None and len(images) > 1 and is_question(images[-1]):
        *images, question = images
    if images.count("-") > 1:
        raise UsageError("standard input ('-') can be read only once.")
    if explain is not None:
        if each and len(images) > 1:
            raise UsageError("--explain draws one answer; leave out --each or give one picture.")
        check_writable(explain)

    if programs and (explain is not None or (len(images) > 1 and not each)):
        raise UsageError("--programs answers about one picture, or --each, and without --explain.")
    if programs and question is None:
        raise UsageError("--programs needs a question.")

    import kimi_mm
    from kimi_mm.pipeline import QUESTION

    engine = kimi_mm.load(model, device=device)
    if programs:
        failed = for_each(images, lambda name: _by_programs(engine, name, str(question), max_tokens, as_json, each))
        if failed:
            raise typer.Exit(1)
        return
    engine.look([])  # says at once that a model has no eyes
    asked = QUESTION if question is None else question
    found: dict[str, list[VisionItem]] = {}

    def read(name: str) -> None:
        found[name] = engine.look(name)
        for note in (note for item in found[name] for note in item.notes):
            complain(note)

    failed = for_each(images, read)
    if failed and not (each and found):
        raise typer.Exit(1)
    groups = [[name] for name in images if name in found] if each else [images]
    for names in groups:
        items = [item for name in names for item in found[name]]
        answer = _answer(engine, names, items, asked, max_tokens, as_json, label=each and len(groups) > 1)
        if explain is not None:
            _explain(engine, items, asked, answer, explain)
    if failed:
        complain(f"{failed} of {len(images)} pictures could not be read.")
        raise typer.Exit(1)


def is_question(text: str) -> bool:
    """Tells whether a last argument is meant as a question: no such file, and words rather than a file's name."""
    try:
        exists = Path(text).exists()
    except (OSError, ValueError):
        exists = False
    if exists or text == "-" or text.lower().startswith("data:") or "://" in text:
        return False
    if _PICTURE_NAME.search(text):
        return False
    return " " in text or text.endswith("?") or ("/" not in text and not Path(text).suffix)


def _answer(
    engine: KimiMM,
    names: list[str],
    items: list[VisionItem],
    question: str,
    max_tokens: int,
    as_json: bool,
    label: bool,
) -> str:
    """Prints an answer as it grows, or as JSON when it is whole, and returns it."""
    pieces = []
    if label and not as_json:
        print(f"{names[0]}: ", end="")
    for piece in engine.describe_stream(items, question, max_tokens=max_tokens):
        pieces.append(piece)
        if not as_json:
            print(piece, end="", flush=True)
    text = "".join(pieces)
    if as_json:
        seen = [{"grid": list(item.grid), "tokens": item.num_tokens, "seconds": item.seconds} for item in items]
        row = {"files": names, "model": engine.config.name, "question": question, "text": text, "items": seen}
        print(json.dumps(row, ensure_ascii=False), end="")
    print(flush=True)
    return text


def _by_programs(engine: KimiMM, name: str, question: str, max_tokens: int, as_json: bool, label: bool) -> None:
    """Prints the answer about one picture, and before it, on standard error, the programs and what they gave."""
    turns = []
    for turn in engine.describe_by_programs(name, question, max_tokens=max_tokens):
        turns.append({"kind": turn.kind, "text": turn.text})
        if turn.kind != "answer" and not as_json:
            for line in turn.text.splitlines():
                print(f"{turn.kind}: {line}", file=sys.stderr, flush=True)
    answer = turns.pop()["text"]
    if as_json:
        row = {"files": [name], "model": engine.config.name, "question": question, "text": answer, "programs": turns}
        print(json.dumps(row, ensure_ascii=False), flush=True)
    else:
        print(f"{name}: {answer}" if label else answer, flush=True)


def _explain(engine: KimiMM, items: list[VisionItem], question: str, answer: str, path: Path) -> None:
    from kimi_mm.vision.explain import attention_over_items, draw_attention

    attention = attention_over_items(engine, items, question, answer)
    draw_attention(path, items, attention, title=question, caption=answer)
    print(f"picture: {path}", file=sys.stderr)
