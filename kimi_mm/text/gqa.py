"""Grouped-query attention with rotary positions, as in Qwen2.

    x ─► q_proj [H], k_proj [G], v_proj [G] ─► rotate q, k ─► attention ─► o_proj        cache keeps [k; v] of G heads

Shapes:  B batch  T time  S cached  D hidden  H query heads  G key heads  E head channels
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kimi_mm.config import GQAConfig
from kimi_mm.text.attention import PeakLogits, Step, attend
from kimi_mm.text.cache import SequenceState
from kimi_mm.text.rope import RotaryEmbedding


class GQA(nn.Module):
    """Softmax attention in which groups of query heads share one key and value head."""

    def __init__(self, config: GQAConfig, hidden_size: int) -> None:
        super().__init__()
        if config.num_heads % config.num_kv_heads:
            raise ValueError(f"num_heads={config.num_heads} is not a multiple of num_kv_heads={config.num_kv_heads}.")
        self.config = config
        H, G, E = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = nn.Linear(hidden_size, H * E, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, G * E, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, G * E, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * E, hidden_size, bias=False)
        self.rope = RotaryEmbedding(config.rope, E)
        self.qk_max = PeakLogits(H)
        self.scale = E**-0.5 * self.rope.softmax_factor

    def new_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> SequenceState:
        """Empty buffer of keys and values, side by side in the last dimension."""
        config = self.config
        return SequenceState(
            torch.zeros(batch_size, 0, config.num_kv_heads, 2 * config.head_dim, dtype=dtype, device=device)
        )

    def forward(self, x: Tensor, step: Step, state: SequenceState | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; `state` is extended."""
        config = self.config
        B, T, _ = x.shape
        H, G, E = config.num_heads, config.num_kv_heads, config.head_dim
        cos, sin = self.rope.angles(step.positions)
        q = self.rope.rotate(self.q_proj(x).view(B, T, H, E), cos, sin)
        k = self.rope.rotate(self.k_proj(x).view(B, T, G, E), cos, sin)
        v = self.v_proj(x).view(B, T, G, E)
        if state is not None:
            rows = state.append(torch.cat([k, v], -1), step.write, step.start)
            if step.start:
                k, v = rows.to(x.dtype).chunk(2, -1)
        if step.context is not None:
            k, v = step.context.keys(torch.cat([k, v], -1)).chunk(2, -1)
        self.qk_max(q, k, step, self.scale)
        return self.o_proj(attend(q, k, v, step, self.scale).flatten(2))
