"""What the vision stage minimises: the next id of answers about pictures, and beside them speech and text.

    patches uint8 ─► VisionEncoder ─► rows ─┐ in the places of the media pads
    ids ─────────────► Backbone.embed ──────┴─► backbone ─► answers

Answers alone teach a new tower next to nothing for a long time: the backbone guesses from the question, and what
reaches the tower through it is noise. So every row has to say what it shows as well: its direction is compared with
those of the embedded ids, and has to be nearest to the ids of the words for what its 28 x 28 pixels show ("shown");
its length stays near theirs ("length"), or the backbone would see little else. Of several ids, as the letters in a row
are, it has to tell the order too: a map of its own for each place ("order") turns it towards the id that stands there.

With `freeze_backbone` only tower and projector learn, by gradients through a backbone that stays bit for bit as it was,
or without running it where `answers_weight` is 0. Otherwise all of them do, and batches of speech and text
(`speech_share`, `text_share`) keep the other abilities alive.

Shapes: B rows, T positions, P patches, p pixels a side of a patch, M vision rows, S ids for what a row shows, D hidden
size, L labels, V ids of text.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from kimi_mm.config import ConfigError
from kimi_mm.data.loader import SpeechBatch
from kimi_mm.data.scene_drawer import SHOWN, Grid
from kimi_mm.data.scene_loader import SceneBatch
from kimi_mm.kernels.precision import without_autocast
from kimi_mm.layout import IGNORE
from kimi_mm.model import Model
from kimi_mm.text.backbone import Backbone
from kimi_mm.training.graphs import Graphed
from kimi_mm.training.objectives import Losses, SpeechTextObjective, cross_entropy
from kimi_mm.training.recipe import Recipe
from kimi_mm.vision.encoder import Layout, VisionEncoder, kept_layout


class _Seeing(nn.Module):
    """Patches [P, 3, p, p] uint8 of pictures of fixed sizes to rows [M, D]."""

    def __init__(self, vision: VisionEncoder, grids: tuple[Grid, ...]) -> None:
        super().__init__()
        self.vision, self.grids = vision, list(grids)
        self.layout: Layout | None = None  # which a captured graph goes on reading

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        self.layout = kept_layout(tuple(self.grids), patches.device)
        pixels = patches.float().div_(255.0).sub_(0.5).div_(0.5)
        return torch.cat(self.vision(pixels, self.grids))


class _Looking(nn.Module):
    """Patches [P, 3, p, p] uint8 of pictures of fixed sizes, ids [B, T], places [M] to hidden states [B, T, D].

    Returns the rows [M, D] that the eyes made as well.
    """

    def __init__(self, vision: VisionEncoder, backbone: Backbone, grids: tuple[Grid, ...]) -> None:
        super().__init__()
        self.seeing, self.backbone = _Seeing(vision, grids), backbone

    def forward(
        self, patches: torch.Tensor, text_ids: torch.Tensor, audio_ids: torch.Tensor, vision_at: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.seeing(patches)
        x = self.backbone.embed(text_ids, audio_ids)
        x = x.flatten(0, 1).index_copy(0, vision_at, rows.to(x.dtype)).view_as(x)
        return self.backbone(x).text_hidden, rows


class VisionObjective(SpeechTextObjective):
    """Questions about pictures, and everything that the asr stage minimises."""

    def __init__(self, model: Model, recipe: Recipe) -> None:
        super().__init__(model, recipe)
        if model.vision is None:
            raise ConfigError(f"{recipe.model}: the model has no section 'vision', which the vision stage trains.")
        self.vision = model.vision
        self._looking: dict[tuple[Grid, ...], Graphed] = {}
        self.sharpness = nn.Parameter(torch.tensor(math.log(20.0)))  # log of what cosines are multiplied by
        self.places = None
        if recipe.shown_weight:
            width = model.config.backbone.hidden_size
            self.places = nn.Parameter(torch.eye(width).repeat(SHOWN, 1, 1) + 0.01 * torch.randn(SHOWN, width, width))
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
        answers = self.recipe.answers_weight
        if batch.grids not in self._looking:
            module = _Looking(self.vision, self.backbone, batch.grids) if answers else _Seeing(self.vision, batch.grids)
            self._looking[batch.grids] = Graphed(module, self.recipe.cuda_graphs)
        look, losses = self._looking[batch.grids], {}
        loss = torch.zeros((), device=batch.patches.device)
        if answers:
            hidden, rows = look(batch.patches, batch.text_ids, batch.audio_ids, batch.vision_at)
            picked = hidden.flatten(0, 1).index_select(0, batch.positions)
            losses["answers"] = cross_entropy(self.backbone, picked, batch.labels, self.recipe.label_smoothing)
            loss = loss + answers * losses["answers"]
        else:
            rows = look(batch.patches)
        if self.places is not None:
            words = self.backbone.embed_tokens.weight[: self.config.vocab.num_text_tokens].detach()
            scale = self.sharpness.exp()
            losses["shown"] = shown_loss(rows, words, scale, batch.shown)
            losses["order"] = order_loss(rows, self.places, words, scale, batch.shown)
            losses["length"] = length_loss(rows, words)
            loss = loss + self.recipe.shown_weight * (losses["shown"] + losses["order"] + losses["length"])
        return {"loss": loss, **losses}


def shown_loss(rows: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """Returns the mean cross-entropy of what rows show, uniform over the ids of a row, given their directions.

    Most rows show the background. What n rows of the batch begin with, in ids, counts as sqrt(n) of them.

    Args:
        rows: [M, D] of the eyes.
        words: [V, D] embedded ids of text.
        scale: [] that cosines are multiplied by.
        shown: [M, S] ids, IGNORE behind; rows without any do not count.
    """
    with without_autocast(rows.device):
        cosines = F.normalize(rows.float(), dim=-1) @ F.normalize(words.float(), dim=-1).T
        logits = (scale * cosines).log_softmax(-1)
        real = shown != IGNORE
        chosen = logits.gather(1, shown.clamp(min=0)) * real
        first, counts = shown[:, 0].clamp(min=0), logits.new_zeros(len(words))
        counts.scatter_add_(0, first, real[:, 0].float())
        weight = counts[first].clamp(min=1).rsqrt() * real[:, 0]
        return -(weight * chosen.sum(1) / real.sum(1).clamp(min=1)).sum() / weight.sum().clamp(min=1e-6)


def order_loss(
    rows: torch.Tensor, places: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, shown: torch.Tensor
) -> torch.Tensor:
    """Returns the mean cross-entropy of the ids of rows that show several, each at its place.

    Args:
        rows: [M, D] of the eyes.
        places: [S, D, D], what turns a row towards the id at each place.
        words, scale, shown: as for `shown_loss`.
    """
    with without_autocast(rows.device):
        turned = F.normalize(torch.einsum("md,sed->mse", rows.float(), places.float()), dim=-1)
        logits = scale * turned @ F.normalize(words.float(), dim=-1).T
        several = (shown != IGNORE) & (shown[:, 1:2] != IGNORE)
        labels = shown.masked_fill(~several, IGNORE)
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        return total / several.sum().clamp(min=1)


def length_loss(rows: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Returns the mean squared log of lengths, rows [M, D] over embedded ids [V, D] on average: a factor e costs 1."""
    lengths = rows.float().square().sum(-1).clamp_min(1e-12).log() / 2
    return (lengths - words.float().norm(dim=-1).mean().log()).square().mean()
