"""What the stages of speech output minimise.

    detokenizer   heard 16 kHz ─► tokenizer (frozen) ─► codes ─┐
                  target 24 kHz ─► mel ─► path to noise ───────┴► DiT: [noisy | clean] under the chunk mask ─► velocity
    vocoder       target 24 kHz ─► mel ─► vocoder ─► wave ─► spectra, and discriminators against the target
                  its pitch, which synthesis told ──┘ (with a source; learnt beside)

Shapes: B rows, N codes, T = 4 N mel frames, C chunks, M mel bins, S samples.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.func import functional_call

from kimi_mm.audio.detokenizer import Detokenizer
from kimi_mm.audio.dit import CLEAN, DiT
from kimi_mm.audio.flow import draw_times, flow_path
from kimi_mm.audio.vocoder import Vocoder
from kimi_mm.config import ConfigError
from kimi_mm.data.augment import augment
from kimi_mm.data.resample import to_16k
from kimi_mm.data.target_loader import TargetBatch
from kimi_mm.data.targets import PITCH_HOP
from kimi_mm.model import Model
from kimi_mm.training.discriminators import Discriminators, discriminator_loss, generator_loss, halves
from kimi_mm.training.graphs import GraphedLosses
from kimi_mm.training.recipe import Recipe
from kimi_mm.training.spectral import SpectralDistance
from kimi_mm.training.speech_out_config import FlowTrainingConfig

CODE_SPREAD = 0.3  # standard deviation of the code embedding at the start
Losses = dict[str, torch.Tensor]


class FlowObjective(nn.Module):
    """Conditional flow matching of mel given codes, all chunks of a row at once.

    Each noisy chunk sees the clean frames of the chunks before it, as a stream sees them in its cache.
    """

    def __init__(self, model: Model, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.config = recipe, recipe.flow
        detokenizer = _detokenizer(model)
        self.dit, self.mel = detokenizer.dit, detokenizer.mel
        self.sigma_min = detokenizer.config.sigma_min
        if not bool(self.dit.output.weight.any()):  # untrained
            start_code_embedding(self.dit, model.audio.quantizer.codebook)
        # Frozen, and kept out of the optimiser and of train() by not being a submodule.
        self._tokenizer = [model.audio.eval().requires_grad_(False)]
        self._run = {
            augmented: GraphedLosses(self, partial(self._losses, augmented), recipe.cuda_graphs)
            for augmented in (False, True)
        }

    def forward(self, batch: TargetBatch, augmented: bool) -> Losses:
        """Returns the losses of a batch: "flow" over all flow times, "flow_late" over those near the data."""
        return self._run[augmented](batch.targets, batch.heard, batch.own, batch.canonical)

    def _losses(
        self, augmented: bool, targets: torch.Tensor, heard: torch.Tensor, own: torch.Tensor, canonical: torch.Tensor
    ) -> Losses:
        """Losses of a batch's tensors (see `TargetBatch`), without host synchronisation."""
        target = targets.float() / 32768
        codes = self._codes(target, heard, own, augmented)
        mel = self.mel.normalize(self.mel(target))
        chunks = draw_chunks(codes.shape[1], self.config, self.dit.frames_per_code, mel.device)
        unjudged = self._prompt_frames(chunks)
        rows, drop = len(mel), self.config
        noise = torch.randn_like(mel)
        time = draw_times((rows, codes.shape[1]), self.config.times, mel.device)[:, chunks]
        noisy, velocity = flow_path(mel, noise, time[..., None], self.sigma_min)

        lost = torch.rand(rows, 1, device=mel.device) < drop.code_dropout
        unknown = torch.rand(rows, 1, device=mel.device) < drop.prompt_dropout
        places = torch.arange(codes.shape[1], device=mel.device) * self.dit.frames_per_code
        null = torch.full_like(codes, self.dit.null_code)
        drawn_from = torch.where(lost, null, codes)
        past = torch.where(unknown & (places < unjudged), null, codes)

        x = torch.cat([noisy, mel], 1)
        times = torch.cat([time, torch.full_like(time, CLEAN)], 1)
        cond = torch.cat([self.dit.condition(drawn_from), self.dit.condition(past)], 1)
        guess = self.dit(x, times, cond, self.dit.chunk_context(chunks))[:, : mel.shape[1]]
        error = (guess.float() - velocity).square().mean(-1)
        judged = canonical[:, None] | (torch.arange(mel.shape[1], device=mel.device) >= unjudged)
        loss = (error * judged).sum() / judged.sum().clamp_min(1)
        late = judged & (time > 0.5)
        flow_late = (error.detach() * late).sum() / late.sum().clamp_min(1)
        return {"loss": loss, "flow": loss.detach(), "flow_late": flow_late}

    @torch.no_grad()
    def _codes(self, target: torch.Tensor, heard: torch.Tensor, own: torch.Tensor, augmented: bool) -> torch.Tensor:
        """Codes [B, N] of the other voice, or of the target itself where the batch says so."""
        tokenizer = self._tokenizer[0]
        heard = torch.where(own[:, None], to_16k(target), heard.float() / 32768)
        if augmented:
            lengths = torch.full((len(heard),), heard.shape[1], device=heard.device)
            heard = augment(heard, lengths, self.recipe.augment)
        features = tokenizer.features_from_wave(heard)
        return tokenizer.quantize(features).codes

    def _prompt_frames(self, chunks: torch.Tensor) -> torch.Tensor:
        """Frames before which other voices are not judged: the first end of a chunk after `prompt_seconds`."""
        rate = self.mel.config.sample_rate / self.mel.config.hop_length
        first = min(int(self.config.prompt_seconds * rate), len(chunks) - 1)
        return (chunks <= chunks[first]).sum()


@torch.no_grad()
def start_code_embedding(dit: DiT, codebook: torch.Tensor) -> None:
    """Lets codes begin as alike as their vectors are: rare codes then learn from common ones.

    Args:
        dit: whose embedding [K + 1, D] is set, all but the row of no code.
        codebook: [K, C] of the tokenizer.
    """
    count, size = codebook.shape
    if count != dit.null_code:
        return
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(size, dit.config.hidden_size, generator=generator).to(codebook)
    rows = (codebook - codebook.mean(0)) @ spread
    dit.code_embedding.weight[:count] = rows * (CODE_SPREAD / rows.std().clamp_min(1e-6))


def draw_chunks(codes: int, config: FlowTrainingConfig, frames_per_code: int, device: torch.device) -> torch.Tensor:
    """Cuts a row into chunks of random length; returns the chunk number of each frame, [codes * frames_per_code]."""
    most = -(-codes // config.min_chunk_codes)
    ends = torch.randint(config.min_chunk_codes, config.max_chunk_codes + 1, (most,), device=device).cumsum(0)
    numbers = torch.searchsorted(ends, torch.arange(codes, device=device), right=True)
    cut = torch.rand((), device=device) >= config.whole_share
    return (numbers * cut)[:, None].expand(-1, frames_per_code).flatten()


class VocoderObjective(nn.Module):
    """Spectral losses from the start; adversarial ones join with the trainer's second phase.

    Vocoder and discriminators are trained in one step of one optimiser, which treats each parameter by itself: the
    gradients are kept apart by judging detached waves for the one, and with detached discriminators for the other.
    """

    def __init__(self, model: Model, recipe: Recipe) -> None:
        super().__init__()
        detokenizer = _detokenizer(model)
        if not isinstance(detokenizer.vocoder, Vocoder):
            raise ConfigError("detokenizer.vocoder: the vocoder stage trains this kind only, not bigvgan.")
        self.config = recipe.vocoder
        self.mel, self.vocoder = detokenizer.mel, detokenizer.vocoder
        self.distance = SpectralDistance(detokenizer.sample_rate)
        self.discriminators = Discriminators(self.config.periods, self.config.resolutions, self.config.channels)
        if self.vocoder.pitch is not None and self.vocoder.step_size != PITCH_HOP:
            raise ConfigError(f"vocoder.upsample: a source needs mel.hop_length / upsample = {PITCH_HOP}.")
        judged = recipe.target.row_codes * detokenizer.config.samples_per_code - self.unjudged - self.vocoder.delay
        if judged < 4096:
            raise ConfigError(
                f"target.row_seconds={recipe.target.row_seconds}: too short, the vocoder's first "
                f"{(self.unjudged + self.vocoder.delay) / detokenizer.sample_rate:.2f} s cannot be judged."
            )
        self._run = {
            adversarial: GraphedLosses(self, partial(self._losses, adversarial), recipe.cuda_graphs)
            for adversarial in (False, True)
        }

    @property
    def unjudged(self) -> int:
        """Samples at the start of a row that depend on what lies before it."""
        return self.vocoder.receptive_frames * self.vocoder.hop

    def forward(self, batch: TargetBatch, adversarial: bool) -> Losses:
        """Returns the losses of a batch, those of the discriminators if `adversarial`."""
        return self._run[adversarial](batch.targets, batch.pitch)

    def _losses(self, adversarial: bool, targets: torch.Tensor, pitches: torch.Tensor) -> Losses:
        """Losses of a batch's tensors (see `TargetBatch`), without host synchronisation."""
        real = targets.float() / 32768
        mel = self.mel(real)
        mel = mel + self.config.mel_noise * torch.randn_like(mel)
        raw, pitch = self.vocoder.learn(mel, pitches)
        real = real[:, self.unjudged : real.shape[1] - self.vocoder.delay]
        fake = raw[:, self.unjudged + self.vocoder.delay :]
        weights = self.config
        losses = {"mel": self.distance.mel(fake, real), "stft": self.distance.stft(fake, real)}
        loss = weights.mel_weight * losses["mel"] + weights.stft_weight * losses["stft"] + pitch
        if self.vocoder.pitch is not None:
            losses["pitch"] = pitch
        if adversarial:
            judged_real, judged_made = halves(self.discriminators(torch.cat([real, fake.detach()])))
            losses["discriminator"] = discriminator_loss(judged_real, judged_made)
            frozen = {name: p.detach() for name, p in self.discriminators.named_parameters()}
            judged_fake = functional_call(self.discriminators, frozen, (fake,))
            losses["generator"], losses["features"] = generator_loss(judged_real, judged_fake)
            loss = loss + weights.adversarial_weight * losses["generator"] + weights.feature_weight * losses["features"]
            loss = loss + losses["discriminator"]
        return {"loss": loss, **losses}

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Parameters whose gradients are clipped apart from each other."""
        return [list(self.vocoder.parameters()), list(self.discriminators.parameters())]


def build_speech_out(model: Model, recipe: Recipe) -> nn.Module:
    """Returns the objective of the stages "detokenizer" and "vocoder"."""
    return FlowObjective(model, recipe) if recipe.stage == "detokenizer" else VocoderObjective(model, recipe)


def _detokenizer(model: Model) -> Detokenizer:
    if model.detokenizer is None:
        raise ConfigError("this stage needs a model with a detokenizer; name its file in the recipe: detokenizer: ...")
    return model.detokenizer
