"""Stretches of a sequence, each worked on alone, give what the whole gives, gradients included."""

from itertools import pairwise

import pytest
import torch

from kimi_mm.kernels import chunk_kda
from kimi_mm.kernels.kda.segments import fold_segments, segment_summary

OPTIONS = {"gate": "bounded", "qk_l2norm": True, "beta_sigmoid": True}


@pytest.mark.parametrize("cuts", [[40], [1, 17, 64], [0, 30]], ids=str)
def test_folded_stretches_equal_the_whole(cuts):
    B, T, H, HV, K, V = 2, 90, 1, 2, 8, 12
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: E731
    q, k, v, g, beta = draw(B, T, H, K), draw(B, T, H, K), draw(B, T, HV, V), draw(B, T, HV, K), draw(B, T, HV)
    start, A_log, dt_bias = draw(B, HV, V, K), draw(HV), draw(HV * K)
    everything = [q, k, v, g, beta, start, A_log, dt_bias]
    constants = {"A_log": A_log, "dt_bias": dt_bias, **OPTIONS}
    want, want_final = chunk_kda(q, k, v, g, beta, initial_state=start, output_final_state=True, **constants)

    edges = [0, *cuts, T]
    pieces = [slice(a, b) for a, b in pairwise(edges)]
    maps = [segment_summary(k[:, p], v[:, p], g[:, p], beta[:, p], **constants) for p in pieces]
    transitions, states = (torch.stack(each) for each in zip(*maps, strict=True))
    seams = fold_segments(transitions, states, start)
    outs = [
        chunk_kda(q[:, p], k[:, p], v[:, p], g[:, p], beta[:, p], initial_state=seam, **constants)[0]
        for p, seam in zip(pieces, seams[:-1], strict=True)
    ]
    got = torch.cat(outs, 1)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(seams[-1], want_final, rtol=1e-10, atol=1e-12)
    weight, final_weight = torch.randn_like(want), torch.randn_like(want_final)
    ours = torch.autograd.grad((got * weight).sum() + (seams[-1] * final_weight).sum(), everything)
    true = torch.autograd.grad((want * weight).sum() + (want_final * final_weight).sum(), everything)
    for a, b in zip(ours, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_without_an_initial_state():
    k, v = torch.randn(1, 20, 1, 4), torch.randn(1, 20, 1, 6)
    g, beta = -torch.rand(1, 20, 1, 4), torch.rand(1, 20, 1)
    transition, state = segment_summary(k, v, g, beta, qk_l2norm=True)
    seams = fold_segments(transition[None], state[None])
    assert torch.equal(seams[0], torch.zeros(1, 1, 6, 4))
    _, want = chunk_kda(k, k, v, g, beta, qk_l2norm=True, output_final_state=True)
    torch.testing.assert_close(seams[1], want)
