"""KDA's chunk kernels on a GPU against the float64 reference: shapes, gates, extremes, packing, capture, compile."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from kimi_mm.kernels.kda import reference
from kimi_mm.kernels.kda.triton import chunk_kda
from tests.kernels.kda_cases import assert_close, compare, make_inputs, poisoned_memory, relative_rms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FUSED = {"qk_l2norm": True, "beta_sigmoid": True}
SHAPES = [
    (1, 64, 1, 1, 64, 64),
    (2, 512, 3, 3, 60, 60),
    (3, 1000, 4, 4, 100, 100),
    (4, 1024, 4, 4, 128, 128),
    (2, 512, 2, 4, 60, 60),
    (2, 1024, 2, 8, 128, 128),
    (2, 333, 5, 5, 64, 64),
    (2, 200, 2, 2, 128, 64),
    (1, 300, 2, 2, 32, 128),
    (1, 130, 1, 1, 256, 200),
    (1, 17, 2, 2, 16, 16),
]


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    with poisoned_memory():
        yield


@pytest.mark.parametrize("gate", ["bounded", "softplus"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape, gate, dtype):
    x = make_inputs(*shape, gate=gate, spread=1.0)
    assert_close(compare(chunk_kda, x, dtype, gate=gate, **FUSED), dtype)


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_given_gate(spread, scale, lower_bound):
    x = make_inputs(2, 500, 2, 2, 64, 64, gate="given", prepared=True, spread=spread)
    errors = compare(chunk_kda, x, torch.bfloat16, other=torch.float32, lower_bound=lower_bound, scale=scale)
    assert_close(errors, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gate", ["bounded", "softplus"])
def test_packed_sequences(gate, dtype):
    sizes = [5, 0, 130, 1, 64, 63, 0, 17, 300, 128, 1, 1]
    x = make_inputs(1, sum(sizes), 2, 4, 64, 96, sequences=len(sizes), gate=gate)
    cu_seqlens = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], device="cuda")
    errors = compare(chunk_kda, x, dtype, gate=gate, cu_seqlens=cu_seqlens, **FUSED)
    assert_close(errors, dtype)


def test_many_packed_sequences():
    """More sequences than one block of the table, most of them shorter than a chunk."""
    sizes = torch.randint(0, 9, (700,), generator=torch.Generator().manual_seed(0))
    x = make_inputs(1, int(sizes.sum()), 1, 1, 32, 32, sequences=700)
    cu_seqlens = F.pad(sizes.cumsum(0), (1, 0)).cuda()
    errors = compare(chunk_kda, x, torch.bfloat16, gate="bounded", cu_seqlens=cu_seqlens, **FUSED)
    assert_close(errors, torch.bfloat16)


def test_lengths():
    x = make_inputs(4, 300, 2, 2, 64, 64)
    lengths = torch.tensor([300, 0, 129, 64], device="cuda")
    errors = compare(chunk_kda, x, torch.bfloat16, gate="bounded", lengths=lengths, **FUSED)
    assert_close(errors, torch.bfloat16)


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gate_extremes(bounded, dtype):
    """Long stretches at exp(-5) a step, channels without decay, beta of 0 and 1."""
    x = make_inputs(1, 500, 1, 2, 64, 64, gate="given", prepared=True)
    x["g"] = torch.full_like(x["g"], -5.0)
    x["g"][:, :, 0, :8] = 0.0
    x["g"][:, 200:300] = 0.0
    x["beta"] = torch.ones_like(x["beta"])
    x["beta"][:, ::3] = 0.0
    errors = compare(chunk_kda, x, dtype, other=torch.float32, lower_bound=-5.0 if bounded else None)
    for name, error in errors.items():
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-4), (name, errors)


def test_unbounded_gate_beyond_fp32_range():
    x = make_inputs(1, 300, 1, 1, 64, 64, spread=10.0, gate="softplus")
    x["A_log"] = torch.full_like(x["A_log"], 2.7726)
    errors = compare(chunk_kda, x, torch.bfloat16, other=torch.float32, gate="softplus", **FUSED)
    assert errors["o"] < 5e-3
    assert all(error < 0.1 for error in errors.values()), errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_identical_consecutive_keys(dtype):
    """beta = 1 without decay on one repeated key is the worst case for the triangular inverse."""
    x = make_inputs(1, 256, 1, 1, 64, 64, gate="given", prepared=True)
    x["k"] = x["k"][:, :1].expand_as(x["k"]).contiguous()
    x["g"], x["beta"] = torch.zeros_like(x["g"]), torch.ones_like(x["beta"])
    errors = compare(chunk_kda, x, dtype)
    assert errors["o"] < (2e-2 if dtype == torch.bfloat16 else 1e-4), errors


@pytest.mark.parametrize("cut", [1, 13, 64, 77, 199])
def test_split_prefill_equals_whole(cut):
    x = {n: t.float() for n, t in make_inputs(2, 200, 1, 2, 64, 64).items()}
    state = x.pop("initial_state")
    constants = {name: x.pop(name) for name in ("A_log", "dt_bias")}
    options = {"gate": "bounded", "output_final_state": True, **FUSED}
    whole, final = chunk_kda(**x, **constants, initial_state=state, **options)
    parts = []
    for piece in (slice(0, cut), slice(cut, 200)):
        cut_x = {name: tensor[:, piece] for name, tensor in x.items()}
        out, state = chunk_kda(**cut_x, **constants, initial_state=state, **options)
        parts.append(out)
    assert relative_rms(torch.cat(parts, 1), whole) < 1e-5
    assert relative_rms(state, final) < 1e-5


@pytest.mark.parametrize("keep", [True, False])
def test_training_step_as_a_cuda_graph(keep, monkeypatch):
    """Under bf16 autocast, as the layer calls it: replays give what eager gives, on other numbers too."""
    if not keep:
        monkeypatch.setattr("kimi_mm.kernels.kda.triton.KEEP_BYTES", 0)
    B, T, H, D = 4, 200, 2, 64

    class Layer(torch.nn.Module):  # capturing a plain function would lose the gradients of what it closes over
        def __init__(self):
            super().__init__()
            self.A_log, self.dt_bias = (torch.nn.Parameter(torch.zeros(n, device="cuda")) for n in (H, H * D))

        def forward(self, x):
            with torch.autocast("cuda", torch.bfloat16):
                q, k, v, g = (y.view(B, T, H, D) for y in x[..., :-H].bfloat16().split(H * D, -1))
                options = {"gate": "bounded", "A_log": self.A_log, "dt_bias": self.dt_bias, **FUSED}
                return chunk_kda(q, k, v, g.float(), x[..., -H:], **options)[0].float()

    def gradients(layer, x):
        loss = layer(x).square().sum()
        return torch.autograd.grad(loss, [x, layer.A_log, layer.dt_bias])

    sample = torch.randn(B, T, 4 * H * D + H, device="cuda", requires_grad=True)
    captured, eager = torch.cuda.make_graphed_callables(Layer(), (sample,)), Layer()
    for seed in range(2):
        x = torch.randn(sample.shape, generator=torch.Generator().manual_seed(seed)).cuda().requires_grad_()
        for got, want in zip(gradients(captured, x), gradients(eager, x), strict=True):
            assert torch.equal(got, want)


def test_compiles_whole_and_keeps_the_rules_of_operators():
    x = {n: t.float().requires_grad_() for n, t in make_inputs(1, 70, 1, 1, 32, 32).items()}
    options = {"gate": "bounded", "output_final_state": True, **FUSED}

    def loss(**tensors):
        out, state = chunk_kda(**tensors, **options)
        return out.square().sum() + state.sum()

    want = torch.autograd.grad(loss(**x), list(x.values()))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(**x), list(x.values()))
    for a, b in zip(got, want, strict=True):
        assert relative_rms(a, b) < 1e-5
    nowhere = (None, None)
    settings = ("bounded", True, -5.0, 0.2, True, True, True, 0, True)
    torch.library.opcheck(torch.ops.kimi_mm.chunk_kda.default, (*x.values(), *nowhere, *settings))


@pytest.mark.parametrize("parts", [2, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_parts_side_by_side(parts, dtype, monkeypatch):
    monkeypatch.setattr("kimi_mm.kernels.kda.chunk_configs.PARTS", parts)
    x = make_inputs(2, 700, 1, 2, 64, 96, spread=1.0)
    assert_close(compare(chunk_kda, x, dtype, gate="bounded", **FUSED), dtype)
    sizes = [5, 0, 300, 1, 64, 200]
    x = make_inputs(1, sum(sizes), 1, 2, 128, 128, sequences=len(sizes))
    cu_seqlens = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], device="cuda")
    assert_close(compare(chunk_kda, x, dtype, gate="bounded", cu_seqlens=cu_seqlens, **FUSED), dtype)


@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_chunk_sizes(rows, dtype):
    x = make_inputs(2, 300, 2, 2, 128, 128, spread=1.0)
    assert_close(compare(chunk_kda, x, dtype, gate="bounded", chunk_size=rows, **FUSED), dtype)


def test_long_sequence_of_one_head():
    """Long enough that `chunk_kda` cuts it into parts by itself."""
    x = make_inputs(1, 6000, 1, 1, 64, 64, spread=1.0)
    assert_close(compare(chunk_kda, x, torch.bfloat16, gate="bounded", **FUSED), torch.bfloat16)


def test_long_sequence_against_the_fp32_reference():
    x = {n: t.bfloat16() for n, t in make_inputs(1, 8192, 2, 2, 128, 128, spread=1.0).items()}
    with torch.no_grad():
        out, state = chunk_kda(**x, gate="bounded", output_final_state=True, **FUSED)
        exact = {n: t.float() for n, t in x.items()}
        want, want_state = reference.chunk_kda(**exact, gate="bounded", output_final_state=True, **FUSED)
    assert relative_rms(out, want) < 5e-3
    assert relative_rms(state, want_state) < 5e-3
