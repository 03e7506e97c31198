"""Video files through PyAV: formats, rotation, damage; and what is said where PyAV is missing."""

from __future__ import annotations

import io
import struct
import sys

import numpy as np
import pytest

from kimi_mm.errors import ImageError
from kimi_mm.vision.presets import PRESETS
from kimi_mm.vision.processing import VisionProcessor

K25 = PRESETS["kimi_k25"]
MP4_HEAD = b"\0\0\0\x18ftypisom\0\0\2\0isomiso2mp41"


def video(container: str = "mp4", codec: str = "mpeg4", frames: int = 45, fps: int = 30, size=(56, 28)) -> bytes:
    """Frames whose red grows by 5 a frame, up to 255; the left half is blue."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            pixels = np.zeros((size[1], size[0], 3), np.uint8)
            pixels[..., 0] = min(5 * number, 255)
            pixels[:, : size[0] // 2, 2] = 255
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska", "avi"])
def test_formats(container, tmp_path):
    path = tmp_path / "clip.bin"
    path.write_bytes(video(container))
    for source in (path, path.read_bytes()):
        (item,) = VisionProcessor(K25).load(source)
        assert (item.grid, item.seconds, item.notes) == ((3, 2, 4), 0.0, ())
        levels = item.pixel_values.view(3, 2, 4, 3, 14, 14) * 127.5 + 127.5
        np.testing.assert_allclose(levels[:, 0, 3, 0].mean((1, 2)), [0, 110, 220], atol=12)
        assert levels[0, :, 0, 2].mean() > 180 > 60 > levels[0, :, 3, 2].mean()


def test_long_clip_is_chunked():
    items = VisionProcessor(K25).clip(video(frames=80, fps=10))
    assert [item.grid[0] for item in items] == [4, 4, 4, 4]
    assert [round(item.seconds, 3) for item in items] == [0.0, 2.1, 4.2, 6.3]


def turned(data: bytes) -> bytes:
    """Writes a rotation by a quarter into the display matrix of an MP4's track, as phones do."""
    at = data.index(b"tkhd") + 4 + 4 + 4 * 5 + 8 + 8
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    return data[:at] + matrix + data[at + 36 :]


def test_rotation_of_phones_is_undone():
    (item,) = VisionProcessor(K25).clip(turned(video(frames=1)))
    assert item.grid == (1, 4, 2)
    levels = item.pixel_values.view(4, 2, 3, 14, 14) * 127.5 + 127.5
    assert levels[0, :, 2].mean() > 180 > 60 > levels[3, :, 2].mean()  # a quarter to the right brings left to the top


def test_damaged_videos():
    clip = VisionProcessor(K25).clip
    whole = video()
    for data, words in ((whole[: len(whole) // 2], "cut short"), (MP4_HEAD + bytes(500), "cut short|no pictures")):
        with pytest.raises(ImageError, match=words):
            clip(data)
    half = video("matroska")
    (item,) = clip(half[: len(half) // 2])
    assert "has pictures for only" in item.notes[0]
    with pytest.raises(ImageError, match="56x28 pixels are more than 999"):
        VisionProcessor(K25.replace(input=K25.input.replace(max_pixels=999))).clip(whole)


def test_sound_without_pictures():
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with pytest.raises(ImageError, match="sound but no pictures"):
        VisionProcessor(K25).load(buffer.getvalue())


def test_missing_pyav_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImageError, match=r"needs PyAV; pip install 'kimi-mm\[video\]'"):
        VisionProcessor(K25).load(MP4_HEAD)
