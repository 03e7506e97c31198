"""What each stage minimises: modules that turn a batch into a loss and numbers worth logging.

    tokenizer   wave ─► student encoder (block-causal) ─► features ─┬─ match the full-attention teacher's features
                                                                    └─ quantizer ─► codes ─► head ─► characters (CTC)
    text        ids ─► backbone ─► next id
    asr         wave ─► tokenizer (frozen) ─► codes, features ─► backbone ─► text; characters (CTC) at audio positions

Shapes: B rows, S samples, N codes, T positions, F feature width, D hidden size, C characters.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from kimi_mm.audio.encoder import AudioEncoder
from kimi_mm.audio.tokenizer import AudioTokenizer
from kimi_mm.data.augment import augment
from kimi_mm.data.loader import CHARACTERS, SpeechBatch, TextBatch
from kimi_mm.model import Model
from kimi_mm.processing import IGNORE
from kimi_mm.text.backbone import Backbone
from kimi_mm.training.graphs import GraphedBackbone, Replayed
from kimi_mm.training.recipe import Recipe

SLOTS = 4  # CTC slots per code: characters come faster than codes

Losses = dict[str, torch.Tensor]


class SemanticHead(nn.Module):
    """Reads codes back: characters by CTC, and the encoder features they stand for. Training only.

    Args:
        code_size: width of a quantized code.
        feature_size: width F of a feature row.
    """

    def __init__(self, code_size: int, feature_size: int, hidden_size: int = 256, num_layers: int = 3) -> None:
        super().__init__()
        self.inner = nn.Linear(code_size, hidden_size)
        self.local = nn.Conv1d(hidden_size, hidden_size, 5, padding=2)
        layer = nn.TransformerEncoderLayer(
            hidden_size, 4, 4 * hidden_size, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.characters = nn.Linear(hidden_size, SLOTS * (len(CHARACTERS) + 1))
        self.features = nn.Linear(hidden_size, feature_size)

    def forward(self, codes: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps codes [B, N, code_size], valid [B, N] bool, to CTC logits [B, N * SLOTS, C + 1] and features [B, N, F].

        Features are read after a window of five codes only, so that each code has to carry its own sound.
        """
        x = self.inner(codes)
        x = x + F.gelu(self.local(x.transpose(1, 2)).transpose(1, 2))
        features = self.features(x)
        x = self.layers(x, src_key_padding_mask=~valid)
        logits = self.characters(x).unflatten(-1, (SLOTS, -1)).flatten(1, 2)
        return logits, features


class TokenizerObjective(nn.Module):
    """Distils a full-attention encoder into the block-causal one and trains the quantizer with a recognition loss.

    The encoder learns from the teacher only: recognition losses on synthetic voices would narrow it.
    """

    def __init__(self, model: Model, recipe: Recipe, teacher: AudioEncoder) -> None:
        super().__init__()
        self.recipe = recipe
        self.tokenizer = model.audio
        self.teacher = teacher.eval().requires_grad_(False)
        config = model.config.audio
        self.head = SemanticHead(config.quantizer.codebook_dim, config.feature_size)

    def forward(self, batch: SpeechBatch, augmented: bool) -> Losses:
        waves, lengths = batch.waves.float() / 32768, batch.wave_lengths
        valid = _valid_codes(lengths, waves.shape[1])
        noisy = augment(waves, lengths, self.recipe.augment) if augmented else waves
        features = self.tokenizer.features_from_wave(noisy, lengths)
        with torch.no_grad():
            target = _teacher_features(self.teacher, self.tokenizer, waves)
        distil = _masked_mse(_unit(features, self.tokenizer), _unit(target, self.tokenizer), valid)
        quantized = self.tokenizer.quantize(features.detach(), mask=valid)
        logits, rebuilt = self.head(quantized.quantized, valid)
        ctc = _ctc(logits, batch)
        recon = _masked_mse(rebuilt, _unit(target, self.tokenizer).float(), valid)
        loss = distil + ctc + 0.5 * recon + quantized.loss
        return {"loss": loss, "distil": distil, "ctc": ctc, "recon": recon, "vq": quantized.loss}


class TextObjective(nn.Module):
    """Next-token prediction on packed sentences."""

    def __init__(self, model: Model, recipe: Recipe) -> None:
        super().__init__()
        self.backbone, self.recipe = model.backbone, recipe
        self._run = GraphedBackbone(model.backbone, recipe.cuda_graphs)

    def forward(self, batch: TextBatch) -> Losses:
        hidden = self._run(batch.text_ids, batch.audio_ids)
        loss = cross_entropy(self.backbone, hidden.flatten(0, 1), batch.labels.flatten(), self.recipe.label_smoothing)
        return {"loss": loss, "text": loss}


class SpeechTextObjective(nn.Module):
    """Speech recognition through the backbone: audio codes and features in, text out."""

    def __init__(self, model: Model, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.config = recipe, model.config
        self.backbone = model.backbone
        self._run = GraphedBackbone(model.backbone, recipe.cuda_graphs)
        self._listen = {
            augmented: Replayed(partial(self._prepare, augmented), recipe.cuda_graphs) for augmented in (False, True)
        }
        self.characters = nn.Linear(model.config.backbone.hidden_size, SLOTS * (len(CHARACTERS) + 1))
        # Frozen, and kept out of the optimiser and of train() by not being a submodule.
        self._tokenizer = [model.audio.eval().requires_grad_(False)]

    def forward(self, batch: SpeechBatch, augmented: bool) -> Losses:
        inputs = (batch.waves, batch.wave_lengths, batch.text_ids, batch.audio_ids, batch.feature_row)
        hidden = self._run(*self._listen[augmented](*inputs))
        picked = hidden.flatten(0, 1).index_select(0, batch.positions)
        text = cross_entropy(self.backbone, picked, batch.labels, self.recipe.label_smoothing)
        loss, losses = text, {"text": text}
        if self.recipe.ctc_weight:
            # The first two positions are user_start and media_begin; codes follow at once.
            num_codes = batch.waves.shape[1] // self._tokenizer[0].config.samples_per_code
            heard = hidden[:, 2 : 2 + num_codes]
            logits = self.characters(heard).unflatten(-1, (SLOTS, -1)).flatten(1, 2)
            losses["ctc"] = _ctc(logits, batch)
            loss = loss + self.recipe.ctc_weight * losses["ctc"]
        return {"loss": loss, **losses}

    def _prepare(
        self,
        augmented: bool,
        waves: torch.Tensor,
        lengths: torch.Tensor,
        text_ids: torch.Tensor,
        audio_ids: torch.Tensor,
        feature_row: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Everything before the backbone, which takes no gradient: to its inputs text ids, audio ids, features, mask.

        Args:
            augmented: whether to disturb the recording.
            waves: [B, S] int16. lengths: [B]. text_ids, audio_ids, feature_row: [B, T], see `SpeechBatch`.
        """
        samples = waves.float() / 32768
        if augmented:
            samples = augment(samples, lengths, self.recipe.augment)
        return self._misheard(text_ids), *self._hear(samples, lengths, audio_ids, feature_row)

    def _misheard(self, tokens: torch.Tensor) -> torch.Tensor:
        """Replaces a share of the words already written, so that the next one has to be heard rather than guessed."""
        share = self.recipe.token_corruption if self.training else 0.0
        if not share:
            return tokens
        limit = self.config.vocab.num_text_tokens
        hit = (torch.rand(tokens.shape, device=tokens.device) < share) & (tokens < limit)
        return torch.where(hit, torch.randint_like(tokens, limit), tokens)

    def text_losses(self, batch: TextBatch) -> Losses:
        """Next-token loss on text alone, which keeps the language prior alive."""
        hidden = self._run(batch.text_ids, batch.audio_ids)
        loss = cross_entropy(self.backbone, hidden.flatten(0, 1), batch.labels.flatten(), self.recipe.label_smoothing)
        return {"loss": loss, "text_only": loss}

    def _hear(
        self, waves: torch.Tensor, lengths: torch.Tensor, audio_ids: torch.Tensor, feature_row: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Fills codes into the audio stream, [B, T], and lays features along it, [B, T, F], with their mask [B, T].

        Dropping the features of some rows, the codes of others, and short spans of both makes each useful alone.
        """
        tokenizer, drop = self._tokenizer[0], self.recipe.feature_dropout if self.training else 0.0
        features = tokenizer.features_from_wave(waves, lengths)
        codes = tokenizer.quantize(features, _valid_codes(lengths, waves.shape[1])).codes
        rows = feature_row.clamp_min(0)
        shown = feature_row >= 0
        codes, features = codes.gather(1, rows), self._noisy(_gather_rows(features, rows))
        size = len(waves)
        no_features = torch.rand(size, 1, device=waves.device) < drop
        no_codes = (torch.rand(size, 1, device=waves.device) < drop) & ~no_features
        # Spans of about three codes (240 ms) vanish from both: words must come from context.
        starts = torch.rand(rows.shape, device=waves.device) < 0.15 * drop
        gone = F.max_pool1d(starts.float()[:, None], 3, stride=1, padding=1)[:, 0] > 0
        audio_ids = torch.where(shown & ~no_codes & ~gone, codes + self.config.vocab.audio_offset, audio_ids)
        return audio_ids, features, shown & ~no_features & ~gone

    def _noisy(self, features: torch.Tensor) -> torch.Tensor:
        """Adds noise to features [..., F], in proportion to the size of each row."""
        share = self.recipe.feature_noise if self.training else 0.0
        if not share:
            return features
        size = features.square().mean(-1, keepdim=True).sqrt()
        return features + share * size * torch.randn_like(features)


def _teacher_features(teacher: AudioEncoder, tokenizer: AudioTokenizer, waves: torch.Tensor) -> torch.Tensor:
    """Runs the full-attention encoder as it was trained, on 30 s of Whisper's own log-mel; [B, S] to [B, N, F].

    Two causal convolutions hear everything one frame (20 ms) later than two centred ones, so the target waits too.
    """
    frames = waves.shape[1] // 320
    whole = 320 * teacher.config.max_positions
    hidden = teacher(tokenizer.log_mel(F.pad(waves, (0, max(0, whole - waves.shape[1]))), dynamic_range="clip"))
    if tokenizer.config.encoder.causal_convolution:
        hidden = hidden.roll(1, 1)
    return hidden[:, :frames].unflatten(1, (-1, tokenizer.config.pooling)).flatten(2)


def _unit(features: torch.Tensor, tokenizer: AudioTokenizer) -> torch.Tensor:
    """Normalises each encoder frame, so that the final norm's gain does not weigh the channels."""
    frames = features.float().unflatten(-1, (tokenizer.config.pooling, -1))
    return F.layer_norm(frames, frames.shape[-1:]).flatten(-2)


def _masked_mse(a: torch.Tensor, b: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    error = (a.float() - b.float()).square().mean(-1)
    return (error * valid).sum() / valid.sum().clamp_min(1)


def _valid_codes(lengths: torch.Tensor, samples: int, samples_per_code: int = 1280) -> torch.Tensor:
    """Returns [B, N] bool: codes that hold at least one sample of their recording."""
    starts = torch.arange(0, samples, samples_per_code, device=lengths.device)
    return starts[None] < lengths[:, None]


def _gather_rows(features: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return features.gather(1, rows[..., None].expand(-1, -1, features.shape[-1]))


def cross_entropy(backbone: Backbone, hidden: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Mean loss of hidden states [P, D] against labels [P], of which IGNORE counts for nothing."""
    logits = backbone.text_logits(hidden).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, label_smoothing=smoothing)


def _ctc(logits: torch.Tensor, batch: SpeechBatch) -> torch.Tensor:
    """Mean CTC loss per character; logits [B, N * SLOTS, C + 1]."""
    logprobs = logits.float().log_softmax(-1).transpose(0, 1)
    frames = tuple(SLOTS * count for count in batch.code_counts)  # lengths as tuples: read without a device sync
    losses = torch.ctc_loss(logprobs, batch.characters, frames, batch.character_counts, reduction=0, zero_infinity=True)
    known = (batch.character_lengths > 0).to(losses)  # rows without a transcript have nothing to say here
    return (losses * known).sum() / batch.character_lengths.sum().clamp_min(1).to(losses)


def build_objective(model: Model, recipe: Recipe, teacher: AudioEncoder | None) -> nn.Module:
    """Returns the objective of the recipe's stage; `teacher` is needed by the tokenizer stage only."""
    if recipe.stage == "tokenizer":
        assert teacher is not None
        return TokenizerObjective(model, recipe, teacher)
    return (TextObjective if recipe.stage == "text" else SpeechTextObjective)(model, recipe)
