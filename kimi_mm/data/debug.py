"""A corpus of a few seconds for debug runs: buzzes for words, so that every recipe runs without any download."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np

from kimi_mm.audio.io import write_wav
from kimi_mm.data.art import ART, ICON_SIZE, Named, icon_bytes, write_pack
from kimi_mm.data.dialog_sets import DIALOGS
from kimi_mm.data.dialogs import Dialog, Turn
from kimi_mm.data.drawing import outlined, shape_icon
from kimi_mm.data.manifest import write_rows
from kimi_mm.data.shards import Clip, write_shard
from kimi_mm.data.targets import CANONICAL, TargetClip, write_target_shard

_WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "left",
    "right",
    "up",
    "down",
    "stop",
    "go",
]


def write_debug_data(folder: Path, count: int = 48, seed: int = 0) -> tuple[Path, Path]:
    """Writes `folder/speech` (one shard) and `folder/texts.jsonl.gz`; returns both paths.

    Each word is a vowel-like buzz of its own pitch, 0.2 s long; sentences have two to six words.
    """
    rng = np.random.default_rng(seed)
    speech = folder / "speech"
    speech.mkdir(parents=True, exist_ok=True)
    pieces, rows, at = [], [], 0
    time = np.arange(3200) / 16_000
    for number in range(count):
        words = rng.choice(len(_WORDS), size=rng.integers(2, 7))
        tones = [sum(np.sin(2 * np.pi * (110 + 15 * w) * h * time) / h for h in range(1, 9)) for w in words]
        wave = (np.concatenate(tones) * 3000).astype(np.int16)
        text = " ".join(_WORDS[w] for w in words)
        rows.append({"id": f"debug-{number}", "text": text, "voice": "buzz", "start": at, "samples": len(wave)})
        pieces.append(wave)
        at += len(wave)
    np.save(speech / "shard-00000.npy", np.concatenate(pieces))
    (speech / "shard-00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = folder / "texts.jsonl.gz"
    lines = "".join(json.dumps({"id": row["id"], "text": row["text"]}) + "\n" for row in rows)
    texts.write_bytes(gzip.compress(lines.encode(), mtime=0))
    return speech, texts


def write_debug_art(folder: Path) -> Path:
    """Writes `folder/art.zip`: six toys that are plain shapes, one font, a few words; returns its path."""
    import matplotlib

    toys = {
        "ball": ("circle", (220, 30, 30)),
        "box": ("square", (30, 90, 220)),
        "hill": ("triangle", (40, 160, 60)),
        "kite": ("diamond", (240, 200, 30)),
        "tyre": ("ring", (40, 40, 40)),
        "moon": ("crescent", (150, 80, 200)),
    }
    files, things = {}, []
    for name, (shape, rgb) in toys.items():
        icon = shape_icon(shape, rgb, ICON_SIZE, np.random.default_rng(0))
        members = {f"icons/plain/{name}.webp": icon, f"icons/drawn/{name}.webp": outlined(icon)}
        files.update({member: icon_bytes(image) for member, image in members.items()})
        things.append(Named(name, f"{name}s", "toy", tuple((member.split("/")[1], member) for member in members)))
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"
    files["fonts/DejaVuSansMono.ttf"] = font.read_bytes()
    words = sorted({*_WORDS, *(f"{a}{b}" for a in ("un", "re", "in") for b in _WORDS)})
    write_pack(folder / ART, things, files, words)
    return folder / ART


def write_debug_conversations(folder: Path, count: int = 12, seed: int = 0) -> Path:
    """Writes `folder/talk/debug.jsonl`: questions in words, about a buzz, and about a coloured square, in turns."""
    rng = np.random.default_rng(seed)
    talk = folder / "talk"
    talk.mkdir(parents=True, exist_ok=True)
    colors = {"red": (220, 30, 30), "green": (40, 160, 60), "blue": (30, 90, 220)}
    time = np.arange(8000) / 16_000
    lines = []
    for number in range(count):
        word = _WORDS[rng.integers(len(_WORDS))]
        parts: list[dict] = [{"type": "text", "text": f"say {word}"}]
        if number % 3 == 1:
            write_wav(talk / f"{number}.wav", 0.3 * np.sin(2 * np.pi * (110 + 15 * _WORDS.index(word)) * time), 16_000)
            parts = [{"type": "audio", "audio": f"{number}.wav"}]
        elif number % 3 == 2:
            word = list(colors)[rng.integers(len(colors))]
            shape_icon("square", colors[word], 56, rng).convert("RGB").save(talk / f"{number}.png")
            parts = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "go"}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": word}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    (talk / "debug.jsonl").write_text("".join(lines), encoding="utf-8")
    return talk / "debug.jsonl"


def write_debug_turns(folder: Path, count: int = 12, seed: int = 0) -> Path:
    """Writes `folder/turns/debug.jsonl`: two buzzes are heard and answered in text, or in speech over two turns."""
    rng = np.random.default_rng(seed)
    turns = folder / "turns"
    turns.mkdir(parents=True, exist_ok=True)
    time = np.arange(8000) / 16_000
    for number, word in enumerate(_WORDS):
        write_wav(turns / f"{word}.wav", 0.3 * np.sin(2 * np.pi * (110 + 15 * number) * time), 16_000)
    lines = []
    for number in range(count):
        one, other = (_WORDS[i] for i in rng.choice(len(_WORDS), size=2, replace=False))
        heard = [{"type": "audio", "audio": f"{word}.wav"} for word in (one, other)]
        answer: list[dict] = [{"type": "text", "text": f"{one} {other}"}]
        messages: list[dict] = [{"role": "user", "content": [{"type": "text", "text": "say"}, *heard]}]
        if number % 2:
            messages += [{"role": "assistant", "content": [*answer, heard[1]]}, {"role": "user", "content": [heard[0]]}]
            answer = [{"type": "text", "text": one}, heard[0]]
        lines.append(json.dumps({"messages": [*messages, {"role": "assistant", "content": answer}]}) + "\n")
    (turns / "debug.jsonl").write_text("".join(lines), encoding="utf-8")
    return turns / "debug.jsonl"


def write_debug_chat(folder: Path, count: int = 12, seed: int = 0) -> Path:
    """Writes `folder/chat.jsonl`: conversations in text alone, two turns each; returns its path."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        messages: list[dict] = []
        for i in rng.choice(len(_WORDS), size=2, replace=False):
            messages.append({"role": "user", "content": f"say {_WORDS[i]}"})
            messages.append({"role": "assistant", "content": _WORDS[i]})
        lines.append(json.dumps({"messages": messages}) + "\n")
    (folder / "chat.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "chat.jsonl"


def write_debug_documents(folder: Path) -> dict[str, Path]:
    """Writes `folder/talk/*.jsonl` for every layout of documents; returns them by layout."""
    talk = write_debug_conversations(folder).parent
    sounds, pictures = (sorted(path.name for path in talk.glob(f"*.{suffix}")) for suffix in ("wav", "png"))
    spoken = [{"audio": name, "text": _WORDS[i]} for i, name in enumerate(sounds)]
    seen = [{"image": name, "text": "a square"} for name in pictures]
    parts = [{"type": "text", "text": "here"}, {"type": "image", "image": pictures[0]}, {"type": "text", "text": "up"}]
    segments = [{"segments": spoken[i : i + 3]} for i in range(len(spoken) - 2)]
    rows = {
        "document": [{"text": "one two three"}, {"parts": parts}],
        "audio": [{"audio": name} for name in sounds],
        "audio_to_text": spoken,
        "text_to_audio": spoken,
        "image_to_text": seen,
        **dict.fromkeys(("interleaved_codes", "interleaved_text", "interleaved_both"), segments),
    }
    for layout, values in rows.items():
        text = "".join(json.dumps(value) + "\n" for value in values)
        (talk / f"{layout}.jsonl").write_text(text, encoding="utf-8")
    return {"conversation": talk / "debug.jsonl", **{layout: talk / f"{layout}.jsonl" for layout in rows}}


def write_debug_targets(folder: Path, count: int = 24, seed: int = 0) -> Path:
    """Writes `folder/targets`, one shard of buzzes in two voices, heard in a third one; returns its path."""
    rng = np.random.default_rng(seed)
    time = np.arange(4800 * 4) / 24_000
    clips = []
    for number in range(count):
        pitch = rng.choice([110.0, 147.0, 196.0])
        voice, octave = (CANONICAL, 1.0) if number % 3 else ("hibari-morph-000", 0.5)
        target, heard = (
            np.asarray(3000 * sum(np.sin(2 * np.pi * pitch * factor * h * t) / h for h in range(1, 9))).astype(np.int16)
            for factor, t in ((octave, time), (0.8, time[: len(time) * 2 // 3] * 1.5))
        )
        clips.append(TargetClip(f"debug-{number}", "buzz", f"{voice}:debug", target, heard))
    write_target_shard(folder / "targets", 0, clips)
    return folder / "targets"


def write_debug_dialogs(folder: Path, count: int = 24, seed: int = 0) -> Path:
    """Writes `folder/dialogs`: dialogs of one or two turns in which "say one" is asked, and "one" answered, in buzzes.

    Every question and answer has a recording, the question two; returns the path of the set.
    """
    rng = np.random.default_rng(seed)
    out, asked, answered = folder / "dialogs", [], []
    for number, word in enumerate(_WORDS):
        for copy in range(2):
            time = np.arange(8000 + 1600 * copy) / 16_000
            wave = (3000 * np.sin(2 * np.pi * (110 + 15 * number) * (1 + copy) * time)).astype(np.int16)
            asked.append(Clip(f"ask-{number}-{copy}", f"say {word}", "buzz", wave))
        target, heard = (
            (3000 * np.sin(2 * np.pi * (110 + 15 * number) * np.arange(rate * 3 // 5) / rate)).astype(np.int16)
            for rate in (24_000, 16_000)
        )
        answered.append(TargetClip(f"answer-{number}", word, f"{CANONICAL}:debug", target, heard))
    dialogs = []
    for number in range(count):
        words = [_WORDS[i] for i in rng.choice(len(_WORDS), size=1 + number % 2, replace=False)]
        turns = tuple(Turn("repeat", word, f"say {word}", word, word) for word in words)
        dialogs.append(Dialog(f"debug-{number}", turns))
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / DIALOGS, [dataclasses.asdict(dialog) for dialog in dialogs])
    (out / "questions").mkdir(exist_ok=True)
    write_shard(out / "questions", 0, asked)
    (out / "answers").mkdir(exist_ok=True)
    write_target_shard(out / "answers", 0, answered)
    return out
