"""KDA's chunk kernels at small sizes, in Triton's interpreter where there is no GPU, against the float64 reference."""

import pytest
import torch

pytest.importorskip("triton")

from kimi_mm.kernels.kda.triton import chunk_kda
from tests.kernels.kda_cases import DEVICE, assert_close, compare, make_inputs, poisoned_memory, relative_rms

FUSED = {"qk_l2norm": True, "beta_sigmoid": True}


@pytest.mark.parametrize("gate", ["bounded", "softplus", "given"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_state_and_gradients(gate, dtype):
    x = make_inputs(1, 70, 1, 1, 16, 24, gate=gate)
    errors = compare(chunk_kda, x, dtype, other=torch.float32, gate=gate, **FUSED)
    assert_close(errors, dtype)


@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_chunk_sizes_grouped_heads_and_odd_channels(chunk_size):
    x = make_inputs(2, 34, 1, 2, 12, 20, prepared=True)
    errors = compare(chunk_kda, x, torch.float32, gate="bounded", scale=0.3, chunk_size=chunk_size)
    assert_close(errors, torch.float32)


@pytest.mark.parametrize("T", [1, 17, 64])
def test_short_sequences(T):
    x = make_inputs(2, T, 1, 1, 16, 16, gate="softplus")
    assert_close(compare(chunk_kda, x, torch.float32, gate="softplus", **FUSED), torch.float32)


def test_lengths():
    x = make_inputs(3, 40, 1, 1, 16, 16)
    lengths = torch.tensor([40, 0, 21], device=DEVICE)
    assert_close(compare(chunk_kda, x, torch.float32, gate="bounded", lengths=lengths, **FUSED), torch.float32)
    x["v"][1:, 21:] = float("nan")
    x = {name: tensor.float() for name, tensor in x.items()}
    out, state = chunk_kda(**x, gate="bounded", lengths=lengths, output_final_state=True, **FUSED)
    assert torch.isfinite(out).all()
    assert torch.equal(state[1], x["initial_state"][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_packed_sequences(dtype):
    """Ragged, empty and one-row sequences; with every fresh buffer full of NaN."""
    sizes = [5, 0, 33, 1, 32, 0]
    x = make_inputs(1, sum(sizes), 1, 1, 16, 24, sequences=len(sizes))
    cu_seqlens = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], device=DEVICE, dtype=torch.int32)
    with poisoned_memory():
        errors = compare(chunk_kda, x, dtype, gate="bounded", cu_seqlens=cu_seqlens, chunk_size=32, **FUSED)
    assert_close(errors, dtype)


@pytest.mark.parametrize("packed", [False, True])
def test_parts_side_by_side(packed, monkeypatch):
    """Sequences cut into three parts, of which the last may be short or empty."""
    monkeypatch.setattr("kimi_mm.kernels.kda.chunk_configs.PARTS", 3)
    sizes = [70, 0, 20, 1] if packed else [70]
    x = make_inputs(1, sum(sizes), 1, 1, 16, 24, sequences=len(sizes))
    cu_seqlens = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], device=DEVICE) if packed else None
    with poisoned_memory():
        errors = compare(chunk_kda, x, torch.float32, gate="bounded", cu_seqlens=cu_seqlens, **FUSED)
    assert_close(errors, torch.float32)


def test_no_rows_at_all():
    x = {name: tensor.float().requires_grad_() for name, tensor in make_inputs(2, 0, 1, 1, 16, 16).items()}
    out, state = chunk_kda(**x, gate="bounded", output_final_state=True, **FUSED)
    assert out.shape == (2, 0, 1, 16)
    assert torch.equal(state, x["initial_state"])
    (grad,) = torch.autograd.grad(state.sum(), [x["initial_state"]])
    assert torch.equal(grad, torch.ones_like(grad))


def test_nothing_kept_gives_the_same_gradients(monkeypatch):
    x = make_inputs(1, 70, 1, 1, 16, 16)
    kept = compare(chunk_kda, x, torch.float32, gate="bounded", **FUSED)
    monkeypatch.setattr("kimi_mm.kernels.kda.triton.KEEP_BYTES", 0)
    again = compare(chunk_kda, x, torch.float32, gate="bounded", **FUSED)
    assert_close(kept, torch.float32)
    assert_close(again, torch.float32)


def test_views_of_one_projection():
    """q, k, v as slices of one row, as the layer passes them, cost no copy and change nothing."""
    T, H, D = 20, 2, 16
    packed = torch.randn(1, T, 3 * H * D, device=DEVICE)
    q, k, v = (x.view(1, T, H, D) for x in packed.split(H * D, -1))
    g, beta = -torch.rand(1, T, H, D, device=DEVICE), torch.rand(1, T, H, device=DEVICE)
    got, none = chunk_kda(q, k, v, g, beta, qk_l2norm=True)
    assert none is None
    want, _ = chunk_kda(q.clone(), k.clone(), v.clone(), g, beta, qk_l2norm=True)
    assert relative_rms(got, want) == 0.0


def test_bad_input_is_refused():
    x = {name: tensor.float() for name, tensor in make_inputs(2, 5, 2, 2, 8, 8).items()}
    for change, message in [
        ({"gate": "swish"}, "must be one of"),
        ({"gate": "bounded", "lower_bound": -6.0}, "lower_bound"),
        ({"v": x["v"][:, :4]}, "q is"),
        ({"v": x["v"][:, :, :1]}, "multiple of the 2 heads"),
        ({"g": x["g"].transpose(2, 3)[:, :, :4]}, "g is"),
        ({"k": x["k"].double()}, "k is torch.float64"),
        ({"chunk_size": 48}, "chunk_size"),
        ({"initial_state": x["initial_state"][:1]}, "initial_state is"),
        ({"lengths": torch.tensor([5])}, "lengths is"),
        ({"cu_seqlens": torch.tensor([0, 5]), "initial_state": None}, "batch size 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            chunk_kda(**{**x, **change})
