"""Packs of art, and the pieces of which `kimi-mm prepare art` makes them."""

import io
import json
import tarfile
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageFont

from kimi_mm.data import packages
from kimi_mm.data.art import ART, HELD_OUT, Art, fit_square, held_out
from kimi_mm.data.art_sources import FONTS, HELD_OUT_FONTS, STYLES, _icons, _subset, draw_svg, read_things
from kimi_mm.data.drawing import outlined
from kimi_mm.data.packages import PackageError, npm_tarball
from kimi_mm.errors import CheckpointError
from tests.data.toy_art import write_toy_art


def test_packs_complement_each_other_and_are_the_same_each_time(art_folder, tmp_path):
    both = Art(art_folder / ART, art_folder / HELD_OUT)
    assert {style for style, _ in both.things["dog"].icons} == {"plain", "other"}
    assert both.fonts == ["DejaVuSans.ttf", "DejaVuSansMono.ttf", "DejaVuSerif.ttf"]
    assert both.icon(both.things["dog"].icons[0][1]).size == (96, 96)
    assert both.font("DejaVuSerif.ttf", 20).getlength("word") > 30
    again = write_toy_art(tmp_path)
    for name in (ART, HELD_OUT):
        assert (again / name).read_bytes() == (art_folder / name).read_bytes()


def test_derived_pictures_are_made_once(art):
    made = []

    def count(icon: Image.Image) -> Image.Image:
        made.append(icon)
        return icon

    member = art.things["dog"].icons[0][1]
    assert art.derived(member, count) is art.derived(member, count)
    assert len(made) == 1
    assert art.derived(member, outlined) is not art.icon(member)


def test_bad_packs_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.zip: cannot be read.*prepare art"):
        Art(tmp_path / "none.zip")
    (tmp_path / "bad.zip").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match=r"bad\.zip: not a pack"):
        Art(tmp_path / "bad.zip")


def test_a_tenth_is_held_out():
    share = np.mean([held_out("pair", a, b) for a in range(100) for b in range(100)])
    assert 0.085 < share < 0.115
    assert held_out("pair", "cat", "dog") == held_out("pair", "cat", "dog")


def test_what_icons_show():
    things = read_things()
    names = [thing.name for thing, _ in things]
    assert len(names) == len(set(names)) > 250
    assert all(icons for _, icons in things)
    plurals = [thing.plural for thing, _ in things if thing.plural]
    assert not set(plurals) & set(names)
    assert len(set(plurals)) == len(plurals)
    assert {"animal", "fruit", "vehicle", ""} <= {thing.group for thing, _ in things}


def test_sources_do_not_overlap():
    """No held-out font may train under another package's name, and OpenMoji is no training style."""
    faces = {name for _, names in FONTS.values() for name in names}
    assert not faces & {name for _, names in HELD_OUT_FONTS.values() for name in names}
    assert not set(FONTS) & set(HELD_OUT_FONTS)
    assert not any("openmoji" in package for package, _, _ in STYLES.values())
    assert not any("SA" in licence or "GPL" in licence for _, licence, _ in STYLES.values())
    assert not any("GPL" in licence for licence, _ in (*FONTS.values(), *HELD_OUT_FONTS.values()))


def test_fonts_keep_ascii_only():
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    small = _subset(path)
    assert len(small) < 30_000 < path.stat().st_size
    whole, cut = ImageFont.truetype(str(path), 30), ImageFont.truetype(io.BytesIO(small), 30)
    sizes = [np.asarray(font.getmask("Rag {9}~").getbbox()) for font in (whole, cut)]
    assert np.abs(sizes[0] - sizes[1]).max() <= 2  # hints move edges
    assert cut.getmask("\u0416").getbbox() == cut.getmask("\u0419").getbbox()  # both are the missing glyph


def test_icons_of_a_set(tmp_path):
    pytest.importorskip("resvg_py")
    square = '<path fill="#f00" d="M8 8h16v8H8z"/>'
    icons = {"dog": {"body": square}, "palmtree": {"body": square}, "sunglasses": {"body": square}}
    data = {"width": 32, "height": 32, "icons": icons, "aliases": {"red-apple": {"parent": "dog"}}}
    body = json.dumps(data).encode()
    with tarfile.open(tmp_path / "set.tgz", "w:gz") as tar:
        info = tarfile.TarInfo("package/icons.json")
        info.size = len(body)
        tar.addfile(info, io.BytesIO(body))
    found = {name: data for name, _, data in _icons(tmp_path / "set.tgz", "fxemoji", read_things())}
    assert set(found) == {"dog", "palm tree", "apple"}  # the sunglasses of that set are a face
    image = np.asarray(Image.open(io.BytesIO(found["dog"])))
    assert image.shape == (96, 96, 4)
    assert (image[40:56, 5:90, 3] > 250).all()
    assert (image[:20, :, 3] < 5).all()
    (tmp_path / "other.tgz").write_bytes(b"")
    with pytest.raises(PackageError, match="no icon set"):
        list(_icons(tmp_path / "other.tgz", "noto", read_things()))


def test_svg_is_drawn_with_transparency():
    pytest.importorskip("resvg_py")
    drawn = np.asarray(draw_svg('<circle cx="16" cy="16" r="8" fill="#00f"/>', 32, 32, 64))
    assert drawn[32, 32].tolist() == [0, 0, 255, 255]
    assert drawn[2, 2, 3] == 0


def test_fit_square_centres_what_is_there():
    image = Image.new("RGBA", (50, 40))
    image.paste((255, 0, 0, 255), (30, 10, 40, 30))
    fitted = np.asarray(fit_square(image, 96))[..., 3] > 128
    assert fitted.any(1).sum() == 94
    assert abs(int(fitted.any(0).sum()) - 47) <= 1


def test_npm_tarballs_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("KIMI_MM_CACHE", str(tmp_path / "cache"))
    for name in ("scope-set-1.2.3.tgz", "scope-set-v1-1.0.0.tgz"):
        (tmp_path / name).write_bytes(b"")
    assert npm_tarball("@scope/set", tmp_path).name == "scope-set-1.2.3.tgz"
    assert npm_tarball("@scope/set-v1", tmp_path).name == "scope-set-v1-1.0.0.tgz"
    monkeypatch.setattr(packages.shutil, "which", lambda program: None)
    with pytest.raises(PackageError, match="npm pack @scope/other"):
        npm_tarball("@scope/other", tmp_path)
