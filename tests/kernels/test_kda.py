"""KDA's chunk form and decode step against the literal recurrence, in float64, with every gradient."""

import pytest
import torch
from torch import Tensor

from kimi_mm.kernels import chunk_kda, kda_step
from kimi_mm.kernels.kda.reference import kda_gate

EXACT = 1e-12
OPTIONS = {"qk_l2norm": True, "beta_sigmoid": True, "output_final_state": True}


def recurrent_kda(q, k, v, g, beta, scale, state=None) -> tuple[Tensor, Tensor]:
    """Kimi Linear, equation 1, row by row. q, k [B,T,H,K]; v [B,T,HV,V]; g <= 0; returns o and S [B,HV,V,K]."""
    B, T, HV, V = v.shape
    repeat = HV // q.shape[2]
    q, k = q.repeat_interleave(repeat, 2), k.repeat_interleave(repeat, 2)
    S = torch.zeros(B, HV, k.shape[-1], V, dtype=v.dtype) if state is None else state.transpose(-1, -2)
    rows = []
    for t in range(T):
        S = g[:, t].exp()[..., None] * S
        remembered = torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - remembered))
        rows.append(torch.einsum("bhkv,bhk->bhv", S, scale * q[:, t]))
    out = torch.stack(rows, 1) if rows else v.clone()
    return out, S.transpose(-1, -2)


def relative_rms(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def _inputs(B, T, H, HV, K, V, spread=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(T * K + V)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    return {
        "q": draw(B, T, H, K),
        "k": draw(B, T, H, K),
        "v": draw(B, T, HV, V),
        "g": draw(B, T, HV, K) * spread,
        "beta": draw(B, T, HV) * 2.0,
        "A_log": draw(HV) * 0.5,
        "dt_bias": draw(HV * K),
        "initial_state": draw(B, HV, V, K),
    }


def _unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def _oracle(x, gate, lower=-5.0):
    HV, K = x["g"].shape[2:]
    z = x["g"] + x["dt_bias"].view(HV, K)
    rate = x["A_log"].exp()[:, None]
    g = lower * torch.sigmoid(rate * z) if gate == "bounded" else -rate * torch.nn.functional.softplus(z)
    q, k = _unit(x["q"]), _unit(x["k"])
    return recurrent_kda(q, k, x["v"], g, x["beta"].sigmoid(), K**-0.5, x["initial_state"])


@pytest.mark.parametrize("gate", ["bounded", "softplus"])
@pytest.mark.parametrize(
    "shape",
    [(2, 70, 2, 4, 24, 40), (1, 130, 1, 1, 16, 8), (2, 33, 2, 2, 8, 8), (3, 1, 1, 2, 8, 12), (1, 15, 1, 1, 60, 20)],
    ids=str,
)
def test_output_and_gradients(shape, gate):
    x = {name: tensor.requires_grad_() for name, tensor in _inputs(*shape).items()}
    out, state = chunk_kda(**x, gate=gate, **OPTIONS)
    want_out, want_state = _oracle(x, gate)
    assert relative_rms(out.detach(), want_out.detach()) < EXACT
    assert relative_rms(state.detach(), want_state.detach()) < EXACT
    weight, state_weight = torch.randn_like(out), torch.randn_like(state)
    got = torch.autograd.grad((out * weight).sum() + (state * state_weight).sum(), list(x.values()))
    want = torch.autograd.grad((want_out * weight).sum() + (want_state * state_weight).sum(), list(x.values()))
    for name, a, b in zip(x, got, want, strict=True):
        assert relative_rms(a, b) < 1e-11, name


@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_chunk_size_and_dtype_do_not_matter(chunk_size):
    x = _inputs(2, 100, 2, 2, 32, 16)
    want = _oracle(x, "bounded")
    single = {name: tensor.float() for name, tensor in x.items()}
    got = chunk_kda(**single, gate="bounded", chunk_size=chunk_size, **OPTIONS)
    assert got[0].dtype == torch.float32
    assert relative_rms(got[0], want[0]) < 3e-6
    assert relative_rms(got[1], want[1]) < 3e-6
    half = {name: tensor.bfloat16() for name, tensor in x.items()}
    out, state = chunk_kda(**half, gate="bounded", chunk_size=chunk_size, **OPTIONS)
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    exact_half = _oracle({name: tensor.double() for name, tensor in half.items()}, "bounded")
    assert relative_rms(out, exact_half[0]) < 5e-3


@pytest.mark.parametrize("bounded", [True, False])
def test_gate_extremes(bounded):
    """Whole stretches at exp(-5) a step underflow to zero quietly; channels without decay keep everything."""
    x = _inputs(1, 100, 1, 2, 16, 16)
    g = torch.full_like(x["g"], -5.0)
    g[:, :, 0, :8] = 0.0
    g[:, 40:45] = 0.0
    beta = torch.full_like(x["beta"], 1.0)
    beta[:, ::3] = 0.0
    q, k = _unit(x["q"]), _unit(x["k"])
    want, want_state = recurrent_kda(q, k, x["v"], g, beta, 0.25)
    inputs = [t.float().requires_grad_() for t in (q, k, x["v"], g, beta)]
    out, state = chunk_kda(*inputs, scale=0.25, lower_bound=-5.0 if bounded else None, output_final_state=True)
    assert relative_rms(out.detach(), want) < 3e-6
    assert relative_rms(state.detach(), want_state) < 3e-6
    (out.sum() + state.sum()).backward()
    assert all(torch.isfinite(t.grad).all() for t in inputs)


def test_unbounded_gate_beyond_fp32_range():
    """exp(A) = 16 with large logits: the decay over a few rows leaves fp32's range, the result does not."""
    x = _inputs(1, 80, 1, 1, 16, 16, spread=10.0)
    x["A_log"] = torch.full_like(x["A_log"], 2.7726)
    want = _oracle(x, "softplus")
    single = {name: tensor.float().requires_grad_() for name, tensor in x.items()}
    out, state = chunk_kda(**single, gate="softplus", **OPTIONS)
    assert relative_rms(out.detach(), want[0]) < 1e-4  # running sums near -5000 hold four digits after the point
    (out.sum() + state.sum()).backward()
    assert all(torch.isfinite(t.grad).all() for t in single.values())


def test_identical_consecutive_keys():
    """beta = 1 without decay on one repeated key is the worst case for the triangular inverse."""
    x = _inputs(1, 128, 1, 1, 16, 16)
    key = _unit(x["k"][:, :1]).expand(1, 128, 1, 16)
    g, beta = torch.zeros_like(x["g"]), torch.ones_like(x["beta"])
    want, _ = recurrent_kda(key, key, x["v"], g, beta, 1.0)
    out, _ = chunk_kda(key.float(), key.float(), x["v"].float(), g.float(), beta.float(), scale=1.0)
    assert relative_rms(out, want) < 3e-6


@pytest.mark.parametrize("cut", [1, 13, 64, 77, 99])
def test_split_prefill_equals_whole(cut):
    x = _inputs(2, 100, 1, 2, 16, 24)
    state = x.pop("initial_state")
    constants = {name: x.pop(name) for name in ("A_log", "dt_bias")}
    whole, final = chunk_kda(**x, **constants, gate="bounded", initial_state=state, **OPTIONS)
    parts = []
    for piece in (slice(0, cut), slice(cut, 100)):
        cut_x = {name: tensor[:, piece] for name, tensor in x.items()}
        out, state = chunk_kda(**cut_x, **constants, gate="bounded", initial_state=state, **OPTIONS)
        parts.append(out)
    assert relative_rms(torch.cat(parts, 1), whole) < EXACT
    assert relative_rms(state, final) < EXACT


@pytest.mark.parametrize("gate", ["bounded", "softplus"])
def test_packed_equals_alone(gate):
    """Ragged, empty and one-row sequences, with states and gradients."""
    sizes = [5, 0, 130, 1, 64, 0, 17]
    x = _inputs(1, sum(sizes), 1, 2, 16, 24)
    x["initial_state"] = torch.randn(len(sizes), 2, 24, 16, dtype=torch.float64)
    for tensor in x.values():
        tensor.requires_grad_()
    cu_seqlens = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    out, state = chunk_kda(**x, gate=gate, cu_seqlens=cu_seqlens, **OPTIONS)
    outs, states = [], []
    for n, size in enumerate(sizes):
        rows = slice(int(cu_seqlens[n]), int(cu_seqlens[n + 1]))
        alone = {name: x[name][:, rows] for name in ("q", "k", "v", "g", "beta")}
        shared = {"A_log": x["A_log"], "dt_bias": x["dt_bias"], "initial_state": x["initial_state"][n : n + 1]}
        if size:
            one, final = _oracle(alone | shared, gate)
            outs.append(one)
        else:
            final = shared["initial_state"]
        states.append(final)
    want, want_state = torch.cat(outs, 1), torch.cat(states)
    assert relative_rms(out.detach(), want.detach()) < EXACT
    assert relative_rms(state.detach(), want_state.detach()) < EXACT
    weight, state_weight = torch.randn_like(out), torch.randn_like(state)
    got = torch.autograd.grad((out * weight).sum() + (state * state_weight).sum(), list(x.values()))
    true = torch.autograd.grad((want * weight).sum() + (want_state * state_weight).sum(), list(x.values()))
    for name, a, b in zip(x, got, true, strict=True):
        assert relative_rms(a, b) < 1e-11, name


def test_lengths_leave_the_state_alone():
    x = _inputs(3, 50, 1, 2, 16, 24)
    lengths = torch.tensor([50, 0, 21])
    out, state = chunk_kda(**x, gate="bounded", lengths=lengths, **OPTIONS)
    for b, length in enumerate(lengths.tolist()):
        alone = {n: t if n in ("A_log", "dt_bias") else t[b : b + 1] for n, t in x.items()}
        if length == 0:
            assert torch.equal(state[b], x["initial_state"][b])
            continue
        cut = {n: t[:, :length] if n in ("q", "k", "v", "g", "beta") else t for n, t in alone.items()}
        want, want_state = _oracle(cut, "bounded")
        assert relative_rms(out[b, :length], want[0]) < EXACT
        assert relative_rms(state[b], want_state[0]) < EXACT


@pytest.mark.parametrize("gate", ["bounded", "softplus", "given"])
@pytest.mark.parametrize("flags", [True, False])
def test_step_equals_recurrence(gate, flags):
    x = _inputs(2, 9, 2, 4, 16, 24)
    state = x.pop("initial_state")
    if gate == "given":
        x["g"] = -x["g"].abs()
    if not flags:
        x["q"], x["k"], x["beta"] = _unit(x["q"]), _unit(x["k"]), x["beta"].sigmoid()
    constants = {"A_log": x.pop("A_log"), "dt_bias": x.pop("dt_bias"), "gate": gate}
    constants |= {"qk_l2norm": flags, "beta_sigmoid": flags}
    want, final = chunk_kda(**x, **constants, initial_state=state, output_final_state=True)
    running = state.clone()
    for t in range(9):
        row = {name: tensor[:, t] for name, tensor in x.items()}
        out, returned = kda_step(*row.values(), running, **constants)
        assert returned is running
        assert relative_rms(out, want[:, t]) < EXACT
    assert relative_rms(running, final) < EXACT


def test_gate_without_parameters():
    z = torch.randn(3, 2, 4)
    assert torch.allclose(kda_gate(z, "bounded", None, None, -2.0), -2.0 * torch.sigmoid(z))
    assert torch.allclose(kda_gate(z, "softplus", None, None, None), -torch.nn.functional.softplus(z))


def test_bad_input_is_refused():
    x = _inputs(2, 5, 2, 2, 8, 8)
    x.pop("initial_state")
    with pytest.raises(ValueError, match="must be one of"):
        chunk_kda(**x, gate="swish")
    with pytest.raises(ValueError, match="lower_bound"):
        chunk_kda(**x, gate="bounded", lower_bound=-6.0)
    with pytest.raises(ValueError, match="batch size 1"):
        chunk_kda(**x, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="do not fit"):
        chunk_kda(**{**x, "v": x["v"][:, :4]})
    one = {n: t if n in ("A_log", "dt_bias") else t[:1] for n, t in x.items()}
    with pytest.raises(ValueError, match="must rise from 0 to 5"):
        chunk_kda(**one, gate="bounded", cu_seqlens=torch.tensor([0, 3]))
