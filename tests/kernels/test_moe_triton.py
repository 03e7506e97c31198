"""Triton's MoE against the reference: interpreted on a CPU, compiled where there is a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from kimi_mm.kernels.moe import reference
from kimi_mm.kernels.moe import triton as moe
from kimi_mm.kernels.moe import triton_rows as rows

NAMES = ("x", "weights", "gate_up", "down")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _indices(N, k, E, seed=0):
    """Expert 0 takes most rows, the last one none."""
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.linspace(3.0, 0.2, E).square()
    popularity[-1] = 0.0 if k < E else popularity[-1]
    return torch.multinomial(popularity.expand(N, E), k, generator=generator) if N else torch.zeros(0, k).long()


def _draw(N, D, I, E, k, dtype=torch.float32):
    torch.manual_seed(N + D)
    x, weights = torch.randn(N, D), torch.rand(N, k)
    gate_up, down = torch.randn(E, 2 * I, D) * D**-0.5, torch.randn(E, D, I) * I**-0.5
    x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
    return [t.to(DEVICE) for t in (x, _indices(N, k, E), weights, gate_up, down)]


def _error(got, want):
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def _check(inputs, output_limit, gradient_limit):
    x, indices, *others = inputs
    leaves = [t.detach().clone().requires_grad_() for t in (x, *others)]
    exact = [t.detach().double().requires_grad_() for t in (x, *others)]
    out = moe.moe_experts(leaves[0], indices, *leaves[1:])
    want = reference._sorted_experts(exact[0], indices, *exact[1:])
    assert out.dtype == x.dtype
    assert _error(out, want) < output_limit
    upstream = torch.randn_like(want)
    got = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    for name, a, b in zip(NAMES, got, torch.autograd.grad(want, exact, upstream), strict=True):
        assert a.dtype == leaves[NAMES.index(name)].dtype
        assert _error(a, b) < gradient_limit, name
    with torch.no_grad():
        assert _error(moe.moe_experts(inputs[0], indices, *others), want) < output_limit


@pytest.mark.parametrize(
    ("N", "D", "I", "E", "k"),
    [
        (1, 16, 16, 3, 1),
        (2, 18, 7, 2, 2),
        (70, 48, 32, 4, 2),
        (17, 20, 33, 5, 3),
        (5, 32, 16, 9, 8),
        (140, 32, 40, 2, 1),
    ],
)
def test_output_and_gradients_fp32(N, D, I, E, k):
    _check(_draw(N, D, I, E, k), 2e-6, 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "D", "I", "E", "k"), [(9, 32, 48, 3, 2), (70, 64, 80, 2, 1)])
def test_half_precision(dtype, N, D, I, E, k):
    """Block sizes of `decode` and `narrow`."""
    _check(_draw(N, D, I, E, k, dtype), 5e-3, 1e-2)


def test_wide_blocks(monkeypatch):
    monkeypatch.setattr(moe.gemm, "WIDE", 16)
    inputs = _draw(130, 32, 48, 2, 1, torch.bfloat16)
    assert moe.gemm.size_class(130, 2, 32, 48, torch.bfloat16, inputs[0].device).startswith("wide")
    _check(inputs, 5e-3, 1e-2)


@pytest.mark.parametrize("engine", ["torch", "tma", "mixed"])
def test_engines_of_wide_experts(monkeypatch, engine):
    """grouped_mm also runs on a CPU; ours by TMA is interpreted. Either may hand over to the other."""
    engines = {kind: engine if engine in choices else "triton" for kind, choices in moe.CHOICES.items()}
    if engine == "mixed":
        engines = {"up": "tma", "down": "torch", "dhidden": "tma", "dx": "triton", "dweight": "torch"}
    config = moe.gemm.CONFIGS["narrow"]
    monkeypatch.setattr(moe, "_plan", lambda *_: (config, engines))
    for kind, columns in (("up", 16), ("down", 32), ("dhidden", 64), ("dx", 32)):
        monkeypatch.setitem(moe.tma.CONFIGS[kind], "BN", columns)
        monkeypatch.setitem(moe.tma.CONFIGS[kind], "BK", 32)
    _check(_draw(60, 48, 40, 3, 2, torch.bfloat16), 5e-3, 1e-2)


def test_no_rows():
    x, indices, weights, gate_up, down = _draw(0, 16, 8, 3, 2)
    gate_up.requires_grad_()
    out = moe.moe_experts(x, indices, weights, gate_up, down)
    assert out.shape == (0, 16)
    out.sum().backward()
    assert not gate_up.grad.any()
    assert moe.moe_route(torch.zeros(0, 4, device=DEVICE), torch.zeros(4, device=DEVICE), 2)[0].shape == (0, 2)


def test_splitting_the_rows_of_weight_gradients(monkeypatch):
    monkeypatch.setattr(moe.gemm, "DWEIGHT_PROGRAMS", 10**6)
    monkeypatch.setitem(moe.gemm.CONFIGS["fp32"]["dweight"], "BK", 16)
    _check(_draw(260, 16, 16, 1, 1), 2e-6, 5e-6)


def test_autocast_reads_fp32_parameters_and_returns_fp32_gradients():
    x, indices, weights, gate_up, down = _draw(40, 32, 16, 4, 2)
    leaves = [t.requires_grad_() for t in (x, weights, gate_up, down)]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = moe.moe_experts(x, indices, weights, gate_up, down)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = reference._sorted_experts(exact[0], indices, *exact[1:])
    assert out.dtype == torch.bfloat16
    assert _error(out, want) < 1e-2
    upstream = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(want, exact, upstream.double()), strict=True
    ):
        assert a.dtype == torch.float32
        assert _error(a, b) < 1e-2


@pytest.mark.parametrize(("N", "E", "k", "tile"), [(1, 1, 1, 16), (37, 5, 3, 16), (700, 3, 2, 64), (30, 130, 8, 16)])
def test_places(monkeypatch, N, E, k, tile):
    monkeypatch.setitem(rows.CONFIGS["place"], "programs", 3)
    monkeypatch.setitem(rows.CONFIGS["place"], "elements", 1024)
    indices = _indices(N, k, E).to(DEVICE)
    places = rows.place_rows(indices, E, tile)
    ids, order = indices.flatten().sort(stable=True)
    assert torch.equal(places.source.long(), order)
    assert torch.equal(places.slots.long()[order], torch.arange(N * k, device=DEVICE))
    loads = torch.bincount(ids, minlength=E)
    assert torch.equal(places.ends.long(), loads.cumsum(0))
    want = [
        (e, int(end - load) + at, int(end))
        for e, (load, end) in enumerate(zip(loads.tolist(), loads.cumsum(0).tolist(), strict=True))
        for at in range(0, load, tile)
    ]
    tiles = places.tiles[:-1].view(3, places.num_tiles)
    used = tiles[0] >= 0
    assert [tuple(tile) for tile in tiles[:, used].t().tolist()] == want
    assert int(places.tiles[-1]) == len(want)
    assert bool(used[: len(want)].all())


@pytest.mark.parametrize(
    ("N", "E", "k", "groups", "kept"),
    [(5, 6, 2, 1, 1), (37, 8, 3, 4, 2), (3, 15, 4, 3, 2), (9, 5, 1, 5, 2), (1, 64, 8, 1, 1)],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_route(N, E, k, groups, kept, normalize):
    torch.manual_seed(N)
    bias = (torch.randn(E) * 0.1).to(DEVICE)
    ours = torch.randn(N, E).to(DEVICE).requires_grad_()
    theirs = ours.detach().double().requires_grad_()
    options = {"num_groups": groups, "top_groups": kept, "normalize": normalize, "scaling": 2.5}
    indices, weights = moe.moe_route(ours, bias, k, **options)
    want, shares = reference.moe_route(theirs, bias.double(), k, **options)
    order, back = indices.argsort(1), want.argsort(1)
    assert torch.equal(indices.gather(1, order), want.gather(1, back))
    torch.testing.assert_close(weights.gather(1, order).double(), shares.gather(1, back), rtol=1e-5, atol=1e-6)
    upstream = torch.randn(N, k).to(DEVICE)
    (got,) = torch.autograd.grad(weights.gather(1, order), ours, upstream)
    (expected,) = torch.autograd.grad(shares.gather(1, back), theirs, upstream.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def test_route_survives_nan_and_extremes():
    logits = torch.tensor([[float("nan")] * 5, [1e30, -1e30, 0.0, float("inf"), -float("inf")]], device=DEVICE)
    indices, _ = moe.moe_route(logits, torch.zeros(5, device=DEVICE), 3)
    assert all(len(set(row)) == 3 and max(row) < 5 for row in indices.tolist())
    assert set(indices[1, :2].tolist()) == {0, 3}


def test_float64_is_the_references():
    x, indices, weights, gate_up, down = _draw(5, 8, 4, 3, 2, torch.float64)
    want = reference.moe_experts(x, indices, weights, gate_up, down)
    assert torch.equal(moe.moe_experts(x, indices, weights, gate_up, down), want)


def test_bad_input():
    x, indices, weights, gate_up, down = _draw(5, 8, 4, 3, 2)
    logits, bias = torch.zeros(5, 6, device=DEVICE), torch.zeros(6, device=DEVICE)
    for message, call in {
        r"x \[5, 8\].*indices \[4, 2\]": lambda: moe.moe_experts(x, indices[:4], weights, gate_up, down),
        r"gate_up .* must be \[E, 2 \* I, 8\]": lambda: moe.moe_experts(x, indices, weights, gate_up[:, :4], down),
        "one dtype": lambda: moe.moe_experts(x.half(), indices, weights, gate_up, down),
        "must be int64": lambda: moe.moe_experts(x, indices.int(), weights, gate_up, down),
        "weights is torch.float64": lambda: moe.moe_experts(x, indices, weights.double(), gate_up, down),
        "down is on meta": lambda: moe.moe_experts(x, indices, weights, gate_up, down.to("meta")),
        "top_k=7": lambda: moe.moe_route(logits, bias, 7),
        "do not form": lambda: moe.moe_route(logits, bias, 1, num_groups=4),
        r"bias \[5\]": lambda: moe.moe_route(logits, bias[:5], 1),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_custom_ops_can_be_traced():
    """Fake results agree with the real ones, and torch.compile sees one graph with its gradients."""
    x, indices, weights, gate_up, down = _draw(7, 16, 8, 3, 2)
    leaves = [t.requires_grad_() for t in (x, torch.randn(16, 3, device=DEVICE), gate_up, down)]
    for keep in (True, False):
        arguments = (x, indices, weights, gate_up, down, torch.float32, keep)
        torch.library.opcheck(torch.ops.kimi_mm.moe_experts.default, arguments, test_utils="test_faketensor")

    def layer(x, router, gate_up, down):
        indices, weights = moe.moe_route(x @ router, torch.zeros(3, device=DEVICE), 2)
        return moe.moe_experts(x, indices, weights, gate_up, down).square().sum()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    want = torch.autograd.grad(layer(*leaves), leaves)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), want, strict=True):
        torch.testing.assert_close(a, b)
