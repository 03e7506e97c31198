"""Inputs for KDA's kernels and the comparison of a kernel with the float64 reference, every gradient included."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from kimi_mm.kernels.kda import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Relative RMS error allowed, by dtype of v: output and state, then the gradients. That of A_log is one number a head, a
# sum over all positions and channels: in bf16 up to 0.018 on a GPU over three seeds of three shapes, mean 0.008.
LIMITS = {
    torch.float32: {"o": 1e-5, "state": 1e-5, "gradient": 5e-5},
    torch.float16: {"o": 5e-3, "state": 5e-3, "gradient": 1e-2},
    torch.bfloat16: {"o": 5e-3, "state": 5e-3, "gradient": 1e-2, "A_log": 2e-2},
}


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh floating-point buffers hold NaN, so that whatever is read without having been written shows."""
    plain = torch.empty

    def empty(*size, **options):
        buffer = plain(*size, **options)
        return buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer

    with mock.patch.object(torch, "empty", empty):
        yield


def relative_rms(got: Tensor, want: Tensor) -> float:
    return float(
        (got.detach().double() - want.detach().double()).norm() / want.detach().double().norm().clamp_min(1e-30)
    )


def make_inputs(
    B: int,
    T: int,
    H: int,
    HV: int,
    K: int,
    V: int,
    *,
    sequences: int | None = None,
    gate: str = "bounded",
    prepared: bool = False,
    spread: float = 3.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Float64 arguments of `chunk_kda`; `prepared` gives unit keys and queries and betas in (0, 1)."""
    generator = torch.Generator().manual_seed(seed + T * K + V)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)  # noqa: E731
    x = {
        "q": draw(B, T, H, K),
        "k": draw(B, T, H, K),
        "v": draw(B, T, HV, V),
        "g": draw(B, T, HV, K) * spread,
        "beta": draw(B, T, HV) * 2.0,
        "A_log": draw(HV) * 0.5,
        "dt_bias": draw(HV * K),
        "initial_state": draw(sequences or B, HV, V, K),
    }
    if gate == "given":
        x["g"] = -x["g"].abs().clamp_max(4.5)
        del x["A_log"], x["dt_bias"]
    if prepared:
        x["q"], x["k"] = (torch.nn.functional.normalize(x[name], dim=-1) for name in "qk")
        x["beta"] = x["beta"].sigmoid()
    return x


def compare(kernel, x: dict[str, Tensor], dtype: torch.dtype, *, other: torch.dtype | None = None, **options) -> dict:
    """Runs `kernel` on `x` in `dtype` (v and q, k; the rest in `other`) and the reference on the same rounded numbers.

    Returns:
        Relative RMS error by name: o, state, and every input for its gradient.
    """
    options = {"output_final_state": True, **options}
    low = {n: t.to(dtype if n in "qkv" else other or dtype).requires_grad_() for n, t in x.items()}
    exact = {n: t.detach().double().requires_grad_() for n, t in low.items()}
    chunk_size = options.pop("chunk_size", None)
    out, state = kernel(**low, **options, chunk_size=chunk_size)
    want_out, want_state = reference.chunk_kda(**exact, **options)
    lengths = options.get("lengths")
    if lengths is not None:
        valid = (torch.arange(out.shape[1], device=out.device) < lengths.to(out.device)[:, None])[..., None, None]
        out, want_out = out * valid, want_out * valid
    assert out.dtype == low["v"].dtype
    assert state.dtype == torch.float32
    generator = torch.Generator().manual_seed(1)
    weight, state_weight = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device) for x in (want_out, want_state)
    )
    loss = (out * weight.to(out.dtype)).sum() + (state * state_weight.float()).sum()
    got = torch.autograd.grad(loss, list(low.values()))
    want_loss = (want_out * weight.to(out.dtype).double()).sum() + (want_state * state_weight).sum()
    want = torch.autograd.grad(want_loss, list(exact.values()))
    errors = {"o": relative_rms(out, want_out), "state": relative_rms(state, want_state)}
    true = {name: tensor.detach() for name, tensor in zip(low, want, strict=True)}
    found = dict(zip(low, got, strict=True))
    for name, a in found.items():
        assert a.dtype == low[name].dtype, name
        errors[name] = relative_rms(a, true[name])
    if "A_log" in true:  # sums whose terms cancel: held against the size of the terms
        heads, channels = exact["g"].shape[2:]
        logits = (exact["g"] + exact["dt_bias"].view(heads, channels)).detach()
        terms = (true["g"] * logits).norm()
        errors["A_log"] = float((found["A_log"].double() - true["A_log"]).norm() / terms)
        errors["dt_bias"] = float(
            (got[list(low).index("dt_bias")].double() - true["dt_bias"]).norm() / true["g"].norm()
        )
    return errors


def assert_close(errors: dict[str, float], dtype: torch.dtype) -> None:
    limits = LIMITS[dtype]
    for name, error in errors.items():
        assert error < limits.get(name, limits["gradient"]), (name, error, errors)
