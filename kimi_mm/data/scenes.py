"""Scenes composed from art, with everything that can be asked about them known exactly.

    (art, kind, size, split, generator) ─► Scene: image [H, W, 3] uint8, things with names and boxes, background colour

A scene is a pure function of its arguments. Compositions are split by `held_out`: training scenes never show a held-out
pair of things, of a thing and a background, of a shape and a colour, of a thing and its number, or a held-out word;
test scenes show one wherever there is one (`compositions` tells).

Kinds: "one" icon; "several" different things; "line": three in a row or column; "count": many of one; "shapes" in
colours; "text": words on a sign or the background; "page": lines full of words; "digit": one, as hands or types write
it; "number": several digits.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from kimi_mm.data.art import Art, held_out
from kimi_mm.data.drawing import (
    COLORS,
    SHAPES,
    Rgb,
    background,
    camera,
    distance,
    outlined,
    pick_rgb,
    place,
    shape_icon,
    stands_out,
    treat,
)
from kimi_mm.data.numbers import cardinal
from kimi_mm.data.writing import Letter, draw_digit, draw_number, draw_page, draw_words

MAX_COUNT = 9
TRIES = 60


@dataclass(frozen=True)
class Thing:
    """Something in a scene: what it is called, its box (left, top, right, bottom) in pixels, a shape's colour."""

    name: str
    box: tuple[int, int, int, int]
    color: str = ""

    @property
    def full_name(self) -> str:
        return f"{self.color} {self.name}" if self.color else self.name

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass
class Scene:
    """A picture and the truth about it.

    `text` is what is written in it, line by line, and `letters` where; `layout` is "row" or "column".
    """

    kind: str
    image: np.ndarray
    background: str
    things: list[Thing] = field(default_factory=list)
    text: tuple[str, ...] = ()
    letters: list[Letter] = field(default_factory=list)
    layout: str = ""


@dataclass
class _Sheet:
    """A scene while it is drawn."""

    art: Art
    rng: np.random.Generator
    image: Image.Image
    rgb: Rgb
    color: str
    plain: bool  # no changes by which a style could be mistaken for another: tests show the art as it is
    things: list[Thing] = field(default_factory=list)
    text: tuple[str, ...] = ()
    letters: list[Letter] = field(default_factory=list)
    layout: str = ""

    def icon(self, name: str, left: int, top: int, size: int) -> None:
        rng, thing = self.rng, self.art.things[name]
        _, member = thing.icons[rng.integers(len(thing.icons))]
        icon = self.art.icon(member)
        if not self.plain:
            if rng.random() < 0.3:
                icon = self.art.derived(member, outlined)
            icon = treat(icon, rng)
        self.paste(icon, left, top, size)
        self.things.append(Thing(name, (left, top, left + size, top + size)))

    def shape(self, name: str, color: str, left: int, top: int, size: int) -> None:
        for _ in range(8):
            rgb = pick_rgb(color, self.rng)
            if distance(rgb, self.rgb) > 45:
                break
        self.paste(shape_icon(name, rgb, size, self.rng), left, top, size)
        self.things.append(Thing(name, (left, top, left + size, top + size), color))

    def paste(self, icon: Image.Image, left: int, top: int, size: int) -> None:
        """Pastes with a light or dark rim where the icon would be lost on the background, and now and then anyway."""
        halo = None
        if not stands_out(icon, self.rgb) or (not self.plain and self.rng.random() < 0.06):
            halo = (250, 250, 250) if distance(self.rgb, (255, 255, 255)) > 90 else (20, 20, 20)
        place(self.image, icon, left, top, size, halo)


def compose(art: Art, kind: str, size: tuple[int, int], rng: np.random.Generator, *, test: bool = False) -> Scene:
    """Draws a scene.

    Args:
        art: icons, fonts and words; tests pass the pack whose style or fonts they are about.
        kind: one of `KINDS`.
        size: height and width in pixels, at least 28.
        rng: decides everything.
        test: show a held-out composition, and none of the disturbances of training.

    Raises:
        ValueError: for an unknown kind or a size that is too small.
    """
    if kind not in KINDS:
        raise ValueError(f"scene kind '{kind}' must be one of {', '.join(KINDS)}.")
    if min(size) < 28:
        raise ValueError(f"size={size}: a scene needs at least 28 pixels a side.")
    wanted, fill = KINDS[kind](art, size, rng, test)
    color = _background_color(wanted, rng, test)
    canvas = background(size, color, rng)
    # The middle stands for the whole: backgrounds are of one colour.
    rgb = canvas.getpixel((size[1] // 2, size[0] // 2))
    sheet = _Sheet(art, rng, canvas, rgb, color, plain=test)  # type: ignore[arg-type]
    fill(sheet)
    image = np.asarray(sheet.image) if test else camera(sheet.image, rng)
    return Scene(kind, image, color, sheet.things, sheet.text, sheet.letters, sheet.layout)


def compositions(scene: Scene) -> list[tuple[str, ...]]:
    """Returns all in a scene that may be held out, as the parts that `held_out` takes."""
    icons = sorted({thing.name for thing in scene.things if not thing.color})
    counts = Counter(thing.name for thing in scene.things if not thing.color)
    found: list[tuple[str, ...]] = [("pair", *pair) for pair in itertools.combinations(icons, 2)]
    found += [("background", name, scene.background) for name in icons]
    found += [("shape", thing.name, thing.color) for thing in scene.things if thing.color]
    found += [("count", name, str(number)) for name, number in counts.items() if number > 1]
    if scene.kind in ("text", "page"):
        found += [("word", word.lower()) for word in " ".join(scene.text).split()]
    return found


def shown(scene: Scene, rows: int, columns: int, cell: int) -> list[list[str]]:
    """Returns for each cell of a grid, row by row, the words for what it shows.

    A thing is shown by cells that it covers a third of, and by the one that its middle is in; a letter by the latter.
    Middles of things of one name are numbered as one reads, so that the last says how many there are. A cell without
    things and letters shows the background, and one outside of the picture nothing.

    Args:
        scene: with a picture [H, W, 3].
        rows: of the grid.
        columns: of the grid.
        cell: pixels a side.
    """
    height, width, _ = scene.image.shape
    there = np.zeros((rows, columns), bool)
    there[: -(-height // cell), : -(-width // cell)] = True
    found: list[list[str]] = [[] for _ in range(rows * columns)]
    for thing in scene.things:
        left, top, right, bottom = thing.box
        wide = [_overlap(left, right, column, cell) for column in range(columns)]
        high = [_overlap(top, bottom, row, cell) for row in range(rows)]
        covered = np.outer(high, wide) > cell * cell / 3
        covered[_cell_of(thing.box, rows, columns, cell)] = True
        for at in np.flatnonzero(covered & there):
            found[at].append(thing.full_name)
    for name, number in Counter(thing.full_name for thing in scene.things).items():
        middles = (_cell_of(thing.box, rows, columns, cell) for thing in scene.things if thing.full_name == name)
        for i, (row, column) in enumerate(sorted(middles) if number > 1 else (), start=1):
            found[row * columns + column].append(cardinal(i))
    for letter in scene.letters:
        row, column = _cell_of(letter.box, rows, columns, cell)
        found[row * columns + column].append(letter.character)
    for at in np.flatnonzero(there):
        found[at] = found[at] or [scene.background]
    return found


def _overlap(low: int, high: int, number: int, cell: int) -> int:
    return max(0, min(high, (number + 1) * cell) - max(low, number * cell))


def _cell_of(box: tuple[int, int, int, int], rows: int, columns: int, cell: int) -> tuple[int, int]:
    left, top, right, bottom = box
    return min(rows - 1, max(0, (top + bottom) // 2 // cell)), min(columns - 1, max(0, (left + right) // 2 // cell))


# ---- kinds: each returns the icons that must suit the background, and how to fill the sheet --------------------------

Plan = tuple[list[str], Callable[[_Sheet], None]]


def _one(art: Art, size: tuple[int, int], rng: np.random.Generator, test: bool) -> Plan:
    name = _name(art, rng)
    for _ in range(TRIES if test else 0):
        if any(held_out("background", name, color) for color in COLORS):
            break
        name = _name(art, rng)

    def fill(sheet: _Sheet) -> None:
        height, width = size
        side = int(min(size) * rng.uniform(0.5, 0.98))
        sheet.icon(name, int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1)), side)

    return [name], fill


def _several(art: Art, size: tuple[int, int], rng: np.random.Generator, test: bool) -> Plan:
    most = 2 if test else max(2, min(4, size[0] * size[1] // 42**2))
    names = _names(art, rng, int(rng.integers(2, most + 1)), test)
    shape = SHAPES[rng.integers(len(SHAPES))]
    color = _shape_color(shape, rng) if not test and rng.random() < 0.25 else ""

    def fill(sheet: _Sheet) -> None:
        spots = _spots(size, len(names) + bool(color), rng)
        for name, spot in zip(names, spots, strict=False):
            sheet.icon(name, *spot)
        if color and color != sheet.color:
            sheet.shape(shape, color, *spots[-1])

    return names, fill


def _line(art: Art, size: tuple[int, int], rng: np.random.Generator, test: bool) -> Plan:
    names = _names(art, rng, 3, test)
    row = size[1] > size[0] if max(size) > 1.3 * min(size) else rng.random() < 0.5

    def fill(sheet: _Sheet) -> None:
        long, short = (size[1], size[0]) if row else size
        side = int(min(long / 3, short) * rng.uniform(0.7, 0.97))
        slack = long - 3 * side
        gaps = np.cumsum(rng.dirichlet(np.ones(4)) * slack)[:3]
        base = rng.integers(0, short - side + 1)
        for i, name in enumerate(names):
            along = int(gaps[i] + i * side)
            wobble = int(np.clip(base + rng.uniform(-0.15, 0.15) * side, 0, short - side))
            sheet.icon(name, *((along, wobble) if row else (wobble, along)), side)
        sheet.layout = "row" if row else "column"

    return names, fill


def _count(art: Art, size: tuple[int, int], rng: np.random.Generator, test: bool) -> Plan:
    most = max(2, min(MAX_COUNT, size[0] * size[1] // 30**2))
    counted = [name for name, thing in art.things.items() if thing.plural]
    for _ in range(TRIES):
        name, number = counted[rng.integers(len(counted))], int(rng.integers(2 if test else 1, most + 1))
        if held_out("count", name, number) == test:
            break
    others = [n for n in _names(art, rng, 2, False) if n != name][:1] if rng.random() < 0.5 else []
    extra = int(rng.integers(1, 3)) if others and number < most else 0
    if any(held_out("pair", *sorted((name, other))) or held_out("count", other, extra) for other in others):
        extra = 0

    def fill(sheet: _Sheet) -> None:
        spots = _spots(size, number + extra, rng)
        for i, spot in enumerate(spots):
            sheet.icon(name if i < number else others[0], *spot)

    return [name, *others[:extra]], fill


def _shapes(art: Art, size: tuple[int, int], rng: np.random.Generator, test: bool) -> Plan:
    most = max(1, min(4, size[0] * size[1] // 36**2))
    number = int(rng.integers(1, most + 1))
    chosen = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:number]]
    colors = [_shape_color(shape, rng) for shape in chosen]
    if test:
        unseen = [(shape, color) for shape in SHAPES for color in COLORS if held_out("shape", shape, color)]
        shape, color = unseen[rng.integers(len(unseen))]
        kept = [(s, c) for s, c in zip(chosen[1:], colors[1:], strict=True) if s != shape]
        chosen, colors = [shape, *(s for s, _ in kept)], [color, *(c for _, c in kept)]

    def fill(sheet: _Sheet) -> None:
        for shape, color, spot in zip(chosen, colors, _spots(size, len(chosen), rng), strict=True):
            if color != sheet.color or test:
                sheet.shape(shape, color, *spot)

    return [], fill


def _text(art: Art, size: tuple[int, int], rng: np.random.Generator, test: bool) -> Plan:
    def fill(sheet: _Sheet) -> None:
        sheet.text, sheet.letters = draw_words(sheet.image, art, rng, test)

    return [], fill


def _page(art: Art, size: tuple[int, int], rng: np.random.Generator, test: bool) -> Plan:
    def fill(sheet: _Sheet) -> None:
        sheet.text, sheet.letters = draw_page(sheet.image, art, rng, test)

    return [], fill


def _digit(art: Art, size: tuple[int, int], rng: np.random.Generator, test: bool) -> Plan:
    def fill(sheet: _Sheet) -> None:
        sheet.text, sheet.letters = draw_digit(sheet.image, art, rng)

    return [], fill


def _number(art: Art, size: tuple[int, int], rng: np.random.Generator, test: bool) -> Plan:
    def fill(sheet: _Sheet) -> None:
        sheet.text, sheet.letters = draw_number(sheet.image, art, rng)

    return [], fill


KINDS: dict[str, Callable[[Art, tuple[int, int], np.random.Generator, bool], Plan]] = {
    "one": _one,
    "several": _several,
    "line": _line,
    "count": _count,
    "shapes": _shapes,
    "text": _text,
    "page": _page,
    "digit": _digit,
    "number": _number,
}

# (longer side, shorter side) in pixels below which there is nothing to be made out
_SMALLEST = {
    "several": (84, 56),
    "line": (126, 44),
    "count": (84, 56),
    "text": (84, 28),
    "page": (112, 56),
    "number": (56, 28),
}


def fits(kind: str, size: tuple[int, int]) -> bool:
    """Tells whether a picture of `size` (H, W) is large enough for a kind of scene."""
    long, short = _SMALLEST.get(kind, (28, 28))
    wide = kind not in ("text", "page", "number") or size[1] >= long
    return max(size) >= long and min(size) >= short and wide


# ---- choosing within the split ---------------------------------------------------------------------------------------


def _name(art: Art, rng: np.random.Generator) -> str:
    names = list(art.things)
    return names[rng.integers(len(names))]


def _names(art: Art, rng: np.random.Generator, number: int, test: bool) -> list[str]:
    """Draws different things; in a test each two neighbours are a held-out pair, otherwise no two are."""
    chosen = [_name(art, rng)]
    for _ in range(TRIES * number * (10 if test else 1)):
        if len(chosen) == number:
            break
        name = _name(art, rng)
        pairs = [held_out("pair", *sorted((name, other))) for other in chosen]
        if name not in chosen and (pairs[-1] if test else not any(pairs)):
            chosen.append(name)
    return chosen


def _shape_color(shape: str, rng: np.random.Generator) -> str:
    options = [color for color in COLORS if not held_out("shape", shape, color)]
    return options[rng.integers(len(options))]


def _background_color(names: list[str], rng: np.random.Generator, test: bool) -> str:
    """Draws a background; single things have it held out in tests, and no thing has a held-out one in training."""
    kept = [color for color in COLORS if not any(held_out("background", name, color) for name in names)]
    if test and len(names) == 1:
        kept = [color for color in COLORS if color not in kept]
    kept = kept or list(COLORS)
    return kept[rng.integers(len(kept))]


def _spots(size: tuple[int, int], number: int, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """Returns places (left, top, side) in different cells of a grid, so that nothing overlaps."""
    height, width = size
    rows, columns = max(
        ((r, -(-number // r)) for r in range(1, number + 1)), key=lambda rc: min(height / rc[0], width / rc[1])
    )
    # A spare row or column now and then, so that places do not give the number away.
    if rng.random() < 0.4 and min(height / (rows + 1), width / (columns + 1)) >= 26:
        rows, columns = rows + 1, columns + 1
    cell_h, cell_w = height / rows, width / columns
    scale = rng.uniform(0.62, 0.97)
    spots = []
    for cell in rng.permutation(rows * columns)[:number]:
        row, column = divmod(int(cell), columns)
        side = max(8, int(min(cell_h, cell_w) * scale * rng.uniform(0.85, 1.0)))
        left = int(column * cell_w + rng.uniform(0, 1) * (cell_w - side))
        top = int(row * cell_h + rng.uniform(0, 1) * (cell_h - side))
        spots.append((left, top, side))
    return spots
