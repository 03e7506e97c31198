"""Paths and solvers of flow matching, on flows whose solution is known."""

import itertools
import math

import pytest
import torch

from kimi_mm.audio.flow import flow_path, integrate, time_grid
from kimi_mm.errors import UserError


def decay(x: torch.Tensor, time: float) -> torch.Tensor:
    """dx/dt = -2 t x^2, so that x(1) = x(0) / (1 + x(0))."""
    return -2 * time * x.square()


def error(steps: int, solver: str, grid: str = "linear") -> float:
    start = torch.tensor([1.0, 3.0], dtype=torch.float64)
    end = integrate(decay, start, time_grid(steps, grid), solver)
    return float((end - start / (1 + start)).abs().max())


@pytest.mark.parametrize("grid", ["linear", "cosine"])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2)])
def test_solvers_converge_at_their_order(solver, order, grid):
    measured = math.log2(error(64, solver, grid) / error(128, solver, grid))
    assert abs(measured - order) < 0.1


def test_a_straight_path_is_followed_exactly_in_one_step():
    noise, data = torch.randn(3, 4), torch.randn(3, 4)
    at, velocity = flow_path(data, noise, torch.zeros(3, 1), 1e-4)
    assert torch.equal(at, noise)
    for steps in (1, 7):
        end = integrate(lambda x, t: velocity, noise, time_grid(steps))
        assert torch.allclose(end, data + 1e-4 * noise, atol=1e-6)


def test_velocity_is_the_slope_of_the_path():
    noise, data = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    a, velocity = flow_path(data, noise, torch.tensor(0.3, dtype=torch.float64), 1e-2)
    b, _ = flow_path(data, noise, torch.tensor(0.4, dtype=torch.float64), 1e-2)
    assert torch.allclose((b - a) / 0.1, velocity)


def test_grids():
    assert time_grid(29)[:3] == [0.0, 1 / 29, 2 / 29]
    cosine = time_grid(6, "cosine")
    steps = [b - a for a, b in itertools.pairwise(cosine)]
    assert (cosine[0], cosine[-1], len(cosine)) == (0.0, 1.0, 7)
    assert steps == sorted(steps)


def test_bad_settings_are_named():
    with pytest.raises(UserError, match="steps=0"):
        time_grid(0)
    with pytest.raises(UserError, match="time_grid='sine'"):
        time_grid(4, "sine")
    with pytest.raises(UserError, match="solver='heun'"):
        integrate(decay, torch.ones(1), [0.0, 1.0], "heun")
