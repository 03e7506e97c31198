"""Kimi-Audio's chunked detokenizer as it was released, chunk by chunk, for comparison with it.

    30 codes ─► 120 frames behind the 48 held back ─► fresh noise ─► 29 Euler steps ─► keep all but the last 48
                                                                                       │       of the last chunk, all
    past (900 frames) ◄─ one pass over the kept frames at t = 999 ◄────────────────────┴─► mel ─► vocoder ─► wave

It differs from `DetokenizerStream` in three ways: noise belongs to the call, not to the code; the last chunk is known
to be the last, so that a multiple of 30 codes has no empty end; after 4096 frames the past is forgotten. Same weights,
same lengths.

Sources: released code, as in the report's section 2.4. Shapes: N codes, T frames, M mel bins, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kimi_mm.audio.detokenizer import Detokenizer

CHUNK, LOOK_AHEAD = 30, 12  # codes
MAX_FRAMES = 4096  # positions before the past is forgotten


@dataclass(frozen=True)
class PublishedPiece:
    """What one call gives: frames solved for and kept, passes of the DiT, mel [T, M] and wave [S]."""

    solved: int
    kept: int
    passes: int
    mel: torch.Tensor
    wave: torch.Tensor


@torch.inference_mode()
def published_pieces(
    detokenizer: Detokenizer, codes: Sequence[int], generator: torch.Generator | None = None
) -> Iterator[PublishedPiece]:
    """Yields the pieces of an utterance as the released code makes them.

    Args:
        detokenizer: of the published architecture.
        codes: N of them, at least one.
        generator: draws randn(T, M) once a call, T the frames that it solves for; None starts one at seed 0.
    """
    config, device = detokenizer.config, detokenizer.device
    frames, bins = config.frames_per_code, config.mel.num_mel_bins
    generator = generator or torch.Generator().manual_seed(0)
    settings = config.streaming.replace(steps=29, solver="euler", time_grid="linear", guidance=1.0)
    cache, vocoder = detokenizer.dit.empty_cache(), detokenizer.vocoder.initial_state()
    held: list[int] = []
    position = 0
    for at in range(0, len(codes), CHUNK):
        final = at + CHUNK >= len(codes)
        window = [*held, *codes[at : at + CHUNK]]
        solved = len(window) * frames
        noise = torch.randn(solved, bins, generator=generator, device=generator.device).to(device)
        mel = detokenizer.solve(noise[None], detokenizer.pad_codes([window]), cache, [solved], settings)[0]
        keep = len(window) - (0 if final else LOOK_AHEAD)
        kept = keep * frames
        if not final:
            done = detokenizer.pad_codes([window[:keep]])
            cache = detokenizer.remember(mel[None, :kept], done, cache, [kept])
        position += kept
        if position + kept > MAX_FRAMES:
            cache, position = detokenizer.dit.empty_cache(), 0
        held = window[keep:]
        wave, vocoder = detokenizer.vocoder.step(detokenizer.mel.denormalize(mel[None, :kept]), vocoder, final)
        yield PublishedPiece(solved, kept, settings.steps + (not final), mel[:kept], wave[0].float())
