"""Parts of scenes: named colours, backgrounds, shapes, icons in several treatments, and what a camera does to them.

Everything draws from the generator it is given, so that a scene is a pure function of its seed.

Shapes: H rows, W columns of pixels.
"""

from __future__ import annotations

import bisect
import colorsys
import functools
import io
import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

# name: ranges of hue (degrees), saturation and value within which everyone would say so
COLORS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-7, 6), (0.78, 1.0), (0.7, 1.0)),
    "orange": ((23, 33), (0.85, 1.0), (0.92, 1.0)),
    "yellow": ((51, 59), (0.7, 1.0), (0.92, 1.0)),
    "green": ((100, 145), (0.55, 1.0), (0.4, 0.8)),
    "blue": ((207, 234), (0.65, 1.0), (0.6, 1.0)),
    "purple": ((268, 288), (0.5, 0.9), (0.45, 0.8)),
    "pink": ((320, 345), (0.28, 0.52), (0.93, 1.0)),
    "brown": ((18, 30), (0.55, 0.8), (0.32, 0.5)),
    "black": ((0, 360), (0.0, 0.3), (0.0, 0.11)),
    "white": ((0, 360), (0.0, 0.03), (0.95, 1.0)),
    "gray": ((0, 360), (0.0, 0.05), (0.42, 0.65)),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "hexagon", "cross", "ring", "heart", "crescent")
Rgb = tuple[int, int, int]


def pick(rng: np.random.Generator, shares: tuple[float, ...]) -> int:
    """Draws an index as often as `shares` say: what `rng.choice` draws with them, in a tenth of the time."""
    return bisect.bisect_right(_bounds(shares), rng.random())


@functools.lru_cache(256)
def _bounds(shares: tuple[float, ...]) -> list[float]:
    chances = np.asarray(shares) / np.sum(shares)
    return (chances.cumsum() / chances.cumsum()[-1]).tolist()


def pick_rgb(color: str, rng: np.random.Generator) -> Rgb:
    """Returns a shade that goes by the name of `color`."""
    hue, saturation, value = (rng.uniform(*limits) for limits in COLORS[color])
    red, green, blue = colorsys.hsv_to_rgb(hue / 360 % 1.0, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def distance(a: Rgb | np.ndarray, b: Rgb | np.ndarray) -> np.ndarray:
    """Returns how far colours lie apart, 0 to 255, with green weighing most as it does for the eye."""
    difference = np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32))
    return difference @ np.asarray([0.3, 0.5, 0.2], np.float32)


def background(size: tuple[int, int], color: str, rng: np.random.Generator) -> Image.Image:
    """Returns an RGB picture of `size` (H, W) that is `color` all over: plain, shaded, striped, chequered or grainy."""
    height, width = size
    shades = [np.asarray(pick_rgb(color, rng), np.float32) for _ in range(2)]
    kind = ("plain", "shaded", "stripes", "checks", "grain")[pick(rng, (0.4, 0.25, 0.12, 0.11, 0.12))]
    if kind == "plain":
        return Image.new("RGB", (width, height), tuple(int(c) for c in shades[0]))
    # Patterns are drawn small and enlarged, which also softens their edges.
    rows, columns = -(-height // 3), -(-width // 3)
    if kind == "grain":
        weight = rng.random((max(2, rows // 2), max(2, columns // 2)), np.float32)
    else:
        angle = rng.uniform(0, 2 * math.pi)
        y, x = np.linspace(-1, 1, rows, dtype=np.float32)[:, None], np.linspace(-1, 1, columns, dtype=np.float32)
        along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        count = rng.uniform(6, 24)
        if kind == "shaded":
            weight = (along + 1.5) / 3
        elif kind == "stripes":
            weight = (np.sin(along * count) > 0).astype(np.float32)
        else:
            weight = ((np.sin(along * count) > 0) ^ (np.sin(across * count) > 0)).astype(np.float32)
    mask = Image.fromarray((255 * np.clip(weight, 0, 1)).astype(np.uint8)).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    plain = [Image.new("RGB", (width, height), tuple(int(c) for c in shade)) for shade in shades]
    return Image.composite(plain[0], plain[1], mask)


def shape_icon(shape: str, rgb: Rgb, size: int, rng: np.random.Generator) -> Image.Image:
    """Returns a filled shape, RGBA, `size` pixels a side, slightly turned, sometimes with an outline."""
    big = 3 * size
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    margin, middle = big * 0.06, big / 2
    radius, turn = middle - margin, math.radians(rng.uniform(-12, 12))
    if shape in ("circle", "ring", "crescent"):
        draw.ellipse([margin, margin, big - margin, big - margin], fill=255)
        if shape == "ring":
            inner = radius * rng.uniform(0.45, 0.65)
            draw.ellipse([middle - inner, middle - inner, middle + inner, middle + inner], fill=0)
        elif shape == "crescent":
            shift, inner = radius * rng.uniform(0.4, 0.55), radius * 0.85
            side = shift if rng.random() < 0.5 else -shift
            draw.ellipse([middle - inner + side, middle - inner, middle + inner + side, middle + inner], fill=0)
    elif shape == "heart":
        t = np.linspace(0, 2 * math.pi, 60)
        x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        draw.polygon([(middle + a * radius / 17, middle - b * radius / 17) for a, b in zip(x, y, strict=True)], 255)
    else:
        draw.polygon(_corners(shape, middle, radius, turn), fill=255)
    mask = mask.resize((size, size), Image.Resampling.BOX)
    icon = Image.new("RGBA", (size, size), (*rgb, 0))
    icon.putalpha(mask)
    return icon


def _corners(shape: str, middle: float, radius: float, turn: float) -> list[tuple[float, float]]:
    if shape == "cross":
        arm = 0.34
        points = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
        points += [(arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)]
        cos, sin = 0.95 * math.cos(turn), 0.95 * math.sin(turn)
        return [(middle + radius * (x * cos - y * sin), middle + radius * (x * sin + y * cos)) for x, y in points]
    count = {"square": 4, "diamond": 4, "triangle": 3, "star": 10}.get(shape, 6)
    start = math.pi / 4 if shape == "square" else -math.pi / 2
    wide = 0.68 if shape == "diamond" else 1.0
    points = []
    for i in range(count):
        angle = turn + start + 2 * math.pi * i / count
        far = radius * (0.42 if shape == "star" and i % 2 else 1.0)
        points.append((middle + wide * far * math.cos(angle), middle + far * math.sin(angle)))
    return points


def outlined(icon: Image.Image) -> Image.Image:
    """Returns an icon as if drawn with a pen: flatter colours, dark lines along edges and around the whole."""
    alpha = icon.getchannel("A")
    flat = ImageOps.posterize(icon.convert("RGB").filter(ImageFilter.BoxBlur(1)), 3)
    edges = flat.convert("L").filter(ImageFilter.FIND_EDGES).point([255 if v > 40 else 0 for v in range(256)])
    edges = edges.filter(ImageFilter.BoxBlur(1)).point([min(255, 2 * v) for v in range(256)])
    solid = alpha.point([255 if v > 100 else 0 for v in range(256)])
    inside = solid.filter(ImageFilter.BoxBlur(2)).point([255 if v > 250 else 0 for v in range(256)])
    rim = ImageChops.subtract(solid, inside).filter(ImageFilter.BoxBlur(0.6))
    drawn = Image.composite(Image.new("RGB", icon.size, (10, 10, 10)), flat, ImageChops.lighter(rim, edges))
    drawn.putalpha(alpha)
    return drawn


def treat(icon: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turns, mirrors and recolours an icon a little; returns RGBA of the same size."""
    if rng.random() < 0.4:
        icon = icon.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        icon = icon.rotate(rng.uniform(-18, 18), Image.Resampling.BILINEAR)
    if rng.random() < 0.35:
        alpha = icon.getchannel("A")
        keep = rng.uniform(0.2, 1.3)  # of the distance from grey
        rows = [(1 - keep) / 3 + keep * (i == j) for i in range(3) for j in range(3)]
        matrix = (*rows[:3], 0.0, *rows[3:6], 0.0, *rows[6:], 0.0)
        gains, gamma = rng.uniform(0.85, 1.15, 3), rng.uniform(0.75, 1.3)
        light = 255 * np.clip(np.arange(256)[None] / 255 * gains[:, None], 0, 1) ** gamma
        icon = icon.convert("RGB").convert("RGB", matrix).point(light.astype(np.uint8).flatten().tolist())
        icon.putalpha(alpha)
    return icon


def place(canvas: Image.Image, icon: Image.Image, left: int, top: int, size: int, halo: Rgb | None = None) -> None:
    """Pastes an icon, scaled to `size` pixels, at (left, top), with a rim of colour `halo` around it where given."""
    small = icon.resize((size, size), Image.Resampling.BICUBIC if size < icon.width else Image.Resampling.BILINEAR)
    if halo is not None:
        rim = Image.fromarray(widened(np.asarray(small.getchannel("A")), max(1, size // 28)))
        canvas.paste(halo, (left, top, left + size, top + size), rim)
    canvas.paste(small, (left, top), small)


def widened(mask: np.ndarray, reach: int) -> np.ndarray:
    """Returns for each place of a mask [H, W] the largest value within `reach` rows and columns of it."""
    for _ in range(2):  # along rows, then along columns
        wide = mask.copy()
        for step in range(1, min(reach, len(mask) - 1) + 1):
            np.maximum(wide[step:], mask[:-step], out=wide[step:])
            np.maximum(wide[:-step], mask[step:], out=wide[:-step])
        mask = wide.T
    return np.ascontiguousarray(mask)


def stands_out(icon: Image.Image, rgb: Rgb) -> bool:
    """Tells whether a fair part of an icon differs from a background of colour `rgb`."""
    pixels = np.asarray(icon.reduce(max(1, icon.width // 12)))
    opaque = pixels[..., 3] > 128
    if not opaque.any():
        return False
    return float((distance(pixels[..., :3][opaque], rgb) > 45).mean()) > 0.35


def camera(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Returns a picture as bytes [H, W, 3] after a little light, blur, compression and noise, or none of it."""
    if rng.random() < 0.12:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
    if rng.random() < 0.12:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(rng.integers(40, 90)))
        image = Image.open(buffer)
    pixels = np.asarray(image)
    if rng.random() < 0.3:
        table = np.arange(256) * rng.uniform(0.85, 1.1) + rng.uniform(-12, 12)
        pixels = np.clip(table, 0, 255).astype(np.uint8).take(pixels)
    if rng.random() < 0.2:
        strength = int(rng.integers(3, 14))
        noise = rng.integers(-strength, strength + 1, pixels.shape, np.int8)
        pixels = np.clip(pixels.astype(np.int16) + noise, 0, 255).astype(np.uint8)
    return pixels
