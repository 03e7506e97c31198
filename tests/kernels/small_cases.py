"""Comparison of a small kernel with its float64 reference: outputs, and the gradient of every float input."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Relative RMS error allowed, by the coarsest dtype among the inputs: outputs, then gradients.
LIMITS = {torch.float32: (1e-5, 2e-5), torch.float16: (5e-3, 1e-2), torch.bfloat16: (5e-3, 1e-2)}


def draw(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers on the test device, the same on every device."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(DEVICE, dtype)


def relative_rms(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def compare(kernel, reference, inputs: list, *, limits: tuple[float, float] | None = None, check_dtype=True, **options):
    """Runs both on the same numbers, the reference in float64, and asserts that outputs and gradients agree.

    `inputs` may hold tensors, lists of tensors, and anything else; results that are None must be None in both.
    """
    flat = [t for x in inputs for t in (x if isinstance(x, (list, tuple)) else [x])]
    tensors = [t for t in flat if isinstance(t, Tensor) and t.is_floating_point()]
    low = [t.detach().clone().requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in low]
    outs, wants = _run(kernel, inputs, low, options), _run(reference, inputs, exact, options)
    coarse = max((t.dtype for t in tensors), key=lambda d: torch.finfo(d).eps)
    output_limit, gradient_limit = limits or LIMITS[coarse]
    loss, want_loss = 0.0, 0.0
    for place, (out, want) in enumerate(zip(outs, wants, strict=True)):
        if want is None:
            assert out is None
            continue
        assert out.shape == want.shape
        error = relative_rms(out, want)
        assert error < output_limit, f"output {place}: {error}"
        upstream = torch.randn_like(want).to(out.dtype)
        loss = loss + (out * upstream).sum()
        want_loss = want_loss + (want * upstream.double()).sum()
    got = torch.autograd.grad(loss, low, allow_unused=True)
    true = torch.autograd.grad(want_loss, exact, allow_unused=True)
    for place, (leaf, a, b) in enumerate(zip(low, got, true, strict=True)):
        a = torch.zeros_like(leaf) if a is None else a
        b = torch.zeros_like(leaf, dtype=torch.float64) if b is None else b
        assert a.dtype == leaf.dtype
        assert a.shape == b.shape
        error = relative_rms(a, b)
        assert error < gradient_limit or float((a.double() - b).abs().max()) < 1e-6, f"gradient {place}: {error}"


def _run(function, inputs, leaves, options):
    leaves = iter(leaves)
    swap = lambda x: next(leaves) if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
    result = function(*([swap(t) for t in x] if isinstance(x, (list, tuple)) else swap(x) for x in inputs), **options)
    return result if isinstance(result, tuple) else (result,)
