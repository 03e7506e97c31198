"""Eyes: what rows are compared with, their lengths, and learning it without the backbone."""

import math

import pytest
import torch
import torch.nn.functional as F

from kimi_mm.checkpoint import load_checkpoint
from kimi_mm.config import ConfigError
from kimi_mm.layout import IGNORE
from kimi_mm.training.run import train
from kimi_mm.training.vision_objective import length_loss, order_loss, shown_loss


def test_shown_is_the_entropy_of_ids_with_rare_ones_as_heavy_as_their_root():
    """Four rows begin with id 1, one with id 2, one shows nothing: the fifth weighs half as much as the four."""
    torch.manual_seed(0)
    rows = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    words = torch.randn(5, 8, dtype=torch.float64)
    shown = torch.tensor([[1, IGNORE]] * 4 + [[2, 3], [IGNORE, IGNORE]])
    got = shown_loss(rows, words, torch.tensor(10.0), shown)
    logs = (10 * F.normalize(rows, dim=-1) @ F.normalize(words, dim=-1).T).log_softmax(-1)
    losses = [-logs[n, 1] for n in range(4)] + [-(logs[4, 2] + logs[4, 3]) / 2]
    want = (sum(losses[:4]) / 2 + losses[4]) / (4 / 2 + 1)
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(got, rows)
    assert gradient[:5].abs().amax(1).min() > 0
    assert gradient[5].abs().max() == 0  # outside of the picture


def test_order_is_asked_of_rows_that_show_several():
    torch.manual_seed(0)
    rows, words, places = torch.randn(3, 8), torch.randn(5, 8), torch.randn(3, 8, 8)
    shown = torch.tensor([[4, 0, 2], [1, IGNORE, IGNORE], [3, 1, IGNORE]])
    got = order_loss(rows, places, words, torch.tensor(7.0), shown)
    losses = []
    for row, place, id in ((0, 0, 4), (0, 1, 0), (0, 2, 2), (2, 0, 3), (2, 1, 1)):
        turned = F.normalize(places[place] @ rows[row], dim=0)
        losses.append(-(7 * F.normalize(words, dim=-1) @ turned).log_softmax(0)[id])
    torch.testing.assert_close(got, sum(losses) / 5)
    assert order_loss(rows, places, words, torch.tensor(7.0), shown.flip(0)) != got


def test_nothing_shown_costs_nothing():
    rows, words, none = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4), torch.full((3, 2), IGNORE)
    losses = [
        shown_loss(rows, words, torch.tensor(10.0), none),
        order_loss(rows, torch.randn(2, 4, 4), words, torch.tensor(10.0), none),
    ]
    assert losses == [0, 0]
    sum(losses).backward()
    assert rows.grad.isfinite().all()


def test_lengths_off_by_e_cost_one():
    words = torch.tensor([[2.0, 0.0], [0.0, 4.0]])  # 3 on average
    rows = torch.tensor([[3.0 * math.e, 0.0], [0.0, 3.0 / math.e], [3.0, 0.0], [0.0, 0.0]])
    assert length_loss(rows[:3], words) == pytest.approx(2 / 3, rel=1e-5)
    assert length_loss(rows, words).isfinite()


def test_eyes_learn_what_rows_show_and_the_rest_stays(tmp_path):
    """A frozen backbone that is not even run; the same pictures must be told apart better after some steps."""
    overrides = ["steps=30", "save_every=30", "optim.warmup_steps=5", "weights=fp32", "cuda_graphs=false"]
    first = train("vision/nano", debug=True, output=tmp_path / "short", overrides=[*overrides, "stop_after=1"])
    last = train("vision/nano", debug=True, output=tmp_path / "long", overrides=overrides)
    assert "answers" not in last
    assert last["shown"] < 0.8 * first["shown"]
    assert last["length"] < 1.0
    before, _ = load_checkpoint(tmp_path / "short" / "model")
    after, _ = load_checkpoint(tmp_path / "long" / "model")
    moved = {
        name.partition(".")[0]
        for name, tensor in after.state_dict().items()
        if not torch.equal(tensor, before.state_dict()[name])
    }
    assert moved == {"vision"}


def test_pictures_need_something_to_learn_by(tmp_path):
    overrides = ["answers_weight=0", "shown_weight=0"]
    with pytest.raises(ConfigError, match="one of them above 0"):
        train("vision/nano", debug=True, output=tmp_path, overrides=overrides)
