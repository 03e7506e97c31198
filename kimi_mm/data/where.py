"""Where things are in a scene: beside, above or below each other, and in which part of the picture.

Only what nobody would hesitate about is said: things that lie askew, or near a border between parts, are left out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from kimi_mm.data.scenes import Scene, Thing


@dataclass(frozen=True)
class Relation:
    """`first` lies on `side` ("left", "right", "above", "below") of `second`; `only`: nothing else could be meant."""

    first: str
    second: str
    side: str
    only: bool


def singles(scene: Scene) -> list[Thing]:
    """Returns the things that can be spoken of as "the": no other of the same name is there."""
    counts = Counter(thing.name for thing in scene.things)
    return [thing for thing in scene.things if counts[thing.name] == 1]


def relations(scene: Scene, rng: np.random.Generator) -> list[Relation]:
    """Returns all clear relations between single things, in random order."""
    things = singles(scene)
    found = []
    for i, one in enumerate(things):
        for j, other in enumerate(things):
            side = side_of(one, other) if i != j else ""
            if side:
                found.append(Relation(one.name, other.name, side, _only(things, j, side, i)))
    return [found[i] for i in rng.permutation(len(found))]


def side_of(one: Thing, other: Thing) -> str:
    """Returns where `one` lies, seen from `other`: "" when it is neither clearly beside nor clearly above or below."""
    dx, dy = (p - q for p, q in zip(one.center, other.center, strict=True))
    half = (one.box[2] - one.box[0] + other.box[2] - other.box[0]) / 4
    if max(abs(dx), abs(dy)) < half or 0.6 < abs(dx) / max(abs(dy), 1e-6) < 1.7:
        return ""
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def position_of(thing: Thing, scene: Scene) -> str:
    """Returns the part of the picture that a thing is in, such as "top left", or "" near the border of two parts."""
    height, width = scene.image.shape[:2]
    x, y = thing.center[0] / width, thing.center[1] / height
    if min(abs(v - border) for v in (x, y) for border in (0.35, 0.65)) < 0.05:
        return ""
    column = "left" if x < 0.35 else "right" if x > 0.65 else ""
    row = "top" if y < 0.35 else "bottom" if y > 0.65 else ""
    return f"{row} {column}".strip() or "middle"


def _only(things: list[Thing], center: int, side: str, answer: int) -> bool:
    """Tells whether `answer` is by far the nearest of all that might be said to lie on that side of `center`."""

    def far(i: int) -> float:
        return sum(abs(p - q) for p, q in zip(things[i].center, things[center].center, strict=True))

    beside = [i for i in range(len(things)) if i != center and side_of(things[i], things[center]) in (side, "")]
    return all(i == answer or far(i) > 1.4 * far(answer) for i in beside)
