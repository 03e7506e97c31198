"""What changes over the steps of a run: the learning rate, as a factor of its peak, and where batches come from."""

from __future__ import annotations

import math

import numpy as np

from kimi_mm.training.recipe import DOCUMENTS, MIXED, OptimConfig, Recipe


def lr_factor(step: int, total: int, config: OptimConfig) -> float:
    """Returns the factor for optimiser step `step` (from 0) of `total`.

    "wsd": linear warm-up, flat, then 1 - sqrt(progress) over the last `decay_fraction`; "cosine": warm-up, then half
    a cosine. Both end at `final_lr_scale`.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    low = config.final_lr_scale
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    start = total * (1 - config.decay_fraction)
    if step < start:
        return 1.0
    progress = (step - start) / max(1.0, total - start)
    return low + (1 - low) * (1 - math.sqrt(min(1.0, progress)))


def source_of_step(recipe: Recipe, step: int) -> str:
    """Returns the name of a loader ("speech", "text", ...): a function of the step, so that a resumed run agrees."""
    if recipe.stage == "text":
        return "text"
    if recipe.stage in DOCUMENTS:
        return "documents"
    main = {"vision": "scenes", "speech": "dialogs", "joint": "dialogs"}.get(recipe.stage, "speech")
    if recipe.stage not in MIXED:
        return main
    draw = np.random.default_rng((recipe.seed, step)).random()
    shares = {"text": recipe.text_share, "speech": recipe.speech_share}
    if recipe.stage in ("speech", "joint"):
        shares |= {"sentences": recipe.tts_share, "scenes": recipe.scene_share}
    end = 0.0
    for name, share in shares.items():
        end += share
        if share and draw < (end + 1e-6 if end > 1 - 1e-6 else end):
            return name
    return main
