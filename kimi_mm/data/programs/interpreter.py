"""Runs programs over a picture: bounded in steps, time, memory and output, with nothing in reach but the picture.

    crop(p, left, top, right, bottom)   zoom(p, factor)   find(p, "ball")     a part of p
    count(p, "ball")   width(p)   height(p)   share(p, "red")                 a number
    color(p)   read(p)                                                        a text
    left(p) top(p) right(p) bottom(p)                                         where a part lies in the whole picture
    bigger(a, b) and equal(a, b)                                              "yes" or "no"
    print(x)   answer(x)                                                      output, and the end

Coordinates are pixels of the part that is given, from its top left. A part is a frame and a factor, never a copy of
pixels, so that memory does not grow; what is in it is told by a `Seer`: the truth of a scene, the pixels themselves, or
a model that looks at them.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Protocol

from kimi_mm.data.programs.language import MAX_NUMBER, Call, Name, Node, Number, ProgramError, String, parse

MAX_STEPS = 2000
MAX_OUTPUT = 500
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the whole picture


class Seer(Protocol):
    """What can be found out about a box of a picture."""

    size: tuple[int, int]  # height, width

    def count(self, box: Box, what: str) -> int:
        """How many things of a name or colour lie in the box."""
        ...

    def find(self, box: Box, what: str) -> Box | None:
        """The frame of the first one, in reading order; None where there is none."""
        ...

    def color(self, box: Box) -> str:
        """The colour that covers most of the box."""
        ...

    def share(self, box: Box, color: str) -> float:
        """Share of the box that a colour covers, 0 to 1."""
        ...

    def read(self, box: Box) -> str:
        """What is written in the box."""
        ...


@dataclass(frozen=True)
class Part:
    """A part of a picture: its box in the whole one, and how much it is enlarged."""

    box: Box
    factor: float = 1.0

    @property
    def width(self) -> float:
        return (self.box[2] - self.box[0]) * self.factor

    @property
    def height(self) -> float:
        return (self.box[3] - self.box[1]) * self.factor


Value = float | str | Part


@dataclass(frozen=True)
class Result:
    """What a program printed, a line a call, and what it answered ("" when it did not)."""

    output: tuple[str, ...]
    answer: str


class _Answered(Exception):
    """Ends a program."""


def run(source: str, seer: Seer, seconds: float = math.inf) -> Result:
    """Runs a program; the whole picture is its variable `image`.

    Args:
        source: its text.
        seer: the picture.
        seconds: after which no further operation begins.

    Raises:
        ProgramError: it cannot be read, does what is not possible, or exceeds a bound; names the line.
    """
    machine = _Machine(seer, seconds)
    for line in parse(source):
        machine.line = line.number
        try:
            value = machine.evaluate(line.value)
        except _Answered:
            break
        if line.target:
            if line.target in OPERATIONS:
                raise machine.error(f"'{line.target}' is an operation; choose another name")
            machine.variables[line.target] = value
    return Result(tuple(machine.output), machine.answer)


class _Machine:
    """Variables, and what has been spent."""

    def __init__(self, seer: Seer, seconds: float = math.inf) -> None:
        height, width = seer.size
        self.seer, self.seconds = seer, seconds
        self.deadline = time.monotonic() + seconds
        self.variables: dict[str, Value] = {"image": Part((0.0, 0.0, float(width), float(height)))}
        self.output: list[str] = []
        self.answer = ""
        self.steps = self.line = 0

    def error(self, reason: str) -> ProgramError:
        return ProgramError(f"line {self.line}: {reason}.")

    def evaluate(self, node: Node) -> Value:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise self.error(f"the program takes more than {MAX_STEPS} steps")
        if time.monotonic() > self.deadline:
            raise self.error(f"the program takes longer than {self.seconds:g} s")
        if isinstance(node, (Number, String)):
            return node.value
        if isinstance(node, Name):
            if node.name not in self.variables:
                raise self.error(f"'{node.name}' has no value; known: {', '.join(self.variables)}")
            return self.variables[node.name]
        return self.call(node)

    def call(self, node: Call) -> Value:
        arguments = [self.evaluate(argument) for argument in node.arguments]
        if node.name in "+-*/":
            return self.arithmetic(node.name, *arguments)
        if node.name not in OPERATIONS:
            raise self.error(f"there is no operation '{node.name}'; there are {', '.join(OPERATIONS)}")
        kinds = OPERATIONS[node.name]
        if len(arguments) != len(kinds):
            raise self.error(f"{node.name} takes {len(kinds)} values, not {len(arguments)}")
        for argument, kind in zip(arguments, kinds, strict=True):
            if kind is not None and not isinstance(argument, kind):
                raise self.error(f"{node.name} wants {_KINDS[kind]}, not {_KINDS[type(argument)]}")
        return getattr(self, f"_{node.name}")(*arguments)

    def arithmetic(self, sign: str, a: Value, b: Value) -> float:
        if not isinstance(a, float) or not isinstance(b, float):
            raise self.error(f"'{sign}' wants numbers")
        if sign == "/" and b == 0:
            raise self.error("division by zero")
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else 0.0}[sign]
        if not math.isfinite(value) or abs(value) > MAX_NUMBER:
            raise self.error(f"a number beyond {MAX_NUMBER:.0e}")
        return value

    # ---- operations --------------------------------------------------------------------------------------------

    def _crop(self, part: Part, left: float, top: float, right: float, bottom: float) -> Part:
        if not (0 <= left < right <= part.width + 1e-6 and 0 <= top < bottom <= part.height + 1e-6):
            raise self.error(
                f"crop({left:g}, {top:g}, {right:g}, {bottom:g}) is not inside {part.width:g} x {part.height:g} pixels"
            )
        x, y = part.box[:2]
        edges = (x + left / part.factor, y + top / part.factor, x + right / part.factor, y + bottom / part.factor)
        return Part(edges, part.factor)

    def _zoom(self, part: Part, factor: float) -> Part:
        if not 0.1 <= factor <= 16 or max(part.width, part.height) * factor > 16_384:
            raise self.error("zoom takes a factor from 0.1 to 16, up to 16384 pixels a side")
        return Part(part.box, part.factor * factor)

    def _find(self, part: Part, what: str) -> Part:
        found = self.seer.find(part.box, what)
        if found is None:
            raise self.error(f"there is no '{what}' here")
        return Part(found, part.factor)

    def _count(self, part: Part, what: str) -> float:
        return float(self.seer.count(part.box, what))

    def _width(self, part: Part) -> float:
        return part.width

    def _height(self, part: Part) -> float:
        return part.height

    def _share(self, part: Part, color: str) -> float:
        return self.seer.share(part.box, color)

    def _color(self, part: Part) -> str:
        return self.seer.color(part.box)

    def _read(self, part: Part) -> str:
        return self.seer.read(part.box)[:MAX_OUTPUT]

    def _left(self, part: Part) -> float:
        return part.box[0]

    def _top(self, part: Part) -> float:
        return part.box[1]

    def _right(self, part: Part) -> float:
        return part.box[2]

    def _bottom(self, part: Part) -> float:
        return part.box[3]

    def _bigger(self, a: float, b: float) -> str:
        return "yes" if a > b else "no"

    def _equal(self, a: Value, b: Value) -> str:
        return "yes" if a == b else "no"

    def _print(self, value: Value) -> Value:
        self.output.append(_shown(value))
        if sum(map(len, self.output)) > MAX_OUTPUT:
            raise self.error(f"more than {MAX_OUTPUT} characters of output")
        return value

    def _answer(self, value: Value) -> Value:
        self.answer = _shown(value)
        raise _Answered


OPERATIONS: dict[str, tuple[type | None, ...]] = {
    "crop": (Part, float, float, float, float),
    "zoom": (Part, float),
    "find": (Part, str),
    "count": (Part, str),
    "width": (Part,),
    "height": (Part,),
    "share": (Part, str),
    "color": (Part,),
    "read": (Part,),
    "left": (Part,),
    "top": (Part,),
    "right": (Part,),
    "bottom": (Part,),
    "bigger": (float, float),
    "equal": (None, None),
    "print": (None,),
    "answer": (None,),
}
_KINDS: dict[type, str] = {Part: "a picture", float: "a number", str: "a text"}


def _shown(value: Value) -> str:
    if isinstance(value, Part):
        return f"a picture of {value.width:g} x {value.height:g}"
    return value[:MAX_OUTPUT] if isinstance(value, str) else f"{value:.4g}"
