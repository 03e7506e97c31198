"""Kimi Delta Attention layer (Kimi Linear, section 4).

    x ─► q_proj, k_proj, v_proj ─► short conv + SiLU ─► q, k, v ─────────┐
    x ─► f_a_proj ─► f_b_proj ─► decay logits ── (A_log, dt_bias) ──────►├─► KDA ─► norm * sigmoid(gate) ─► o_proj
    x ─► b_proj ─► beta ────────────────────────────────────────────────┘            ▲
    x ─► g_a_proj ─► g_b_proj ─► gate ────────────────────────────────────────────────┘

Shapes:  B batch  T time  D hidden  H key heads  HV value heads  K key channels  V value channels
         C convolved channels = 2 * H * K + HV * V
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kimi_mm import kernels
from kimi_mm.config import KDAConfig
from kimi_mm.text.attention import Step
from kimi_mm.text.cache import KDAState


class KDA(nn.Module):
    """Token mixer with a constant-size state; q and k are L2-normalised, every key channel decays on its own."""

    def __init__(self, config: KDAConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.config = config
        keys = config.num_heads * config.head_dim
        decays = config.value_heads * config.head_dim
        values = config.value_heads * config.value_dim
        rank = config.gate_rank or config.head_dim
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(2 * keys + values, config.conv_kernel_size))
        self.f_a_proj = nn.Linear(hidden_size, rank, bias=False)
        self.f_b_proj = nn.Linear(rank, decays, bias=False)
        self.b_proj = nn.Linear(hidden_size, config.value_heads, bias=False)
        self.g_a_proj = nn.Linear(hidden_size, rank, bias=False)
        self.g_b_proj = nn.Linear(rank, values, bias=config.output_gate_bias)
        self.A_log = nn.Parameter(torch.empty(config.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(decays))
        self.o_norm_weight = nn.Parameter(torch.ones(config.value_dim))
        self.o_proj = nn.Linear(values, hidden_size, bias=False)
        self.eps = eps

    def reset_parameters(self) -> None:
        """Draws the decay parameters: rates exp(A_log) in [1, 16] (1 when bounded), steps dt in [1e-3, 1e-1]."""
        with torch.no_grad():
            # As torch draws depthwise convolutions; N(0, 0.02) would start the values near the output norm's eps.
            bound = self.config.conv_kernel_size**-0.5
            self.conv_weight.uniform_(-bound, bound)
            if self.config.gate == "softplus":
                self.A_log.uniform_(1.0, 16.0).log_()
            else:
                self.A_log.zero_()
            dt = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_min_(1e-4)
            dt.add_(torch.log(-torch.expm1(-dt)))

    def new_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> KDAState:
        """Zero state: conv inputs in `dtype`, recurrent state in fp32 (float64 for float64)."""
        config = self.config
        inner = torch.float64 if dtype == torch.float64 else torch.float32
        channels, width = self.conv_weight.shape
        return KDAState(
            torch.zeros(batch_size, width - 1, channels, dtype=dtype, device=device),
            torch.zeros(batch_size, config.value_heads, config.value_dim, config.head_dim, dtype=inner, device=device),
        )

    def forward(self, x: Tensor, step: Step, state: KDAState | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; `state` is advanced in place."""
        config = self.config
        B, T, _ = x.shape
        H, HV, K, V = config.num_heads, config.value_heads, config.head_dim, config.value_dim
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)
        decay = self.f_b_proj(self.f_a_proj(x)).view(B, T, HV, K)
        beta = self.b_proj(x)
        gate = self.g_b_proj(self.g_a_proj(x)).view(B, T, HV, V)
        options: dict[str, Any] = {"gate": config.gate, "A_log": self.A_log, "dt_bias": self.dt_bias}
        options["lower_bound"] = config.gate_lower_bound if config.gate == "bounded" else None
        if state is not None and T == 1 and step.lengths is None:
            rows = (qkv[:, 0], self.conv_weight, state.conv, decay[:, 0], beta[:, 0], state.recurrent, gate[:, 0])
            out, state.recurrent, state.conv = kernels.kda_decode(*rows, self.o_norm_weight, self.eps, **options)
            return self.o_proj(out.flatten(1)[:, None])
        past = None if state is None else state.conv
        if step.context is not None:
            past = step.context.conv_past(qkv, config.conv_kernel_size)
        qkv, conv_state = kernels.short_conv(
            qkv,
            self.conv_weight,
            initial_state=past,
            output_final_state=state is not None,
            cu_seqlens=step.cu_seqlens,
            lengths=step.lengths,
        )
        q, k, v = qkv.split([H * K, H * K, HV * V], -1)
        q, k, v = q.view(B, T, H, K), k.view(B, T, H, K), v.view(B, T, HV, V)
        options |= {"qk_l2norm": True, "beta_sigmoid": True}
        past = None if state is None else state.recurrent
        if step.context is not None:
            past = step.context.kda_past(k, v, decay, beta, **options)
        out, final = kernels.chunk_kda(
            q,
            k,
            v,
            decay,
            beta,
            **options,
            initial_state=past,
            output_final_state=state is not None,
            cu_seqlens=step.cu_seqlens,
            lengths=step.lengths if state is not None else None,
        )
        if state is not None:
            assert final is not None
            assert conv_state is not None
            state.recurrent, state.conv = final, conv_state.to(state.conv.dtype)
        out = kernels.gated_rms_norm(out, gate, self.o_norm_weight, self.eps)
        return self.o_proj(out.flatten(2))
