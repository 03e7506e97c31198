"""What all runs of an ablation share: sentences, pictures with captions and questions, programs, held-out parts, a BPE.

DATA/texts.jsonl.gz ─► texts, held-out texts, documents, tokenizer.json
DATA/art/art.zip ────► captions.jsonl, asked.jsonl (conversations about pictures), programs.jsonl, guesses.jsonl (the
                       same conversations without program and result), held-captions.jsonl, held-questions.jsonl
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.ablation_cases import Scale
from kimi_mm.data.art import ART, Art
from kimi_mm.data.debug import write_debug_art, write_debug_data
from kimi_mm.data.loader import read_texts, training_texts
from kimi_mm.data.manifest import write_aside
from kimi_mm.data.programs.samples import SIZES, write_samples
from kimi_mm.data.questions import CAPTION, Asker, Question
from kimi_mm.data.scenes import Scene, compose, fits
from kimi_mm.errors import UserError
from kimi_mm.text.tokenizer import TextTokenizer

HELD_OUT = "held-out.jsonl.gz"
HELD_CAPTIONS, HELD_QUESTIONS = "held-captions.jsonl", "held-questions.jsonl"
KINDS = ("one", "several", "count", "shapes")
JUDGED = ("count", "color", "background", "name")  # kinds of held-out questions


def prepare_texts(folder: Path, data: Path, scale: Scale, *, made_up: bool) -> None:
    """Writes the sentences and the BPE, unless they are there.

    Raises:
        UserError: there is no text below `data`.
    """
    if (folder / "tokenizer.json").exists():
        return
    source = write_debug_data(folder)[1] if made_up else data / "texts.jsonl.gz"
    if not source.exists():
        raise UserError(f"{source}: there is no text here; run `kimi-mm prepare text --data {data}` first.")
    rows = read_texts(source)
    # The made-up text has no held-out part; its last third serves.
    held = [row for row in rows if row.get("held_out")] or rows[-max(1, len(rows) // 3) :]
    _write_texts(folder / HELD_OUT, [{**row, "held_out": False} for row in held])
    _write_texts(folder / "texts.jsonl.gz", [row for row in rows if not row.get("held_out")])
    texts = training_texts(folder / "texts.jsonl.gz")
    _write_rows(folder / "documents.jsonl", ({"text": text} for text in texts))
    write_aside(folder / "tokenizer.json", TextTokenizer.train(texts, scale.text_tokens).to_json().encode())


def prepare_pictures(folder: Path, data: Path, scale: Scale, *, made_up: bool) -> None:
    """Writes pictures, captions, conversations and programs, unless they are there.

    Raises:
        UserError: there is no art below `data`.
    """
    if (folder / HELD_QUESTIONS).exists():
        return
    source = write_debug_art(folder) if made_up else data / "art" / ART
    if not Path(source).exists():
        raise UserError(f"{source}: there is no art here; run `kimi-mm prepare art --data {data}` first.")
    art = Art(source)
    asker, held = Asker(art.things), max(4, scale.pictures // 10)
    write_samples(folder / "programs.jsonl", art, scale.pictures)
    lines = (folder / "programs.jsonl").read_text(encoding="utf-8").splitlines()
    turns = (json.loads(line)["messages"] for line in lines)
    _write_rows(folder / "guesses.jsonl", ({"messages": [asked, answer]} for asked, _, _, answer in turns))
    captions, conversations = [], []
    for number in range(scale.pictures + held):
        rng = np.random.default_rng((7, number))
        scene = _scene(art, rng)
        name = f"pictures/{number:06d}.png"
        (folder / "pictures").mkdir(exist_ok=True)
        Image.fromarray(scene.image).save(folder / name)
        captions.append({"image": name, "text": asker.caption(scene, rng).answer})
        conversations.append((name, [q for q in asker.questions(scene, rng) if q.text != CAPTION]))
    _write_rows(folder / "captions.jsonl", captions[held:])
    _write_rows(folder / HELD_CAPTIONS, captions[:held])
    _write_rows(folder / "asked.jsonl", (_conversation(name, asked) for name, asked in conversations[held:] if asked))
    judged = ((name, [q for q in asked if q.kind in JUDGED]) for name, asked in conversations[:held])
    _write_rows(folder / HELD_QUESTIONS, ({"image": name, **asdict(asked[0])} for name, asked in judged if asked))


def held_questions(folder: Path) -> list[tuple[Path, Question]]:
    """Reads the held-out questions: pictures, and what is asked about them."""
    rows = [json.loads(line) for line in (folder / HELD_QUESTIONS).read_text(encoding="utf-8").splitlines()]
    return [
        (folder / row["image"], Question(row["kind"], row["text"], row["answer"], tuple(row["truth"]))) for row in rows
    ]


def _scene(art: Art, rng: np.random.Generator) -> Scene:
    size = SIZES[rng.integers(len(SIZES))]
    kinds = [kind for kind in KINDS if fits(kind, size)]
    return compose(art, kinds[rng.integers(len(kinds))], size, rng)


def _conversation(name: str, asked: list[Question]) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for question in asked[:4]:
        parts = [] if messages else [{"type": "image", "image": name}]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question.text}]})
        messages.append({"role": "assistant", "content": question.answer})
    return {"messages": messages}


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_aside(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _write_texts(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))
