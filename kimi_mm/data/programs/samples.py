"""Zero-vision samples: questions about pictures, answered by programs, in text alone (K2.5 report, section 4.2).

    scene (its truth only) ─► question ─► program ─► interpreter ─► result ─► conversation without any picture

    user       The picture image has 168 x 112 pixels. How many balls are in its left half?
    assistant  a = crop(image, 0, 0, 84, 112)  answer(count(a, "ball"))
    system     2
    assistant  Two.

Every answer comes from running the program; the model learns the programs and how to use what comes back.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kimi_mm.data.art import Art
from kimi_mm.data.manifest import write_aside
from kimi_mm.data.programs.interpreter import run
from kimi_mm.data.programs.seers import SceneSeer
from kimi_mm.data.questions import NUMBERS, a
from kimi_mm.data.scenes import Scene, compose

SIZES = ((112, 168), (168, 112), (140, 140), (168, 168))  # height, width
Ask = Callable[[Scene, np.random.Generator], "tuple[str, str, Callable[[str], str]] | None"]


def write_samples(path: Path, art: Art, count: int, seed: int = 0) -> int:
    """Writes conversations as JSON lines; a pure function of its arguments.

    Args:
        path: the file.
        art: what scenes are made of.
        count: of conversations.

    Returns:
        How many were written.
    """
    lines = []
    number = 0
    while len(lines) < count:
        messages = sample(art, np.random.default_rng((seed, 3, number)))
        number += 1
        if messages is not None:
            lines.append(json.dumps({"messages": messages}) + "\n")
    write_aside(path, "".join(lines).encode())
    return len(lines)


def sample(art: Art, rng: np.random.Generator) -> list[dict[str, str]] | None:
    """Draws one conversation; None where the drawn question does not suit the drawn scene."""
    kinds = list(ASKED)
    kind = kinds[rng.integers(len(kinds))]
    asks = ASKED[kind]
    scene = compose(art, kind, SIZES[rng.integers(len(SIZES))], rng)
    asked = asks[rng.integers(len(asks))](scene, rng)
    if asked is None:
        return None
    question, program, say = asked
    result = run(program, SceneSeer(scene)).answer
    height, width = scene.image.shape[:2]
    return [
        {"role": "user", "content": f"The picture image has {width} x {height} pixels. {question}"},
        {"role": "assistant", "content": program},
        {"role": "system", "content": result},
        {"role": "assistant", "content": say(result)},
    ]


def _count(scene: Scene, rng: np.random.Generator) -> tuple[str, str, Callable[[str], str]] | None:
    names = Counter(thing.name for thing in scene.things)
    if not names:
        return None
    name = list(names)[rng.integers(len(names))]
    return f"How often is there {a(name)}?", f'answer(count(image, "{name}"))', _number


def _count_part(scene: Scene, rng: np.random.Generator) -> tuple[str, str, Callable[[str], str]] | None:
    if not scene.things:
        return None
    name = scene.things[rng.integers(len(scene.things))].name
    height, width = scene.image.shape[:2]
    halves = {
        "left": (0, 0, width // 2, height),
        "right": (width // 2, 0, width, height),
        "upper": (0, 0, width, height // 2),
        "lower": (0, height // 2, width, height),
    }
    side = list(halves)[rng.integers(4)]
    edges = ", ".join(str(edge) for edge in halves[side])
    program = f'a = crop(image, {edges})\nanswer(count(a, "{name}"))'
    return f"How often is there {a(name)} in the {side} half?", program, _number


def _measure(scene: Scene, rng: np.random.Generator) -> tuple[str, str, Callable[[str], str]] | None:
    single = _single(scene, rng)
    if single is None:
        return None
    side = ("width", "height")[rng.integers(2)]
    program = f'a = find(image, "{single}")\nanswer({side}(a))'
    how = "wide" if side == "width" else "high"
    return f"How {how} is the {single}?", program, lambda result: f"It is {result} pixels {how}."


def _compare(scene: Scene, rng: np.random.Generator) -> tuple[str, str, Callable[[str], str]] | None:
    one, other = _single(scene, rng), _single(scene, rng)
    if one is None or other is None or one == other:
        return None
    lines = [f'a = find(image, "{one}")', f'b = find(image, "{other}")']
    if rng.random() < 0.5:
        lines.append("answer(bigger(width(a), width(b)))")
        return f"Is the {one} wider than the {other}?", "\n".join(lines), _upper
    lines.append("answer(bigger(left(b), left(a)))")
    return f"Does the {one} begin left of the {other}?", "\n".join(lines), _upper


def _background(scene: Scene, rng: np.random.Generator) -> tuple[str, str, Callable[[str], str]] | None:
    return "Which color covers most of it?", "answer(color(image))", _upper


def _color_of(scene: Scene, rng: np.random.Generator) -> tuple[str, str, Callable[[str], str]] | None:
    single = _single(scene, rng)
    if single is None:
        return None
    program = f'a = find(image, "{single}")\nw = width(a)\nh = height(a)\n'
    program += "b = crop(a, w * 0.4, h * 0.4, w * 0.6, h * 0.6)\nanswer(color(b))"
    return f"Which color is in the middle of the {single}?", program, _upper


def _read(scene: Scene, rng: np.random.Generator) -> tuple[str, str, Callable[[str], str]] | None:
    program = ("answer(read(image))", "a = zoom(image, 2)\nanswer(read(a))")[rng.integers(2)]
    return ("What does it say?", "What is written there?")[rng.integers(2)], program, lambda result: result


ASKED: dict[str, tuple[Ask, ...]] = {
    "one": (_measure, _background, _color_of),
    "several": (_count, _count_part, _measure, _compare),
    "count": (_count, _count_part, _background),
    "shapes": (_count, _compare, _measure, _color_of),
    "text": (_read,),
    "number": (_read,),
}


def _single(scene: Scene, rng: np.random.Generator) -> str | None:
    counts = Counter(thing.name for thing in scene.things)
    names = [name for name, number in counts.items() if number == 1]
    return names[rng.integers(len(names))] if names else None


def _number(result: str) -> str:
    number = int(result)
    return _upper(NUMBERS[number] if number < len(NUMBERS) else str(number))


def _upper(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
