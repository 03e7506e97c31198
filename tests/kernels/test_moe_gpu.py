"""Triton's MoE on a GPU: every size class and dtype, uneven loads, poisoned memory, CUDA graphs, autocast."""

import pytest
import torch

pytest.importorskip("triton")

from kimi_mm.kernels.moe import reference
from kimi_mm.kernels.moe import triton as moe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NAMES = ("x", "weights", "gate_up", "down")
SHAPES = {  # N, D, I, E, k
    "one token": (1, 320, 128, 8, 2),
    "decode": (8, 512, 256, 64, 8),
    "nano": (4096, 320, 128, 8, 2),
    "odd widths": (777, 333, 77, 8, 3),
    "odd rows": (1003, 256, 512, 5, 5),
    "one expert": (300, 128, 128, 1, 1),
    "many experts": (500, 128, 64, 300, 4),
    "wide": (2048, 1024, 512, 8, 2),
    "wide, uneven": (3000, 768, 1040, 8, 3),
}
LIMITS = {torch.float32: (3e-6, 1e-5), torch.bfloat16: (5e-3, 1e-2), torch.float16: (1e-3, 2e-3)}


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that is not written reads as NaN, or as the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def _draw(N, D, I, E, k, dtype, loads):
    torch.manual_seed(N + D)
    popularity = torch.ones(E, device="cuda") if loads == "even" else torch.logspace(0, -3, E, device="cuda")
    if loads == "empty" and k < E:
        popularity[1 :: max(2, E // max(1, E - k - 1))] = 0.0
        popularity[:k] = 1.0
    indices = torch.multinomial(popularity.expand(N, E), k)
    x, weights = torch.randn(N, D, device="cuda"), torch.rand(N, k, device="cuda")
    gate_up, down = torch.randn(E, 2 * I, D, device="cuda") * D**-0.5, torch.randn(E, D, I, device="cuda") * I**-0.5
    return x.to(dtype), indices, weights, gate_up.to(dtype), down.to(dtype)


def _exact(x, indices, weights, gate_up, down):
    """Float64, expert by expert."""
    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        token, place = (indices == e).nonzero(as_tuple=True)
        hidden = reference._swiglu(x[token] @ gate_up[e].t())
        out = out.index_add(0, token, hidden @ down[e].t() * weights[token, place, None])
    return out


def _error(got, want):
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def _compare(inputs, output_limit, gradient_limit, run=moe.moe_experts):
    x, indices, *others = inputs
    leaves = [t.detach().clone().requires_grad_() for t in (x, *others)]
    exact = [t.detach().double().requires_grad_() for t in (x, *others)]
    out, want = run(leaves[0], indices, *leaves[1:]), _exact(exact[0], indices, *exact[1:])
    errors = {"out": _error(out, want)}
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, upstream)
    for name, a, b in zip(NAMES, got, torch.autograd.grad(want, exact, upstream.double()), strict=True):
        errors[name] = _error(a, b)
    with torch.no_grad():
        errors["no_grad"] = _error(run(x, indices, *others), want)
    for name, error in errors.items():
        assert error < (output_limit if name in ("out", "no_grad") else gradient_limit), errors


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matrix(shape, dtype):
    for loads in ("even", "uneven", "empty"):
        _compare(_draw(*SHAPES[shape], dtype, loads), *LIMITS[dtype])


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7, 8])
def test_every_k(k):
    _compare(_draw(257, 64, 48, 12, k, torch.bfloat16, "uneven"), *LIMITS[torch.bfloat16])


@pytest.mark.parametrize("shape", ["wide", "wide, uneven"])
@pytest.mark.parametrize(("kind", "engine"), [(kind, engine) for kind in moe.CHOICES for engine in moe.CHOICES[kind]])
def test_engines_agree(monkeypatch, shape, kind, engine):
    for other in moe.ENGINES:
        monkeypatch.setitem(moe.ENGINES, other, engine if other == kind else "triton")
    _compare(_draw(*SHAPES[shape], torch.bfloat16, "empty"), *LIMITS[torch.bfloat16])


def test_same_result_twice():
    inputs = _draw(*SHAPES["nano"], torch.bfloat16, "uneven")
    first, second = (moe.moe_experts(*inputs) for _ in range(2))
    assert torch.equal(first, second)


def test_autocast_and_graph_capture():
    x, _, _, gate_up, down = (t.float() for t in _draw(*SHAPES["nano"], torch.float32, "even"))
    logits = torch.randn(x.shape[0], 8, device="cuda")
    leaves = [t.requires_grad_() for t in (x, logits, gate_up, down)]

    def layer(x, logits, gate_up, down):
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            indices, weights = moe.moe_route(logits, torch.zeros(8, device="cuda"), 2, scaling=2.0)
            return moe.moe_experts(x, indices, weights, gate_up, down)

    graphed = torch.cuda.make_graphed_callables(layer, tuple(t.detach().clone().requires_grad_() for t in leaves))
    out, want = graphed(*leaves), layer(*leaves)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, want)
    upstream = torch.randn_like(out)
    got = [t.clone() for t in torch.autograd.grad(out, leaves, upstream)]
    for a, b in zip(got, torch.autograd.grad(want, leaves, upstream), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("E", "k", "groups", "kept"), [(8, 2, 1, 1), (64, 8, 1, 1), (256, 8, 8, 4), (384, 8, 1, 1), (897, 16, 3, 2)]
)
def test_route(E, k, groups, kept):
    logits = torch.randn(5000, E, device="cuda").requires_grad_()
    exact = logits.detach().double().requires_grad_()
    bias = torch.randn(E, device="cuda") * 0.1
    options = {"num_groups": groups, "top_groups": kept, "scaling": 2.5}
    indices, weights = moe.moe_route(logits, bias, k, **options)
    want, shares = reference.moe_route(exact, bias.double(), k, **options)
    dense = torch.zeros_like(exact).scatter(1, indices, weights.double())
    dense_want = torch.zeros_like(exact).scatter(1, want, shares)
    same = (indices.sort(1).values == want.sort(1).values).all(1)  # near ties may fall either way
    assert same.float().mean() > 0.99
    torch.testing.assert_close(dense[same], dense_want[same], rtol=1e-5, atol=1e-6)
    upstream = torch.randn(5000, E, device="cuda", dtype=torch.float64)
    (got,) = torch.autograd.grad(dense, logits, upstream)
    (expected,) = torch.autograd.grad(dense_want, exact, upstream)
    torch.testing.assert_close(got.double()[same], expected[same], rtol=1e-4, atol=1e-6)


def test_compiled_layer():
    inputs = _draw(*SHAPES["nano"], torch.bfloat16, "even")
    compiled = torch.compile(moe.moe_experts, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), moe.moe_experts(*inputs))
