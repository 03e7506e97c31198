"""Where the pieces of streamed speech meet, and whether one can hear it."""

from __future__ import annotations

import torch

from kimi_mm.audio.detokenizer_config import DetokenizerConfig


def seam_positions(config: DetokenizerConfig, codes: int) -> list[int]:
    """Returns the samples at which one window's frames end and the next one's begin, for an utterance of `codes`."""
    streaming, seams = config.streaming, []
    at, need = streaming.first_chunk_codes - streaming.look_ahead_codes, streaming.first_chunk_codes
    while need <= codes:
        seams.append(at * config.samples_per_code)
        at, need = at + streaming.chunk_codes, need + streaming.chunk_codes
    return [seam for seam in seams if seam < codes * config.samples_per_code]


def seam_energy(wave: torch.Tensor, seams: list[int], reach: int = 120) -> float:
    """Returns the energy of the second difference near seams, over that elsewhere: 1 is no seam, a click is far more.

    Args:
        wave: [S].
        seams: sample positions.
        reach: samples on both sides of a seam that count as near it (120: 5 ms at 24 kHz).
    """
    bend = wave.double().diff(n=2).square()
    near = torch.zeros(len(bend), dtype=torch.bool, device=wave.device)
    for seam in seams:
        near[max(0, seam - reach) : seam + reach] = True
    return float(bend[near].mean() / bend[~near].mean().clamp_min(1e-30))
