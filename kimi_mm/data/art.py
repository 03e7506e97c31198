"""Packs of art: the icons, fonts and words that scenes are drawn from, in one zip file small enough to carry about.

    art.zip / held-out.zip
      index.json              {"things": [{name, plural, group, icons: [[style, file], ...]}], "fonts": [...], ...}
      icons/STYLE/NAME.webp   RGBA, 96 pixels a side
      fonts/NAME.ttf          subset to printable ASCII
      words.txt               one a line

`held-out.zip` has the art style and the fonts that no training scene ever shows, so a training machine need not have
it. Both are written by `kimi_mm.data.art_sources`.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from kimi_mm.data.manifest import write_aside
from kimi_mm.errors import CheckpointError

ART, HELD_OUT = "art.zip", "held-out.zip"
ICON_SIZE = 96
SHARE = 10  # one of so many compositions, and words, is held out


@dataclass(frozen=True)
class Named:
    """What an icon is called: `plural` is "" where it is not counted, `group` "" where nobody would ask for it."""

    name: str
    plural: str
    group: str
    icons: tuple[tuple[str, str], ...] = ()  # style, member of the zip


def held_out(*parts: object) -> bool:
    """Tells whether a composition, a word or the like belongs to the tests: a tenth of all, by a hash of its parts."""
    digest = hashlib.sha1("|".join(map(str, parts)).encode()).digest()
    return digest[0] % SHARE == 0


class Art:
    """One or more packs, read whole; pictures and fonts are decoded when they are first needed.

    Args:
        paths: packs; those with the same things complement each other.

    Raises:
        CheckpointError: a pack is missing or damaged.
    """

    def __init__(self, *paths: str | Path) -> None:
        self.things: dict[str, Named] = {}
        self.fonts: list[str] = []
        self.words: list[str] = []
        self._files: dict[str, bytes] = {}
        self._icons: dict[str, Image.Image] = {}
        self._fonts: dict[tuple[str, int], ImageFont.FreeTypeFont] = {}
        self._advances: dict[tuple[str, int, str], float] = {}
        for path in paths:
            self._read(Path(path))

    def _read(self, path: Path) -> None:
        try:
            with zipfile.ZipFile(path) as source:
                index = json.loads(source.read("index.json"))
                self._files.update({name: source.read(name) for name in source.namelist()})
            for row in index["things"]:
                icons = tuple((style, name) for style, name in row["icons"])
                if old := self.things.get(row["name"]):
                    icons = old.icons + icons
                self.things[row["name"]] = Named(row["name"], row["plural"], row["group"], icons)
            self.fonts.extend(index["fonts"])
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); run 'kimi-mm prepare art'.") from None
        except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: not a pack of art ({error}); run 'kimi-mm prepare art' again.") from None
        self.words.extend(self._files.get("words.txt", b"").decode().split())

    def icon(self, member: str) -> Image.Image:
        """Returns a picture of 96 x 96 pixels, RGBA."""
        if member not in self._icons:
            self._icons[member] = Image.open(io.BytesIO(self._files[member])).convert("RGBA")
        return self._icons[member]

    def derived(self, member: str, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
        """Returns a changed picture; the change is made once."""
        key = f"{change.__name__}/{member}"
        if key not in self._icons:
            self._icons[key] = change(self.icon(member))
        return self._icons[key]

    def font(self, name: str, size: int) -> ImageFont.FreeTypeFont:
        """Returns a font at `size` pixels to the em."""
        key = (name, size)
        if key not in self._fonts:
            if len(self._fonts) > 4000:
                self._fonts.clear()
                self._advances.clear()
            data = io.BytesIO(self._files[f"fonts/{name}"])
            self._fonts[key] = ImageFont.truetype(data, size, layout_engine=ImageFont.Layout.BASIC)
        return self._fonts[key]

    def advance(self, name: str, size: int, character: str) -> float:
        """Returns how far a character of a font moves the pen, in pixels, kerning aside."""
        key = (name, size, character)
        if key not in self._advances:
            self._advances[key] = self.font(name, size).getlength(character)
        return self._advances[key]


def write_pack(
    path: Path,
    things: Sequence[Named],
    files: dict[str, bytes],
    words: Sequence[str] = (),
    meta: dict[str, object] | None = None,
) -> int:
    """Writes a pack, the same bytes for the same contents, and returns its size.

    Args:
        path: the zip file.
        things: what the icons are called; their members must be among `files`.
        files: icons and fonts by member name ("icons/...", "fonts/...").
        words: for reading.
        meta: kept in the index.
    """
    index = {
        "things": [
            {"name": t.name, "plural": t.plural, "group": t.group, "icons": [list(icon) for icon in t.icons]}
            for t in things
        ],
        "fonts": sorted(name.removeprefix("fonts/") for name in files if name.startswith("fonts/")),
        **(meta or {}),
    }
    members = {"index.json": json.dumps(index, indent=0).encode(), "words.txt": "\n".join(words).encode(), **files}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        for name in sorted(members):
            packed = zipfile.ZIP_STORED if name.endswith(".webp") else zipfile.ZIP_DEFLATED
            out.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), members[name], packed, 9)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, buffer.getvalue())
    return len(buffer.getvalue())


def icon_bytes(image: Image.Image) -> bytes:
    """Encodes an icon, RGBA, as WebP."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88, alpha_quality=90, method=6)
    return buffer.getvalue()


def fit_square(image: Image.Image, size: int = ICON_SIZE) -> Image.Image:
    """Cuts off transparent margins and centres what is left in a square of `size` pixels."""
    alpha = np.asarray(image.getchannel("A")) > 8
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    if len(rows):
        image = image.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    scale = (size - 2) / max(image.size)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    square = Image.new("RGBA", (size, size))
    square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return square
