"""Reading pictures: whatever people have, to one upright RGB image of 8 bits a channel.

    path, "-", data: URL, bytes, file ─► header: kind, size ─► decode ─┬─► orientation ─► alpha, palette, depth ─► RGB
    PIL image, array ──────────────────────────────────────────────────┘

Choices where the published processors differ or say nothing: transparency is shown on white, or dropped when the
config says so; 16-bit samples are scaled to 8 bits instead of being clipped; of an animation the first frame is taken.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import sys
import urllib.parse
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps

from kimi_mm.errors import ImageError

ImageSource = Any  # path, "-", data: URL, bytes, binary file, PIL image, numpy array or tensor

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM")  # never EPS: it would run a program
_SIGNATURES = (b"\x89PNG", b"\xff\xd8", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
MAX_PIXELS = 100_000_000


@dataclass(frozen=True)
class Picture:
    """An upright RGB image, the name to call it by, and sentences about what was left out."""

    image: Image.Image
    name: str
    notes: tuple[str, ...] = ()


def read_image(source: ImageSource, *, alpha: str = "white", max_pixels: int = MAX_PIXELS) -> Picture:
    """Reads one picture: PNG, JPEG, WebP, GIF, BMP, TIFF or PPM, or one that is already in memory.

    Args:
        source: a path (pipes too), "-" for standard input, a `data:` URL, the bytes of a file, a file opened in binary
            mode, a PIL image, or an array or tensor [H, W], [H, W, C] or [C, H, W] with C in 1, 3, 4: uint8, uint16,
            bool, or floats in [0, 1].
        alpha: "white" puts transparent pictures on white, "drop" ignores transparency.
        max_pixels: larger pictures are refused by their header, before anything is decoded.

    Raises:
        ImageError: one sentence on what is wrong with the picture.
    """
    if isinstance(source, Picture):
        return source
    if isinstance(source, Image.Image):
        check_size("the picture", source.size, max_pixels)
        return Picture(_finish(source, "the picture", alpha), "the picture")
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return Picture(to_rgb(_from_array(source, max_pixels), alpha), "the picture")
    opened = open_source(source)
    refuse_other_kinds(opened.name, opened.head())
    # Pillow warns of odd metadata where the pixels are fine, and of sizes that are refused here anyway.
    with opened.open() as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = open_image(opened.name, file, max_pixels)
        upright = _finish(image, opened.name, alpha)
        return Picture(upright, opened.name, _left_out(image, opened.name))


def _left_out(image: Image.Image, name: str) -> tuple[str, ...]:
    """Says that there are more frames or pages; a phone's JPEG with a preview behind it (MPO) is one picture."""
    try:
        several = getattr(image, "is_animated", False) and image.format != "MPO"
    except Exception:  # what follows the first frame is damaged, and not needed
        several = True
    if not several:
        return ()
    what, part = ("has several pages", "page") if image.format == "TIFF" else ("is animated", "frame")
    return (f"{name}: {what}; only the first {part} is looked at.",)


def _finish(image: Image.Image, name: str, alpha: str) -> Image.Image:
    try:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image), alpha)
    except MemoryError:
        raise
    except Exception as error:  # the decoders raise whatever they like on damaged data
        raise broken(name, error) from None


def open_image(name: str, file: BinaryIO, max_pixels: int) -> Image.Image:
    """Opens an image file without decoding it; ImageError when it is of no known kind or too large."""
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: far too many pixels, more than {max_pixels:,}; make it smaller first.") from None
    except Image.UnidentifiedImageError:
        file.seek(0)
        if file.read(8).startswith(_SIGNATURES):
            raise ImageError(f"{name}: damaged or cut short, it cannot be decoded.") from None
        raise ImageError(
            f"{name}: not a picture that can be read; PNG, JPEG, WebP, GIF, BMP, TIFF and PPM can."
        ) from None
    except Exception as error:
        raise broken(name, error) from None
    check_size(name, image.size, max_pixels)
    return image


def check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    """Raises ImageError when a picture of (width, height) is empty or has more than `max_pixels` pixels."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: has no pixels ({width}x{height}).")
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width}x{height} pixels are more than {max_pixels:,}; make it smaller first.")


def to_rgb(image: Image.Image, alpha: str = "white") -> Image.Image:
    """Brings any mode of PIL to RGB: palettes looked up, 16 and 32 bits scaled to 8, transparency as asked."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        if alpha == "white":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(samples: np.ndarray) -> np.ndarray:
    """Scales grey samples of any range to uint8: by 65535 for 16 bits, by their peak where the type says nothing."""
    values = np.nan_to_num(samples.astype(np.float64), posinf=0.0, neginf=0.0)
    peak = values.max()
    if samples.dtype == np.uint16:
        top = 65535.0
    elif samples.dtype.kind == "f":
        top = 1.0 if peak <= 1.0 else 255.0 if peak <= 255.0 else peak
    else:
        top = 255.0 if peak <= 255 else 65535.0 if peak <= 65535 else peak
    return np.clip(np.rint(values * (255.0 / top)), 0, 255).astype(np.uint8)


def _from_array(source: Any, max_pixels: int) -> Image.Image:
    array = source.detach().cpu().numpy() if isinstance(source, torch.Tensor) else source
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(f"the picture has shape {list(source.shape)}; expected [H, W], [H, W, C] or [C, H, W].")
    check_size("the picture", (array.shape[1], array.shape[0]), max_pixels)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = _to_8_bits(array)
    elif array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < 0.0 or array.max() > 1.0:
            raise ImageError("the picture's floats must lie in [0, 1] and be finite; give uint8 for 0 to 255.")
        array = np.rint(array * 255.0).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ImageError(f"the picture has type {array.dtype}; expected uint8, uint16, bool or floats in [0, 1].")
    return Image.fromarray(np.ascontiguousarray(array))


# ---- where the bytes come from --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A file by the name that messages give it: where it lies, or its bytes."""

    name: str
    content: Path | bytes

    def open(self) -> BinaryIO:
        """Opens it for reading, from the start."""
        return io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb")

    def head(self) -> bytes:
        """Returns the first kilobyte."""
        with self.open() as file:
            return file.read(1024)


def open_source(source: ImageSource) -> Source:
    """Finds what holds a picture or clip; ImageError when it is not there, empty, or nothing to read from."""
    if isinstance(source, Source):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _in_memory("the picture", bytes(source))
    if isinstance(source, str) and source == "-":
        return _in_memory("standard input", sys.stdin.buffer.read())
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _in_memory("the data: URL", _data_url(source))
    if isinstance(source, str) and re.match(r"(?i)[a-z][a-z0-9+.-]+://", source):
        raise ImageError(f"{source[:80]}: addresses are not fetched; download the file and give its path.")
    if isinstance(source, (str, Path)):
        return _from_path(Path(source))
    if not hasattr(source, "read") or isinstance(source, io.TextIOBase):
        raise ImageError(
            f"a picture cannot be read from {type(source).__name__}; give a path, bytes, a file opened in binary "
            "mode, a PIL image or an array."
        )
    return _in_memory(str(getattr(source, "name", "the picture")), source.read())


def _from_path(path: Path) -> Source:
    try:
        with path.open("rb") as file:
            if not file.seekable():
                return _in_memory(str(path), file.read())
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file.") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: is a directory, not a picture.") from None
    except OSError as error:
        raise ImageError(f"{path}: cannot be opened ({error.strerror}).") from None
    except ValueError as error:
        raise ImageError(f"{str(path)!r}: not a file name ({error}).") from None
    if not path.stat().st_size:
        raise ImageError(f"{path}: the file is empty.")
    return Source(str(path), path)


def _in_memory(name: str, data: bytes) -> Source:
    if not data:
        raise ImageError(f"{name}: empty.")
    return Source(name, data)


def _data_url(url: str) -> bytes:
    kind, comma, data = url[5:].partition(",")
    if not comma:
        raise ImageError("the data: URL has no comma before its data; expected 'data:image/png;base64,...'.")
    raw = urllib.parse.unquote_to_bytes(data)
    if not kind.lower().replace(" ", "").endswith(";base64"):
        return raw
    try:
        return base64.b64decode(re.sub(rb"\s", b"", raw), validate=True)
    except binascii.Error as error:
        raise ImageError(f"the data: URL is not valid base64 ({error}).") from None


# ---- telling kinds of files apart -----------------------------------------------------------------------------------


def is_video(head: bytes) -> bool:
    """Tells by its first bytes whether a file is a video: MP4 and MOV, Matroska and WebM, AVI, MPEG, Ogg or FLV."""
    if head[4:8] == b"ftyp":
        return head[8:12] not in (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
    if head[:4] == b"RIFF":
        return head[8:12] == b"AVI "
    return head.startswith((b"\x1aE\xdf\xa3", b"\x00\x00\x01\xba", b"OggS", b"FLV\x01"))


def refuse_other_kinds(name: str, head: bytes) -> None:
    """Raises ImageError with advice for files that people take for pictures but that none of the decoders reads."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"<svg") or (start.startswith((b"<?xml", b"<!--", b"<!doctype")) and b"<svg" in start):
        raise ImageError(f"{name}: SVG is a drawing, not pixels; convert it first, for instance with rsvg-convert.")
    if head[4:12] in (b"ftypavif", b"ftypavis", b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1"):
        raise ImageError(f"{name}: HEIC and AVIF cannot be read; convert it to JPEG or PNG first.")
    if start.startswith(b"%pdf"):
        raise ImageError(f"{name}: is a PDF; convert its pages to PNG first, for instance with pdftoppm.")
    if is_video(head):
        raise ImageError(f"{name}: is a video, not a picture; give it as a clip.")


def broken(name: str, error: Exception) -> ImageError:
    """Returns the error to raise for a file whose data ends early or makes no sense."""
    reason = str(error).strip().rstrip(".") or type(error).__name__
    if isinstance(error, (EOFError, IndexError)) or re.search("(?i)truncated|unexpected end", reason):
        return ImageError(f"{name}: cut short, the file ends before the picture does.")
    return ImageError(f"{name}: damaged or cut short, it cannot be decoded ({reason}).")
