"""Context and expert parallelism give what one process gives: outputs, gradients, largest logits; real processes."""

import numpy as np
import pytest
import torch

from tests.text import spread
from tests.training.processes import together

DRAW = torch.Generator().manual_seed(5)
PACKED = {
    "documents within, across and over ranks": [0, 3, 5, 19, 21, 24],
    "an edge between documents": [0, 8, 16, 24],
    "one document": [0, 24],
    "an empty one": [0, 10, 10, 24],
}


@pytest.mark.parametrize(
    ("ranks", "edges", "recompute"),
    [(2, None, False), (3, None, True), *((3, edges, False) for edges in PACKED.values())],
    ids=["2 ranks", "3 ranks, recomputed", *PACKED],
)
def test_stretches_equal_the_whole(ranks, edges, recompute):
    rows = 2 if edges is None else 1
    ids = torch.randint(0, 40, (rows, 24), generator=DRAW)
    weights = torch.randn(rows, 24, 16, generator=DRAW, dtype=torch.float64)
    cu_seqlens = None if edges is None else torch.tensor(edges)
    hidden, gradients, peaks = spread.run(spread.backbone(), ids, weights, cu_seqlens)
    parts = together(ranks, spread.stretch, ids, weights, cu_seqlens, recompute)
    np.testing.assert_allclose(np.concatenate([part[0] for part in parts], 1), hidden, rtol=1e-9, atol=1e-11)
    _, others, tops = parts[-1]
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(others[name], gradient, rtol=1e-8, atol=1e-10, err_msg=name)
    for mine, theirs in zip(peaks, tops, strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=1e-9)


@pytest.mark.parametrize("favoured", [False, True], ids=["spread", "all to one rank"])
def test_spread_experts_equal_experts_together(favoured):
    ranks = 4
    x, weights = (torch.randn(ranks, 5, 16, generator=DRAW, dtype=torch.float64) for _ in range(2))
    bias = torch.zeros(8)
    if favoured:
        bias[2:4] = 10.0  # both experts of rank 1
    layer = spread.moe()
    layer.router.bias.copy_(bias)
    inputs = x.clone().requires_grad_()
    out = layer(inputs)
    ((out * weights).sum() / ranks).backward()
    parts = together(ranks, spread.experts, x, weights, bias)
    np.testing.assert_allclose(np.stack([part[0] for part in parts]), out.detach(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(np.stack([part[1] for part in parts]) / ranks, inputs.grad, rtol=1e-9, atol=1e-12)
    for name, p in layer.named_parameters():
        if name.startswith("experts."):
            got = np.concatenate([part[2][name] for part in parts])
        else:
            got = parts[0][2][name]
        np.testing.assert_allclose(got, p.grad, rtol=1e-9, atol=1e-12, err_msg=name)
