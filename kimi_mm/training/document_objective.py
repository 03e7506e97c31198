"""What the stages on documents minimise: the next id of either stream where a document has labels.

    DocumentBatch ─► Model (packed or padded) ─┬─► text hidden at labelled positions ─► cross entropy, by group
                                               └─► audio hidden at labelled positions ─► cross entropy of codes

The loss is the mean over all text labels of a batch, plus `speech_weight` times that over all codes; the mean of every
group of documents ("text", "audio", "image", ...) is logged beside it, and that of codes as "speech". Recordings come
as codes and features of the frozen tokenizer; a feature encoder of its own may learn, and then hears them in each step.
Pictures go through the eyes, which may learn.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from kimi_mm import kernels
from kimi_mm.config import ConfigError, ModelConfig
from kimi_mm.data.document_loader import DocumentBatch
from kimi_mm.model import Model
from kimi_mm.training.freezing import add_lora, freeze, parts_of
from kimi_mm.training.recipe import Recipe

Losses = dict[str, torch.Tensor]
# Parts that a micro-batch without pictures, without codes to learn, or without recordings does not reach.
OPTIONAL = ("vision", "speech", "features", "adaptor")


class DocumentObjective(nn.Module):
    """Loss on the text of documents.

    Args:
        model: whose backbone and eyes learn, but for what `recipe.freeze` names.
        recipe: of a stage on documents.
    """

    def __init__(self, model: Model, recipe: Recipe) -> None:
        super().__init__()
        self.backbone, self.vision = model.backbone, model.vision
        self._model = [model]  # not a submodule: the tokenizer and the voice stay out of the optimiser
        self.features = model.audio.feature_encoder if learns_features(model.config, recipe) else None
        self.smoothing, self.speech_weight = recipe.label_smoothing, recipe.data.speech_weight
        self.everywhere = False  # set in runs of several processes: gradients reach every part, if only with zeros
        self.reached: set[str] = set()  # of OPTIONAL, since it was last cleared
        self._frozen = [] if recipe.lora is None else add_lora(model.backbone, recipe.lora)
        always = [] if self.features is not None else ["features"]
        always = [name for name in ("audio", *always) if name in parts_of(model)]
        self._frozen += freeze(model, tuple(dict.fromkeys((*always, *recipe.freeze))))

    def train(self, mode: bool = True) -> DocumentObjective:
        """Sets the mode of all that learns; frozen experts do not even count their loads."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, batch: DocumentBatch, augmented: bool = False) -> Losses:
        """Returns "loss", and the mean of each group of documents that is in the batch."""
        output = self._model[0](batch.inputs)
        picked = output.text_hidden.flatten(0, 1).index_select(0, batch.positions)
        weight = self._head(self.backbone.lm_head)
        losses: Losses = {}
        total = picked.new_zeros((), dtype=torch.float32)
        parts = zip(picked.split(batch.label_counts), batch.labels.split(batch.label_counts), strict=True)
        for name, count, (hidden, labels) in zip(batch.group_names, batch.label_counts, parts, strict=True):
            if count:
                losses[name] = self._loss(hidden, weight, labels)
                total = total + losses[name] * (count / len(batch.labels))
        if len(batch.audio_labels):
            if output.audio_hidden is None:
                raise ConfigError("the data has speech to learn, but the model has no audio head.")
            heard = output.audio_hidden.flatten(0, 1).index_select(0, batch.audio_positions)
            losses["speech"] = self._loss(heard, self._head(self.backbone.audio_head), batch.audio_labels)
            total = total + self.speech_weight * losses["speech"]
        reached = {"vision": batch.inputs.vision_at is not None, "speech": len(batch.audio_labels) > 0}
        reached["features"] = batch.inputs.clip_waves is not None
        reached["adaptor"] = reached["features"] or batch.inputs.features is not None
        self.reached |= {name for name in OPTIONAL if reached[name]}
        for name in OPTIONAL if self.everywhere else ():
            if not reached[name]:
                total = total + self._nothing(name, output.audio_hidden)
        return {"loss": total, **losses}

    def optional_parts(self) -> dict[str, list[nn.Parameter]]:
        """Returns what learns in each part that micro-batches may not reach."""
        backbone = self.backbone
        modules = {
            "vision": [self.vision],
            "speech": [backbone.audio, backbone.audio_head],
            "features": [self.features],
            "adaptor": [backbone.adaptor],
        }
        return {
            name: [p for module in modules[name] if module is not None for p in module.parameters() if p.requires_grad]
            for name in OPTIONAL
        }

    def _nothing(self, name: str, audio_hidden: torch.Tensor | None) -> torch.Tensor | float:
        """Zero, through all that learns in a part: ranks exchange gradients of what any of them has reached."""
        through = [p.flatten()[:1].sum() for p in self.optional_parts()[name] if not isinstance(p, DTensor)]
        if name == "speech" and audio_hidden is not None:
            through.append(audio_hidden[:, :1].sum())
        return 0.0 * torch.stack(through).float().sum() if through else 0.0

    def _head(self, own: nn.Linear | None) -> torch.Tensor:
        return self.backbone.embed_tokens.weight if own is None else own.weight

    def _loss(self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return kernels.linear_cross_entropy(hidden, weight, labels, label_smoothing=self.smoothing)


def learns_features(config: ModelConfig, recipe: Recipe) -> bool:
    """Whether a feature encoder of its own, such as Kimi-Audio's Whisper, is trained along."""
    return config.hears and config.audio.feature_encoder is not None and not {"audio", "features"} & set(recipe.freeze)
