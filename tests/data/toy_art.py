"""A pack of art for tests: forty things that are coloured shapes, two fonts, some words; and one of held-out art."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from kimi_mm.data.art import ART, HELD_OUT, ICON_SIZE, Named, icon_bytes, write_pack
from kimi_mm.data.art_sources import read_things
from kimi_mm.data.drawing import SHAPES, shape_icon

FONTS = {ART: ("DejaVuSans.ttf", "DejaVuSansMono.ttf"), HELD_OUT: ("DejaVuSerif.ttf",)}


def write_toy_art(folder: Path) -> Path:
    """Writes `folder/art.zip` and `folder/held-out.zip`; returns the folder."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    words = [a + b + c for a in "bcdfg" for b in "aeiou" for c in "lmnrst"]
    for pack, style in ((ART, "plain"), (HELD_OUT, "other")):
        rng = np.random.default_rng(0)
        files, things = {f"fonts/{name}": (fonts / name).read_bytes() for name in FONTS[pack]}, []
        for number, (thing, _) in enumerate(read_things()[::6][:40]):
            member = f"icons/{style}/{thing.name}.webp"
            rgb = tuple(int(v) for v in rng.integers(0, 256, 3))
            files[member] = icon_bytes(shape_icon(SHAPES[number % len(SHAPES)], rgb, ICON_SIZE, rng))
            things.append(Named(thing.name, thing.plural, thing.group, ((style, member),)))
        write_pack(folder / pack, things, files, words if pack == ART else ())
    return folder
