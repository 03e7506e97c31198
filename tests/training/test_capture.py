"""What training captures in CUDA graphs, looked at on a CPU.

It reads nothing back, takes no data of the host, and begins when no other autograd graph holds its parameters.
"""

from __future__ import annotations

import pytest
import torch

from kimi_mm.training.graphs import Graphed, Replayed
from kimi_mm.training.run import train
from kimi_mm.training.schedule import source_of_step
from kimi_mm.training.trainer import Trainer
from tests.training.capturable import Capturing, NotCapturable, in_live_graphs

X = torch.arange(6.0)
BAD = {
    "item": lambda: X.sum().item(),
    "if": lambda: 1 if X.sum() > 3 else 0,
    "list": lambda: X.tolist(),
    "float": lambda: float(X[0]),
    "mask": lambda: X[X > 2],
    "set by mask": lambda: X.clone().__setitem__(X > 2, 0.0),
    "nonzero": lambda: torch.nonzero(X),
    "where": lambda: torch.where(X > 2),
    "unique": lambda: torch.unique(X),
    "tensor": lambda: torch.tensor([1.0, 2.0], device=X.device),
    "as_tensor": lambda: torch.as_tensor([1.0], device=X.device),
    "new_tensor": lambda: X.new_tensor([1.0]),
    "numpy": lambda: torch.from_numpy(X.new_zeros(2).numpy()),
    "factory": lambda: torch.arange(6) + X,
    "repeats": lambda: X.repeat_interleave(X.long()),
    "cpu": lambda: X.cpu(),
    "to cpu": lambda: X.to("cpu"),
}
GOOD = {
    "index": lambda: X[X.long()],
    "fill": lambda: X.masked_fill(X > 2, 0.0),
    "choose": lambda: torch.where(X > 2, X, 0.0),
    "arange": lambda: torch.arange(6, device=X.device) + X,
    "repeat": lambda: X.repeat_interleave(2),
    "draw": lambda: torch.rand_like(X) + torch.rand(6, device=X.device),
    "cast": lambda: X.to(torch.bfloat16),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_captured_is_seen(name):
    with pytest.raises(NotCapturable), Capturing():
        BAD[name]()


@pytest.mark.parametrize("name", GOOD)
def test_what_can_be_captured_passes(name):
    with Capturing():
        GOOD[name]()


def test_graphs_that_hold_parameters_are_seen():
    layer = torch.nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert in_live_graphs(layer) == []
    loss = layer(torch.ones(3)).sum()
    loss.backward()
    assert in_live_graphs(layer) == ["weight"]
    loss = loss.detach()
    assert in_live_graphs(layer) == []


class _Watch:
    """Stands for both kinds of graphs: calls what they would capture as a capture would, and again to go on with."""

    def __init__(self, monkeypatch):
        self.captured, self.sources = set(), set()
        monkeypatch.setattr(Replayed, "__call__", lambda replayed, *inputs: self.replayed(replayed.function, *inputs))
        monkeypatch.setattr(Graphed, "__call__", lambda graphed, *inputs: self.graphed(graphed.module, *inputs))
        step = Trainer._one_step

        def one_step(trainer, sources):
            self.sources.add(source_of_step(trainer.recipe, trainer.step))
            return step(trainer, sources)

        monkeypatch.setattr(Trainer, "_one_step", one_step)

    @torch.no_grad()
    def replayed(self, function, *inputs):
        self.captured.add(getattr(function, "func", function).__name__)
        function(*inputs)  # captures are warmed up, which fills caches
        with Capturing():
            function(*inputs)
        return function(*inputs)

    def graphed(self, module, *inputs):
        self.captured.add(type(module).__name__)
        assert not in_live_graphs(module)
        module(*inputs)
        with Capturing():
            found = module(*inputs)
            (found[0] if isinstance(found, tuple) else found).square().mean().backward()
        return module(*inputs)


@pytest.mark.parametrize(
    ("recipe", "steps", "sources", "captured"),
    [
        (
            "joint/nano",
            12,
            {"scenes", "speech", "text", "sentences", "dialogs"},
            {"_Looking", "_Embedded", "_BothStreams", "_prepare", "_questions", "_answers"},
        ),
        ("vision/nano", 1, {"scenes"}, {"_Seeing"}),
        ("text/nano", 1, {"text"}, {"_Embedded"}),
        ("detokenizer/nano", 2, {"speech"}, {"_Losses"}),
        ("vocoder/nano", 2, {"speech"}, {"_Losses"}),
        ("asr/nano", 1, {"speech"}, {"_prepare", "_Embedded"}),
    ],
)
def test_what_a_stage_captures(recipe, steps, sources, captured, tmp_path, monkeypatch):
    """Augmentation and all disturbances are on, as they are in a real run."""
    watch = _Watch(monkeypatch)
    train(recipe, debug=True, output=tmp_path, overrides=[f"steps={steps}", f"save_every={steps}", "augment_from=0"])
    assert watch.sources == sources
    assert watch.captured == captured
