"""Piecewise use of a vocoder that needs its context on both sides: each piece is vocoded with the end of the one
before, and the two versions of what they share are faded into each other.

    piece k:    [ kept mel | new mel ] ─► wave     the first half of the kept wave is faded, then new wave follows
    returned:   everything up to where the next fade begins; the rest is kept for it
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kimi_mm.audio.vocoder import VocoderState


def overlap_step(
    vocode: Callable[[torch.Tensor], torch.Tensor],
    mel: torch.Tensor,
    state: VocoderState,
    final: bool,
    hop: int,
    fade: str,
) -> tuple[torch.Tensor, VocoderState]:
    """Takes the next mel frames and returns the samples that are settled.

    The lengths are those of Kimi-Audio's detokenizer: of the first piece half comes out; of later ones twice the kept
    wave, or half of everything where that is less; of the last one all, without a fade as published, with one where
    `fade` is "hann".

    Args:
        vocode: maps mel [B, T, M] to waves [B, T * hop].
        mel: [B, T, M], T >= 0.
        state: kept mel [B, K, M] and its wave [B, K * hop].
        final: nothing follows.
        hop: samples per frame.
        fade: window of the fade, "hamming" or "hann".

    Returns:
        wave [B, S] and the next state; T * hop samples in all over the stream.
    """
    kept_mel, kept = state.tensors
    joined = torch.cat([kept_mel, mel], 1)
    if not joined.shape[1] or not (mel.shape[1] or final):
        return kept[:, :0], state
    wave, frames, twice = vocode(joined), joined.shape[1], 2 * kept_mel.shape[1]
    ready = frames if final else twice if 0 < twice < frames else frames // 2
    half = min(ready * hop // 2, kept.shape[1])
    if half and (not final or fade == "hann"):
        window = getattr(torch, f"{fade}_window")(2 * half, device=wave.device, dtype=wave.dtype)
        mixed = kept[:, :half] * window[half:] + wave[:, :half] * window[:half]
        wave = torch.cat([mixed, wave[:, half:]], 1)
    kept_state = VocoderState((joined[:, ready:], wave[:, ready * hop :]))
    return wave[:, : ready * hop].clamp(-1.0, 1.0), kept_state
