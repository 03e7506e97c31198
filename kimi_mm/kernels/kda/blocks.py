"""The two matrices inside a KDA chunk, and the inverse between them, each with a hand-written backward.

    rows i, columns j of one chunk, G = running sum of the log-decay inside the chunk
        P_ij = sum_d q_id k_jd exp(G_id - G_jd)   for j <= i     what row i reads from the chunk
        A_ij = sum_d k_id k_jd exp(G_id - G_jd)   for j <  i     how much of row i's key was already written
        X    = (I + L)^-1 with L = diag(beta) A

The decay sits inside the sum over channels, so every product needs a row factor exp(G_i - a) and a column factor
exp(a - G_j) that share an anchor a. Anchoring each group of `SUB` rows at its first row keeps every exponent at or
below zero, except inside the group itself. There a decay bounded by exp(-5) a step allows at most exp(75), which
fp32 holds; an unbounded decay takes the explicit differences, masked before the exponential.

Only q, k and G are kept for the backward, which rebuilds the factors (Kimi Linear, section 3; the gradients follow
from dP, dA by the product rule, and the anchors cancel).

Shapes:  M (chunk, head) pairs,  C rows of a chunk,  K key channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SUB = 16  # rows that share one anchor; 15 steps of at least -5 stay above fp32's smallest normal exponent


class DecayedScores(torch.autograd.Function):
    """(q, k, G, bounded) -> (P, A), both [M, C, C] and lower triangular (A strictly)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, G: Tensor, bounded: bool) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        M, C, _ = q.shape
        P = q.new_zeros(M, C, C)
        A = q.new_zeros(M, C, C)
        for start in range(0, C, SUB):
            rows = slice(start, min(start + SUB, C))
            n = rows.stop - start
            width = rows.stop if bounded else start
            if width:
                row_MSK, col_MWK = _factors(G, rows, width)
                left = torch.cat([q[:, rows] * row_MSK, k[:, rows] * row_MSK], 1)  # [M, 2S, K]
                scores = left @ col_MWK.mul_(k[:, :width]).mT
                P[:, rows, :width] = scores[:, :n]
                A[:, rows, :width] = scores[:, n:]
            if not bounded:
                right = _differences(G[:, rows]).mul_(k[:, None, rows])  # [M, S, S, K]
                scores = torch.stack([q[:, rows], k[:, rows]], 2) @ right.mT  # [M, S, 2, S]
                P[:, rows, rows] = scores[:, :, 0]
                A[:, rows, rows] = scores[:, :, 1]
        ctx.save_for_backward(q, k, G)
        ctx.bounded = bounded
        return P.tril_(), A.tril_(-1)

    @staticmethod
    def backward(ctx: Any, dP: Tensor, dA: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, G = ctx.saved_tensors
        C = q.shape[1]
        dP, dA = dP.tril(), dA.tril(-1)
        dq, dk_row, dk_col = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(k)
        for start in range(0, C, SUB):
            rows = slice(start, min(start + SUB, C))
            n = rows.stop - start
            width = rows.stop if ctx.bounded else start
            if width:
                row_MSK, col_MWK = _factors(G, rows, width)
                left = torch.cat([q[:, rows] * row_MSK, k[:, rows] * row_MSK], 1)
                dscores = torch.cat([dP[:, rows, :width], dA[:, rows, :width]], 1)  # [M, 2S, W]
                dleft = dscores @ (col_MWK * k[:, :width])
                dq[:, rows] += dleft[:, :n] * row_MSK
                dk_row[:, rows] += dleft[:, n:] * row_MSK
                dk_col[:, :width] += (dscores.mT @ left).mul_(col_MWK)
            if not ctx.bounded:
                decay = _differences(G[:, rows])  # [M, S, S, K]
                dscores = torch.stack([dP[:, rows, rows], dA[:, rows, rows]], 2)  # [M, S, 2, S]
                both = torch.stack([q[:, rows], k[:, rows]], 2)  # [M, S, 2, K]
                dleft = dscores @ (decay * k[:, None, rows])
                dq[:, rows] += dleft[:, :, 0]
                dk_row[:, rows] += dleft[:, :, 1]
                dk_col[:, rows] += (dscores.mT @ both).mul_(decay).sum(1)
        dG = q * dq + k * (dk_row - dk_col)
        return dq, dk_row.add_(dk_col), dG, None


class UnitLowerInverse(torch.autograd.Function):
    """L [M, C, C] strictly lower triangular, C a power of two -> (I + L)^-1.

    Blocks of four by (I - L)(I + L^2), then pairs of neighbouring blocks are joined until one is left: with A, B the
    inverted diagonal blocks the new corner is -B L_21 A. Every factor is an inverse whose entries stay small, so
    equal consecutive keys cost no digits, which a power series over the whole chunk would.
    """

    @staticmethod
    def forward(ctx: Any, L: Tensor) -> Tensor:  # type: ignore[override]
        C = L.shape[-1]
        size = min(4, C)
        blocks = _diagonal_blocks(L, size)
        X = torch.zeros_like(L)
        eye = torch.eye(size, dtype=L.dtype, device=L.device)
        _diagonal_blocks(X, size).copy_((eye - blocks) @ (eye + blocks @ blocks))
        while size < C:
            inverse = _diagonal_blocks(X, size)  # [M, C/size, size, size]
            corner = _diagonal_blocks(L, 2 * size)[:, :, size:, :size]
            joined = inverse[:, 1::2] @ corner @ inverse[:, 0::2]
            _diagonal_blocks(X, 2 * size)[:, :, size:, :size] = joined.neg_()
            size *= 2
        ctx.save_for_backward(X)
        return X

    @staticmethod
    def backward(ctx: Any, dX: Tensor) -> Tensor:  # type: ignore[override]
        (X,) = ctx.saved_tensors
        return (X.mT @ dX @ X.mT).tril(-1).neg_()


def _factors(G_MCK: Tensor, rows: slice, width: int) -> tuple[Tensor, Tensor]:
    anchor = G_MCK[:, rows.start : rows.start + 1]
    return (G_MCK[:, rows] - anchor).exp_(), (anchor - G_MCK[:, :width]).exp_()


def _differences(G_MSK: Tensor) -> Tensor:
    size = G_MSK.shape[1]
    later = torch.ones(size, size, dtype=torch.bool, device=G_MSK.device).triu(1)
    return (G_MSK[:, :, None] - G_MSK[:, None]).masked_fill_(later[:, :, None], float("-inf")).exp_()


def _diagonal_blocks(square: Tensor, size: int) -> Tensor:
    """View of the diagonal blocks: [M, C, C] -> [M, C/size, size, size]."""
    M, C, _ = square.shape
    tiled = square.view(M, C // size, size, C // size, size)
    return tiled.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
