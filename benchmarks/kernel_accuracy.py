"""Errors of KDA's implementations against its recurrence in float64, on the same inputs.

S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t / sqrt(K)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_cases import kda_calls, kda_inputs


def kda_errors(device: str, shape: tuple[int, int, int, int, int], columns: list[str]) -> list[dict[str, Any]]:
    """Relative RMS errors of output, final state and all gradients, for both gates and every column.

    Args:
        shape: B, T, H, K, V.
        columns: implementations to compare; one that fails says why under "error".
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    lines = []
    for gate in ("bounded", "softplus"):
        x = {name: t.requires_grad_() for name, t in kda_inputs(device, *shape, dtype).items()}
        exact = {name: t.detach().double().requires_grad_() for name, t in x.items()}
        want = recurrence(exact, gate)
        torch.manual_seed(1)
        upstream = [torch.randn_like(t) for t in want]
        gradients = torch.autograd.grad(want, list(exact.values()), upstream)
        calls = kda_calls(x, gate, output_final_state=True)
        for column in columns:
            errors: dict[str, float] = {}
            problem = ""
            try:
                got = calls[column]()()
                assert isinstance(got, tuple)
                errors = {name: _error(a, b) for name, a, b in zip(("o", "state"), got, want, strict=True)}
                down = [u.to(t.dtype) for u, t in zip(upstream, got, strict=True)]
                found = torch.autograd.grad(got, list(x.values()), down)
                for name, a, b in zip(x, found, gradients, strict=True):
                    errors[f"d{name}"] = _error(a, b)
            except Exception as error:  # the other columns still count
                problem = f"{type(error).__name__}: {str(error).strip()[:120]}"
            title = "B{} T{} H{} K{} V{}".format(*shape)
            lines.append({"shape": title, "gate": gate, "column": column, "errors": errors, "error": problem})
    return lines


def recurrence(x: dict[str, Tensor], gate: str) -> tuple[Tensor, Tensor]:
    """KDA token by token. x: as `kda_inputs` gives them. Returns o [B, T, H, V] and the final state [B, H, V, K]."""
    B, T, H, K = x["q"].shape
    q, k = (F.normalize(x[name], dim=-1, eps=1e-6) for name in ("q", "k"))
    z, rate = x["g"] + x["dt_bias"].view(H, K), x["A_log"].exp()[:, None]
    g = -5.0 * torch.sigmoid(z * rate) if gate == "bounded" else -rate * F.softplus(z)
    decay, beta = g.exp(), x["beta"].sigmoid()
    state = x["v"].new_zeros(B, H, x["v"].shape[-1], K)
    out = []
    for t in range(T):
        state = state * decay[:, t, :, None]
        error = x["v"][:, t] - (state * k[:, t, :, None]).sum(-1)
        state = state + (beta[:, t, :, None] * error)[..., None] * k[:, t, :, None]
        out.append((state * q[:, t, :, None]).sum(-1))
    return torch.stack(out, 1) * K**-0.5, state


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm().clamp_min(1e-30))
