"""What the stage "speech" minimises: text and, some steps behind it, the codes of its speech.

    questions 16 kHz ─► tokenizer (frozen) ─► codes, features ─┐
    answers 24 kHz ─► 16 kHz ─► tokenizer (frozen) ─► codes ───┴─► both streams ─► backbone ─┬─► text labels
                                                                                             └─► codes, msg_end

Batches of sentences teach to read out, batches of dialogs to answer; batches of recordings and of text (`speech_share`,
`text_share`) keep the other abilities alive.

Shapes: B rows, T positions, C recordings, S samples, N codes, D hidden size, P and Q labels.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from kimi_mm.config import ConfigError
from kimi_mm.data.augment import augment
from kimi_mm.data.loader import SpeechBatch
from kimi_mm.data.resample import to_16k
from kimi_mm.data.spoken_loader import END, SpokenBatch
from kimi_mm.model import Model
from kimi_mm.text.backbone import Backbone
from kimi_mm.training.graphs import Graphed, Replayed
from kimi_mm.training.objectives import Losses, SpeechTextObjective, _valid_codes, cross_entropy
from kimi_mm.training.recipe import Recipe


class _BothStreams(nn.Module):
    """Ids [B, T] of both streams, and features with their mask, to the hidden states of both branches [2, B, T, D]."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, text_ids: torch.Tensor, audio_ids: torch.Tensor, *features: torch.Tensor) -> torch.Tensor:
        output = self.backbone(self.backbone.embed(text_ids, audio_ids, *features))
        assert output.audio_hidden is not None
        return torch.stack([output.text_hidden, output.audio_hidden])


class SpokenObjective(SpeechTextObjective):
    """Spoken answers, and everything that the asr stage minimises."""

    def __init__(self, model: Model, recipe: Recipe) -> None:
        super().__init__(model, recipe)
        if model.backbone.audio is None:
            raise ConfigError(f"{recipe.model}: the backbone has no audio branch, which the speech stage trains.")
        self._both = Graphed(_BothStreams(model.backbone), recipe.cuda_graphs)
        self._asked = {
            augmented: Replayed(partial(self._questions, augmented), recipe.cuda_graphs) for augmented in (False, True)
        }
        self._said = Replayed(self._answers, recipe.cuda_graphs)

    def forward(self, batch: SpokenBatch | SpeechBatch, augmented: bool) -> Losses:
        """Returns the losses of a batch of answers, or of recordings to be written down."""
        if not isinstance(batch, SpokenBatch):
            return super().forward(batch, augmented)
        audio_ids, codes = self._said(batch.answers, batch.answer_lengths, batch.audio_ids, batch.answer_at)
        features: tuple[torch.Tensor, ...] = ()
        if batch.questions is not None and batch.question_lengths is not None:
            asked = (batch.questions, batch.question_lengths, audio_ids, batch.question_at)
            audio_ids, *features = self._asked[augmented](*asked)  # type: ignore[assignment]
        hidden = self._both(batch.text_ids, audio_ids, *features)
        vocab = self.config.vocab
        heard = hidden[1].flatten(0, 1).index_select(0, batch.audio_positions)
        logits = self.backbone.audio_logits(heard)[:, vocab.num_text_tokens :].float()
        known = codes.flatten()[batch.audio_labels.clamp_min(0)] + vocab.audio_offset
        labels = torch.where(batch.audio_labels == END, vocab.special("msg_end"), known) - vocab.num_text_tokens
        audio = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        said = hidden[0].flatten(0, 1).index_select(0, batch.text_positions)
        # Sentences with words by letter are not learnt; where all are such, loss and gradient are zero.
        text = said.sum()
        if len(said):
            text = cross_entropy(self.backbone, said, batch.text_labels, self.recipe.label_smoothing)
        kind = "speak" if batch.questions is None else "answer"
        right = (logits.detach().argmax(-1) == labels).float().mean()
        loss = text + self.recipe.audio_weight * audio
        return {"loss": loss, f"{kind}_text": text, f"{kind}_audio": audio, f"{kind}_right": right}

    def _answers(
        self, waves: torch.Tensor, lengths: torch.Tensor, audio_ids: torch.Tensor, answer_at: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes the codes of answers and puts them into the audio stream.

        Args:
            waves: [C, 1.5 S] int16 at 24 kHz. lengths: [C] at 16 kHz. audio_ids, answer_at: [B, T], see `SpokenBatch`.

        Returns:
            The audio stream [B, T], in which a share of the codes is wrong as they are when the model errs, and the
            codes [C, N].
        """
        samples = to_16k(waves.float() / 32768)
        tokenizer = self._tokenizer[0]
        features = tokenizer.features_from_wave(samples, lengths)
        codes = tokenizer.quantize(features, _valid_codes(lengths, samples.shape[1])).codes
        shown = codes.flatten()[answer_at.clamp_min(0)]
        share = self.recipe.token_corruption if self.training else 0.0
        wrong = torch.rand(shown.shape, device=shown.device) < share
        shown = torch.where(wrong, torch.randint_like(shown, self.config.vocab.num_audio_codes), shown)
        return torch.where(answer_at >= 0, shown + self.config.vocab.audio_offset, audio_ids), codes

    def _questions(
        self,
        augmented: bool,
        waves: torch.Tensor,
        lengths: torch.Tensor,
        audio_ids: torch.Tensor,
        question_at: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hears questions: the audio stream [B, T] with their codes, features [B, T, F], and the mask [B, T].

        Args:
            augmented: whether to disturb them.
            waves: [C, S] int16. lengths: [C]. audio_ids, question_at: [B, T], see `SpokenBatch`.
        """
        samples, tokenizer = waves.float() / 32768, self._tokenizer[0]
        if augmented:
            samples = augment(samples, lengths, self.recipe.augment)
        features = tokenizer.features_from_wave(samples, lengths)
        codes = tokenizer.quantize(features, _valid_codes(lengths, samples.shape[1])).codes
        at, shown = question_at.clamp_min(0), question_at >= 0
        drop = self.recipe.feature_dropout if self.training else 0.0
        kept = torch.rand(len(audio_ids), 1, device=audio_ids.device) >= drop
        audio_ids = torch.where(shown, codes.flatten()[at] + self.config.vocab.audio_offset, audio_ids)
        return audio_ids, self._noisy(features.flatten(0, 1)[at]), shown & kept
