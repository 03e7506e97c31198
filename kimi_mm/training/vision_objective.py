"""What the vision stage minimises: the next id of answers about pictures, and beside them speech and text.

    patches uint8 ─► VisionEncoder ─► rows ─┐ in the places of the media pads
    ids ─────────────► Backbone.embed ──────┴─► backbone ─► answers

With `freeze_backbone` only tower and projector learn, by gradients through a backbone that stays bit for bit as it was.
Otherwise all of them do, and batches of speech and text (`speech_share`, `text_share`) keep the other abilities alive.

Shapes: B rows, T positions, P patches, p pixels a side of a patch, M vision rows, D hidden size, L labels.
"""

from __future__ import annotations

import torch
from torch import nn

from kimi_mm.config import ConfigError
from kimi_mm.data.loader import SpeechBatch
from kimi_mm.data.scene_drawer import Grid
from kimi_mm.data.scene_loader import SceneBatch
from kimi_mm.model import Model
from kimi_mm.text.backbone import Backbone
from kimi_mm.training.graphs import Graphed
from kimi_mm.training.objectives import Losses, SpeechTextObjective, cross_entropy
from kimi_mm.training.recipe import Recipe
from kimi_mm.vision.encoder import Layout, VisionEncoder, kept_layout


class _Looking(nn.Module):
    """Patches [P, 3, p, p] uint8 of pictures of fixed sizes, ids [B, T], places [M] to hidden states [B, T, D]."""

    def __init__(self, vision: VisionEncoder, backbone: Backbone, grids: tuple[Grid, ...]) -> None:
        super().__init__()
        self.vision, self.backbone, self.grids = vision, backbone, list(grids)
        self.layout: Layout | None = None  # which a captured graph goes on reading

    def forward(
        self, patches: torch.Tensor, text_ids: torch.Tensor, audio_ids: torch.Tensor, vision_at: torch.Tensor
    ) -> torch.Tensor:
        self.layout = kept_layout(tuple(self.grids), patches.device)
        pixels = patches.float().div_(255.0).sub_(0.5).div_(0.5)
        rows = torch.cat(self.vision(pixels, self.grids))
        x = self.backbone.embed(text_ids, audio_ids)
        x = x.flatten(0, 1).index_copy(0, vision_at, rows.to(x.dtype)).view_as(x)
        return self.backbone(x).text_hidden


class VisionObjective(SpeechTextObjective):
    """Questions about pictures, and everything that the asr stage minimises."""

    def __init__(self, model: Model, recipe: Recipe) -> None:
        super().__init__(model, recipe)
        if model.vision is None:
            raise ConfigError(f"{recipe.model}: the model has no section 'vision', which the vision stage trains.")
        self.vision = model.vision
        self._looking: dict[tuple[Grid, ...], Graphed] = {}
        if recipe.freeze_backbone:
            self.backbone.requires_grad_(False)
            self.characters.requires_grad_(False)

    def train(self, mode: bool = True) -> VisionObjective:
        """Sets the mode of all that learns; a frozen backbone does not even count the loads of its experts."""
        super().train(mode)
        if self.recipe.freeze_backbone:
            self.backbone.eval()
        return self

    def forward(self, batch: SceneBatch | SpeechBatch, augmented: bool) -> Losses:
        """Returns the losses of a batch of pictures, or of speech."""
        if not isinstance(batch, SceneBatch):
            return super().forward(batch, augmented)
        if batch.grids not in self._looking:
            module = _Looking(self.vision, self.backbone, batch.grids)
            self._looking[batch.grids] = Graphed(module, self.recipe.cuda_graphs)
        hidden = self._looking[batch.grids](batch.patches, batch.text_ids, batch.audio_ids, batch.vision_at)
        picked = hidden.flatten(0, 1).index_select(0, batch.positions)
        loss = cross_entropy(self.backbone, picked, batch.labels, self.recipe.label_smoothing)
        return {"loss": loss, "answers": loss}
