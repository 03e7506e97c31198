"""Expert choice in one kernel: sigmoid, bias, groups, top k and weights, and its gradient.

    s = sigmoid(logits)      picked = top k of s + bias within the best groups      w = scaling * s / (sum of picked s)
    ds_j = scaling * (dw_j - sum_i dw_i s_i / S) / S        dlogits = ds * s * (1 - s), zero where not picked

Bytes: 4 N E in, 12 N k out (backward 12 N k in, 4 N E out); some 10 N E k operations on registers. Floor: the copy time
of those bytes, about 2 us for 16,384 tokens and 64 experts on an H100.

Shapes:  N tokens  E experts  k experts per token  G groups of M experts (E = G * M)
"""

# A type checker takes kernels for Python functions and does not know what a launch adds to their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_mm.kernels.launch import on_device

MAX_EXPERTS = 1024  # scores of a token stay in registers
CONFIGS = {"route": {"elements": 2048, "num_warps": 4}, "route_backward": {"elements": 4096, "num_warps": 4}}


def route(
    logits: Tensor, bias: Tensor, top_k: int, num_groups: int, top_groups: int, normalize: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """logits [N, E] and bias [E] -> indices [N, k] int64 and weights [N, k] in the dtype of the logits."""
    N, E = logits.shape
    indices = torch.empty(N, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(N, top_k, dtype=logits.dtype, device=logits.device)
    G_PAD, M_PAD = triton.next_power_of_2(num_groups), triton.next_power_of_2(E // num_groups)
    config = CONFIGS["route"]
    BLOCK = max(1, config["elements"] // (G_PAD * M_PAD))
    if N:
        with on_device(logits):
            _route_kernel[(triton.cdiv(N, BLOCK),)](
                logits,
                bias,
                indices,
                weights,
                N,
                scaling,
                K=top_k,
                K_PAD=triton.next_power_of_2(top_k),
                GROUPS=num_groups,
                TOP_GROUPS=top_groups,
                M=E // num_groups,
                G_PAD=G_PAD,
                M_PAD=M_PAD,
                NORMALIZE=normalize,
                BLOCK=BLOCK,
                num_warps=config["num_warps"],
            )
    return indices, weights


def route_backward(logits: Tensor, indices: Tensor, dweights: Tensor, normalize: bool, scaling: float) -> Tensor:
    """Gradient of the logits, [N, E]."""
    N, E = logits.shape
    dlogits = torch.empty_like(logits)
    E_PAD = triton.next_power_of_2(E)
    config = CONFIGS["route_backward"]
    BLOCK = max(1, config["elements"] // E_PAD)
    if N:
        with on_device(logits):
            _route_backward_kernel[(triton.cdiv(N, BLOCK),)](
                logits,
                indices,
                dweights,
                dlogits,
                N,
                E,
                scaling,
                K=indices.shape[1],
                E_PAD=E_PAD,
                NORMALIZE=normalize,
                BLOCK=BLOCK,
                num_warps=config["num_warps"],
            )
    return dlogits


@triton.jit
def _route_kernel(
    logits,
    bias,
    indices,
    weights,
    N,
    scaling,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    M: tl.constexpr,
    G_PAD: tl.constexpr,
    M_PAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, G_PAD * M_PAD)
    expert = (lane // M_PAD) * M + lane % M_PAD
    real = (lane % M_PAD < M) & (lane // M_PAD < GROUPS)
    offsets = rows.to(tl.int64)[:, None] * (GROUPS * M) + expert[None, :]
    logit = tl.load(logits + offsets, mask=(rows[:, None] < N) & real[None, :], other=0.0)
    scores = tl.sigmoid(logit.to(tl.float32))
    choice = scores + tl.load(bias + expert, mask=real, other=0.0).to(tl.float32)[None, :]
    # A NaN must not make a lane without an expert win; it still reaches the output through its score.
    choice = tl.where(choice == choice, choice, -1e30)
    choice = tl.where(real[None, :], choice, float("-inf"))
    if GROUPS > 1:
        grouped = tl.reshape(choice, (BLOCK, G_PAD, M_PAD))
        best, at = tl.max(grouped, 2, return_indices=True)
        if M > 1:
            others = tl.arange(0, M_PAD)[None, None, :] != at[:, :, None]
            best += tl.max(tl.where(others, grouped, float("-inf")), 2)
        left = best
        for _ in range(TOP_GROUPS):
            top = tl.argmax(left, 1)
            left = tl.where(tl.arange(0, G_PAD)[None, :] == top[:, None], float("-inf"), left)
        dropped = left == best  # all of a chosen group are finite, so losing it shows
        grouped = tl.where(dropped[:, :, None], float("-inf"), grouped)
        choice = tl.reshape(grouped, (BLOCK, G_PAD * M_PAD))
    place = tl.arange(0, K_PAD)[None, :]
    picked = tl.zeros((BLOCK, K_PAD), tl.int32)
    shares = tl.zeros((BLOCK, K_PAD), tl.float32)
    for j in range(K):
        top = tl.argmax(choice, 1)
        hit = lane[None, :] == top[:, None]
        share = tl.sum(tl.where(hit, scores, 0.0), 1)
        choice = tl.where(hit, float("-inf"), choice)
        picked = tl.where(place == j, ((top // M_PAD) * M + top % M_PAD)[:, None], picked)
        shares = tl.where(place == j, share[:, None], shares)
    if NORMALIZE:
        shares = shares / (tl.sum(shares, 1)[:, None] + 1e-20)
    out = rows.to(tl.int64)[:, None] * K + place
    mask = (rows[:, None] < N) & (place < K)
    tl.store(indices + out, picked.to(tl.int64), mask=mask)
    tl.store(weights + out, shares * scaling, mask=mask)


@triton.jit
def _route_backward_kernel(
    logits,
    indices,
    dweights,
    dlogits,
    N,
    E,
    scaling,
    K: tl.constexpr,
    E_PAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    lane = tl.arange(0, E_PAD)
    inside = rows < N
    total = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK,), tl.float32)
    if NORMALIZE:
        for j in range(K):
            e = tl.load(indices + rows * K + j, mask=inside, other=0)
            s = tl.sigmoid(tl.load(logits + rows * E + e, mask=inside, other=0.0).to(tl.float32))
            total += s
            mean += s * tl.load(dweights + rows * K + j, mask=inside, other=0.0).to(tl.float32)
        total += 1e-20
        mean = mean / total
    out = tl.zeros((BLOCK, E_PAD), tl.float32)
    for j in range(K):
        e = tl.load(indices + rows * K + j, mask=inside, other=0)
        s = tl.sigmoid(tl.load(logits + rows * E + e, mask=inside, other=0.0).to(tl.float32))
        ds = tl.load(dweights + rows * K + j, mask=inside, other=0.0).to(tl.float32)
        if NORMALIZE:
            ds = (ds - mean) / total
        d = ds * s * (1.0 - s) * scaling
        out += tl.where(lane[None, :] == e[:, None], d[:, None], 0.0)
    offsets = rows[:, None] * E + lane[None, :]
    tl.store(dlogits + offsets, out, mask=inside[:, None] & (lane[None, :] < E))
