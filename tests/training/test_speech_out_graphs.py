"""Losses of speech output as CUDA graphs: nothing passes through the host, and they equal those computed eagerly."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kimi_mm.model import Model
from kimi_mm.training.recipe import load_recipe
from kimi_mm.training.speech_out import build_speech_out

STAGES = [(stage, phase) for stage in ("detokenizer", "vocoder") for phase in (False, True)]


def setup(stage: str):
    """Objective of a stage at debug size, all parameters random, and its frozen tokenizer."""
    recipe, config = load_recipe(f"{stage}/nano", debug=True)
    torch.manual_seed(0)
    model = Model(config)
    objective = build_speech_out(model, recipe).train()
    if stage == "detokenizer":
        for parameter in objective.dit.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return objective, model.audio


def random_batch(objective, stage: str, device: str) -> list[torch.Tensor]:
    """Tensors that a stage's losses are computed from."""
    rows, codes = 3, objective.recipe.target.row_codes if stage == "detokenizer" else 10
    targets = torch.randint(-9000, 9000, (rows, 1920 * codes), device=device, dtype=torch.int16)
    if stage == "vocoder":
        pitch = torch.rand(rows, 8 * codes, device=device) * 200 + 60
        return [targets, pitch * (torch.rand_like(pitch) < 0.7)]
    heard = torch.randint(-9000, 9000, (rows, 1280 * codes), device=device, dtype=torch.int16)
    own, canonical = torch.tensor([[True, False, False], [False, True, True]], device=device)
    return [targets, heard, own, canonical]


class HostTensors(TorchDispatchMode):
    """Notes the operations that take or give a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if any(t.device.type == "cpu" for t in tensors):
            self.found.append(str(func))
        return out


def to_fake_gpu(module: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Replaces parameters and buffers by tensors that only claim to be on a GPU."""
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, tensor in list(store.items()):
                if tensor is not None:
                    with mode:
                        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
                    learns = isinstance(tensor, torch.nn.Parameter)
                    store[name] = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad) if learns else fake


@pytest.mark.parametrize(("stage", "phase"), STAGES)
def test_nothing_passes_through_the_host(stage, phase):
    objective, tokenizer = setup(stage)
    mode = FakeTensorMode()
    to_fake_gpu(objective, mode)
    to_fake_gpu(tokenizer, mode)
    with mode:
        batch = random_batch(objective, stage, "cuda")
        objective._losses(phase, *batch)  # constants are made once, before a capture
        with HostTensors() as host:  # a value that is read back is an error of the mode
            losses = objective._losses(phase, *batch)
    assert not host.found
    assert all(loss.shape == () and loss.device.type == "cuda" for loss in losses.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stage", "phase"), STAGES)
def test_graphs_equal_eager_losses_and_gradients(stage, phase, precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    objective, tokenizer = setup(stage)
    objective, _ = objective.cuda(), tokenizer.cuda()
    graphed = objective._run[phase]
    graphed.enabled = True

    def step(run, batch):
        torch.cuda.manual_seed(3)
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16):
            losses = run(*batch)
        losses["loss"].backward()
        gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
        objective.zero_grad(set_to_none=True)
        # A live graph of the parameters, made on the default stream, would break a capture.
        return {name: loss.detach() for name, loss in losses.items()}, gradients

    kept = []
    for _ in range(2):  # the second time with other weights and another batch
        batch = random_batch(objective, stage, "cuda")
        replayed, replayed_gradients = step(graphed, batch)  # first of all, since it captures
        losses, gradients = step(lambda *tensors: objective._losses(phase, *tensors), batch)
        kept.append((losses, replayed))
        assert replayed_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            apart = (replayed_gradients[name] - gradient).norm()
            assert apart <= 2e-2 * gradient.norm() + 1e-5, name
        with torch.no_grad():
            for parameter in objective.parameters():
                parameter.mul_(0.9)
    for losses, replayed in kept:  # what was returned first outlasts the second replay
        assert {name: v.item() for name, v in replayed.items()} == pytest.approx(
            {name: v.item() for name, v in losses.items()}, rel=5e-3, abs=1e-4
        )


def test_objectives_draw_and_judge_alike_through_their_runner():
    """Without a GPU the runner is the plain function."""
    for stage, phase in STAGES:
        objective, _ = setup(stage)
        batch = random_batch(objective, stage, "cpu")
        torch.manual_seed(1)
        expected = objective._losses(phase, *batch)
        torch.manual_seed(1)
        assert objective._run[phase](*batch) == expected
