"""What each process does in the tests of runs that are spread over several."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import torch

from kimi_mm.training import state_sharded, trainer
from kimi_mm.training.parallel import leave_processes
from kimi_mm.training.run import train
from tests.training.processes import print_nowhere

BASE = ["steps=4", "save_every=4", "log_every=1", "cuda_graphs=false", "optim.warmup_steps=1"]
SMALL = [*BASE, "gradient_accumulation=4"]
PAIR = ["gradient_accumulation=2", "optim.optimizer=adamw"]


def losses(run: Path, *overrides: str, recipe: str = "text/nano") -> list[dict[str, float]]:
    """Trains a recipe at debug size and returns what was logged at each step that this process took."""
    seen: list[dict[str, float]] = []
    real = trainer.Trainer._report

    def report(self, numbers, curves, bar):
        seen.append({name: value for name, value in numbers.items() if "second" not in name})
        return real(self, numbers, curves, bar)

    trainer.Trainer._report = report
    try:
        train(recipe, debug=True, output=run, overrides=[*SMALL, *overrides])
    finally:
        trainer.Trainer._report = real
    return seen


def threads_left(run: Path, *overrides: str) -> tuple[int, int]:
    """Returns how many threads of gloo there are at the end of a run, and after it left the others."""

    def count() -> int:
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        return names.count("pt_gloo_runloop")

    losses(run, *overrides)
    before = count()
    leave_processes()
    return before, count()


def stage(recipe: str, begun: Path, fresh: Path, expert: int, *overrides: str) -> tuple[list, list]:
    """Runs of one stage: what is left of the run `begun` under DDP, and the first three steps of another with FSDP2."""
    rest = losses(begun, *PAIR, f"parallel={{data: ddp, expert: {expert}}}", *overrides, recipe=recipe)
    return rest, losses(fresh, *PAIR, "parallel={data: fsdp}", "stop_after=3", *overrides, recipe=recipe)


def full_disk(run: Path, victim: int) -> str:
    """Saves step 1; at step 2 one process finds no room for files. Returns what the run ends with."""
    print_nowhere()
    real = state_sharded.dcp.save

    def save(*arguments, **options):
        if "0000002" in str(options["checkpoint_id"]) and torch.distributed.get_rank() == victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, resource.RLIM_INFINITY))
        return real(*arguments, **options)

    state_sharded.dcp.save = save
    return refusal(run, "save_every=1", "stop_after=2", "parallel={data: fsdp}")


def stuck(run: Path) -> None:
    """Trains with a checkpoint at every step; at the third, rank 1 hangs before it writes."""
    real = state_sharded.dcp.save

    def save(*arguments, **options):
        if "0000003" in str(options["checkpoint_id"]) and torch.distributed.get_rank() == 1:
            (run / "stuck").touch()
            time.sleep(600)
        return real(*arguments, **options)

    state_sharded.dcp.save = save
    losses(run, "save_every=1", "optim.optimizer=muonclip", "optim.qk_clip=0.02", "parallel={data: fsdp}")


def refusal(run: Path, *overrides: str, recipe: str = "text/nano") -> str:
    """Returns the sentence that a run ends with."""
    try:
        losses(run, *overrides, recipe=recipe)
    except ValueError as error:
        return str(error)
    return "it ran"


def refusals(run: Path, asked: list[tuple[str, str]]) -> list[str]:
    """Returns the sentences that runs of (recipe, override) end with."""
    return [refusal(run / str(number), override, recipe=recipe) for number, (recipe, override) in enumerate(asked)]
