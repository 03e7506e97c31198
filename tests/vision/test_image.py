"""Reading pictures: kinds of files, modes, orientation, sources, and a sentence for everything that is no picture."""

from __future__ import annotations

import base64
import io
import os
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from kimi_mm.errors import ImageError
from kimi_mm.vision.image import read_image

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(np.arange(20)[:, None] * 12, np.arange(30) * 8, 99), -1).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray = RGB, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(source, **options) -> np.ndarray:
    image = read_image(source, **options).image
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("PPM", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats(format, options):
    np.testing.assert_array_equal(pixels(encoded(format=format, **options)), RGB)


@pytest.mark.parametrize(("format", "tolerance"), [("JPEG", 4), ("WEBP", 4), ("GIF", 9)])
def test_lossy_formats(format, tolerance):
    got = pixels(encoded(SMOOTH, format))
    assert np.abs(got.astype(int) - SMOOTH).mean() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_undone(orientation):
    turned = {
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: np.rot90,
    }.get(orientation, lambda a: a)(RGB)
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(pixels(encoded(exif=exif)), turned)


def test_transparency():
    rgba = np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)])
    rgba[:10, :, 3] = 0
    rgba[10, :, 3] = 51
    for source in (encoded(rgba), encoded(rgba, "WEBP", lossless=True, exact=True), Image.fromarray(rgba), rgba):
        white = pixels(source)
        assert (white[:10] == 255).all()
        np.testing.assert_allclose(white[10], 0.8 * 255 + 0.2 * RGB[10], atol=1.1)
        np.testing.assert_array_equal(white[11:], RGB[11:])
        np.testing.assert_array_equal(pixels(source, alpha="drop"), RGB)


def test_palettes():
    palette = Image.new("P", (4, 2))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2, 0] * 2)
    row = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 0, 0]]
    np.testing.assert_array_equal(pixels(encoded(palette)), [row, row])
    seen = pixels(encoded(palette, transparency=1))
    assert seen[0, 1].tolist() == [255, 255, 255]
    assert seen[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["L", "LA", "1", "CMYK", "YCbCr", "HSV"])
def test_modes(mode):
    image = Image.fromarray(SMOOTH).convert("RGB" if mode == "LA" else mode)
    image = image.convert("LA") if mode == "LA" else image
    np.testing.assert_array_equal(pixels(image), np.asarray(image.convert("RGB")))


def test_depths():
    ramp = np.linspace(0, 65535, 20 * 30).reshape(20, 30)
    expected = np.repeat(np.rint(ramp / 257)[..., None], 3, -1)
    deep = ramp.astype(np.uint16)
    for source in (encoded(deep), encoded(deep, "TIFF"), Image.fromarray(deep), deep, deep.astype(np.int32) * 1):
        image = Image.fromarray(source) if isinstance(source, np.ndarray) and source.dtype == np.int32 else source
        np.testing.assert_allclose(pixels(image), expected, atol=1)
    unit = (ramp / 65535).astype(np.float32)
    for source in (unit, torch.from_numpy(unit), Image.fromarray(unit), encoded(unit, "TIFF")):
        np.testing.assert_allclose(pixels(source), expected, atol=1)
    np.testing.assert_allclose(pixels(Image.fromarray(unit * 255)), expected, atol=1)


def test_arrays():
    for source in (RGB, torch.from_numpy(RGB), np.moveaxis(RGB, 2, 0), torch.from_numpy(RGB).permute(2, 0, 1)):
        np.testing.assert_array_equal(pixels(source), RGB)
    for source in (RGB[..., 0], RGB[..., :1], RGB[None, ..., 0]):
        np.testing.assert_array_equal(pixels(source), RGB[..., :1].repeat(3, -1))
    np.testing.assert_array_equal(pixels(RGB[..., 0] > 99)[..., 1], (RGB[..., 0] > 99) * 255)


def test_sources(tmp_path, monkeypatch):
    data, path, fifo = encoded(), tmp_path / "ü b.png", tmp_path / "fifo"
    path.write_bytes(data)
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: [fifo.write_bytes(data) for _ in range(1)])
    writer.start()
    np.testing.assert_array_equal(pixels(fifo), RGB)
    writer.join()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    text = base64.b64encode(data).decode()
    percent = "data:image/png," + "".join(f"%{byte:02x}" for byte in data)
    urls = (f"data:image/png;base64,{text}", f"DATA:;BASE64,{text[:8]}\n{text[8:]}", percent)
    with path.open("rb") as file:
        for source in (path, str(path), "-", *urls, data, bytearray(data), io.BytesIO(data), file):
            picture = read_image(source)
            np.testing.assert_array_equal(np.asarray(picture.image), RGB)
            assert picture.notes == ()
    assert read_image(path).name == str(path)


def test_first_frame_of_an_animation_is_said():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        picture = read_image(encoded(frames[0], format, save_all=True, append_images=frames[1:]))
        assert np.asarray(picture.image)[0, 0, 0] > 250
        assert len(picture.notes) == 1
        assert "only the first" in picture.notes[0]


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size; there are hardly any pixels behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 1000)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_bombs_are_refused_before_decoding(monkeypatch, recwarn):
    small = encoded()
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("the picture was decoded"))
    for width, height in ((20_000, 20_000), (12_000, 10_000)):
        with pytest.raises(ImageError, match="more than 100,000,000"):
            read_image(png_of_size(width, height))
    with pytest.raises(ImageError, match="30x20 pixels are more than 599"):
        read_image(small, max_pixels=599)
    assert not recwarn.list


BAD = {
    "empty": (b"", "empty"),
    "letter": (b"Dear reader, this is a letter." * 9, "not a picture that can be read"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG .* rsvg-convert"),
    "svg with header": (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- by hand -->\n<svg/>', "SVG"),
    "pdf": (b"%PDF-1.7 ...", "PDF"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
    "video": (b"\0\0\0\x18ftypisom\0\0\0\0", "is a video"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a picture that can be read"),
    "png header": (encoded()[:30], "damaged or cut short"),
    "png": (encoded()[:700], "cut short"),
    "jpeg": (encoded(format="JPEG")[:700], "cut short"),
    "webp": (encoded(format="WEBP")[:300], "cut short"),
    "gif": (encoded(format="GIF")[:1000], "cut short"),
    "bmp": (encoded(format="BMP")[:1000], "cut short"),
    "tiff": (encoded(format="TIFF", compression="tiff_lzw")[:900], "cut short"),
    "damaged": (encoded()[:60] + bytes(200) + encoded()[260:], "damaged or cut short"),
    "missing": ("/nowhere/x.png", "no such file"),
    "address": ("https://example.org/x.png", "not fetched"),
    "no comma": ("data:image/png;base64", "no comma"),
    "not base64": ("data:image/png;base64,!!!", "not valid base64"),
    "NUL": ("a\0b", "not a file name"),
    "text file": (io.StringIO("x"), "binary"),
    "nothing": (None, "NoneType"),
    "five axes": (np.zeros((1, 2, 3, 4, 5)), r"shape \[1, 2, 3, 4, 5\]"),
    "two channels": (np.zeros((9, 9, 2), np.uint8), "shape"),
    "no rows": (np.zeros((0, 9, 3), np.uint8), "no pixels"),
    "floats": (np.full((9, 9, 3), 255.0), r"\[0, 1\]"),
    "NaN": (np.full((9, 9), np.nan), "finite"),
    "complex": (np.zeros((9, 9), np.complex64), "complex64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence(name, recwarn):
    source, words = BAD[name]
    with pytest.raises(ImageError, match=words) as caught:
        read_image(source)
    assert str(caught.value).count("\n") == 0
    assert not recwarn.list


def test_bad_paths(tmp_path, monkeypatch):
    (tmp_path / "empty.png").touch()
    for path, words in ((tmp_path, "is a directory"), (tmp_path / "empty.png", r"empty\.png: the file is empty")):
        with pytest.raises(ImageError, match=words):
            read_image(path)
    with pytest.raises(ImageError, match="cannot be opened"):
        read_image(tmp_path / "empty.png" / "x")
