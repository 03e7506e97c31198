"""The detokenizer: codes (12.5 Hz) to speech at 24 kHz, whole or as a stream.

    codes [N] ─► DiT, flow matching from noise ─► mel [4 N, M] ─► vocoder ─► wave [1920 N]
                  ▲ past frames, speaker prompt

`decode` runs the very stream that `stream` hands out, so the two give the same samples.

Shapes: B rows, N codes, T = 4 N mel frames, M mel bins, D hidden size of the DiT, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from kimi_mm.audio.bigvgan import BigVGAN
from kimi_mm.audio.detokenizer_config import DetokenizerConfig, StreamingConfig
from kimi_mm.audio.detokenizer_replay import Replay, replayed
from kimi_mm.audio.detokenizer_stream import Codes, DetokenizerState, DetokenizerStream, advance, check_codes
from kimi_mm.audio.dit import DiT
from kimi_mm.audio.dit_cache import DiTCache
from kimi_mm.audio.io import check_rate, check_samples, resample, to_mono
from kimi_mm.audio.target_mel import TargetMel
from kimi_mm.audio.vocoder import Vocoder
from kimi_mm.errors import AudioError

SHORTEST_PROMPT = 0.5  # seconds


@dataclass(frozen=True)
class SpeakerPrompt:
    """A voice to go on in: a reference recording as a past that is never forgotten."""

    cache: DiTCache
    seconds: float


class Detokenizer(nn.Module):
    """DiT and vocoder behind one interface.

    Args:
        config: sizes and streaming defaults.
    """

    def __init__(self, config: DetokenizerConfig) -> None:
        super().__init__()
        self.config = config
        bins, hop = config.mel.num_mel_bins, config.mel.hop_length
        self.mel = TargetMel(config.mel)
        self.dit = DiT(config.dit, bins, config.frames_per_code)
        if config.vocoder is not None:
            self.vocoder: Vocoder | BigVGAN = Vocoder(config.vocoder, bins, hop, config.mel.sample_rate)
        else:
            assert config.bigvgan is not None
            self.vocoder = BigVGAN(config.bigvgan, bins, config.streaming.fade)
        self._replay = Replay(self.dit)

    @property
    def sample_rate(self) -> int:
        """Of the waves, Hz."""
        return self.config.mel.sample_rate

    @property
    def device(self) -> torch.device:
        return self.dit.output.weight.device

    # ---- speech ------------------------------------------------------------------------------------------------

    def decode(
        self,
        codes: Codes,
        *,
        prompt: SpeakerPrompt | None = None,
        generator: torch.Generator | None = None,
        streaming: StreamingConfig | None = None,
    ) -> torch.Tensor:
        """Makes the wave of one utterance.

        Args:
            codes: [N] whole numbers below the codebook's size.
            prompt: voice to speak in; None is the voice that the model was trained on.
            generator: source of the noise; None starts one at seed 0.
            streaming: chunk sizes and solver; None takes the config's.

        Returns:
            [1920 * N] fp32 in [-1, 1].

        Raises:
            AudioError: when there is no code, or one outside the codebook.
        """
        return self.decode_batch([codes], prompts=[prompt], generators=[generator], streaming=streaming)[0]

    def decode_batch(
        self,
        codes: Sequence[Codes],
        *,
        prompts: Sequence[SpeakerPrompt | None] | None = None,
        generators: Sequence[torch.Generator | None] | None = None,
        streaming: StreamingConfig | None = None,
    ) -> list[torch.Tensor]:
        """Makes several utterances side by side, each as `decode` would."""
        if any(len(row) == 0 for row in codes):
            raise AudioError("there are no codes to speak; give at least one.")
        prompts, generators = prompts or [None] * len(codes), generators or [None] * len(codes)
        streams = [
            self.stream(prompt=prompt, generator=generator, streaming=streaming)
            for prompt, generator in zip(prompts, generators, strict=True)
        ]
        return advance(streams, codes, final=True)

    def stream(
        self,
        *,
        prompt: SpeakerPrompt | None = None,
        generator: torch.Generator | None = None,
        streaming: StreamingConfig | None = None,
    ) -> DetokenizerStream:
        """Opens a stream: `push` codes in pieces of any size, then `flush`; see `decode` for the arguments."""
        with torch.inference_mode():
            cache = self.dit.empty_cache() if prompt is None else prompt.cache
            noise = torch.zeros(0, self.config.mel.num_mel_bins, device=self.device)
            generator = generator or torch.Generator().manual_seed(0)
            state = DetokenizerState(cache, self.vocoder.initial_state(), generator, noise)
        return DetokenizerStream(self, state, streaming or self.config.streaming)

    @torch.inference_mode()
    def prompt(self, wave: np.ndarray | torch.Tensor, sample_rate: int, codes: Codes | None = None) -> SpeakerPrompt:
        """Prepares a reference recording, whose voice the speech then keeps.

        Args:
            wave: mono or several channels, see `to_mono`; of a longer one the last part is used.
            sample_rate: of `wave`, Hz; any, it is resampled.
            codes: what the tokenizer makes of the recording, which helps; None if unknown.

        Raises:
            AudioError: when the recording is too short or cannot be used, or the codes are not its codes.
        """
        samples = resample(to_mono(wave), check_rate(sample_rate, "the prompt"), self.sample_rate)
        check_samples(samples, "the prompt")
        seconds = len(samples) / self.sample_rate
        if seconds < SHORTEST_PROMPT:
            raise AudioError(f"the prompt has {seconds:.2f} s; give at least {SHORTEST_PROMPT} s of speech.")
        count = -(-len(samples) // self.config.samples_per_code)
        known = [self.dit.null_code] * count if codes is None else check_codes(codes, self.config.dit.codebook_size)
        if abs(len(known) - count) > 1:
            raise AudioError(f"the prompt lasts {count} codes, but {len(known)} were given; they belong together.")
        count = min(count, len(known))
        samples = np.pad(samples, (0, self.config.samples_per_code))[: count * self.config.samples_per_code]
        mel = self.mel.normalize(self.mel(torch.from_numpy(samples)[None].to(self.device)))
        frames = self.config.frames_per_code
        longest = self.config.dit.context_frames // 2 // frames
        piece = self.config.streaming.chunk_codes
        cache, first = self.dit.empty_cache(), max(0, count - longest)
        for at in range(first, count, piece):
            part = torch.tensor([known[at : min(at + piece, count)]], device=self.device)
            x = mel[:, at * frames : (at + part.shape[1]) * frames]
            cache = self.remember(x, part, cache, [x.shape[1]])
        return SpeakerPrompt(cache.protected(), seconds)

    # ---- for the stream ----------------------------------------------------------------------------------------

    def solve(
        self, noise: torch.Tensor, codes: torch.Tensor, cache: DiTCache, counts: list[int], config: StreamingConfig
    ) -> torch.Tensor:
        """Follows the flow from noise to mel.

        Args:
            noise: [B, T, M].
            codes: [B, N], T = N * frames_per_code, padded with the null code.
            cache: the past of each row.
            counts: frames of each row that are not padding.
            config: steps, solver, grid, guidance.

        Returns:
            [B, T, M] normalised mel.
        """
        return self._replay.solve(noise, codes, cache, counts, config)

    def remember(self, mel: torch.Tensor, codes: torch.Tensor, cache: DiTCache, counts: list[int]) -> DiTCache:
        """Returns the past with finished frames appended; arguments as for `solve`, mel [B, T, M] normalised."""
        keys, values = self._replay.keys_values(mel, codes, cache, counts)
        return cache.extended(keys, values, counts, self.config.dit.context_frames)

    def use_cuda_graphs(self, enabled: bool = True) -> Detokenizer:
        """Replays solver and vocoder as CUDA graphs, one for each shape; costs a second each when first met.

        For inference alone, on a CUDA device; elsewhere only the padding that graphs need takes place.
        """
        self._replay = Replay(self.dit, enabled)
        self.vocoder.runner = replayed(self.vocoder.run) if enabled else self.vocoder.run
        return self

    def pad_codes(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Returns codes of several lengths as one tensor [B, N] on the model's device, padded with the null code."""
        longest = max(len(row) for row in rows)
        padded = [[*row, *[self.dit.null_code] * (longest - len(row))] for row in rows]
        return torch.tensor(padded, device=self.device)
