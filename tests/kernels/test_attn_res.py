"""Attention over depth against its formula, with gradients of every source, and the two-phase form."""

import pytest
import torch

from kimi_mm.kernels import attn_res_begin, attn_res_finish, attn_res_mix

EPS = 1e-6


def _formula(sources, query, norm_weight):
    """Attention Residuals, equations 2-4."""
    V = torch.stack(sources)
    keys = V / (V.square().mean(-1, keepdim=True) + EPS).sqrt() * norm_weight
    weights = torch.softmax((keys * query).sum(-1), 0)
    return (weights[..., None] * V).sum(0)


def _draw(n, D, lead=(2, 5)):
    generator = torch.Generator().manual_seed(n * D)
    draw = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    scales = 10.0 ** torch.linspace(-3, 3, n, dtype=torch.float64)  # sources of very different size
    return [draw(*lead, D) * scale for scale in scales], draw(D), draw(D)


@pytest.mark.parametrize("n", [1, 2, 7, 16])
@pytest.mark.parametrize("lead", [(2, 5), (1, 1)])
def test_output_and_gradients(n, lead):
    sources, query, weight = _draw(n, 48, lead)
    leaves = [t.requires_grad_() for t in (*sources, query, weight)]
    out, want = attn_res_mix(sources, query, weight, EPS), _formula(sources, query, weight)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, upstream)
    true = torch.autograd.grad(want, leaves, upstream)
    for a, b in zip(got, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * (1.0 + float(b.abs().max())))
    with torch.no_grad():
        torch.testing.assert_close(attn_res_mix(sources, query, weight, EPS), want, rtol=1e-12, atol=1e-12)


def test_zero_query_is_the_mean():
    sources, _, weight = _draw(5, 32)
    out = attn_res_mix(sources, torch.zeros(32, dtype=torch.float64), weight, EPS)
    torch.testing.assert_close(out, torch.stack(sources).mean(0))


@pytest.mark.parametrize("n", [1, 4])
def test_two_phases_equal_one(n):
    sources, _, _ = _draw(n, 48)
    partial = torch.randn(2, 5, 48, dtype=torch.float64)
    queries, weights = torch.randn(3, 48, dtype=torch.float64), torch.randn(3, 48, dtype=torch.float64)
    mixed, peak, total = attn_res_begin(sources, queries, weights, EPS)
    for s in range(3):
        part = None if s == 0 else partial
        got = attn_res_finish(mixed[s], peak[s], total[s], part, queries[s], weights[s], EPS)
        want = attn_res_mix(sources if part is None else [*sources, part], queries[s], weights[s], EPS)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_bf16_keeps_dtype_and_mixes_in_fp32():
    sources, query, weight = _draw(4, 32)
    half = [s.bfloat16() for s in sources]
    out = attn_res_mix(half, query.float(), weight.float(), EPS)
    assert out.dtype == torch.bfloat16
    want = _formula([s.double() for s in half], query, weight)
    torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-2)


def test_no_source_is_refused():
    with pytest.raises(ValueError, match="at least one source"):
        attn_res_mix([], torch.zeros(4), torch.ones(4), EPS)
