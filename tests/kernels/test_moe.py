"""Routing and experts against per-token loops."""

import pytest
import torch
import torch.nn.functional as F

from kimi_mm.kernels import moe_experts, moe_route
from kimi_mm.kernels.moe import reference


def _experts(x, indices, weights, gate_up, down):
    rows = []
    for n in range(x.shape[0]):
        row = torch.zeros_like(x[n])
        for e, w in zip(indices[n].tolist(), weights[n], strict=True):
            gate, up = (gate_up[e] @ x[n]).chunk(2)
            row = row + w * (down[e] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def _draw(N, D, I, E=6, k=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(N + D)
    x = torch.randn(N, D, generator=generator, dtype=dtype)
    # expert 0 takes most tokens and expert E - 1 none
    indices = torch.stack([torch.randperm(E - 1, generator=generator)[:k] for _ in range(N)]) if N else None
    indices = torch.zeros(0, k, dtype=torch.int64) if indices is None else indices
    weights = torch.rand(N, k, generator=generator, dtype=dtype)
    gate_up = torch.randn(E, 2 * I, D, generator=generator, dtype=dtype) * 0.2
    return x, indices, weights, gate_up, torch.randn(E, D, I, generator=generator, dtype=dtype) * 0.2


@pytest.mark.parametrize("N", [0, 1, 2, 5, 40])
@pytest.mark.parametrize(("D", "I"), [(16, 8), (18, 7)], ids=["grouped", "odd sizes"])
def test_output_and_gradients(N, D, I):
    x, indices, weights, gate_up, down = _draw(N, D, I)
    leaves = [t.requires_grad_() for t in (x, weights, gate_up, down)]
    out, want = moe_experts(x, indices, weights, gate_up, down), _experts(x, indices, weights, gate_up, down)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    if N:
        upstream = torch.randn_like(out)
        got = torch.autograd.grad(out, leaves, upstream)
        for a, b in zip(got, torch.autograd.grad(want, leaves, upstream), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert not got[2][-1].any()
    with torch.no_grad():
        torch.testing.assert_close(moe_experts(x, indices, weights, gate_up, down), want, rtol=1e-5, atol=1e-5)


def test_float64_and_the_dense_form_agree():
    inputs = _draw(11, 16, 8, dtype=torch.float64)
    want = _experts(*inputs)
    torch.testing.assert_close(moe_experts(*inputs), want)
    torch.testing.assert_close(reference._all_experts(*inputs), want)


def test_autocast_decides_the_dtype():
    inputs = _draw(11, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = moe_experts(*inputs)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), _experts(*inputs), rtol=5e-2, atol=5e-2)


def test_bias_moves_the_choice_but_not_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    indices, weights = moe_route(logits, torch.tensor([0.0, 0.0, 0.0, 5.0]), 2, scaling=2.0)
    assert set(indices[0].tolist()) == {0, 3}
    scores = logits.sigmoid()[0, indices[0]]
    torch.testing.assert_close(weights[0], 2.0 * scores / scores.sum())
    _, plain = moe_route(logits, torch.zeros(4), 2, normalize=False)
    assert set(plain[0].tolist()) == set(logits.sigmoid()[0, :2].tolist())


def test_groups_limit_the_choice():
    """The best group by its two best experts wins, even if another group holds the best single expert."""
    logits = torch.tensor([[9.0, -9.0, -9.0, 1.0, 1.0, -9.0]])
    indices, _ = moe_route(logits, torch.zeros(6), 2, num_groups=2, top_groups=1)
    assert set(indices[0].tolist()) == {3, 4}


def test_routing_gradient_reaches_the_logits():
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: moe_route(x, torch.zeros(6, dtype=torch.float64), 2)[1], logits)
