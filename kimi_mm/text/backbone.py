"""The decoder: one embedding table, a trunk, and a text and an audio branch on top of it.

    text_ids, audio_ids, features ─► embed ─► x [B, T, D]
    x ─► trunk ─┬─► text branch  ─► final mix, norm ─► text_hidden  ─► text_logits
                └─► audio branch ─► final mix, norm ─► audio_hidden ─► audio_logits

    layer:  h ─► norm ─► mixer {KDA | MLA | GQA} ─► stream ─► norm ─► mlp {dense | MoE} ─► stream

Shapes:  B batch  T time  D hidden  F feature channels  V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kimi_mm.config import BackboneConfig, ConfigError
from kimi_mm.quantized import QuantizedLinear
from kimi_mm.text.attention import PeakLogits, Step, plan_step
from kimi_mm.text.attn_res import AttnRes, AttnResStream, PlainStream, Stream
from kimi_mm.text.cache import BackboneCache, LayerState
from kimi_mm.text.context import Context
from kimi_mm.text.gqa import GQA
from kimi_mm.text.kda import KDA
from kimi_mm.text.mla import MLA
from kimi_mm.text.mlp import DenseMLP
from kimi_mm.text.moe import MoE, Router
from kimi_mm.text.norm import RMSNorm


@dataclass(frozen=True)
class BackboneOutput:
    """Hidden states after the final norms; `audio_hidden` is None where the audio branch is missing or not run."""

    text_hidden: Tensor  # [B, T, D]
    audio_hidden: Tensor | None  # [B, T, D]


class DecoderLayer(nn.Module):
    """A mixer and an mlp, each behind its own norm; `first` has only one source to read, so it needs no mix."""

    def __init__(self, config: BackboneConfig, kind: str, first: bool) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        mixer, _, mlp = kind.partition("/")
        mixes = config.residual == "attn_res"
        self.mixer_mix = AttnRes(D, eps) if mixes and not first else None
        self.mixer_norm = RMSNorm(D, eps)
        self.mixer: KDA | MLA | GQA = _mixer(config, mixer)
        self.mlp_mix = AttnRes(D, eps) if mixes else None
        self.mlp_norm = RMSNorm(D, eps)
        self.mlp: MoE | DenseMLP = (
            MoE(_section(config.moe, "moe"), D) if mlp == "moe" else DenseMLP(D, config.intermediate_size)
        )

        self.recompute = False  # keeps only the stream for the backward pass, and computes the rest again

    def forward(self, stream: Stream, step: Step, state: LayerState | None) -> Stream:
        """Returns the stream with both outputs added; advances the state."""
        if self.recompute and torch.is_grad_enabled():
            # Without dropout (adapters may have it) nothing is drawn, and a CUDA graph cannot set random states.
            draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())
            options = {"use_reentrant": False, "preserve_rng_state": draws, "context_fn": self._contexts}
            return checkpoint(self._run, stream, step, state, **options)  # type: ignore[return-value]
        return self._run(stream, step, state)

    def _run(self, stream: Stream, step: Step, state: LayerState | None) -> Stream:
        stream = stream.fork()
        stream.add(self.mixer(stream.read(self.mixer_mix, self.mixer_norm), step, state))
        x = stream.read(self.mlp_mix, self.mlp_norm)
        stream.add(self.mlp(x, step.valid) if isinstance(self.mlp, MoE) else self.mlp(x))
        return stream

    def _contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), self._repeating()

    @contextmanager
    def _repeating(self) -> Iterator[None]:
        """The second run of the same step: picks and largest logits have been counted."""
        counters = [(m, "counting") for m in self.modules() if isinstance(m, Router)]
        counters += [(m, "enabled") for m in self.modules() if isinstance(m, PeakLogits)]
        before = [getattr(module, name) for module, name in counters]
        for module, name in counters:
            setattr(module, name, False)
        try:
            yield
        finally:
            for (module, name), value in zip(counters, before, strict=True):
                setattr(module, name, value)


class Branch(nn.Module):
    """Layers on top of the trunk, and the way out: final mix and norm."""

    def __init__(self, config: BackboneConfig, kinds: tuple[str, ...], first: bool) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.layers = nn.ModuleList(DecoderLayer(config, kind, first and i == 0) for i, kind in enumerate(kinds))
        self.mix = AttnRes(D, eps) if config.residual == "attn_res" and (kinds or not first) else None
        self.norm = RMSNorm(D, eps)

    def forward(self, stream: Stream, step: Step, states: list[LayerState] | None) -> Tensor:
        """Returns the hidden state [B, T, D] that the head reads."""
        for i, layer in enumerate(self.layers):
            stream = layer(stream, step, None if states is None else states[i])
        return stream.read(self.mix, self.norm)


class Backbone(nn.Module):
    """Multi-stream decoder built from a `BackboneConfig`; weights are drawn at construction."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.context: Context | None = None  # training: ranks that hold other stretches of the same rows
        D, V = config.hidden_size, config.vocab_size
        self.embed_tokens = nn.Embedding(V, D)
        self.adaptor = None
        if config.adaptor_input_size is not None:
            self.adaptor = nn.Sequential(
                nn.Linear(config.adaptor_input_size, D),
                nn.SiLU(),
                nn.Linear(D, D),
                nn.LayerNorm(D, eps=config.rms_norm_eps),
            )
        self.trunk = nn.ModuleList(DecoderLayer(config, kind, i == 0) for i, kind in enumerate(config.trunk))
        self.text = Branch(config, config.text_branch, not config.trunk)
        self.audio = Branch(config, config.audio_branch, not config.trunk) if config.audio_head else None
        self.lm_head = self.audio_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(D, V, bias=False)
            self.audio_head = nn.Linear(D, V, bias=False) if config.audio_head else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights: N(0, 0.02^2), decay parameters as KDA says, norms one, biases and pseudo-queries zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, (KDA, MoE)):
                module.reset_parameters()

    def embed(
        self,
        text_ids: Tensor,
        audio_ids: Tensor | None = None,
        features: Tensor | None = None,
        feature_mask: Tensor | None = None,
    ) -> Tensor:
        """Fuses the streams into one embedding per step (Kimi-Audio, section 3).

        Args:
            text_ids: [B, T] int64.
            audio_ids: [B, T] int64, or None for text alone. Both streams share one table.
            features: [B, T, F] continuous audio features, read where feature_mask is set.
            feature_mask: [B, T] bool; there the audio part becomes (embedding + adaptor(features)) * sqrt(2).

        Returns:
            [B, T, D].

        Raises:
            ValueError: if features come without a mask, without audio_ids, or to a model without an adaptor.
        """
        x = self.embed_tokens(text_ids)
        if features is not None and (self.adaptor is None or audio_ids is None or feature_mask is None):
            raise ValueError("features need audio_ids, a feature_mask, and a config with adaptor_input_size.")
        if audio_ids is None:
            return x
        audio = self.embed_tokens(audio_ids)
        if features is not None and self.adaptor is not None and feature_mask is not None:
            fused = (audio + self.adaptor(features.to(x.dtype)).to(x.dtype)) * math.sqrt(2.0)
            audio = torch.where(feature_mask[..., None], fused, audio)
        return audio + x

    def forward(
        self,
        inputs_embeds: Tensor,
        *,
        positions: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: BackboneCache | None = None,
    ) -> BackboneOutput:
        """Runs trunk and branches.

        Args:
            inputs_embeds: [B, T, D].
            positions: [B, T] int64 for rotary layers; None counts on from the cache, or restarts at each sequence.
            lengths: [B] int64, valid tokens of right-padded rows; outputs past them are meaningless.
            cu_seqlens: [N + 1] int, sequences packed into one row; excludes a cache.
            cache: from `new_cache`; read and advanced in place. With one for text alone the audio branch does not run.

        Raises:
            ValueError: if the options contradict each other or the cache belongs to another batch size.
        """
        step = plan_step(inputs_embeds, positions, lengths, cu_seqlens, cache, self.context)
        states = None if cache is None else cache.layers
        stream: Stream = PlainStream(inputs_embeds)
        if self.config.residual == "attn_res":
            stream = AttnResStream(inputs_embeds, self.config.attn_res_block_size)
        for i, layer in enumerate(self.trunk):
            stream = layer(stream, step, None if states is None else states[i])
        middle, end = len(self.trunk), len(self.trunk) + len(self.text.layers)
        audio_stream = stream.fork()
        text_hidden = self.text(stream, step, None if states is None else states[middle:end])
        audio_hidden = None
        if self.audio is not None and (states is None or len(states) == end + len(self.audio.layers)):
            audio_hidden = self.audio(audio_stream, step, None if states is None else states[end:])
        if cache is not None:
            cache.advance(inputs_embeds.shape[1], lengths)
        return BackboneOutput(text_hidden, audio_hidden)

    def text_logits(self, hidden: Tensor, size: int | None = None) -> Tensor:
        """[..., D] -> [..., V] over the whole vocabulary, or over its first `size` ids."""
        if isinstance(self.lm_head, QuantizedLinear):
            return self.lm_head(hidden, size)
        weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(hidden, weight if size is None else weight[:size])

    def audio_logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] over the whole vocabulary."""
        return F.linear(hidden, self.embed_tokens.weight) if self.audio_head is None else self.audio_head(hidden)

    def new_cache(
        self,
        batch_size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        audio: bool = True,
    ) -> BackboneCache:
        """Returns an empty cache; dtype and device default to those of the embedding table.

        With `audio` False it is for text alone: it holds nothing for the audio branch, which then does not run.
        """
        dtype = dtype or self.embed_tokens.weight.dtype
        device = torch.device(device) if device is not None else self.embed_tokens.weight.device
        end = len(self.trunk) + len(self.text.layers)
        wanted = self.decoder_layers() if audio else self.decoder_layers()[:end]
        layers: list[LayerState] = [layer.mixer.new_state(batch_size, dtype, device) for layer in wanted]
        return BackboneCache(layers, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def decoder_layers(self) -> list[DecoderLayer]:
        """All layers in the order of the cache: trunk, text branch, audio branch."""
        branches = [self.text] if self.audio is None else [self.text, self.audio]
        return [*self.trunk, *(layer for branch in branches for layer in branch.layers)]  # type: ignore[list-item]

    def update_expert_bias(self) -> None:
        """Rebalances every router (see `moe.Router.update_bias`); call it after each optimizer step."""
        for module in self.modules():
            if isinstance(module, MoE):
                module.update_bias()


def _mixer(config: BackboneConfig, kind: str) -> KDA | MLA | GQA:
    if kind == "kda":
        return KDA(_section(config.kda, kind), config.hidden_size, config.rms_norm_eps)
    if kind == "mla":
        return MLA(_section(config.mla, kind), config.hidden_size)
    return GQA(_section(config.gqa, kind), config.hidden_size)


def _section(section, name: str):
    if section is None:
        raise ConfigError(f"The backbone has a layer '{name}' but no section '{name}'.")
    return section
