"""The 12.5 Hz audio tokenizer: any recording to codes and continuous features, whole or as a stream.

    wave ─► mono 16 kHz ─► log-mel ─► encoder (50 Hz) ─► 4 frames side by side ─► features [N, F] ─► codes [N]

N = ceil(seconds * 12.5): the recording is padded with zeros to a multiple of 1280 samples. `encode` runs the very
stream that `stream` hands out, block by block, so codes do not depend on how a recording is cut into pieces.

Shapes: B rows, S samples at 16 kHz, N codes, F feature width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from kimi_mm.audio.encoder import AudioEncoder
from kimi_mm.audio.features import LogMel
from kimi_mm.audio.io import to_mono_16k
from kimi_mm.audio.quantizer import Quantized, VectorQuantizer
from kimi_mm.audio.streaming import AudioStream
from kimi_mm.audio.tokens import AudioTokens, join
from kimi_mm.config import AudioTokenizerConfig


class AudioTokenizer(nn.Module):
    """Log-mel, encoder and quantizer behind one interface.

    Args:
        config: sizes; `config.encoder` must be causal with a block size for `stream`.
    """

    def __init__(self, config: AudioTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.mel = LogMel(config.mel)
        self.encoder = AudioEncoder(config.encoder, config.mel.num_mel_bins)
        self.quantizer = VectorQuantizer(config)

    # ---- recordings --------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(self, wave: np.ndarray | torch.Tensor, sample_rate: int = 16_000) -> AudioTokens:
        """Tokenizes one recording.

        Args:
            wave: float in [-1, 1] or int16; [S], [channels, S] or [S, channels].
            sample_rate: of `wave`, Hz.

        Returns:
            N = ceil(S / sample_rate * 12.5) codes and feature rows, on the tokenizer's device.

        Raises:
            AudioError: on empty input, NaN or infinite samples, or an impossible rate.
        """
        samples = to_mono_16k(wave, sample_rate)
        if self.streams:
            stream = self.stream()
            return join([stream.push(samples), stream.flush()])
        step = self.config.samples_per_code
        padded = np.pad(samples, (0, -len(samples) % step))
        features = self.features_from_wave(torch.from_numpy(padded)[None].to(self.device))
        return AudioTokens(self.quantizer.nearest(self.quantizer.project(features).float())[0], features[0].float())

    def encode_batch(self, waves: list[np.ndarray], sample_rate: int = 16_000) -> list[AudioTokens]:
        """Tokenizes several recordings, each exactly as alone."""
        return [self.encode(wave, sample_rate) for wave in waves]

    def stream(self, sample_rate: int = 16_000) -> AudioStream:
        """Opens a stream: `push` pieces of any size, then `flush`; see `AudioStream`."""
        return AudioStream(self, sample_rate)

    # ---- training path -----------------------------------------------------------------------------------------

    def features_from_wave(self, wave: torch.Tensor) -> torch.Tensor:
        """Maps waves [B, S] at 16 kHz, S a multiple of 1280, to features [B, S / 1280, F]; differentiable."""
        hidden = self.encoder(self.log_mel(wave))
        return hidden.unflatten(1, (-1, self.config.pooling)).flatten(2)

    def log_mel(self, wave: torch.Tensor, dynamic_range: str | None = None) -> torch.Tensor:
        """Log-mel [B, S / 160, M] of waves [B, S], with the running floor in step with the encoder's blocks."""
        block = self.config.encoder.block_size
        return self.mel(wave, None if block is None else 2 * block, dynamic_range)

    def quantize(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> Quantized:
        """Quantizes features [B, N, F]; see `VectorQuantizer.forward`."""
        return self.quantizer(features, mask)

    @property
    def streams(self) -> bool:
        """Whether recordings can be tokenized as they come in."""
        return self.encoder.streams and self.config.mel.dynamic_range == "running"

    @property
    def device(self) -> torch.device:
        return self.mel.window.device
