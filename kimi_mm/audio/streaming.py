"""Tokenizing while the sound still comes in.

    push(piece) ─► resample ─► mel in whole blocks (2 s) ─► encoder.step ─► quantizer.step ─► tokens
    flush()     ─► the rest, padded to a whole code

Work is always done in whole encoder blocks, whatever the size of the pieces, so the results are the same to the bit
for any chunking.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from kimi_mm.audio.encoder import EncoderState
from kimi_mm.audio.features import MelState, MelStream
from kimi_mm.audio.io import TARGET_RATE, Resampler, check_rate, check_samples, to_mono
from kimi_mm.audio.quantizer import QuantizerState
from kimi_mm.audio.tokens import AudioTokens, join
from kimi_mm.errors import AudioError

if TYPE_CHECKING:
    from kimi_mm.audio.tokenizer import AudioTokenizer


@dataclass
class AudioStreamState:
    """Everything a stream remembers, resampler apart."""

    mel: MelState = field(default_factory=MelState)
    encoder: EncoderState = field(default_factory=EncoderState)
    quantizer: QuantizerState = field(default_factory=QuantizerState)

    def clone(self) -> AudioStreamState:
        """Returns an independent copy."""
        return AudioStreamState(self.mel.clone(), self.encoder.clone(), self.quantizer.clone())


class AudioStream:
    """One recording on its way in.

    Args:
        tokenizer: must have a causal encoder with a block size.
        sample_rate: of the pieces, Hz.
    """

    def __init__(self, tokenizer: AudioTokenizer, sample_rate: int = TARGET_RATE) -> None:
        if not tokenizer.streams:
            raise AudioError(
                "this tokenizer cannot stream: it needs causal convolutions, a block size and a running mel floor."
            )
        self.tokenizer, self.sample_rate = tokenizer, check_rate(sample_rate)
        self.state = AudioStreamState()
        self.closed = False
        self._resampler = Resampler(self.sample_rate, TARGET_RATE)
        config = tokenizer.config
        assert config.encoder.block_size is not None
        self._mel = MelStream(tokenizer.mel, 2 * config.encoder.block_size, config.samples_per_code)

    def clone(self) -> AudioStream:
        """Returns a stream that goes on from here on its own; only at 16 kHz, since resamplers cannot be copied."""
        if not self._resampler.copyable:
            raise AudioError("a stream that resamples cannot be copied; push 16 kHz samples instead.")
        twin = copy.copy(self)
        twin.state, twin._resampler = self.state.clone(), copy.copy(self._resampler)
        return twin

    @torch.inference_mode()
    def push(self, piece: np.ndarray | torch.Tensor) -> AudioTokens:
        """Takes the next samples, [S] or [S, channels], any number of them; returns the codes that became certain.

        Raises:
            AudioError: on NaN or infinite samples (the stream stays as it was), or after `flush`.
        """
        if self.closed:
            raise AudioError("this stream was flushed; open another one.")
        samples = to_mono(piece, channel_axis=1)
        check_samples(samples)
        return self._tokens(self._mel.push(self._resampler.push(samples), self.state.mel))

    @torch.inference_mode()
    def flush(self) -> AudioTokens:
        """Ends the stream and returns the remaining codes; ceil(seconds * 12.5) in all, none if nothing was pushed."""
        if self.closed:
            raise AudioError("this stream was flushed already; open another one.")
        self.closed = True
        blocks = self._mel.push(self._resampler.flush(), self.state.mel)
        return self._tokens(blocks + self._mel.flush(self.state.mel))

    def _tokens(self, blocks: list[torch.Tensor]) -> AudioTokens:
        tokenizer, state = self.tokenizer, self.state
        config, device = tokenizer.config, tokenizer.device
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        done = [AudioTokens(nothing, torch.zeros(0, config.feature_size, device=device))]
        for mel in blocks:
            hidden, state.encoder = tokenizer.encoder.step(mel, state.encoder)
            features = hidden.unflatten(1, (-1, config.pooling)).flatten(2)
            codes, state.quantizer = tokenizer.quantizer.step(features, state.quantizer)
            done.append(AudioTokens(codes[0], features[0].float()))
        return join(done)
