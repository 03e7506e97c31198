"""Multi-head latent attention (DeepSeek-V2, section 2.1), with or without rotary positions.

    x ─► (q_a ─► norm ─► q_b) or q_proj ─► q_nope [H, N], q_pe [H, R]
    x ─► kv_a_proj ─► c [L] ─► norm ──┬─ kv_b_proj ─► k_nope [H, N], v [H, V]      many tokens: expanded
                     k_pe [R], shared ┘                                            cache keeps [c; k_pe] only
    one token: q_nope is folded into latent space, attention runs over the latents, values are expanded afterwards

Under NoPE the R shared channels stay but are not rotated, and the scale is (N + R)^-0.5 all the same.

Shapes:  B batch  T time  S cached  D hidden  H heads  N qk_nope  R qk_rope  V value channels  L kv_lora_rank
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_mm.config import MLAConfig
from kimi_mm.text.attention import PeakLogits, Step, attend
from kimi_mm.text.cache import SequenceState
from kimi_mm.text.norm import RMSNorm
from kimi_mm.text.rope import RotaryEmbedding


class MLA(nn.Module):
    """Attention whose cache is one latent and one shared key part per token."""

    def __init__(self, config: MLAConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        H, N, R = config.num_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, H * (N + R), bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, config.q_lora_rank, bias=False)
            self.q_a_norm = RMSNorm(config.q_lora_rank, config.kv_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, H * (N + R), bias=False)
        self.kv_a_proj = nn.Linear(hidden_size, config.kv_lora_rank + R, bias=False)
        self.kv_a_norm = RMSNorm(config.kv_lora_rank, config.kv_norm_eps)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, H * (N + config.v_head_dim), bias=False)
        self.o_proj = nn.Linear(H * config.v_head_dim, hidden_size, bias=False)
        self.rope = None if config.rope is None else RotaryEmbedding(config.rope, R)
        self.qk_max = PeakLogits(H)
        self.scale = (N + R) ** -0.5 * (1.0 if self.rope is None else self.rope.softmax_factor)

    def new_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> SequenceState:
        """Empty buffer of latents and shared keys."""
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        return SequenceState(torch.zeros(batch_size, 0, width, dtype=dtype, device=device))

    def forward(self, x: Tensor, step: Step, state: SequenceState | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; `state` is extended."""
        config = self.config
        B, T, _ = x.shape
        N, R, L = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
        q = self.q_proj(x) if config.q_lora_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q_nope, q_pe = q.view(B, T, config.num_heads, N + R).split([N, R], -1)
        latent, k_pe = self.kv_a_proj(x).split([L, R], -1)
        if self.rope is not None:
            cos, sin = self.rope.angles(step.positions)
            q_pe = self.rope.rotate(q_pe, cos, sin)
            k_pe = self.rope.rotate(k_pe[:, :, None], cos, sin)[:, :, 0]
        row = torch.cat([self.kv_a_norm(latent), k_pe], -1)  # [B, T, L + R]
        if state is not None:
            rows = state.append(row, step.write, step.start)
            if T == 1 and step.start:
                return self._one_token(q_nope, q_pe, rows.to(x.dtype), step.mask)
            if step.start:
                row = rows.to(x.dtype)
        if step.context is not None:
            row = step.context.keys(row)
        return self._expanded(q_nope, q_pe, row, step)

    def _expanded(self, q_nope: Tensor, q_pe: Tensor, row: Tensor, step: Step) -> Tensor:
        config = self.config
        N, L = config.qk_nope_head_dim, config.kv_lora_rank
        B, S, _ = row.shape
        kv = self.kv_b_proj(row[..., :L]).view(B, S, config.num_heads, N + config.v_head_dim)
        k_nope, v = kv.split([N, config.v_head_dim], -1)
        k = torch.cat([k_nope, row[:, :, None, L:].expand(-1, -1, config.num_heads, -1)], -1)
        q = torch.cat([q_nope, q_pe], -1)
        self.qk_max(q, k, step, self.scale)
        out = attend(q, k, v, step, self.scale)
        return self.o_proj(out.flatten(2))

    def _one_token(self, q_nope: Tensor, q_pe: Tensor, rows: Tensor, mask: Tensor | None) -> Tensor:
        """Absorbed form: multi-query attention with key [c; k_pe] and value c; heads serve as query rows."""
        config = self.config
        H, N, L = config.num_heads, config.qk_nope_head_dim, config.kv_lora_rank
        weight = self.kv_b_proj.weight.to(rows.dtype).view(H, N + config.v_head_dim, L)
        folded = torch.matmul(q_nope.transpose(1, 2), weight[:, :N])  # [B, H, 1, L]
        query = torch.cat([folded, q_pe.transpose(1, 2)], -1).transpose(1, 2)  # [B, 1, H, L + R]
        keys = rows[:, None]
        out = F.scaled_dot_product_attention(query, keys, keys[..., :L], attn_mask=mask, scale=self.scale)
        values = torch.matmul(out.transpose(1, 2), weight[:, N:].mT)  # [B, H, 1, V]
        return self.o_proj(values.flatten(1)[:, None])
