"""QK-clip: keeps attention logits below a threshold by shrinking query and key weights after an optimiser step.

    S_h = max over batch and causal pairs of scale * q_h . k_h        gamma_h = tau / S_h where S_h > tau
    GQA: q rows of head h, and k rows of its group
    MLA: q and k content rows by sqrt(gamma), q rotary rows by gamma

Kimi K2, section 2.1. Attention layers note their maxima while `track` is on; `apply` uses and clears them. In GQA a key
head serves several query heads: it shrinks by the square root of the least gamma of its group, and every query head
makes up the rest, so that each head's logits end at tau or where they were.
"""

from __future__ import annotations

import torch
from torch import nn

from kimi_mm.text.gqa import GQA
from kimi_mm.text.mla import MLA
from kimi_mm.training.sharding import scale_rows


def attention_layers(model: nn.Module) -> list[MLA | GQA]:
    """Returns the layers whose logits can grow; KDA normalises its queries and keys."""
    return [module for module in model.modules() if isinstance(module, (MLA, GQA))]


def track(model: nn.Module, on: bool = True) -> None:
    """Makes attention layers note the largest logit of every head while training (one more q k^T product each)."""
    for layer in attention_layers(model):
        layer.qk_max.enabled = on


@torch.no_grad()
def apply(model: nn.Module, tau: float = 100.0) -> torch.Tensor:
    """Clips every head whose largest logit since the last call exceeded `tau`.

    Args:
        model: module with attention layers; all processes of a distributed run must call this together.
        tau: threshold of the logits.

    Returns:
        The largest logit of all heads before clipping, a scalar (0 without attention layers).

    Raises:
        ValueError: if tau is not positive.
    """
    if not tau > 0:
        raise ValueError(f"tau={tau} must be positive.")
    layers = attention_layers(model)
    if not layers:
        return torch.zeros(())
    peaks = torch.cat([layer.qk_max.peak for layer in layers])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(peaks, torch.distributed.ReduceOp.MAX)
    gammas = (tau / peaks.clamp_min(tau)).split([layer.config.num_heads for layer in layers])
    for layer, gamma in zip(layers, gammas, strict=True):
        (_clip_mla if isinstance(layer, MLA) else _clip_gqa)(layer, gamma)  # type: ignore[arg-type]
        layer.qk_max.peak.zero_()
    return peaks.max()


def _clip_mla(layer: MLA, gamma: torch.Tensor) -> None:
    config = layer.config
    N, R = config.qk_nope_head_dim, config.qk_rope_head_dim
    root = gamma.sqrt()
    queries = layer.q_proj if config.q_lora_rank is None else layer.q_b_proj
    rows = torch.cat([root[:, None].expand(-1, N), gamma[:, None].expand(-1, R)], 1)
    scale_rows(queries.weight, rows.flatten())
    keys = torch.cat([root[:, None].expand(-1, N), torch.ones_like(root)[:, None].expand(-1, config.v_head_dim)], 1)
    scale_rows(layer.kv_b_proj.weight, keys.flatten())


def _clip_gqa(layer: GQA, gamma: torch.Tensor) -> None:
    config = layer.config
    G, E = config.num_kv_heads, config.head_dim
    shared = gamma.view(G, -1).amin(1).sqrt()
    own = gamma / shared.repeat_interleave(config.num_heads // G)
    for projection, factor in ((layer.q_proj, own), (layer.k_proj, shared)):
        rows = factor.repeat_interleave(E)
        scale_rows(projection.weight, rows)
        if projection.bias is not None:
            scale_rows(projection.bias, rows)
