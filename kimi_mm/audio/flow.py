"""Conditional flow matching: the straight path from noise to data, and solvers that follow a learnt velocity.

    noise x_0 ──── x_t = t x_1 + (1 - (1 - s) t) x_0 ────► data x_1        dx/dt = x_1 - (1 - s) x_0

Lipman et al., "Flow Matching for Generative Modeling" (2023), section 4.1, with s = `sigma_min`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch

from kimi_mm.errors import UserError

Velocity = Callable[[torch.Tensor, float], torch.Tensor]


def flow_path(
    data: torch.Tensor, noise: torch.Tensor, time: torch.Tensor, sigma_min: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the point x_t of the path and its velocity.

    Args:
        data: x_1, any shape.
        noise: x_0, of the same shape.
        time: t in [0, 1], broadcast against `data`.
        sigma_min: s, the noise left at t = 1.
    """
    return time * data + (1 - (1 - sigma_min) * time) * noise, data - (1 - sigma_min) * noise


def time_grid(steps: int, kind: str = "linear") -> list[float]:
    """Returns `steps` + 1 times from 0 to 1: evenly spaced, or 1 - cos(pi u / 2), small steps near the noise.

    Raises:
        UserError: when `steps` is not positive or the kind is unknown.
    """
    if steps < 1:
        raise UserError(f"steps={steps} must be at least 1.")
    even = [k / steps for k in range(steps + 1)]
    if kind == "linear":
        return even
    if kind != "cosine":
        raise UserError(f"time_grid='{kind}' must be linear or cosine.")
    return [1 - math.cos(math.pi / 2 * u) for u in even[:-1]] + [1.0]


def draw_times(shape: tuple[int, ...], kind: str, device: torch.device) -> torch.Tensor:
    """Draws times in [0, 1) for training: as many, on average, in each step of the `time_grid` of that kind."""
    even = torch.rand(shape, device=device)
    return 1 - torch.cos(math.pi / 2 * even) if kind == "cosine" else even


def integrate(velocity: Velocity, x: torch.Tensor, times: Sequence[float], solver: str = "euler") -> torch.Tensor:
    """Follows dx/dt = velocity(x, t) from `times[0]` to `times[-1]`.

    Args:
        velocity: called once a step ("euler", first order) or twice ("midpoint", second order).
        x: the start; any shape.
        times: ascending; one step between each pair of neighbours.
        solver: "euler" or "midpoint".

    Returns:
        x at the last time.
    """
    if solver not in ("euler", "midpoint"):
        raise UserError(f"solver='{solver}' must be euler or midpoint.")
    for start, end in itertools.pairwise(times):
        step = end - start
        slope = velocity(x, start)
        if solver == "midpoint":
            slope = velocity(x + step / 2 * slope, start + step / 2)
        x = x + step * slope
    return x
