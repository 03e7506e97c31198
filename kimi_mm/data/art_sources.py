"""Where art comes from: icon sets, fonts and words in packages of the public registries, by name, with licences.

    npm tarballs (SVG in JSON) ─► resvg ─► 96 px RGBA ─┐
    Debian fonts ─► subset to ASCII ───────────────────┼─► art.zip, held-out.zip, art-report.json
    Debian word list ──────────────────────────────────┘

Only permissive licences train; OpenMoji (CC-BY-SA) is the style that tests alone show.
"""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from kimi_mm.data.art import ART, HELD_OUT, Named, fit_square, icon_bytes, write_pack
from kimi_mm.data.manifest import write_aside
from kimi_mm.data.packages import PackageError, debian_package, npm_tarball
from kimi_mm.errors import UserError

# style: (npm package, licence of the drawings, whose they are)
STYLES = {
    "noto": ("@iconify-json/noto", "Apache-2.0", "Google"),
    "noto-v1": ("@iconify-json/noto-v1", "Apache-2.0", "Google"),
    "twemoji": ("@iconify-json/twemoji", "CC-BY-4.0", "Twitter"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "MIT", "Microsoft"),
    "fxemoji": ("@iconify-json/fxemoji", "Apache-2.0", "Mozilla"),
    "emojione": ("@iconify-json/emojione", "CC-BY-4.0", "EmojiTwo, Ranks.com"),
}
LEFT_OUT = {("fxemoji", "sunglasses")}  # a face that wears them
HELD_OUT_STYLES = {"openmoji": ("@iconify-json/openmoji", "CC-BY-SA-4.0", "OpenMoji")}

# Debian package: (licence, files)
FONTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fonts-dejavu-core": ("Bitstream Vera", ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")),
    "fonts-liberation2": (
        "OFL-1.1",
        (
            "LiberationSans-Regular",
            "LiberationSans-Bold",
            "LiberationSans-Italic",
            "LiberationSerif-Regular",
            "LiberationSerif-Bold",
            "LiberationSerif-Italic",
            "LiberationMono-Regular",
        ),
    ),
    "fonts-open-sans": ("Apache-2.0", ("OpenSans-Regular", "OpenSans-Semibold")),
    "fonts-lato": ("OFL-1.1", ("Lato-Regular", "Lato-Black", "Lato-Italic")),
    "fonts-roboto-unhinted": ("Apache-2.0", ("Roboto-Regular", "Roboto-Bold", "RobotoCondensed-Regular")),
    "fonts-crosextra-carlito": ("OFL-1.1", ("Carlito-Regular",)),
    "fonts-clear-sans": ("Apache-2.0", ("ClearSans-Regular", "ClearSans-Bold")),
    "fonts-karla": ("OFL-1.1", ("Karla-Regular",)),
    "fonts-manrope": ("OFL-1.1", ("Manrope-Medium",)),
    "fonts-sora": ("OFL-1.1", ("Sora-Regular",)),
    "fonts-dosis": ("OFL-1.1", ("Dosis-Medium",)),
    "fonts-jura": ("OFL-1.1", ("Jura-Medium",)),
    "fonts-play": ("OFL-1.1", ("Play-Regular",)),
    "fonts-go": ("BSD-3-Clause", ("Go-Regular", "Go-Bold", "Go-Mono")),
    "fonts-b612": ("OFL-1.1", ("B612-Regular",)),
    "fonts-quicksand": ("OFL-1.1", ("Quicksand-Medium",)),
    "fonts-league-spartan": ("OFL-1.1", ("LeagueSpartan-Medium",)),
    "fonts-yanone-kaffeesatz": ("OFL-1.1", ("YanoneKaffeesatz-Regular",)),
    "fonts-allerta": ("OFL-1.1", ("allerta_medium",)),
    "fonts-national-park": ("OFL-1.1", ("NationalPark-Regular",)),
    "fonts-averia-sans-gwf": ("OFL-1.1", ("AveriaSansGWF-Regular",)),
    "fonts-averia-serif-gwf": ("OFL-1.1", ("AveriaSerifGWF-Regular",)),
    "fonts-paratype": ("ParaType Free Font Licence", ("PTS55F", "PTF55F", "PTF75F")),
    "fonts-tuffy": ("public domain", ("Tuffy",)),
    "fonts-opendyslexic": ("Bitstream Vera", ("OpenDyslexic-Regular",)),
    "fonts-ebgaramond": ("OFL-1.1", ("EBGaramond12-Regular",)),
    "fonts-oldstandard": ("OFL-1.1", ("OldStandard-Regular",)),
    "fonts-quattrocento": ("OFL-1.1", ("Quattrocento-Regular",)),
    "fonts-vollkorn": ("OFL-1.1", ("Vollkorn-Regular", "Vollkorn-Bold")),
    "fonts-hack": ("Bitstream Vera", ("Hack-Regular",)),
    "fonts-jetbrains-mono": ("Apache-2.0", ("JetBrainsMono-Medium",)),
    "fonts-courier-prime": ("OFL-1.1", ("Courier Prime",)),
    "fonts-anonymous-pro": ("OFL-1.1", ("Anonymous Pro",)),
    "fonts-fantasque-sans": ("OFL-1.1", ("FantasqueSansMono-Regular",)),
    "fonts-humor-sans": ("OFL-1.1", ("Humor-Sans",)),
    "fonts-dkg-handwriting": ("OFL-1.1", ("dkg",)),
    "fonts-breip": ("OFL-1.0", ("Breip",)),
    "fonts-bwht": ("OFL-1.1", ("BecauseWeBuild-Regular", "BecauseWeLearn-Regular")),
}
HELD_OUT_FONTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fonts-cantarell": ("OFL-1.1", ("Cantarell-Regular",)),
    "fonts-cabin": ("OFL-1.1", ("Cabin-Bold",)),
    "fonts-crosextra-caladea": ("Apache-2.0", ("Caladea-Regular",)),
    "fonts-linuxlibertine": ("OFL-1.1", ("LinLibertine_R",)),
    "fonts-inconsolata": ("OFL-1.0", ("Inconsolata",)),
    "fonts-roboto-slab": ("Apache-2.0", ("RobotoSlab-Regular",)),
    "fonts-comic-neue": ("OFL-1.1", ("ComicNeue-Regular",)),
    "fonts-comfortaa": ("OFL-1.1", ("Comfortaa-Regular",)),
}
WORD_LIST = ("wamerican-small", "SCOWL, permissive", "usr/share/dict/american-english-small")
ASCII = "".join(map(chr, range(32, 127)))


def prepare_art(out: str | Path, packages: str | Path | None = None, note: Callable[[str], None] | None = None) -> dict:
    """Writes `art.zip`, `held-out.zip` and `art-report.json`.

    Args:
        out: folder.
        packages: folder of already downloaded packages; None downloads them by name.
        note: called with the name of each step.

    Returns:
        Counts and sizes in bytes; the report on disk also names each source's package and licence.

    Raises:
        PackageError: a package cannot be had, or lacks a file that is named here.
        UserError: the rasteriser is not installed.
    """
    say = note or (lambda step: None)
    out, named = Path(out), read_things()
    report: dict[str, Any] = {"sources": []}
    packs = ((ART, STYLES, FONTS), (HELD_OUT, HELD_OUT_STYLES, HELD_OUT_FONTS))
    for pack, styles, fonts in packs:
        files: dict[str, bytes] = {}
        icons: dict[str, list[tuple[str, str]]] = {thing.name: [] for thing, _ in named}
        for style, (package, licence, author) in styles.items():
            say(f"drawing {style}")
            source = npm_tarball(package, packages)
            for name, member, data in _icons(source, style, named):
                icons[name].append((style, member))
                files[member] = data
            report["sources"].append(_source(source, package, f"{licence}, {author}"))
        for package, (licence, names) in fonts.items():
            say(f"fonts of {package}")
            folder = debian_package(package, packages)
            files.update({f"fonts/{name}.ttf": _subset(_font_file(folder, name)) for name in names})
            report["sources"].append(_source(folder, package, licence))
        words = _words(debian_package(WORD_LIST[0], packages)) if pack == ART else []
        things = [Named(t.name, t.plural, t.group, tuple(icons[t.name])) for t, _ in named]
        size = write_pack(out / pack, things, files, words)
        report[pack] = {"bytes": size, "icons": sum(map(len, icons.values())), "fonts": len(files), "words": len(words)}
        report[pack]["fonts"] -= report[pack]["icons"]
    report["things"] = len(named)
    report["sources"].append(_source(debian_package(WORD_LIST[0], packages), WORD_LIST[0], WORD_LIST[1]))
    write_aside(out / "art-report.json", (json.dumps(report, indent=1) + "\n").encode())
    return {name: value for name, value in report.items() if name != "sources"}


def read_things() -> list[tuple[Named, tuple[str, ...]]]:
    """Returns what `phrases/things.txt` lists: each thing and the names of its icons in the sets."""
    rows = []
    text = (Path(__file__).parent / "phrases" / "things.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, plural, group, icons = (part.strip() for part in line.split("|"))
            plural, group = "" if plural == "-" else plural, "" if group.endswith("-") else group
            rows.append((Named(name, plural, group), tuple(icons.split())))
    return rows


def draw_svg(body: str, width: float, height: float, size: int = 192) -> Image.Image:
    """Draws the inside of an SVG picture of `width` x `height` units, RGBA, `size` pixels wide."""
    try:
        import resvg_py
    except ImportError:
        raise UserError("Drawing icons needs the package 'resvg-py'; install kimi-mm[scenes].") from None
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{size}" height="{round(size * height / width)}">{body}</svg>'
    )
    return Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))).convert("RGBA")


def _icons(source: Path, style: str, named: list[tuple[Named, tuple[str, ...]]]) -> Iterator[tuple[str, str, bytes]]:
    """Yields (thing, member, WebP) for every icon of a set that a thing has there."""
    data = _icon_set(source)
    width, height = data.get("width", 16), data.get("height", 16)
    for thing, names in named:
        for name in dict.fromkeys(option for n in names for option in (n, n.replace("-", ""))):
            found = data["aliases"].get(name, {}).get("parent", name)
            icon = data["icons"].get(found)
            if icon is None or (style, name) in LEFT_OUT:
                continue
            image = draw_svg(icon["body"], icon.get("width", width), icon.get("height", height))
            yield thing.name, f"icons/{style}/{name}.webp", icon_bytes(fit_square(image))


def _icon_set(source: Path) -> dict:
    try:
        with tarfile.open(source) as tar:
            member = tar.extractfile("package/icons.json")
            data = json.load(member) if member is not None else {}
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise PackageError(f"{source}: holds no icon set ({error}); delete it and fetch it again.") from None
    return {"aliases": {}, **data}


def _font_file(folder: Path, name: str) -> Path:
    found = sorted(path for ending in (".ttf", ".otf") for path in folder.rglob(name + ending))
    if not found:
        raise PackageError(f"{folder.name}: has no font file '{name}'; another version of the package is needed.")
    return found[0]


def _subset(path: Path) -> bytes:
    """Returns a font with printable ASCII only, without hints and layout tables."""
    from fontTools import subset

    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it warns of glyphs that are thrown away anyway
    options = subset.Options(layout_features=[], hinting=False, notdef_outline=True, name_IDs=[1, 2], drop_tables=[])
    options.drop_tables += ["GSUB", "GPOS", "GDEF", "DSIG", "FFTM", "kern", "BASE", "MATH"]
    font = subset.load_font(path, options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(text=ASCII)
    subsetter.subset(font)
    font["head"].modified = 0  # type: ignore[attr-defined]
    font.recalcTimestamp = False
    buffer = io.BytesIO()
    font.save(buffer)
    return buffer.getvalue()


def _words(folder: Path) -> list[str]:
    """Returns words of three to nine lower-case letters."""
    text = (folder / WORD_LIST[2]).read_text(encoding="utf-8")
    return sorted({w for w in text.split() if 3 <= len(w) <= 9 and w.isascii() and w.isalpha() and w.islower()})


def _source(path: Path, package: str, licence: str) -> dict[str, str]:
    return {"package": package, "file": path.name, "licence": licence}
