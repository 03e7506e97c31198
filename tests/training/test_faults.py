"""Runs that are killed while saving, run out of disk, are asked to stop, or meet bad numbers, lose nothing."""

import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kimi_mm.config import ConfigError
from kimi_mm.errors import CheckpointError
from kimi_mm.training import state
from kimi_mm.training.guard import Guard, GuardConfig, TrainingError
from kimi_mm.training.run import train
from tests.training.processes import print_nowhere, start, together

SMALL = ["steps=4", "save_every=1", "optim.optimizer=muonclip", "guard.spike_sigmas=50"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict, dict]:
    """Numbers and weights of a run that nothing disturbed."""
    run = tmp_path_factory.mktemp("whole")
    numbers = train("text/nano", debug=True, output=run, overrides=SMALL)
    return numbers, load_file(run / "step-0000004" / "model.safetensors")


def assert_goes_on_to(whole: tuple[dict, dict], run: Path) -> None:
    """The run in the folder, started again, ends with the very numbers and weights of the undisturbed one."""
    numbers = train("text/nano", debug=True, output=run, overrides=SMALL)
    assert {k: v for k, v in numbers.items() if "second" not in k} == {
        k: v for k, v in whole[0].items() if "second" not in k
    }
    weights = load_file(run / "step-0000004" / "model.safetensors")
    assert all(torch.equal(weights[name], whole[1][name]) for name in whole[1])
    assert not list(run.glob(".step-*"))


def stuck_while_saving(run: Path, module: str, function: str, call: int) -> None:
    """Trains until the given call of a function that saving uses, then hangs there, half-way through a file."""
    owner = {"state": state, "torch": torch, "os": os}[module]
    real, calls = getattr(owner, function), []

    def hang(*arguments, **options):
        calls.append(1)
        if len(calls) < call:
            return real(*arguments, **options)
        if function in ("save_file", "save"):
            real(*arguments, **options)
            file = Path(arguments[1])
            file.write_bytes(file.read_bytes()[:-100])  # what a write in progress looks like
        (run / "stuck").touch()
        time.sleep(600)

    setattr(owner, function, hang)
    train("text/nano", debug=True, output=run, overrides=SMALL)


@pytest.mark.parametrize(
    ("module", "function", "call", "last"),
    [
        ("state", "save_file", 3, 2),
        ("torch", "save", 3, 2),
        ("state", "flush", 3, 2),
        ("state", "_remove", 1, 3),  # step 3 has its name, step 1 is about to go
    ],
)
def test_killed_while_saving(module, function, call, last, whole, tmp_path):
    process = start(stuck_while_saving, tmp_path, module, function, call)
    limit = time.monotonic() + 60
    while not (tmp_path / "stuck").exists():
        assert process.is_alive()
        assert time.monotonic() < limit
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert state.list_states(tmp_path)[-1].name == f"step-{last:07d}"
    assert last == 3 or list(tmp_path.glob(".step-0000003.tmp/*"))
    assert_goes_on_to(whole, tmp_path)


def without_room(run: Path) -> tuple[str, list[str]]:
    """Trains two steps, then on, and from the first save with a limit on files that no checkpoint fits into."""
    print_nowhere()
    train("text/nano", debug=True, output=run, overrides=[*SMALL, "stop_after=2"])
    real = state.save_file

    def no_room(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return real(*arguments)

    state.save_file = no_room
    with pytest.raises(CheckpointError) as caught:
        train("text/nano", debug=True, output=run, overrides=SMALL)
    return str(caught.value), sorted(path.name for path in run.iterdir() if "step" in path.name)


def test_full_disk(whole, tmp_path):
    message, left = together(1, without_room, tmp_path)[0]
    assert "step 4 could not be written" in message
    assert message.endswith("the last whole one is step-0000002.")
    assert left == ["step-0000001", "step-0000002"]
    assert_goes_on_to(whole, tmp_path)


def forever(run: Path) -> None:
    train("text/nano", debug=True, output=run, overrides=["steps=100000", "save_every=100000", "log_every=1"])


def test_sigterm_saves_and_leaves(tmp_path):
    process = start(forever, tmp_path)
    limit = time.monotonic() + 60
    while not list(tmp_path.glob("tensorboard/*")):
        assert time.monotonic() < limit
        time.sleep(0.02)
    time.sleep(0.3)
    process.terminate()
    process.join(30)
    assert process.exitcode == 0
    [saved] = state.list_states(tmp_path)
    step = torch.load(saved / "training.pt", weights_only=True)["step"]
    assert step >= 1
    assert saved.name == f"step-{step:07d}"
    assert (tmp_path / "model" / "config.yaml").is_file()


# ---- bad numbers ----------------------------------------------------------------------------------------------------


def test_a_bad_step_changes_nothing(tmp_path, monkeypatch):
    """Step 3 of a run with NaN in its gradient: the weights after it are those after step 2."""
    from kimi_mm.training import trainer

    real, calls = trainer.Trainer._clip, []

    def poisoned(self):
        calls.append(1)
        if len(calls) == 3:
            next(p for p in self.objective.parameters() if p.grad is not None).grad[0] = float("nan")
        return real(self)

    monkeypatch.setattr(trainer.Trainer, "_clip", poisoned)
    numbers = train("text/nano", debug=True, output=tmp_path, overrides=[*SMALL, "stop_after=3"])
    assert not {"loss", "grad_norm"} & numbers.keys()
    assert numbers["skipped_steps"] == 1.0
    before, after = (load_file(tmp_path / f"step-000000{n}" / "model.safetensors") for n in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert train("text/nano", debug=True, output=tmp_path, overrides=SMALL)["skipped_steps"] == 1.0


def test_a_run_that_only_fails_ends_with_a_sentence(tmp_path):
    hopeless = ["optim.lr=1e30", "optim.warmup_steps=1", "steps=20", "guard.max_skipped=3"]
    with pytest.raises(TrainingError, match=r"3 steps in a row were skipped.*optim\.lr"):
        train("text/nano", debug=True, output=tmp_path, overrides=hopeless)


def test_spikes_are_judged_by_recent_losses_of_the_same_source():
    guard = Guard(GuardConfig(spike_sigmas=5.0, window=20, max_skipped=2))
    for step in range(20):
        assert guard.passes(step, "text", 2.0 + 0.1 * (step % 2), 1.0)
    assert not guard.passes(20, "text", 2.5, 1.0)
    assert guard.passes(21, "text", 2.2, 1.0)
    assert guard.passes(22, "speech", 9.0, 1.0)  # nothing to compare with
    twin = Guard(guard.config)
    twin.load_state_dict(guard.state_dict())
    assert not twin.passes(23, "text", 2.5, 1.0)
    assert twin.skipped == 2
    with pytest.raises(TrainingError, match="2 steps in a row"):
        twin.passes(24, "text", 2.5, 1.0)
    calm = Guard(GuardConfig())
    assert all(calm.passes(step, "text", 10.0**step, 1.0) for step in range(40))
    assert not calm.passes(40, "text", float("inf"), 1.0)


@pytest.mark.parametrize("values", [{"spike_sigmas": -1.0}, {"window": 3}, {"max_skipped": 0}])
def test_bad_settings_are_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        GuardConfig.from_dict(values)
