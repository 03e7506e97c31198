"""What programs can find out: from the truth about a scene, or from pixels.

Scene  ─► SceneSeer    counts and finds by name, reads exactly; colours from the picture
pixels ─► PixelSeer    colours, and patches of one colour; reading by a function that is given
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np

from kimi_mm.data.drawing import COLORS
from kimi_mm.data.programs.interpreter import Box
from kimi_mm.data.programs.language import ProgramError
from kimi_mm.data.scenes import Scene, Thing

MAX_SIDE = 256  # pictures are reduced to this before colours are looked at


class PixelSeer:
    """A picture as it is: colours, and connected patches of a colour as things.

    Args:
        image: [H, W, 3] uint8.
        reader: from the pixels of a part [h, w, 3] to what is written in it; None: nothing can be read.
    """

    def __init__(self, image: np.ndarray, reader: Callable[[np.ndarray], str] | None = None) -> None:
        self.size = (int(image.shape[0]), int(image.shape[1]))
        self.image, self.reader = image, reader
        self.step = max(1, -(-max(self.size) // MAX_SIDE))
        self.names = _color_names(image[:: self.step, :: self.step])

    def count(self, box: Box, what: str) -> int:
        return len(self._patches(box, what))

    def find(self, box: Box, what: str) -> Box | None:
        found = sorted(self._patches(box, what), key=lambda patch: (patch[1], patch[0]))
        return found[0] if found else None

    def color(self, box: Box) -> str:
        numbers = np.bincount(self._cut(box).ravel(), minlength=len(COLORS))
        return list(COLORS)[int(numbers.argmax())]

    def share(self, box: Box, color: str) -> float:
        return float((self._cut(box) == _number(color)).mean())

    def read(self, box: Box) -> str:
        if self.reader is None:
            raise ProgramError("read: nothing here can read; crop, count, color and share work on pixels.")
        left, top, right, bottom = (round(edge) for edge in box)
        return self.reader(self.image[top : max(bottom, top + 1), left : max(right, left + 1)])

    def _cut(self, box: Box) -> np.ndarray:
        left, top, right, bottom = (int(edge // self.step) for edge in box)
        return self.names[top : max(bottom, top + 1), left : max(right, left + 1)]

    def _patches(self, box: Box, color: str) -> list[Box]:
        """Returns boxes of the connected patches of a colour, but for specks below 1/400 of the picture."""
        mask = self._cut(box) == _number(color)
        seen = np.zeros_like(mask)
        found = []
        for start in zip(*np.nonzero(mask), strict=True):
            if seen[start]:
                continue
            seen[start] = True
            stack, pixels = [start], []
            while stack:
                y, x = stack.pop()
                pixels.append((y, x))
                for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                    inside = 0 <= near[0] < mask.shape[0] and 0 <= near[1] < mask.shape[1]
                    if inside and mask[near] and not seen[near]:
                        seen[near] = True
                        stack.append(near)
            if 400 * len(pixels) >= self.names.size:
                ys, xs = np.asarray(pixels).T * self.step
                x, y = box[0], box[1]
                edges = (x + xs.min(), y + ys.min(), x + xs.max() + self.step, y + ys.max() + self.step)
                found.append(tuple(float(edge) for edge in edges))
        return found


class SceneSeer(PixelSeer):
    """A scene with its truth: things by name, shapes by colour too, and writing."""

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene.image)
        self.scene = scene

    def count(self, box: Box, what: str) -> int:
        return len(self._inside(box, what))

    def find(self, box: Box, what: str) -> Box | None:
        found = sorted(self._inside(box, what), key=lambda thing: (thing.box[1], thing.box[0]))
        return tuple(float(edge) for edge in found[0].box) if found else None  # type: ignore[return-value]

    def read(self, box: Box) -> str:
        height, width = self.size
        if (box[2] - box[0]) * (box[3] - box[1]) < 0.9 * height * width:
            raise ProgramError("read: what is written in a part is not known; read the whole picture.")
        return " ".join(self.scene.text)

    def _inside(self, box: Box, what: str) -> list[Thing]:
        """Returns the things of a name or colour whose middle lies in a box."""
        left, top, right, bottom = box
        return [
            thing
            for thing in self.scene.things
            if what in (thing.name, thing.color, thing.full_name, "thing")
            and left <= thing.center[0] < right
            and top <= thing.center[1] < bottom
        ]


def _number(color: str) -> int:
    if color not in COLORS:
        raise ProgramError(f"'{color[:20]}' is not a colour; there are {', '.join(COLORS)}.")
    return list(COLORS).index(color)


def _color_names(image: np.ndarray) -> np.ndarray:
    """Numbers of the colours in `COLORS` that come nearest: [H, W, 3] uint8 to [H, W] int64."""
    middles = []
    for hue, saturation, value in COLORS.values():
        middle = [sum(limits) / 2 for limits in (hue, saturation, value)]
        middles.append(colorsys.hsv_to_rgb(middle[0] / 360 % 1.0, middle[1], middle[2]))
    table = np.asarray(middles, np.float32) * 255
    weights = np.asarray([0.3, 0.5, 0.2], np.float32)
    distances = [np.abs(image.astype(np.float32) - row) @ weights for row in table]
    return np.argmin(np.stack(distances), 0)
