"""Attention over depth in Triton at small sizes against the float64 reference."""

import pytest
import torch

pytest.importorskip("triton")

from kimi_mm.kernels.attn_res import reference
from kimi_mm.kernels.attn_res import triton as kernels
from tests.kernels.small_cases import compare, draw, relative_rms

EPS, OUT_EPS = 1e-6, 1e-5
F32, BF16 = torch.float32, torch.bfloat16


def _sources(n, D, lead=(1, 3), dtype=F32, first=None, spread=0.0):
    """Sources of sizes from 10^-spread to 10^spread."""
    scales = 10.0 ** torch.linspace(-spread, spread, n)
    kinds = [first or dtype, *[dtype] * (n - 1)]
    return [draw(*lead, D, seed=i, scale=float(scales[i]), dtype=kind) for i, kind in enumerate(kinds)]


def _vectors(D, count=2):
    return [draw(D, seed=100 + i) for i in range(count)]


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "D"), [(1, 48), (2, 60), (7, 33), (3, 320)])
def test_mix(n, D, dtype):
    inputs = [_sources(n, D, dtype=dtype), *_vectors(D)]
    compare(kernels.attn_res_mix, reference.attn_res_mix, inputs, eps=EPS)


def test_mix_of_unlike_sources(monkeypatch):
    """Sizes from 1e-3 to 1e3, several tokens a program."""
    for config in ("forward", "backward"):
        monkeypatch.setitem(kernels.CONFIGS[config], "held", 128)
    inputs = [_sources(6, 40, lead=(7,), spread=3.0), *_vectors(40)]
    compare(kernels.attn_res_mix, reference.attn_res_mix, inputs, eps=EPS)


@pytest.mark.parametrize("dtypes", [(F32, BF16), (BF16, F32), (BF16, BF16)], ids=str)
def test_first_source_of_its_own_dtype(dtypes):
    first, dtype = dtypes
    inputs = [_sources(4, 48, dtype=dtype, first=first), *_vectors(48)]
    compare(kernels.attn_res_mix, reference.attn_res_mix, inputs, eps=EPS)
    mixed = [*inputs[0], inputs[0][0].half()]
    compare(kernels.attn_res_mix, reference.attn_res_mix, [mixed, *inputs[1:]], eps=EPS)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("n", "D"), [(1, 16), (4, 40)])
def test_mix_and_norm(n, D, dtype, monkeypatch):
    for config in ("forward", "backward_norm"):
        monkeypatch.setitem(kernels.CONFIGS[config], "held", 128)  # two programs share three tokens
    query, weight, out_weight = _vectors(D, 3)
    inputs = [_sources(n, D, dtype=dtype), query, weight]

    def with_weight(function):
        return lambda sources, query, weight, out_weight: function(sources, query, weight, EPS, out_weight, OUT_EPS)

    compare(with_weight(kernels.attn_res_mix_norm), with_weight(reference.attn_res_mix_norm), [*inputs, out_weight])


def test_zero_query_is_the_mean():
    sources = _sources(5, 32)
    out = kernels.attn_res_mix(sources, torch.zeros_like(sources[0][0, 0]), draw(32), EPS)
    torch.testing.assert_close(out, torch.stack(sources).mean(0))


def test_nothing_kept_gives_the_same():
    sources, vectors = _sources(3, 32), _vectors(32)
    with torch.no_grad():
        quiet = kernels.attn_res_mix(sources, *vectors, EPS)
    vectors[0].requires_grad_()
    assert torch.equal(kernels.attn_res_mix(sources, *vectors, EPS), quiet)


@pytest.mark.parametrize(("n", "S", "dtype"), [(1, 3, F32), (4, 4, BF16)])
def test_two_phases(n, S, dtype):
    D = 40
    sources, partial = _sources(n, D, dtype=dtype), draw(1, 3, D, seed=9, dtype=dtype)
    queries, weights, out_weight = draw(S, D, seed=20), draw(S, D, seed=21), draw(D, seed=22)
    begun = kernels.attn_res_begin(sources, queries, weights, EPS)
    exact = reference.attn_res_begin([s.double() for s in sources], queries.double(), weights.double(), EPS)
    for got, want in zip(begun, exact, strict=True):
        assert got.dtype == F32
        assert got.shape == want.shape
        assert relative_rms(got, want) < 1e-5
    for s, part in ((0, None), (S - 1, partial)):
        rest = [x[s] for x in begun]
        got = kernels.attn_res_finish(*rest, part, queries[s], weights[s], EPS)
        wide = None if part is None else part.double()
        finish = (*(x[s] for x in exact), wide, queries[s].double(), weights[s].double(), EPS)
        assert got.dtype == F32
        assert relative_rms(got, reference.attn_res_finish(*finish)) < 1e-5
        last = (queries[s], weights[s], EPS, out_weight, OUT_EPS)
        normed = kernels.attn_res_finish_norm(*rest, part, *last, dtype)
        assert normed.dtype == dtype
        want = reference.attn_res_finish_norm(*finish, out_weight.double(), OUT_EPS)
        assert relative_rms(normed, want) < (1e-5 if dtype == F32 else 5e-3)


def test_two_phases_keep_their_gradients():
    sources, queries, weights = _sources(2, 16), draw(2, 16).requires_grad_(), draw(2, 16, seed=1)
    mixed, peak, total = kernels.attn_res_begin(sources, queries, weights, EPS)
    out = kernels.attn_res_finish(mixed[1], peak[1], total[1], sources[0], queries[1], weights[1], EPS)
    (gradient,) = torch.autograd.grad(out.sum(), queries)
    assert gradient[1].abs().sum() > 0


def test_no_tokens():
    empty = [draw(0, 16) for _ in range(3)]
    query = draw(16).requires_grad_()
    out = kernels.attn_res_mix(empty, query, draw(16), EPS)
    assert out.shape == (0, 16)
    (gradient,) = torch.autograd.grad(out.sum(), query)
    assert not gradient.any()


def test_bad_input_is_refused():
    sources, (query, weight) = _sources(3, 16), _vectors(16)
    for arguments, message in [
        (([], query, weight), "at least one source"),
        (([*sources, sources[0][:, :2]], query, weight), r"sources\[3\] is"),
        (([*sources, sources[0].long()], query, weight), r"sources\[3\] is torch.int64"),
        ((sources, query[:4], weight), "query is"),
        ((sources, query, weight.double()), "norm_weight is torch.float64"),
        (([sources[0]] * 130, query, weight), "1 to 129"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernels.attn_res_mix(*arguments, EPS)
    with pytest.raises(ValueError, match="out_weight is"):
        kernels.attn_res_mix_norm(sources, query, weight, EPS, weight[:4], OUT_EPS)
    with pytest.raises(ValueError, match=r"queries is \[16\]"):
        kernels.attn_res_begin(sources, query, weight, EPS)
    begun = [x[0] for x in kernels.attn_res_begin(sources, query[None], weight[None], EPS)]
    with pytest.raises(ValueError, match="partial is"):
        kernels.attn_res_finish(*begun, sources[0][:, :1], query, weight, EPS)


def test_operators_are_well_formed():
    sources, vectors = _sources(2, 16), _vectors(16, 3)
    vectors[0].requires_grad_()
    arguments = (sources, *vectors[:2], EPS, vectors[2], OUT_EPS, True)
    for check in ("test_schema", "test_autograd_registration", "test_faketensor"):
        torch.library.opcheck(torch.ops.kimi_mm.attn_res_mix.default, arguments, test_utils=check)
