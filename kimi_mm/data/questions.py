"""What can be asked about a scene, in varied wording, with the answer and the truth that a scorer needs.

    Scene ─► [Question(kind, text, answer, truth), ...]

Kinds: name, count, color, shape, relation, position, presence, background, read, line, spell, digit; and caption, which
says all there is. An answer's form follows from the wording of its question alone, so that nothing about it is left to
chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kimi_mm.data.art import Named
from kimi_mm.data.drawing import SHAPES, pick
from kimi_mm.data.scenes import Scene
from kimi_mm.data.where import Relation, position_of, relations, singles

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ORDINALS = ("first", "second", "third", "fourth", "fifth")
PHRASES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
PLACES = {"left": "on", "right": "on", "top": "at", "bottom": "at"}  # "in" the others
CAPTION = "What is in the picture?"  # what `kimi-mm describe` asks when nothing is asked


@dataclass(frozen=True)
class Question:
    """A question about a picture; `truth` is what an answer must hold: names, a number word, a colour, a text."""

    kind: str
    text: str
    answer: str
    truth: tuple[str, ...]


def a(name: str) -> str:
    """Returns a name with its article: "a dog", "an owl"."""
    return f"{'an' if name[0] in 'aeio' or name in ('umbrella', 'hourglass') else 'a'} {name}"


def listed(parts: Sequence[str]) -> str:
    """Returns "x", "x and y" or "x, y and z"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


class Asker:
    """Makes questions about scenes.

    Args:
        things: what icons are called, from `Art.things`.
    """

    def __init__(self, things: dict[str, Named]) -> None:
        self.things = things
        self.groups = sorted({thing.group for thing in things.values()} - {""})

    def questions(self, scene: Scene, rng: np.random.Generator) -> list[Question]:
        """Returns everything that can be asked about a scene, in random order, one wording each."""
        if scene.kind == "page":
            return _page(scene, rng)
        found = [self.caption(scene, rng), _background(scene, rng)]
        if scene.text:
            found += _writing(scene, rng)
        else:
            found += [*self._names(scene, rng), *self._counts(scene, rng), *self._presence(scene, rng)]
            found += [*_colors(scene, rng), *self._relations(scene, rng), *self._positions(scene, rng)]
        return [found[i] for i in rng.permutation(len(found))]

    def caption(self, scene: Scene, rng: np.random.Generator) -> Question:
        """Returns the question that is answered by all there is."""
        if scene.text:
            what = {"digit": "the digit", "number": "the number"}.get(
                scene.kind, "the words" if _many(scene) else "the word"
            )
            said, truth = f'{what} "{" ".join(scene.text)}"', (" ".join(scene.text),)
        else:
            said, truth = self._inventory(scene), tuple(thing.full_name for thing in scene.things)
        forms = [
            (CAPTION, f"{said}."),
            ("What do you see?", f"I see {said}."),
            ("What does the picture show?", f"The picture shows {said}."),
            ("Describe the picture.", f"{said} on a {scene.background} background."),
        ]
        text, answer = forms[pick(rng, (0.4, 0.15, 0.15, 0.3))]
        return Question("caption", text, _upper(answer), truth)

    def _inventory(self, scene: Scene) -> str:
        """Lists things as one reads: by thirds of the height, and in them from left to right."""
        third = scene.image.shape[0] / 3
        order = sorted(scene.things, key=lambda thing: (int(thing.center[1] / third), thing.center[0]))
        counts = Counter(thing.full_name for thing in order)
        return listed([self._some(name, number) for name, number in counts.items()]) if counts else "nothing"

    def _some(self, name: str, number: int) -> str:
        if number > 1:
            return f"{NUMBERS[number]} {self._plural(name)}"
        known = self.things.get(name)
        return name if known is not None and not known.plural else a(name)

    def _plural(self, name: str) -> str:
        known = self.things.get(name)
        if known is not None:
            return known.plural or name
        return f"{name}es" if name.endswith("s") else f"{name}s"

    def _be(self, name: str) -> str:
        known = self.things.get(name)
        return "are" if known is not None and not known.plural and name.endswith("s") else "is"

    def _names(self, scene: Scene, rng: np.random.Generator) -> list[Question]:
        if len(scene.things) != 1:
            return []
        thing = scene.things[0]
        said = self._some(thing.full_name, 1)
        this, it = ("these are", "they are") if self._be(thing.name) == "are" else ("this is", "it is")
        forms = [
            ("What is this?", f"{this} {said}."),
            ("Name the object.", f"{thing.full_name}."),
            ("What is it?", f"{it} {said}."),
            ("What can you see here?", f"{said}."),
        ]
        group = self.things[thing.name].group if thing.name in self.things else "shape"
        if group:
            forms.append((f"Which {group} is this?", f"{said}."))
        return [_draw("name", forms, (thing.full_name,), rng)]

    def _counts(self, scene: Scene, rng: np.random.Generator) -> list[Question]:
        counts = Counter(thing.name for thing in scene.things)
        found = []
        for name, number in counts.items():
            plural = self._plural(name)
            uncounted = name in self.things and not self.things[name].plural
            if uncounted or (number == 1 and rng.random() < 0.75):
                continue
            word, verb = NUMBERS[number], "is" if number == 1 else "are"
            forms = [
                (f"How many {plural} are there?", f"{word}."),
                (f"How many {plural} do you see?", f"{word}."),
                (f"Count the {plural}.", f"{word}."),
                (f"How many {plural} are in the picture?", f"there {verb} {word}."),
            ]
            found.append(_draw("count", forms, (word,), rng))
        number = len(scene.things)
        if 1 < number < len(NUMBERS):
            forms = [
                ("How many things are there?", f"{NUMBERS[number]}."),
                ("Count the objects.", f"{NUMBERS[number]}."),
            ]
            found.append(_draw("count", forms, (NUMBERS[number],), rng))
        return found[:2]

    def _presence(self, scene: Scene, rng: np.random.Generator) -> list[Question]:
        present = [thing.name for thing in scene.things]
        if not present:
            return []
        there = rng.random() < 0.5
        names = [*SHAPES] if scene.kind == "shapes" else [*self.things]
        name = present[rng.integers(len(present))] if there else names[rng.integers(len(names))]
        there = name in present
        some, said = self._some(name, 1), "yes" if there else "no"
        verb = self._be(name)
        forms = [
            (f"{_upper(verb)} there {some} in the picture?", f"{said}."),
            (f"Do you see {some}?", f"{said}."),
            (f"{_upper(verb)} there {some}?", f"{said}, there {verb} {'' if there else 'not '}".rstrip() + "."),
        ]
        return [_draw("presence", forms, (said,), rng)]

    def _relations(self, scene: Scene, rng: np.random.Generator) -> list[Question]:
        found = []
        for relation in relations(scene, rng)[:3]:
            kind = rng.random()
            if kind < 0.45 and relation.only:
                found.append(_what_is_where(relation, rng))
            elif kind < 0.75:
                found.append(self._where_is_what(relation, rng))
            else:
                found.append(self._is_it_there(relation, rng))
        return found

    def _where_is_what(self, relation: Relation, rng: np.random.Generator) -> Question:
        first, second, verb = relation.first, relation.second, self._be(relation.first)
        phrase, other = PHRASES[relation.side], "them" if self._be(second) == "are" else "it"
        forms = [
            (f"Where {verb} the {first} compared to the {second}?", f"{phrase} the {second}."),
            (f"Where {verb} the {first}, seen from the {second}?", f"{phrase} {other}."),
        ]
        return _draw("relation", forms, (relation.side,), rng)

    def _is_it_there(self, relation: Relation, rng: np.random.Generator) -> Question:
        asked = relation.side if rng.random() < 0.5 else list(PHRASES)[rng.integers(4)]
        said = "yes" if asked == relation.side else "no"
        verb = _upper(self._be(relation.first))
        forms = [(f"{verb} the {relation.first} {PHRASES[asked]} the {relation.second}?", f"{said}.")]
        return _draw("relation", forms, (said,), rng)

    def _positions(self, scene: Scene, rng: np.random.Generator) -> list[Question]:
        for thing in singles(scene):
            place = position_of(thing, scene)
            if place:
                said = f"{PLACES.get(place, 'in')} the {place}."
                forms = [
                    (f"Where {self._be(thing.name)} the {thing.name}?", said),
                    (f"In which part of the picture {self._be(thing.name)} the {thing.name}?", said),
                ]
                return [_draw("position", forms, (place,), rng)]
        return []


def _what_is_where(relation: Relation, rng: np.random.Generator) -> Question:
    where = f"{PHRASES[relation.side]} the {relation.second}"
    forms = [(f"What is {where}?", f"the {relation.first}."), (f"Which object is {where}?", f"the {relation.first}.")]
    return _draw("relation", forms, (relation.first,), rng)


def _colors(scene: Scene, rng: np.random.Generator) -> list[Question]:
    found = []
    counts = Counter(thing.color for thing in scene.things)
    for thing in singles(scene):
        if not thing.color:
            continue
        forms = [
            (f"What color is the {thing.name}?", f"{thing.color}."),
            (f"Which color does the {thing.name} have?", f"it is {thing.color}."),
            (f"What is the color of the {thing.name}?", f"the {thing.name} is {thing.color}."),
        ]
        found.append(_draw("color", forms, (thing.color,), rng))
        if counts[thing.color] == 1 and len(scene.things) > 1:
            forms = [
                (f"What is {thing.color}?", f"the {thing.name}."),
                (f"Which shape is {thing.color}?", f"the {thing.name}."),
            ]
            found.append(_draw("shape", forms, (thing.name,), rng))
    return found[:4]


def _background(scene: Scene, rng: np.random.Generator) -> Question:
    forms = [
        ("What color is the background?", f"{scene.background}."),
        ("Which color is behind it all?", f"{scene.background}."),
    ]
    return _draw("background", forms, (scene.background,), rng)


def _writing(scene: Scene, rng: np.random.Generator) -> list[Question]:
    text = " ".join(scene.text)
    if scene.kind == "digit":
        forms = [
            ("Which digit is this?", f"{text}."),
            ("What digit do you see?", f"{text}."),
            ("Which number is shown?", f"it is {text}."),
        ]
        return [_draw("digit", forms, (text,), rng)]
    forms = [
        ("What does it say?", text),
        ("Read the text.", text),
        ("What is written here?", text),
        ("Read this.", text),
    ]
    if scene.kind == "number":
        forms.append(("Which number is this?", text))
    found = [Question("read", *forms[rng.integers(len(forms))], (text,))]
    spelled = "-".join(text.replace(" ", ""))
    if len(spelled) < 40:
        forms = [("Spell it.", spelled), ("Spell the text letter by letter.", spelled)]
        found.append(Question("spell", *forms[rng.integers(len(forms))], (spelled,)))
    return found


def _page(scene: Scene, rng: np.random.Generator) -> list[Question]:
    number, found = len(scene.text), []
    for at in rng.permutation([*range(min(number, len(ORDINALS))), -1])[:2]:
        which, line = "last" if at < 0 else ORDINALS[at], scene.text[at]
        forms = [(f"What does the {which} line say?", line), (f"Read the {which} line.", line)]
        found.append(Question("line", *forms[rng.integers(len(forms))], (line,)))
    if number < len(NUMBERS):
        forms = [("How many lines of text are there?", f"{NUMBERS[number]}.")]
        found.append(_draw("count", forms, (NUMBERS[number],), rng))
    return found


def _many(scene: Scene) -> bool:
    return len(" ".join(scene.text).split()) > 1


def _draw(kind: str, forms: list[tuple[str, str]], truth: tuple[str, ...], rng: np.random.Generator) -> Question:
    text, answer = forms[rng.integers(len(forms))]
    return Question(kind, text, _upper(answer), truth)


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]
