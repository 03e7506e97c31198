"""Digits as hands write them: strokes through jittered points, drawn whole or at the 8 x 8 grain of small scans.

    skeleton (variants of each digit) ─► jitter, slant, stretch, turn ─► smooth ─► pen ─► [size, size] grey
                                                                      └─► 32 x 32 black and white ─► counts of 4 x 4

Nothing here was taken or learnt from any set of scanned digits.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

# "c" curves smoothly through its points [n, 2], "l" has corners; x to the right, y down, both 0 to 1.
Stroke = tuple[str, np.ndarray]

# One variant is strokes that are separated by ";", each "c" or "l" and then points "x,y" in per cent.
_VARIANTS = {
    0: """c 55,0 18,20 10,60 35,100 75,88 90,45 72,8 50,0
          c 50,0 22,25 22,75 50,100 78,75 78,25 50,0""",
    1: """l 50,0 50,100
          l 20,28 55,0 55,100
          l 5,45 55,0 55,100
          l 12,40 45,18 55,0 55,100
          l 20,25 52,0 52,100; l 20,100 85,100
          l 5,42 50,2 50,100; l 10,100 90,100""",
    2: """c 12,25 35,2 75,6 80,35 50,68 12,100; l 12,100 90,100
          c 20,22 45,2 68,15 60,50 25,97; l 8,100 95,100
          c 15,20 50,0 82,25 55,65 20,95 12,80 35,78 92,100
          c 10,12 50,0 80,20 60,60 10,98; c 10,98 50,92 90,98""",
    3: """c 14,12 50,0 82,20 65,42 35,47; c 35,47 70,53 86,75 60,98 12,90
          c 20,5 60,2 75,22 45,45; c 45,45 80,60 75,92 15,97
          l 14,3 85,3 42,44; c 42,44 80,52 84,82 50,100 12,90""",
    4: """l 30,0 10,58 92,58; l 70,10 62,100
          l 50,0 8,60 92,55; l 72,30 55,100
          c 60,0 30,25 10,55 30,68 90,52; l 75,25 50,100
          l 66,100 66,0 6,68 94,68
          c 22,2 14,35 30,52 75,45; l 80,0 72,100""",
    5: """l 86,2 24,2 18,44; c 18,44 50,36 86,55 78,88 45,100 10,90
          l 90,3 30,3 25,40; c 25,40 65,42 75,75 50,97 10,97
          c 85,3 30,5 22,38 60,42 82,68 55,98 12,94""",
    6: """c 72,2 35,22 12,65 32,98 68,96 84,70 58,50 25,60 16,75
          c 55,0 22,40 12,80 45,100 85,85 70,60 20,70
          c 45,0 20,40 16,80 50,100 84,80 60,58 22,74""",
    7: """l 10,3 90,3 50,55 38,100
          l 12,20 14,3 90,3 40,100
          l 10,3 88,3 42,100; l 28,50 82,50
          l 15,5 80,5 50,100; l 15,52 95,48
          c 10,16 25,4 60,10 90,3; c 90,3 62,45 50,100; l 30,52 85,48""",
    8: """c 78,14 45,0 20,20 45,45 82,75 50,100 16,78 50,46 78,14
          c 85,15 55,0 25,15 40,42 70,70 50,100 25,80 50,50 85,15
          c 50,0 20,22 50,46 80,22 50,0; c 50,46 14,75 50,100 86,75 50,46
          c 50,0 10,28 50,58 90,28 50,0; c 50,58 30,80 50,100 70,80 50,58
          c 50,0 32,15 50,36 68,15 50,0; c 50,36 10,70 50,100 90,70 50,36""",
    9: """c 82,25 55,0 20,14 22,42 55,50 82,25; l 82,25 72,100
          c 82,22 45,0 15,25 45,52 80,30; c 80,30 85,65 60,98 20,100
          c 82,30 55,2 18,20 40,50 80,30 80,70 55,100 15,93""",
}


def _parse(variant: str) -> tuple[Stroke, ...]:
    strokes = []
    for stroke in variant.split(";"):
        kind, *pairs = stroke.split()
        strokes.append((kind, np.asarray([[float(v) / 100 for v in pair.split(",")] for pair in pairs])))
    return tuple(strokes)


DIGITS = {digit: tuple(map(_parse, text.splitlines())) for digit, text in _VARIANTS.items()}


def written_digit(digit: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a handwritten digit as ink, [size, size] uint8, 0 for paper.

    Args:
        digit: 0 to 9.
        size: pixels a side; the digit fills the height.
    """
    pen = size * rng.uniform(0.07, 0.15)
    strokes = _strokes(digit, rng, wide=rng.uniform(0.5, 0.85))
    return _ink(strokes, size, pen)


def coarse_digit(digit: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a handwritten digit as small scanners kept it: ink counts [8, 8], 0 to 16, of 4 x 4 pixels each."""
    strokes = _strokes(digit, rng, wide=rng.uniform(0.4, 0.85))
    ink = _ink(strokes, 32, rng.uniform(3.2, 9.0)) > 127
    return ink.reshape(8, 4, 8, 4).sum((1, 3)).astype(np.uint8)


def coarse_picture(counts: np.ndarray, size: int) -> Image.Image:
    """Returns ink counts [8, 8], 0 to 16, as a grey picture of `size` pixels a side, white ink on black."""
    values = np.minimum(255, counts.astype(np.float32) * (255 / 16)).astype(np.uint8)
    return Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC)


def _strokes(digit: int, rng: np.random.Generator, wide: float) -> list[np.ndarray]:
    """Draws a variant, its jitter, slant and turn; returns strokes as points [n, 2] in the unit square."""
    variants = DIGITS[digit]
    strokes = []
    for kind, points in variants[rng.integers(len(variants))]:
        path = points + rng.normal(0, 0.045, points.shape)
        strokes.append(_smooth(path) if kind == "c" else path)
    slant, angle = rng.uniform(-0.15, 0.35), rng.normal(0, 0.1)
    cos, sin = np.cos(angle), np.sin(angle)
    shear = np.asarray([[cos, -sin], [sin, cos]]) @ np.asarray([[wide, -slant], [0, 1.0]])
    turned = [(stroke - 0.5) @ shear.T for stroke in strokes]
    every = np.concatenate(turned)
    low, high = every.min(0), every.max(0)
    # The height is filled; the width follows, but never leaves the square.
    scale = min(1.0 / max(high[1] - low[1], 0.2), 0.95 / max(high[0] - low[0], 0.05))
    return [(stroke - (low + high) / 2) * scale + 0.5 for stroke in turned]


def _smooth(points: np.ndarray) -> np.ndarray:
    """Catmull-Rom curve through points [n, 2]."""
    padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    t = np.linspace(0, 1, 9)[:-1, None]
    pieces = []
    for a, b, c, d in zip(padded[:-3], padded[1:-2], padded[2:-1], padded[3:], strict=True):
        pieces.append(0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3))
    return np.concatenate([*pieces, points[-1:]])


def _ink(strokes: list[np.ndarray], size: int, pen: float) -> np.ndarray:
    fine = 3
    image = Image.new("L", (fine * size, fine * size))
    draw, half = ImageDraw.Draw(image), fine * pen / 2
    for stroke in strokes:
        path = [tuple(point) for point in (half + stroke * (fine * size - 2 * half)).tolist()]
        draw.line(path, fill=255, width=max(1, round(2 * half)), joint="curve")
        for x, y in (path[0], path[-1]):
            draw.ellipse([x - half, y - half, x + half, y + half], fill=255)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))
