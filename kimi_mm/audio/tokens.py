"""What tokenizing gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AudioTokens:
    """Codes [N] int64 and features [N, F] fp32 of one recording or of a piece of it."""

    codes: torch.Tensor
    features: torch.Tensor

    def __len__(self) -> int:
        return len(self.codes)


def join(pieces: list[AudioTokens]) -> AudioTokens:
    """Joins consecutive pieces of a stream."""
    return AudioTokens(torch.cat([p.codes for p in pieces]), torch.cat([p.features for p in pieces]))
