"""Replayed functions give what the function gives, and leave the run's random numbers where they were."""

import pytest
import torch

from kimi_mm.training.graphs import Replayed


def double(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return 2 * x, x + torch.rand_like(x)


def test_disabled_calls_the_function_without_gradients():
    x = torch.ones(3, requires_grad=True)
    doubled, _ = Replayed(double, False)(x)
    assert torch.equal(doubled, torch.full((3,), 2.0))
    assert not doubled.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replays_follow_their_inputs_and_draw_anew():
    run = Replayed(double, True)
    torch.cuda.manual_seed(0)
    before = torch.cuda.get_rng_state()
    noises = []
    for value in (1.0, 2.0, 3.0):
        x = torch.full((1000,), value, device="cuda")
        doubled, noisy = run(x)
        assert torch.equal(doubled, 2 * x)
        noises.append((noisy - x).clone())
    assert not torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[1], noises[2])
    assert all(float(n.min()) >= 0 and float(n.max()) <= 1.0001 for n in noises)
    # A second capture from the same state of the generator draws the same numbers.
    torch.cuda.set_rng_state(before)
    again = Replayed(double, True)(torch.full((1000,), 1.0, device="cuda"))[1] - 1.0
    assert torch.equal(again, noises[0])
