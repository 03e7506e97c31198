"""Tokenizing while the sound still comes in.

    push(piece) ─► resample ─► waiting samples ─► whole blocks (2 s) ─► mel ─► encoder.step ─► quantizer.step ─► tokens
    flush()     ─► the rest, padded to a whole code

Work is always done in whole encoder blocks, whatever the size of the pieces, so the results are the same to the bit
for any chunking. A block needs 40 samples (2.5 ms) after its end, half a mel window less one hop.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import soxr
import torch

from kimi_mm.audio.encoder import EncoderState
from kimi_mm.audio.features import DECADES
from kimi_mm.audio.io import TARGET_RATE, check_samples, to_mono
from kimi_mm.audio.quantizer import QuantizerState
from kimi_mm.audio.tokens import AudioTokens, join
from kimi_mm.errors import AudioError

if TYPE_CHECKING:
    from kimi_mm.audio.tokenizer import AudioTokenizer


@dataclass
class AudioStreamState:
    """Everything a stream remembers.

    `waiting` starts half a mel window before the next block, so that its first frames find their context.
    """

    waiting: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    received: int = 0  # samples at 16 kHz
    blocks: int = 0
    loudest: float = 0.0  # of the running floor, log10 power
    encoder: EncoderState = field(default_factory=EncoderState)
    quantizer: QuantizerState = field(default_factory=QuantizerState)

    def clone(self) -> AudioStreamState:
        """Returns an independent copy."""
        return replace(
            self, waiting=self.waiting.copy(), encoder=self.encoder.clone(), quantizer=self.quantizer.clone()
        )


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
        if not 1000 <= sample_rate <= 384_000:
            raise AudioError(f"sample rate {sample_rate} Hz is not between 1000 and 384000.")
        self.tokenizer, self.sample_rate = tokenizer, sample_rate
        self.state = AudioStreamState()
        self.closed = False
        self._given = 0
        self._resampler = None if sample_rate == TARGET_RATE else soxr.ResampleStream(sample_rate, TARGET_RATE, 1)
        config = tokenizer.config
        assert config.encoder.block_size is not None
        self._block_frames = 2 * config.encoder.block_size
        self._hop, self._half = config.mel.hop_length, config.mel.n_fft // 2

    def clone(self) -> AudioStream:
        """Returns a stream that goes on from here on its own; only at 16 kHz, since resamplers cannot be copied."""
        if self._resampler is not None:
            raise AudioError("a stream that resamples cannot be copied; push 16 kHz samples instead.")
        twin = copy.copy(self)
        twin.state = self.state.clone()
        return twin

    @torch.inference_mode()
    def push(self, piece: np.ndarray | torch.Tensor) -> AudioTokens:
        """Takes the next samples, [S] or with channels, any number of them; returns the codes that became certain."""
        if self.closed:
            raise AudioError("this stream was flushed; open another one.")
        samples = to_mono(piece)
        self._given += len(samples)
        if self._resampler is not None:
            samples = self._resampler.resample_chunk(samples)
        return self._advance(samples)

    @torch.inference_mode()
    def flush(self) -> AudioTokens:
        """Ends the stream and returns the remaining codes; ceil(seconds * 12.5) in all."""
        if self.closed:
            raise AudioError("this stream was flushed already; open another one.")
        if self._resampler is not None:
            rest = self._resampler.resample_chunk(np.zeros(0, np.float32), last=True)
            # The resampler may end a sample early or late; the number of codes follows the true duration.
            goal = -(-self._given * TARGET_RATE // self.sample_rate) - self.state.received
            rest = np.pad(rest, (0, max(0, goal - len(rest))))[: max(0, goal)]
        else:
            rest = np.zeros(0, np.float32)
        pieces = self._advance(rest)
        self.closed = True
        return self._finish(pieces)

    # ---- blocks ------------------------------------------------------------------------------------------------

    def _advance(self, samples: np.ndarray) -> AudioTokens:
        state, size = self.state, self._block_frames * self._hop
        check_samples(samples)
        state.received += len(samples)
        state.waiting = np.concatenate([state.waiting, samples.astype(np.float32)])
        device, width = self.tokenizer.device, self.tokenizer.config.feature_size
        nothing = torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, width, device=device)
        done = [AudioTokens(*nothing)]
        while True:
            left = 0 if state.blocks == 0 else self._half
            need = left + size + self._half - self._hop
            if len(state.waiting) < need:
                return join(done)
            context = self._with_start(state.waiting[:need])
            done.append(self._block(context, self._block_frames))
            state.waiting = state.waiting[left + size - self._half :].copy()

    def _finish(self, before: AudioTokens) -> AudioTokens:
        state, code = self.state, self.tokenizer.config.samples_per_code
        if state.received == 0:
            return before
        total = -(-state.received // code) * code
        left = 0 if state.blocks == 0 else self._half
        waiting = np.pad(state.waiting, (0, total - state.received))
        frames = (len(waiting) - left) // self._hop
        # Mirror the end of the recording, as the whole-batch features do.
        waiting = np.concatenate([waiting, waiting[-self._half - 1 : -1][::-1]])
        pieces, at = [before], 0
        padded = self._with_start(waiting)
        while at < frames:
            count = min(self._block_frames, frames - at)
            start = at * self._hop
            pieces.append(self._block(padded[start : start + (count - 1) * self._hop + 2 * self._half], count))
            at += count
        state.waiting = np.zeros(0, np.float32)
        return join(pieces)

    def _with_start(self, samples: np.ndarray) -> np.ndarray:
        """Mirrors the start of the recording in front of its first block."""
        if self.state.blocks:
            return samples
        return np.concatenate([samples[1 : self._half + 1][::-1], samples])

    def _block(self, samples: np.ndarray, frames: int) -> AudioTokens:
        tokenizer, state = self.tokenizer, self.state
        wave = torch.from_numpy(np.ascontiguousarray(samples))[None].to(tokenizer.device)
        log_power = tokenizer.mel.log_power(wave)
        assert log_power.shape[1] == frames
        state.loudest = max(state.loudest, float(log_power.max()))
        mel = tokenizer.mel.scale(log_power, log_power.new_tensor(state.loudest - DECADES))
        hidden, state.encoder = tokenizer.encoder.step(mel, state.encoder)
        features = hidden.unflatten(1, (-1, tokenizer.config.pooling)).flatten(2)
        codes, state.quantizer = tokenizer.quantizer.step(features, state.quantizer)
        state.blocks += 1
        return AudioTokens(codes[0], features[0].float())
