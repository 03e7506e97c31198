"""Grids, pixels, sampling and chunks against the published rule, by hand and by transformers' own processors."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from kimi_mm.config import VisionConfig
from kimi_mm.errors import ImageError
from kimi_mm.vision.presets import PRESETS
from kimi_mm.vision.processing import VisionProcessor, navit_size, pack, patchify, sample_frames

K25, VL = PRESETS["kimi_k25"], PRESETS["kimi_vl"]
PUBLISHED = [  # height, width, resized, grid, tokens; tokens of Kimi-VL
    (224, 224, (224, 224), (16, 16), 64, 64),
    (100, 333, (100, 333), (8, 24), 48, 48),
    (480, 640, (480, 640), (36, 46), 414, 414),
    (1080, 1920, (1080, 1920), (78, 138), 2691, 1032),
    (3000, 4000, (1554, 2073), (112, 150), 4200, 1036),
    (4096, 4096, (1795, 1795), (130, 130), 4225, 1089),
    (20, 9000, (15, 7168), (2, 512), 256, 322),
    (7, 7, (7, 7), (2, 2), 1, 1),
    (1, 1, (1, 1), (2, 2), 1, 1),
    (28, 28, (28, 28), (2, 2), 1, 1),
    (1792, 1792, (1792, 1792), (128, 128), 4096, 1024),
]


@pytest.mark.parametrize(("height", "width", "resized", "grid", "tokens", "vl"), PUBLISHED)
def test_published_sizes(height, width, resized, grid, tokens, vl):
    got, padded = navit_size(height, width, K25.input.max_patches, K25)
    assert got == resized
    assert (padded[0] // 14, padded[1] // 14) == grid
    assert grid[0] * grid[1] // 4 == tokens
    if width < 9000:  # Kimi-VL's own rule has no limit a side; see below
        _, padded = navit_size(height, width, VL.input.max_patches, VL)
        assert padded[0] * padded[1] // 28**2 == vl


def test_sizes_equal_transformers():
    theirs = pytest.importorskip("transformers.models.kimi_k25.image_processing_kimi_k25").navit_resize
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(0, np.log(20_000), (2000, 2))).astype(int)
    for height, width in sizes.tolist():
        for budget in (16_384, 4096, 100):
            want = theirs(height, width, 14, 2, budget, 512)
            assert navit_size(height, width, budget, K25) == want


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("size", [(60, 45), (29, 57), (700, 500), (1, 1), (3, 400)])
def test_pixels_by_hand(size):
    """The published rule: put back together, shrunk by Pillow, padded with what 0 becomes."""
    config = K25.replace(input=K25.input.replace(max_patches=400))
    image = noise(*size)
    item = VisionProcessor(config).picture(image)
    (height, width), padded = navit_size(*size, 400, config)
    t, h, w = item.grid
    assert (t, h * 14, w * 14) == (1, *padded)
    whole = item.pixel_values.view(h, w, 3, 14, 14).permute(0, 3, 1, 4, 2).reshape(*padded, 3)
    want = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)) / 127.5 - 1
    np.testing.assert_allclose(whole[:height, :width], want, atol=1e-6)
    assert (whole[height:] == -1).all()
    assert (whole[:, width:] == -1).all()
    assert item.num_tokens == h * w // 4
    assert item.size == (height, width)


@pytest.mark.parametrize("size", [(300, 451), (1500, 333), (2000, 2100)])
def test_pixels_near_transformers(size):
    """On blurred noise; on raw noise transformers strays from Pillow, which is the rule, by up to 12 levels."""
    theirs = pytest.importorskip("transformers.models.kimi_k25.image_processing_kimi_k25").Kimi_K25ImageProcessor
    config = K25.replace(input=K25.input.replace(max_patches=1024))
    image = noise(*size).filter(ImageFilter.GaussianBlur(1))
    want = theirs(max_patches=1024)(images=[image], return_tensors="pt")
    got, grid = pack([VisionProcessor(config).picture(image)])
    assert grid.tolist() == want["image_grid_thw"].tolist()
    difference = (got - want["pixel_values"]).abs() * 127.5
    assert difference.max() <= 2.01
    assert difference.mean() < 0.3


def test_clip_pixels_near_transformers():
    theirs = pytest.importorskip("transformers.models.kimi_k25.video_processing_kimi_k25").Kimi_K25VideoProcessor
    frames = np.random.default_rng(0).integers(0, 256, (6, 90, 130, 3), np.uint8)
    config = K25.replace(input=K25.input.replace(max_patches_per_frame=20))
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    want = theirs(max_patches=20)(videos=[video], do_sample_frames=False, return_tensors="pt")
    got, grid = pack(VisionProcessor(config).clip(frames))
    assert grid.tolist() == want["video_grid_thw"].tolist()
    assert [t for t, _, _ in grid.tolist()] == [4, 2]
    assert (got - want["pixel_values_videos"]).abs().max() * 127.5 <= 2.01


def test_sampling_of_the_published_rule():
    assert sample_frames(300, 30.0, K25)[:4] == [0, 16, 31, 47]
    assert sample_frames(300, 30.0, K25)[-1] == 299
    assert len(sample_frames(300, 30.0, K25)) == 20
    assert sample_frames(45, 30.0, K25) == [0, 22, 44]
    assert sample_frames(3, 1.0, K25) == [0, 1, 2]
    assert sample_frames(1, 25.0, K25) == [0]
    assert sample_frames(9, 25.0, K25) == [0]
    few = K25.replace(input=K25.input.replace(max_frames_per_video=5))
    assert sample_frames(300, 30.0, few) == [0, 75, 150, 224, 299]


def test_chunks_and_their_times():
    frames = np.zeros((10, 240, 320, 3), np.uint8)
    items = VisionProcessor(K25).clip(frames)
    assert [(i.grid, i.num_tokens, i.seconds) for i in items] == [
        ((4, 18, 24), 108, 0.0),
        ((4, 18, 24), 108, 2.0),
        ((2, 18, 24), 108, 4.0),
    ]
    assert [i.grid for i in VisionProcessor(VL).clip(frames[:2])] == [(1, 18, 24)] * 2
    shared = K25.replace(input=K25.input.replace(max_patches_per_video=800))
    assert VisionProcessor(shared).clip(frames)[0].grid == (4, 8, 12)


@pytest.mark.parametrize(("size", "tokens"), [((240, 320), 108), ((720, 1280), 1075), ((1080, 1920), 1032)])
def test_tokens_of_a_chunk(size, tokens):
    _, padded = navit_size(*size, K25.input.max_patches_per_frame, K25)
    assert padded[0] * padded[1] // 28**2 == tokens


def animation(format: str, durations: list[int]) -> bytes:
    frames = [Image.new("RGB", (40, 30), (60 * i, 0, 0)) for i in range(len(durations))]
    buffer = io.BytesIO()
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:], duration=durations, lossless=True)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animated_pictures_are_clips(format):
    data = animation(format, [500, 250, 750, 500])
    items = VisionProcessor(K25).clip(data)
    assert [(i.grid, i.seconds) for i in items] == [((4, 4, 4), 0.0)]
    reds = items[0].pixel_values.view(4, 4, 4, 3, 14, 14)[:, 0, 0, 0, 0, 0] * 127.5 + 127.5
    np.testing.assert_allclose(reds, [0, 60, 120, 180], atol=1)
    assert VisionProcessor(K25).picture(data).grid == (1, 4, 4)
    faster = VisionProcessor(K25).clip(data, fps=4.0)
    assert [i.grid for i in faster] == [(2, 4, 4)]


def test_list_of_pictures_is_a_clip():
    items = VisionProcessor(K25).clip([noise(30, 30), noise(30, 30)], fps=1.0)
    assert [i.grid for i in items] == [(2, 4, 4)]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], "no frames"),
        (np.zeros((4, 9, 9), np.uint8), r"shape \[4, 9, 9\]"),
        (b"GIF89a", "damaged or cut short"),
        (animation("GIF", [100] * 3)[:120], "cut short"),
        (b"hello" * 100, "not a picture"),
        (np.zeros((1, 200, 200, 3), np.uint8), "more than 9,999"),
    ],
)
def test_bad_clips(source, words):
    config = K25.replace(input=K25.input.replace(max_pixels=9999))
    with pytest.raises(ImageError, match=words):
        VisionProcessor(config).clip(source)


def test_clips_that_would_fill_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr("kimi_mm.vision.processing.MAX_CLIP_PATCHES", 100)
    with pytest.raises(ImageError, match="max_frames_per_video"):
        VisionProcessor(K25).clip(np.zeros((30, 28, 28, 3), np.uint8))
    with pytest.raises(ImageError, match="fps=0"):
        VisionProcessor(K25).clip([noise(9, 9)], fps=0.0)


def test_extreme_sizes_are_said():
    processor = VisionProcessor(K25)
    assert "1x1 pixels are less than one patch" in processor.picture(noise(1, 1)).notes[0]
    assert "9000x20 pixels were reduced to 7168x15" in processor.picture(noise(20, 9000)).notes[0]
    assert processor.picture(noise(300, 20)).notes == ()


def test_load_tells_clips_from_pictures():
    processor = VisionProcessor(K25)
    assert len(processor.load(noise(9, 9))) == len(processor.load(animation("GIF", [100, 100]))) == 1
    assert processor.load(animation("GIF", [100, 100]))[0].grid == (1, 4, 4)


def test_patches_are_in_reading_order():
    frames = torch.arange(2 * 28 * 42 * 3, dtype=torch.int64).view(2, 28, 42, 3).remainder(256).to(torch.uint8)
    patches = patchify(frames, 14)
    assert patches.shape == (12, 3, 14, 14)
    want = frames[1, 14:, 28:].permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(patches[11], want)


def test_preset_rules():
    assert VisionConfig().input.alpha == "white"
    assert K25.input.alpha == VL.input.alpha == "drop"
