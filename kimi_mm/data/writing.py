"""Words and digits in scenes: which ones, in which font, how large, and in ink that can be told from the paper.

Held-out words are those that `held_out("word", ...)` says; fonts are held out by being in a pack of their own.
Beside the lines as they stand there, everything that writes returns its letters and where they are.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from kimi_mm.data.art import Art, held_out
from kimi_mm.data.digits import coarse_digit, coarse_picture, written_digit
from kimi_mm.data.drawing import COLORS, Rgb, distance, pick, pick_rgb

SMALLEST = 15  # pixels to the em
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Letter:
    """A letter or digit of what is written in a scene, and its box."""

    character: str
    box: Box


Written = tuple[tuple[str, ...], list[Letter]]


def draw_words(image: Image.Image, art: Art, rng: np.random.Generator, test: bool) -> Written:
    """Writes one to four words, in one to three lines.

    In tests all words are held out; otherwise none is, and some are letters that make no word.
    """
    font_name = art.fonts[rng.integers(len(art.fonts))]
    width, height = image.size
    lines = list(_lines(art, rng, test))[: max(1, height // (2 * SMALLEST))]
    size = int(rng.integers(SMALLEST, max(SMALLEST + 1, min(64, height // len(lines)))))
    box = _extent(art, font_name, size, lines)
    while box[0] > width - 6 or box[1] > height - 4:
        if size > SMALLEST:
            size = max(SMALLEST, int(size * 0.85))
        elif len(lines) > 1:
            lines = lines[:-1]
        elif " " in lines[0]:
            lines = [lines[0].rsplit(" ", 1)[0]]
        elif len(lines[0]) > 2 and not test:
            lines = [lines[0][:-1]]
        elif size > 9:
            size -= 1
        else:
            break
        box = _extent(art, font_name, size, lines)
    left = int(rng.integers(2, max(3, width - box[0] - 3)))
    top = int(rng.integers(1, max(2, height - box[1] - 2)))
    paper = _paper(image, (left, top, left + box[0], top + box[1]), rng)
    return tuple(lines), _write(image, art, font_name, size, lines, (left, top), ink_for(paper, rng))


def draw_page(image: Image.Image, art: Art, rng: np.random.Generator, test: bool) -> Written:
    """Fills a picture with lines of words in one font and size; words are chosen as by `draw_words`."""
    font_name = art.fonts[rng.integers(len(art.fonts))]
    width, height = image.size
    # As many small ones as large ones: sizes are even in their logarithm.
    size = int(SMALLEST * (max(1.0, min(44, height / 3) / SMALLEST)) ** rng.random())
    step = max(1, _extent(art, font_name, size, [""])[1])
    lines: list[str] = []
    for _ in range(max(1, (height - 4) // step)):
        words: list[str] = []
        room = width - 8.0
        while True:
            words.append(_cased(_word(art, rng, test), rng))
            room -= sum(art.advance(font_name, size, c) for c in f" {words[-1]}")
            if room < 0:
                break
        kept = words[:-1] if rng.random() < 0.8 else words[:1]  # some lines end before the margin
        lines += [" ".join(kept)] if kept and len(words) > 1 else []
    lines = lines or [_word(art, rng, test)[:2]]
    box = _extent(art, font_name, size, lines)
    left, top = (int(rng.integers(0, max(1, room))) for room in (width - box[0], height - box[1]))
    paper = _paper(image, (left, top, left + box[0], top + box[1]), rng)
    return tuple(lines), _write(image, art, font_name, size, lines, (left, top), ink_for(paper, rng))


def draw_number(image: Image.Image, art: Art, rng: np.random.Generator) -> Written:
    """Writes a number of two to five digits in a font or by hand."""
    width, height = image.size
    digits = "".join(map(str, rng.integers(0, 10, int(rng.integers(2, 6 if width > 80 else 3)))))
    if rng.random() < 0.5:
        side = int(min(height * 0.9, width / (0.75 * len(digits))) * rng.uniform(0.6, 0.95))
        left, top = (int(rng.uniform(0, max(0, room))) for room in (width - 0.75 * side * len(digits), height - side))
        paper = _paper(image, (left, top, left + round(0.75 * side * len(digits)), top + side), rng)
        ink, letters = ink_for(paper, rng), []
        for i, digit in enumerate(digits):
            mask, at = Image.fromarray(written_digit(int(digit), side, rng)), left + round(0.75 * side * i)
            image.paste(Image.new("RGB", mask.size, ink), (at, top), mask)
            letters.append(Letter(digit, (at, top, at + side, top + side)))
        return (digits,), letters
    font_name = art.fonts[rng.integers(len(art.fonts))]
    size = int(min(height * 0.8, 1.5 * width / len(digits)) * rng.uniform(0.5, 0.95))
    box = _extent(art, font_name, size, (digits,))
    while box[0] > width - 4 or box[1] > height - 4:
        size = int(size * 0.85)
        box = _extent(art, font_name, size, (digits,))
    left, top = (int(rng.integers(2, max(3, room - 2))) for room in (width - box[0], height - box[1]))
    paper = _paper(image, (left, top, left + box[0], top + box[1]), rng)
    return (digits,), _write(image, art, font_name, size, (digits,), (left, top), ink_for(paper, rng))


def draw_digit(image: Image.Image, art: Art, rng: np.random.Generator) -> Written:
    """Shows a single digit: half of them in the coarse grain of small scans, the others by hand or in a font."""
    digit, kind = int(rng.integers(0, 10)), rng.random()
    width, height = image.size
    if kind < 0.5:
        counts = coarse_digit(digit, rng) if rng.random() < 0.85 else _coarse_type(art, digit, rng)
        side = int(min(width, height) * (1.0 if rng.random() < 0.6 else rng.uniform(0.6, 1.0)))
        picture = coarse_picture(counts, side)
        if rng.random() < 0.3:
            picture = picture.point(lambda v: 255 - v)
        left, top = (int(rng.integers(0, room + 1)) for room in (width - side, height - side))
        image.paste(picture.convert("RGB"), (left, top))
        return (str(digit),), [Letter(str(digit), (left, top, left + side, top + side))]
    side = int(min(width, height) * rng.uniform(0.45, 0.95))
    left, top = (int(rng.integers(0, room + 1)) for room in (width - side, height - side))
    ink = ink_for(_paper(image, (left, top, left + side, top + side), rng), rng)
    if kind < 0.8:
        mask = Image.fromarray(written_digit(digit, side, rng))
        image.paste(Image.new("RGB", mask.size, ink), (left, top), mask)
        return (str(digit),), [Letter(str(digit), (left, top, left + side, top + side))]
    font_name = art.fonts[rng.integers(len(art.fonts))]
    return (str(digit),), _write(image, art, font_name, max(10, int(0.9 * side)), (str(digit),), (left, top), ink)


def ink_for(paper: Rgb, rng: np.random.Generator) -> Rgb:
    """Returns a colour that can be read on `paper`."""
    names = list(COLORS)
    for _ in range(12):
        ink = pick_rgb(names[rng.integers(len(names))], rng)
        if distance(ink, paper) > 80:
            return ink
    return (0, 0, 0) if distance(paper, (0, 0, 0)) > distance(paper, (255, 255, 255)) else (255, 255, 255)


def _lines(art: Art, rng: np.random.Generator, test: bool) -> tuple[str, ...]:
    number = 1 + pick(rng, (0.6, 0.3, 0.1) if test else (0.5, 0.3, 0.12, 0.08))
    words = [_word(art, rng, test) for _ in range(number)]
    case = rng.random()
    if case > 0.8:
        words = [word.upper() for word in words]
    elif case > 0.5:
        words = [word.capitalize() for word in words]
    if number == 1 or rng.random() < 0.5:
        return (" ".join(words),)
    cut = int(rng.integers(1, number))
    return (" ".join(words[:cut]), " ".join(words[cut:]))


def _cased(word: str, rng: np.random.Generator) -> str:
    draw = rng.random()
    return word.upper() if draw > 0.8 else word.capitalize() if draw > 0.6 else word


def _word(art: Art, rng: np.random.Generator, test: bool) -> str:
    if not test and rng.random() < 0.3:
        length = int(rng.integers(2, 8))
        if rng.random() < 0.25:
            return "".join(string.digits[i] for i in rng.integers(0, 10, length))
        return "".join(string.ascii_lowercase[i] for i in rng.integers(0, 26, length))
    while True:
        word = art.words[rng.integers(len(art.words))]
        if held_out("word", word) == test:
            return word


def _coarse_type(art: Art, digit: int, rng: np.random.Generator) -> np.ndarray:
    """A typed digit at the grain of `coarse_digit`."""
    font = art.font(art.fonts[rng.integers(len(art.fonts))], 40)
    left, top, right, bottom = font.getbbox(str(digit))
    image = Image.new("L", (max(1, int(right - left)), max(1, int(bottom - top))))
    ImageDraw.Draw(image).text((-left, -top), str(digit), font=font, fill=255)
    wide = max(8, min(32, round(image.width * 32 / image.height)))
    square = Image.new("L", (32, 32))
    square.paste(image.resize((wide, 32)), ((32 - wide) // 2, 0))
    return (np.asarray(square) > 127).reshape(8, 4, 8, 4).sum((1, 3)).astype(np.uint8)


def _extent(art: Art, font_name: str, size: int, lines: Sequence[str]) -> tuple[int, int]:
    """Width and height in pixels of lines."""
    font = art.font(font_name, size)
    ascent, descent = font.getmetrics()
    return max(int(font.getlength(line)) for line in lines) + 4, (ascent + descent) * len(lines)


def _write(
    image: Image.Image, art: Art, font_name: str, size: int, lines: Sequence[str], at: tuple[int, int], ink: Rgb
) -> list[Letter]:
    font = art.font(font_name, size)
    step = sum(font.getmetrics())
    draw = ImageDraw.Draw(image)
    letters = []
    for i, line in enumerate(lines):
        left, top = at[0] + 2, at[1] + i * step
        draw.text((left, top), line, font=font, fill=ink)
        edges = [
            left + int(x) for x in itertools.accumulate((art.advance(font_name, size, c) for c in line), initial=0)
        ]
        letters += [
            Letter(character, (edges[n], top, edges[n + 1], top + step))
            for n, character in enumerate(line)
            if character != " "
        ]
    return letters


def _paper(image: Image.Image, box: Box, rng: np.random.Generator) -> Rgb:
    """Puts a sign below the words, more often than not, and returns the colour that they will stand on."""
    if rng.random() < 0.4 and not _uneven(image, box):
        return image.getpixel(((box[0] + box[2]) // 2, (box[1] + box[3]) // 2))  # type: ignore[return-value]
    names = list(COLORS)
    paper = pick_rgb(names[rng.integers(len(names))], rng) if rng.random() < 0.6 else (250, 250, 250)
    margin = int(rng.integers(1, 6))
    left, top, right, bottom = box
    frame = ink_for(paper, rng) if rng.random() < 0.3 else None
    corners = [left - margin, top - margin, right + margin, bottom + margin]
    ImageDraw.Draw(image).rounded_rectangle(corners, int(rng.integers(0, 8)), fill=paper, outline=frame)
    return paper


def _uneven(image: Image.Image, box: Box) -> bool:
    return float(np.asarray(image.crop(box).resize((12, 12)), np.float32).std((0, 1)).max()) > 18
