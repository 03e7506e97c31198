"""Reading clips: how many frames there are, how fast they run, and the frames that were asked for, one at a time.

    video file ─► PyAV (the extra "video") ─┐
    animated GIF, WebP, PNG ─► Pillow ──────┼─► Clip: num_frames, fps, size ─► frames(indices)
    list of pictures, array [T, H, W, 3] ───┘

torchvision decodes no video since 0.26, and did it through PyAV before. Frames come as an iterator, so that a long
video never lies decoded in memory.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from kimi_mm.errors import ImageError
from kimi_mm.vision.image import Source, broken, check_size, is_video, open_image, open_source, read_image

DEFAULT_FPS = 2.0  # of frames without times: every frame is sampled
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


@dataclass(frozen=True)
class Clip:
    """A clip that was opened: `size` is (height, width); `frames` yields the frames of ascending indices."""

    num_frames: int
    fps: float
    size: tuple[int, int]
    frames: Callable[[Sequence[int]], Iterator[Any]]
    name: str = "the clip"
    notes: tuple[str, ...] = ()


def read_clip(source: Any, fps: float | None, max_pixels: int) -> Clip:
    """Opens a clip without decoding all of it.

    Args:
        source: a video file or animated picture (path, "-", data: URL, bytes, binary file), a list of pictures, an
            array or tensor [T, H, W, C], or a `Clip`.
        fps: frames a second; None takes what the file says, and 2 for a list or array.
        max_pixels: larger frames are refused before they are decoded.

    Raises:
        ImageError: one sentence on what is wrong with the clip.
    """
    if fps is not None and not fps > 0.0:
        raise ImageError(f"fps={fps} must be above 0.")
    if isinstance(source, Clip):
        clip = source
    elif isinstance(source, (list, tuple, np.ndarray, torch.Tensor)):
        clip = _from_frames(source, max_pixels)
    else:
        opened = open_source(source)
        clip = (_from_video if is_video(opened.head()) else _from_animation)(opened, max_pixels)
    return clip if fps is None else replace(clip, fps=fps)


def _from_frames(source: Any, max_pixels: int) -> Clip:
    array = source.detach().cpu().numpy() if isinstance(source, torch.Tensor) else source
    if isinstance(array, np.ndarray) and (array.ndim != 4 or array.shape[3] not in (1, 3, 4)):
        raise ImageError(f"the clip has shape {list(array.shape)}; expected [T, H, W, C] with C 1, 3 or 4.")
    if not len(array):
        raise ImageError("the clip has no frames.")
    first = read_image(array[0], max_pixels=max_pixels).image
    return Clip(len(array), DEFAULT_FPS, (first.height, first.width), lambda indices: (array[i] for i in indices))


# ---- animated pictures ----------------------------------------------------------------------------------------------


def _from_animation(source: Source, max_pixels: int) -> Clip:
    """GIF, WebP or PNG with several frames; its rate is the number of frames by the sum of their durations."""
    milliseconds = 0.0
    with source.open() as file:
        image = _quietly(source, lambda: open_image(source.name, file, max_pixels))
        count = _quietly(source, lambda: getattr(image, "n_frames", 1))
        for number in range(count):
            _quietly(source, lambda number=number: image.seek(number))
            if image.format == "WEBP":
                _quietly(source, image.load)  # only then Pillow knows the duration
            milliseconds += float(image.info.get("duration") or 100.0)  # as browsers do with frames without duration

    def frames(indices: Sequence[int]) -> Iterator[Image.Image]:
        with source.open() as file:
            image = _quietly(source, lambda: open_image(source.name, file, max_pixels))
            for i in indices:
                _quietly(source, lambda i=i: image.seek(i))
                yield _quietly(source, image.copy)

    return Clip(count, 1000.0 * count / milliseconds, (image.height, image.width), frames, source.name)


def _quietly(source: Source, work: Callable[[], Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return work()
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # the decoders raise whatever they like on damaged data
        raise broken(source.name, error) from None


# ---- video files ----------------------------------------------------------------------------------------------------


def _from_video(source: Source, max_pixels: int) -> Clip:
    with _container(source) as container:
        stream = container.streams.video[0]
        check_size(source.name, (stream.codec_context.width, stream.codec_context.height), max_pixels)
        # The header's number of frames is often missing or wrong, so packets are counted; nothing is decoded.
        count = sum(1 for packet in container.demux(stream) if packet.size)
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        whole = (container.duration or 0) / 1e6
    if not count or not fps > 0.0:
        raise ImageError(f"{source.name}: holds no frames.")
    notes = ()
    if count / fps < 0.9 * whole - 1 / fps:
        notes = (f"{source.name}: has pictures for only {count / fps:.1f} of its {whole:.1f} seconds.",)
    first = next(_decoded(source, [0]))
    return Clip(count, fps, (first.height, first.width), lambda indices: _decoded(source, indices), source.name, notes)


def _decoded(source: Source, indices: Sequence[int]) -> Iterator[Image.Image]:
    """Yields the frames of ascending indices, upright; the last frame stands in for a few that are not there."""
    wanted, seen, last = list(indices), 0, None
    with _container(source) as container:
        for frame in container.decode(video=0):
            last, seen = frame, seen + 1
            while wanted and wanted[0] < seen:
                wanted.pop(0)
                yield _upright(frame)
            if not wanted:
                return
        # Containers count frames that decoders drop at the ends; more than that is a damaged file.
        if last is None or wanted[-1] - seen > 0.05 * seen + 4:
            raise ImageError(f"{source.name}: cut short or damaged, {seen} of its frames can be decoded.")
        for _ in wanted:
            yield _upright(last)


def _upright(frame: Any) -> Image.Image:
    image = frame.to_image()
    turn = _TURNS.get(round(getattr(frame, "rotation", 0)) % 360)
    return image if turn is None else image.transpose(turn)


@contextlib.contextmanager
def _container(source: Source) -> Iterator[Any]:
    """Opens a video file with PyAV; its errors become ImageError."""
    try:
        import av
    except ImportError:
        raise ImageError(
            f"{source.name}: is a video, and reading videos needs PyAV; pip install 'kimi-mm[video]'."
        ) from None
    av.logging.set_level(None)  # FFmpeg would write its own complaints to stderr
    try:
        with source.open() as file, av.open(file) as container:
            if not container.streams.video:
                raise ImageError(f"{source.name}: has sound but no pictures.")
            yield container
    except av.FFmpegError as error:
        reason = (error.strerror or str(error)).rstrip(".")
        raise ImageError(f"{source.name}: damaged or cut short, it cannot be decoded ({reason}).") from None
