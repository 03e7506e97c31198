"""Draws docs/vision-inputs.png: pictures as they come, and the grids of patches and rows that the model gets.

    python -m docs.figures.vision_inputs [--art data/art/art.zip]

Without a pack of art (`kimi-mm prepare art`) the scenes hold plain shapes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from kimi_mm.data.art import Art
from kimi_mm.data.debug import write_debug_art
from kimi_mm.data.scenes import compose
from kimi_mm.vision.presets import vision_preset
from kimi_mm.vision.processing import VisionProcessor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CASES = [("one", (300, 300)), ("several", (180, 520)), ("text", (420, 610)), ("shapes", (61, 200))]


def main() -> None:
    """Draws the scenes, runs nano's processor over them and shows what came out, beside K2.5's budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--art", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/vision-inputs.png"))
    options = parser.parse_args()
    processor = VisionProcessor(vision_preset("nano"))
    figure, axes = plt.subplots(2, len(CASES), figsize=(13, 6.4), layout="constrained")
    with tempfile.TemporaryDirectory() as folder:
        art = Art(options.art or write_debug_art(Path(folder)))
        for (above, below), (number, (kind, size)) in zip(axes.T, enumerate(CASES), strict=True):
            image = Image.fromarray(compose(art, kind, size, np.random.default_rng((7, number))).image)
            _show(above, below, image, processor)
    figure.savefig(options.output, dpi=80)


def _show(above: plt.Axes, below: plt.Axes, image: Image.Image, processor: VisionProcessor) -> None:
    item = processor.picture(image)
    patch, merge = processor.config.tower.patch_size, processor.config.merge_size
    _, h, w = item.grid
    above.imshow(image)
    above.set_title(f"{image.width} x {image.height} pixels", fontsize=10)
    pixels = item.pixel_values.view(h, w, 3, patch, patch).permute(0, 3, 1, 4, 2).reshape(h * patch, w * patch, 3)
    below.imshow((pixels.numpy() + 1) / 2)
    for step, color, width in ((patch, "#9aa3b2", 0.3), (patch * merge, "#1f6feb", 0.9)):
        for y in range(0, h * patch + 1, step):
            below.plot([-0.5, w * patch - 0.5], [y - 0.5, y - 0.5], color=color, linewidth=width)
        for x in range(0, w * patch + 1, step):
            below.plot([x - 0.5, x - 0.5], [-0.5, h * patch - 0.5], color=color, linewidth=width)
    inside = f"{item.size[1]} x {item.size[0]} pixels, padded to {w * patch} x {h * patch}"
    below.set_title(f"{h} x {w} patches, {item.num_tokens} rows\n{inside}", fontsize=9)
    for axis in (above, below):
        axis.set_axis_off()


if __name__ == "__main__":
    main()
