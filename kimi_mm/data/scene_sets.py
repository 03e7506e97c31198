"""Test sets of pictures with one question each, none of whose compositions was ever trained on.

    art.zip, held-out.zip, scikit-learn's digits ─► DATA/scenes/<set>/{00000.png, ..., manifest.jsonl, manifest.json}

| set      | pictures                                   | question                     | truth                   |
|----------|--------------------------------------------|------------------------------|-------------------------|
| naming   | one thing on a held-out background, or a held-out pair | what it is, what there is | names           |
| style    | one thing in OpenMoji's style              | what it is                   | name                    |
| count    | a held-out number of a thing               | how many                     | number word             |
| color    | shapes, one in a held-out colour           | its colour                   | colour                  |
| relation | three things of held-out pairs in a line   | where, what, whether         | side, name, yes or no   |
| reading  | held-out words in held-out fonts           | what it says                 | text                    |
| digits   | scikit-learn's 8 x 8 scans, enlarged       | which digit                  | digit                   |
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from kimi_mm.data.art import ART, HELD_OUT, Art, held_out
from kimi_mm.data.digits import coarse_picture
from kimi_mm.data.manifest import ManifestError, read_rows, resolve, write_aside, write_manifest, write_rows
from kimi_mm.data.packages import wheel_package
from kimi_mm.data.questions import NUMBERS, Asker, Question
from kimi_mm.data.scenes import Scene, compose, compositions, fits
from kimi_mm.errors import UserError

SETS = ("naming", "style", "count", "color", "relation", "reading", "digits")
KEYS = {"image": str, "question": str, "kind": str, "truth": list, "answer": str}
COUNT = 300
SEED = 20_000_000  # far from the seeds of training
DIGITS_PACKAGE = "scikit-learn"
DIGITS_FROM = 500  # the first 500 were looked at while the skeletons of `digits` were drawn

Example = tuple[Image.Image, Question]


def prepare_scenes(
    out: str | Path,
    art: str | Path,
    *,
    packages: str | Path | None = None,
    count: int | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, int]:
    """Writes all test sets and returns how many questions each has.

    Args:
        out: folder; each set becomes one of its folders.
        art: folder of `art.zip` and `held-out.zip`.
        packages: folder of already downloaded packages, for the digits.
        count: questions of a set; None is 300.
        note: called with the name of each step.

    Raises:
        CheckpointError: art is missing.
        PackageError: the digits cannot be had.
    """
    art, report = Path(art), {}
    for name in SETS:
        if note:
            note(f"drawing {name}")
        examples = _digits(packages, count or COUNT) if name == "digits" else draw_set(name, art, count or COUNT)
        report[name] = write_set(Path(out) / name, examples)
    return report


def draw_set(name: str, art: Path, count: int) -> Iterator[Example]:
    """Yields the pictures and questions of a drawn set: a function of its name and their numbers alone."""
    both = Art(art / ART, art / HELD_OUT)
    new_fonts = Art(art / HELD_OUT).fonts
    pack = Art(art / HELD_OUT) if name == "style" else Art(art / ART)
    if name == "reading":
        pack, pack.fonts = both, new_fonts
    asker, number = Asker(pack.things), 0
    found = 0
    while found < count:
        rng = np.random.default_rng((SEED, SETS.index(name), number))
        number += 1
        kind = _kind(name, rng)
        size = _size(kind, rng)
        scene = compose(pack, kind, size, rng, test=True)
        chosen = [q for q in asker.questions(scene, rng) if _belongs(name, scene, q)]
        if number > 1000 + 100 * count:
            raise UserError(f"{art}: has too little art for the test set '{name}'; run 'kimi-mm prepare art' again.")
        if chosen and _unseen(name, scene):
            found += 1
            yield Image.fromarray(scene.image), chosen[0]


def write_set(folder: Path, examples: Iterator[Example]) -> int:
    """Writes a set and returns how many questions it has."""
    rows, files = [], []
    for number, (image, question) in enumerate(examples):
        path = folder / f"{number:05d}.png"
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=False)
        write_aside(path, buffer.getvalue())
        row = {"image": path.name, "question": question.text, "kind": question.kind, "truth": list(question.truth)}
        rows.append({**row, "answer": question.answer})
        files.append(path)
    write_rows(folder / "manifest.jsonl", rows)
    write_manifest(folder, "scenes", [*files, folder / "manifest.jsonl"])
    return len(rows)


def read_set(folder: str | Path) -> list[tuple[Path, Question]]:
    """Returns the pictures and questions of a prepared set.

    Raises:
        ManifestError: the set is missing or damaged; names the file and the line.
    """
    folder = Path(folder)
    path = folder / "manifest.jsonl"
    if not path.is_file():
        raise ManifestError(f"{folder}: holds no prepared pictures; run 'kimi-mm prepare scenes' first.")
    return [
        (
            resolve(folder, row["image"], f"{path}:{number}"),
            Question(row["kind"], row["question"], row["answer"], tuple(row["truth"])),
        )
        for number, row in enumerate(read_rows(path, KEYS), start=1)
    ]


def _kind(name: str, rng: np.random.Generator) -> str:
    if name == "naming":
        return "one" if rng.random() < 0.5 else "several"
    return {"style": "one", "color": "shapes", "relation": "line", "reading": "text"}.get(name, name)


def _size(kind: str, rng: np.random.Generator) -> tuple[int, int]:
    """Draws a size from 56 x 56 to 512 x 512, of odd proportions now and then, that suits the kind."""
    while True:
        draw = rng.random()
        if draw < 0.5:
            size = (side := int(rng.integers(84, 337)), side)
        elif draw < 0.85:
            size = (int(rng.integers(70, 400)), int(rng.integers(70, 400)))
        else:
            size = (side := int(rng.choice([56, 64, 448, 512])), side)
        if fits(kind, size) and max(size) <= 3 * min(size):
            return size


def _belongs(name: str, scene: Scene, question: Question) -> bool:
    """Tells whether a question is what its set is about, and about the held-out part of the scene."""
    if name in ("naming", "style"):
        return question.kind == ("name" if scene.kind == "one" and name == "style" else "caption")
    if name == "count":
        number = sum(thing.name == scene.things[0].name for thing in scene.things)
        several = len({thing.name for thing in scene.things}) > 1
        about_all = any(word in question.text for word in ("things", "objects"))
        return question.kind == "count" and question.truth == (NUMBERS[number],) and not (several and about_all)
    if name == "color":
        about_it = question.kind == "color" and f"the {scene.things[0].name}" in question.text
        return about_it and question.truth != (scene.background,)
    return question.kind == {"reading": "read"}.get(name, name)


def _unseen(name: str, scene: Scene) -> bool:
    """Tells whether a scene shows a held-out composition of the kind that its set is about."""
    wanted = {
        "one": "background",
        "several": "pair",
        "line": "pair",
        "count": "count",
        "shapes": "shape",
        "text": "word",
    }
    shown = [held_out(*parts) for parts in compositions(scene) if parts[0] == wanted[scene.kind]]
    return name == "style" or (all(shown) if name == "reading" else any(shown))


def _digits(packages: str | Path | None, count: int) -> Iterator[Example]:
    """Yields scikit-learn's scans of handwritten digits, evenly from those that nobody looked at."""
    found = sorted(wheel_package(DIGITS_PACKAGE, packages).rglob("digits.csv.gz"))
    if not found:
        raise ManifestError(f"The package {DIGITS_PACKAGE} holds no digits.csv.gz; another version is needed.")
    text = gzip.decompress(found[0].read_bytes()).decode("ascii")
    rows = np.asarray([[float(v) for v in line.split(",")] for line in text.split()])[DIGITS_FROM:]
    for i in np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int):
        digit = str(int(rows[i, 64]))
        question = Question("digit", "Which digit is this?", f"{digit}.", (digit,))
        yield coarse_picture(rows[i, :64].reshape(8, 8), 112).convert("RGB"), question
