"""What programs find out about a real picture with a model's eyes: pixels for colours, looks at parts for the rest.

count(p, "red"), find(p, "red"), color, share    the pixels (`PixelSeer`)
count(p, "ball"), read(p)                        one look at the part
find(p, "ball")                                  looks at smaller and smaller parts, as long as there is one in them
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from PIL import Image

from kimi_mm.data.drawing import COLORS
from kimi_mm.data.programs.interpreter import Box
from kimi_mm.data.programs.language import ProgramError
from kimi_mm.data.programs.seers import PixelSeer
from kimi_mm.data.questions import NUMBERS, a

MAX_LOOKS = 40  # of one picture, whatever programs ask
LEAST_SIDE = 168  # pixels of the longer side of what is looked at; smaller parts are enlarged
SMALLEST = 28  # pixels; parts are not searched below

Look = Callable[[np.ndarray, str], str]


class EyesSeer(PixelSeer):
    """A picture, and a model that answers questions about parts of it.

    Args:
        image: [H, W, 3] uint8.
        look: from the pixels of a part [h, w, 3] and a question to an answer.
    """

    def __init__(self, image: np.ndarray, look: Look) -> None:
        super().__init__(image, reader=lambda pixels: self._written(pixels))
        self.look, self.looks = look, 0

    def count(self, box: Box, what: str) -> int:
        if what in COLORS:
            return super().count(box, what)
        said = self._ask(self._pixels(box), f"How many {what}s are there?")
        found = re.search(rf"\b({'|'.join(NUMBERS)}|[0-9]+)\b", said.lower())
        if found is None:
            raise ProgramError(f"count: '{said[:60]}' tells no number of '{what[:20]}'.")
        return int(found[1]) if found[1].isdigit() else NUMBERS.index(found[1])

    def find(self, box: Box, what: str) -> Box | None:
        if what in COLORS:
            return super().find(box, what)
        if not self._there(box, what):
            return None
        while max(box[2] - box[0], box[3] - box[1]) >= 2 * SMALLEST:
            inside = next((part for part in _halves(box) if self._there(part, what)), None)
            if inside is None:
                break
            box = inside
        return box

    def _there(self, box: Box, what: str) -> bool:
        return self._ask(self._pixels(box), f"Is there {a(what)} in the picture?").lower().startswith("yes")

    def _written(self, pixels: np.ndarray) -> str:
        said = self._ask(pixels, "What does it say?")
        quoted = re.search(r'"(.+)"', said)
        return quoted[1] if quoted else said

    def _pixels(self, box: Box) -> np.ndarray:
        left, top, right, bottom = (round(edge) for edge in box)
        return self.image[top : max(bottom, top + 1), left : max(right, left + 1)]

    def _ask(self, pixels: np.ndarray, question: str) -> str:
        self.looks += 1
        if self.looks > MAX_LOOKS:
            raise ProgramError(f"the picture has been looked at {MAX_LOOKS} times; ask for less.")
        height, width = pixels.shape[:2]
        if max(height, width) < LEAST_SIDE:
            factor = LEAST_SIDE / max(height, width)
            size = (max(1, round(width * factor)), max(1, round(height * factor)))
            pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
        return self.look(pixels, question).strip()


def _halves(box: Box) -> list[Box]:
    """Cuts a box across its longer side: both halves, and the half in the middle."""
    left, top, right, bottom = box
    if right - left >= bottom - top:
        step = (right - left) / 4
        return [(left + i * step, top, left + (i + 2) * step, bottom) for i in (0, 2, 1)]
    step = (bottom - top) / 4
    return [(left, top + i * step, right, top + (i + 2) * step) for i in (0, 2, 1)]
