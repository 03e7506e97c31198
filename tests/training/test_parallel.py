"""Runs over 2 and 4 processes do what one process does: DDP, FSDP2, expert and context parallelism, checkpoints."""

import os
import signal
import time
from functools import partial

import pytest
import torch

from kimi_mm.checkpoint import read_tensors
from kimi_mm.training.state import list_states
from tests.training import spread
from tests.training.processes import start_together, together

MUON = "optim.optimizer=muonclip"
CLIP = "optim.qk_clip=0.02"  # low enough that heads are clipped at every step


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process logs, by optimiser."""
    made = {}

    def get(optimizer: str) -> list[dict[str, float]]:
        if optimizer not in made:
            run = tmp_path_factory.mktemp("alone")
            made[optimizer] = spread.losses(run, f"optim.optimizer={optimizer}", CLIP)
        return made[optimizer]

    return get


def assert_same(got: list[dict[str, float]], want: list[dict[str, float]]) -> None:
    assert [step.keys() for step in got] == [step.keys() for step in want]
    for one, other in zip(got, want, strict=True):
        for name, value in other.items():
            assert one[name] == pytest.approx(value, abs=1e-4, rel=1e-4), name


@pytest.mark.parametrize(
    ("ranks", "optimizer", "parallel"),
    [
        (2, "adamw", "{data: ddp}"),
        (2, "muonclip", "{data: ddp, expert: 2}"),
        (4, "muonclip", "{data: fsdp}"),
        (2, "adamw", "{data: fsdp, checkpoint_activations: true}"),
        (4, "muonclip", "{data: fsdp, expert: 2}"),
        (4, "muonclip", "{data: fsdp, expert: 4, context: 2, checkpoint_activations: true}"),
        (4, "muonclip", "{data: ddp, context: 4}"),
    ],
    ids=lambda value: str(value),
)
def test_same_losses_as_one_process(ranks, optimizer, parallel, alone, tmp_path):
    overrides = (f"parallel={parallel}", f"optim.optimizer={optimizer}", CLIP)
    for logged in together(ranks, spread.losses, tmp_path, *overrides):
        assert_same(logged, alone(optimizer))


@pytest.mark.parametrize("recipe", ["text/nano", "joint/nano"])
def test_gradients_that_graphs_write_are_averaged_as_well(recipe, tmp_path):
    """On the CPU nothing is captured, but gradients travel as they do where it is."""
    want = spread.losses(tmp_path / "alone", *spread.PAIR, recipe=recipe)
    overrides = (*spread.PAIR, "cuda_graphs=true")
    task = partial(spread.losses, recipe=recipe)
    for logged in together(2, task, tmp_path / "spread", *overrides):
        assert_same(logged, want)


def test_processes_agree_on_the_time(tmp_path):
    """The run ends by its clock, at the same step everywhere, and rates were the same."""
    overrides = ("steps=100000", "train_seconds=3", "save_every=100000", "gradient_accumulation=2")
    first, second = together(2, spread.losses, tmp_path, *overrides)
    assert 3 < len(first) < 10_000
    assert first == second


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux names them")
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(2, "{data: ddp}"), (2, "{data: fsdp}"), (4, "{data: fsdp, expert: 2, context: 2}")],
    ids=lambda value: str(value),
)
def test_no_thread_outlives_the_group(ranks, parallel, tmp_path):
    """One that does may abort the process while Python ends."""
    for before, after in together(ranks, spread.threads_left, tmp_path, f"parallel={parallel}", "stop_after=1"):
        assert before >= 2
        assert after == 0


@pytest.mark.slow
def test_compiled_parts_do_the_same(alone, tmp_path):
    overrides = ("parallel={compile: true}", "optim.optimizer=adamw", CLIP)
    assert_same(together(1, spread.losses, tmp_path, *overrides)[0], alone("adamw"))


def last_model(run) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor, _ in read_tensors(run / "model")}


@pytest.mark.parametrize(
    ("optimizer", "worlds"),
    [
        ("muonclip", [(4, "{data: fsdp, expert: 2}"), (2, "{data: fsdp}"), (1, "{}")]),
        ("adamw", [(1, "{}"), (8, "{data: fsdp, expert: 2, context: 2}"), (2, "{data: ddp, expert: 2}")]),
    ],
    ids=["4, 2, 1", "1, 8, 2"],
)
def test_goes_on_with_another_number_of_processes(optimizer, worlds, alone, tmp_path):
    """Steps 1 and 2 on some processes, 3 on others, 4 on others again: the losses, and the model, of one process."""
    got = []
    for number, (ranks, parallel) in enumerate(worlds):
        end = [f"stop_after={2 + number}"] if number < 2 else []
        overrides = (f"parallel={parallel}", f"optim.optimizer={optimizer}", CLIP, "weights=fp32", *end)
        got += together(ranks, spread.losses, tmp_path, *overrides)[0]
    assert_same(got, alone(optimizer))
    whole = tmp_path / "whole"
    spread.losses(whole, f"optim.optimizer={optimizer}", CLIP, "weights=fp32")
    ours, theirs = last_model(tmp_path), last_model(whole)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_bf16_keeps_fp32_weights(tmp_path):
    """FSDP2 computes in bf16 as autocast does; shards, momenta and the checkpoint stay fp32."""
    want = spread.losses(tmp_path / "alone", "precision=bf16")
    overrides = ("precision=bf16", "parallel={data: fsdp}", "weights=fp32")
    got = together(2, spread.losses, tmp_path / "spread", *overrides)[0]
    assert [step["loss"] for step in got] == pytest.approx([step["loss"] for step in want], abs=0.02)
    assert all(t.dtype == torch.float32 for t in last_model(tmp_path / "spread").values() if t.is_floating_point())


@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_that_cannot_write_spoils_the_checkpoint_for_all(victim, tmp_path):
    for message in together(2, spread.full_disk, tmp_path, victim):
        assert "checkpoint of step 2" in message
    assert [path.name for path in tmp_path.iterdir() if "step" in path.name] == ["step-0000001"]


def test_processes_killed_while_saving(alone, tmp_path):
    """Both processes are killed when one has written its part of step 3 and the other has not."""
    processes = start_together(2, spread.stuck, tmp_path)
    limit = time.monotonic() + 60
    while not (tmp_path / "stuck").exists():
        assert time.monotonic() < limit
        assert all(process.is_alive() for process in processes)
        time.sleep(0.02)
    time.sleep(0.2)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert list_states(tmp_path)[-1].name == "step-0000002"
    got = together(2, spread.losses, tmp_path, "optim.optimizer=muonclip", CLIP, "parallel={data: fsdp}")[0]
    assert_same(got, alone("muonclip")[2:])


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["gradient_accumulation=3"], "multiple of 2"),
        (["parallel.expert=3"], "parallel.expert=3 does not divide"),
        (["parallel={context: 2}", "text.row_tokens=33"], "33 positions"),
        (["cuda_graphs=true"], "set gradient_accumulation=2, or cuda_graphs=false"),
        (["cuda_graphs=true", "parallel={data: fsdp}"], "only with parallel.data=ddp"),
    ],
)
def test_what_cannot_be_spread_is_said(overrides, named, tmp_path):
    assert all(named in message for message in together(2, spread.refusal, tmp_path, *overrides))
