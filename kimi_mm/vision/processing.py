"""Pictures and clips to packed patches, by the published rule of K2.5 and Kimi-VL ("navit" resizing).

    picture H x W ─► shrink to the patch budget (never enlarge) ─► pad right and below with 0 to whole merge cells
                  ─► x / 127.5 - 1 ─► patches in reading order [h * w, 3, p, p], grid (1, h, w)
    clip          ─► sampled frames ─► chunks of at most `max_frames`, each one item: grid (t, h, w), time of its start

Shrinking is Pillow's antialiased bicubic on bytes, as published; an interpolation without antialiasing, or in floats,
gives other pixels (by up to 170 of 255 levels on fine patterns).

Shapes: t frames, h x w patches, p pixels a side of a patch, P patches of all items.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from kimi_mm.config import VisionConfig
from kimi_mm.errors import ImageError
from kimi_mm.vision.image import Picture, is_video, open_source, read_image
from kimi_mm.vision.video import Clip, read_clip

MAX_CLIP_PATCHES = 2**21  # 4.6 GiB of pixel values; 2048 frames of 448 x 448
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class VisionItem:
    """What the tower takes as one: a picture, or a chunk of consecutive sampled frames of a clip.

    `pixel_values` [t * h * w, 3, p, p] fp32 in [-1, 1]; `grid` (t, h, w) in patches; `num_tokens` rows come out of it.
    `size` is the height and width in pixels that the picture has inside the padded grid.
    """

    pixel_values: torch.Tensor
    grid: Grid
    num_tokens: int
    size: tuple[int, int]
    name: str = "the picture"
    seconds: float | None = None  # of a chunk's first frame; None: a picture
    notes: tuple[str, ...] = ()


def navit_size(
    height: int, width: int, max_patches: int, config: VisionConfig
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes a picture by the published rule.

    Args:
        height, width: in pixels.
        max_patches: budget of this picture or frame; compared with floor counts, as published.
        config: patch and merge size, and the limit a side.

    Returns:
        (height, width) after shrinking, and after padding to multiples of `patch_size * merge_size`; pixels.
    """
    patch, cell = config.tower.patch_size, config.tower.patch_size * config.merge_size
    longest = config.input.max_patches_per_side * patch
    patches = max(1, height // patch) * max(1, width // patch)
    scale = min(1.0, math.sqrt(max_patches / patches), longest / height, longest / width)
    resized = tuple(min(max(1, int(side * scale)), longest) for side in (height, width))
    return resized, tuple(-(-side // cell) * cell for side in resized)  # type: ignore[return-value]


def sample_frames(num_frames: int, fps: float, config: VisionConfig) -> list[int]:
    """Chooses the frames to look at: `sample_fps` a second, evenly from the first to the last (published rule).

    Args:
        num_frames: of the whole clip, at least 1.
        fps: frames a second of the clip.

    Returns:
        Indices in order; one at least.
    """
    rules = config.input
    count = max(1, round(num_frames * min(rules.sample_fps, fps) / fps))
    if rules.max_frames_per_video is not None:
        count = min(count, rules.max_frames_per_video)
    return [int(i) for i in np.linspace(0, num_frames - 1, count).round()]


class VisionProcessor:
    """Turns pictures and clips into `VisionItem`s by the rules of one config."""

    def __init__(self, config: VisionConfig) -> None:
        self.config = config

    def picture(self, source: Any) -> VisionItem:
        """Reads and cuts one picture; `source` as in `read_image`. ImageError when it cannot be used."""
        rules = self.config.input
        picture = read_image(source, alpha=rules.alpha, max_pixels=rules.max_pixels)
        image, notes = picture.image, list(picture.notes)
        resized, padded = navit_size(image.height, image.width, rules.max_patches, self.config)
        patch, size = self.config.tower.patch_size, f"{image.width}x{image.height}"
        if max(image.size) < patch:
            notes.append(f"{picture.name}: {size} pixels are less than one patch ({patch}x{patch}); the rest is blank.")
        if max(image.size) > patch * rules.max_patches_per_side:
            notes.append(f"{picture.name}: {size} pixels were reduced to {resized[1]}x{resized[0]}.")
        return self._item([image], resized, padded, name=picture.name, notes=tuple(notes))

    def clip(self, source: Any, *, fps: float | None = None) -> list[VisionItem]:
        """Reads a clip, samples it, and cuts it into chunks.

        Args:
            source: a video file (path, "-", data: URL, bytes, binary file), an animated GIF, WebP or PNG, or frames: a
                list of pictures or an array [T, H, W, 3].
            fps: of frames given as a list or array.

        Returns:
            Chunks of at most `max_frames` frames in order, with the time of their first frame in seconds.

        Raises:
            ImageError: when it cannot be read, or is longer than fits into memory.
        """
        rules, chunk = self.config.input, self.config.tower.max_frames
        clip = read_clip(source, fps, rules.max_pixels)
        indices = sample_frames(clip.num_frames, clip.fps, self.config)
        budget = rules.max_patches_per_frame
        if rules.max_patches_per_video is not None:
            budget = max(1, min(budget, rules.max_patches_per_video // len(indices)))
        resized, padded = navit_size(*clip.size, budget, self.config)
        patches = len(indices) * math.prod(side // self.config.tower.patch_size for side in padded)
        if patches > MAX_CLIP_PATCHES:
            raise ImageError(
                f"{clip.name}: {len(indices)} frames are too many to look at; set vision.input.max_frames_per_video "
                "or a lower sample_fps."
            )
        items, notes, frames = [], clip.notes, clip.frames(indices)
        for start in range(0, len(indices), chunk):
            pictures = [
                read_image(frame, alpha=rules.alpha, max_pixels=rules.max_pixels).image
                for frame in itertools.islice(frames, chunk)
            ]
            seconds = indices[start] / clip.fps
            items.append(self._item(pictures, resized, padded, name=clip.name, seconds=seconds, notes=notes))
            notes = ()
        return items

    def load(self, source: Any) -> list[VisionItem]:
        """Reads a picture, or a clip where the file is a video or `source` a `Clip`; see `picture` and `clip`."""
        if isinstance(source, Clip):
            return self.clip(source)
        if isinstance(source, (Picture, Image.Image, np.ndarray, torch.Tensor)):
            return [self.picture(source)]
        opened = open_source(source)
        return self.clip(opened) if is_video(opened.head()) else [self.picture(opened)]

    def _item(
        self,
        frames: Sequence[Image.Image],
        resized: tuple[int, int],
        padded: tuple[int, int],
        *,
        name: str,
        seconds: float | None = None,
        notes: tuple[str, ...] = (),
    ) -> VisionItem:
        patch, merge = self.config.tower.patch_size, self.config.merge_size
        (height, width), (h, w) = resized, (padded[0] // patch, padded[1] // patch)
        canvas = np.zeros((len(frames), *padded, 3), np.uint8)
        for number, frame in enumerate(frames):
            if frame.size != (width, height):
                frame = frame.resize((width, height), Image.Resampling.BICUBIC)
            canvas[number, :height, :width] = np.asarray(frame)
        pixels = patchify(torch.from_numpy(canvas), patch)
        return VisionItem(pixels, (len(frames), h, w), h * w // merge**2, resized, name, seconds, notes)


def patchify(frames: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cuts bytes into patches and scales them to [-1, 1].

    Args:
        frames: [t, h * p, w * p, 3] uint8.
        patch_size: p.

    Returns:
        [t * h * w, 3, p, p] fp32, frame by frame in reading order.
    """
    t, height, width, _ = frames.shape
    cut = frames.view(t, height // patch_size, patch_size, width // patch_size, patch_size, 3)
    patches = cut.permute(0, 1, 3, 5, 2, 4).reshape(-1, 3, patch_size, patch_size)
    return patches.float().div_(255.0).sub_(0.5).div_(0.5)


def pack(items: Iterable[VisionItem]) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins items into what the tower takes: pixel_values [P, 3, p, p] and grid_thw [items, 3] int64."""
    items = list(items)
    return torch.cat([item.pixel_values for item in items]), torch.tensor([item.grid for item in items])
