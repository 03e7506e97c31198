"""The 12.5 Hz audio tokenizer: any recording to codes and continuous features, whole or as a stream.

    wave ─► mono 16 kHz ─► log-mel ─► encoder (50 Hz) ─► 4 frames side by side ─► features [N, F] ─► codes [N]
                                 └─► feature encoder, if there is one, over 30 s ─► features [N, F]

N = ceil(S / 1280): the recording is padded with zeros to a multiple of 1280 samples. At another rate S is
ceil(samples * 16000 / rate). `encode` runs the very stream that `stream` hands out, block by block, so codes do not
depend on how a recording is cut into pieces. A tokenizer that cannot stream (Whisper's full attention, a mel floor per
clip) takes each 30 s as a recording of its own, as the published ones do.

Shapes: B rows, S samples at 16 kHz, N codes, F feature width.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
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
        self.feature_encoder = None
        if config.feature_encoder is not None:
            self.feature_encoder = AudioEncoder(config.feature_encoder, config.mel.num_mel_bins)
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
        segments = [samples[at : at + self._segment] for at in range(0, len(samples), self._segment)]
        if self.streams:
            stream = self.stream()
            return join([*(stream.push(segment) for segment in segments), stream.flush()])
        pieces = []
        for segment in segments:
            if self.feature_encoder is not None:
                pieces.append(self._encode_as_published(segment, len(segments[0])))
                continue
            padded = np.pad(segment, (0, -len(segment) % self.config.samples_per_code))
            features = self.features_from_wave(torch.from_numpy(padded)[None].to(self.device))
            codes = self.quantizer.nearest(self.quantizer.project(features).float())
            pieces.append(AudioTokens(codes[0], features[0].float()))
        return join(pieces)

    def _encode_as_published(self, segment: np.ndarray, longest: int) -> AudioTokens:
        """Tokenizes one segment as Kimi-Audio does.

        For codes a segment is padded to the longest of its recording, and attention hides the padding; for features to
        the full 30 s, of which attention hides nothing.
        """
        assert self.feature_encoder is not None
        code, pooling = self.config.samples_per_code, self.config.pooling
        count = -(-len(segment) // code)
        samples = torch.from_numpy(segment)[None].to(self.device)
        padded = F.pad(samples, (0, -(-longest // code) * code - len(segment)))
        frames = torch.tensor([-(-len(segment) * pooling // code)], device=self.device)
        hidden = self.encoder(self.log_mel(padded).to(self.encoder.conv1.weight.dtype), frames)
        rows = hidden.unflatten(1, (-1, pooling)).flatten(2)
        codes = self.quantizer.nearest(self.quantizer.project(rows).float())
        features = self.feature_rows(F.pad(samples, (0, self._segment - len(segment))))
        return AudioTokens(codes[0, :count], features[0, :count].float())

    def feature_rows(self, segments: torch.Tensor) -> torch.Tensor:
        """Continuous features of whole segments by the encoder made for them: [B, S] to [B, S / 1280, F]."""
        assert self.feature_encoder is not None
        heard = self.feature_encoder(self.log_mel(segments).to(self.feature_encoder.conv1.weight.dtype))
        return heard.unflatten(1, (-1, self.config.pooling)).flatten(2)

    def segments(self, wave: np.ndarray | torch.Tensor, sample_rate: int = 16_000) -> torch.Tensor:
        """Cuts a recording into what `feature_rows` takes, the last padded with zeros; arguments as for `encode`."""
        samples = torch.from_numpy(to_mono_16k(wave, sample_rate))
        return F.pad(samples, (0, -len(samples) % self._segment)).view(-1, self._segment)

    def encode_batch(self, waves: list[np.ndarray], sample_rate: int = 16_000) -> list[AudioTokens]:
        """Tokenizes several recordings of any lengths, each exactly as alone."""
        return [self.encode(wave, sample_rate) for wave in waves]

    def stream(self, sample_rate: int = 16_000) -> AudioStream:
        """Opens a stream: `push` pieces of any size, then `flush`; see `AudioStream`."""
        return AudioStream(self, sample_rate)

    # ---- training path -----------------------------------------------------------------------------------------

    def features_from_wave(self, wave: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Computes features as `encode` does, differentiable and without host synchronisation.

        Args:
            wave: [B, S] at 16 kHz, S a multiple of 1280.
            lengths: [B] samples of each row that are not padding; attention then hides what lies behind, and a row
                differs from the recording alone only by the 2.5 ms that are mirrored at a recording's end. None: all.

        Returns:
            [B, S / 1280, F].
        """
        code, pooling = self.config.samples_per_code, self.config.pooling
        frames = None if lengths is None else (lengths + code - 1) // code * pooling
        hidden = self.encoder(self.log_mel(wave), frames)
        return hidden.unflatten(1, (-1, pooling)).flatten(2)

    def log_mel(self, wave: torch.Tensor, dynamic_range: str | None = None) -> torch.Tensor:
        """Log-mel [B, S / 160, M] of waves [B, S].

        The running floor keeps step with the encoder's blocks; with "clip", or when the tokenizer cannot stream, each
        30 s segment is a clip.
        """
        block = self.config.encoder.block_size
        if self.streams and block is not None and dynamic_range != "clip":
            return self.mel(wave, 2 * block, dynamic_range)
        return torch.cat([self.mel(segment, None, dynamic_range) for segment in wave.split(self._segment, 1)], 1)

    def quantize(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> Quantized:
        """Quantizes features [B, N, F]; see `VectorQuantizer.forward`."""
        return self.quantizer(features, mask)

    @property
    def _segment(self) -> int:
        """Samples of a 30 s segment."""
        return self.config.encoder.max_positions * self.config.samples_per_code // self.config.pooling

    @property
    def streams(self) -> bool:
        """Whether recordings can be tokenized as they come in."""
        alone = self.config.feature_encoder is None
        return alone and self.encoder.streams and self.config.mel.dynamic_range == "running"

    @property
    def device(self) -> torch.device:
        return self.mel.window.device
