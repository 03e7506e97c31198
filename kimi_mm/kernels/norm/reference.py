"""RMS normalisation with a sigmoid output gate, as KDA applies it to every head (Kimi Linear, section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes weight * x / rms(x) * sigmoid(gate) in fp32 and casts once.

    Args:
        x: [..., D], normalised over D.
        gate: [..., D] logits.
        weight: [D].
        eps: added to the mean square.

    Returns:
        [..., D] in the dtype of x.
    """
    inner = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = F.rms_norm(x.to(inner), weight.shape, weight.to(inner), eps)
    return (y * gate.to(inner).sigmoid()).to(x.dtype)
