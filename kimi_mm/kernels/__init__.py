"""The operations that deserve kernels. Each runs on any device; `dispatch` picks the implementation.

chunk_kda, kda_step           Kimi Delta Attention over sequences, and one step of it
kda_decode                    that step with the short convolution before it and the gated norm after it
short_conv                    causal depthwise convolution + SiLU
gated_rms_norm                RMS norm with a sigmoid gate
attn_res_mix, _begin, _finish attention over depth, in one go or in two phases
attn_res_mix_norm             and _finish_norm: with the RMS norm that follows
moe_route, moe_experts        expert choice, and the experts
linear_cross_entropy          loss of a linear head over a large vocabulary, without holding all logits
"""

from kimi_mm.kernels.attn_res import reference as _attn_res
from kimi_mm.kernels.conv import reference as _conv
from kimi_mm.kernels.cross_entropy import reference as _cross_entropy
from kimi_mm.kernels.dispatch import KernelError, dispatched, resolve
from kimi_mm.kernels.kda import reference as _kda
from kimi_mm.kernels.moe import reference as _moe
from kimi_mm.kernels.norm import reference as _norm

chunk_kda = dispatched("chunk_kda", _kda.chunk_kda)
kda_step = dispatched("kda_step", _kda.kda_step)
kda_decode = dispatched("kda_decode", _kda.kda_decode)
short_conv = dispatched("short_conv", _conv.short_conv)
gated_rms_norm = dispatched("gated_rms_norm", _norm.gated_rms_norm)
attn_res_mix = dispatched("attn_res_mix", _attn_res.attn_res_mix)
attn_res_mix_norm = dispatched("attn_res_mix_norm", _attn_res.attn_res_mix_norm)
attn_res_begin = dispatched("attn_res_begin", _attn_res.attn_res_begin)
attn_res_finish = dispatched("attn_res_finish", _attn_res.attn_res_finish)
attn_res_finish_norm = dispatched("attn_res_finish_norm", _attn_res.attn_res_finish_norm)
moe_route = dispatched("moe_route", _moe.moe_route)
moe_experts = dispatched("moe_experts", _moe.moe_experts)
linear_cross_entropy = dispatched("linear_cross_entropy", _cross_entropy.linear_cross_entropy)

__all__ = [
    "KernelError",
    "attn_res_begin",
    "attn_res_finish",
    "attn_res_finish_norm",
    "attn_res_mix",
    "attn_res_mix_norm",
    "chunk_kda",
    "gated_rms_norm",
    "kda_decode",
    "kda_step",
    "linear_cross_entropy",
    "moe_experts",
    "moe_route",
    "resolve",
    "short_conv",
]
