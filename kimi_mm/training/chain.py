"""A chain of training runs in sittings: what trains a whole model on a machine that is to be had for minutes at a time.

    chain file ─► sittings ─► data that each needs, its stages with seconds ─► WORK/<stage>/model ─► the next stage

A sitting is what one machine does from start to end: everything that a later sitting needs of it are the models of its
stages. Within a sitting the command may be given as often as one likes: a stage that was stopped goes on, by its own
clock (`train_seconds`), and one that is done is passed over.

On a machine with several GPUs each one takes the first stage that can start: whose data is there, and the models that
it is made from. A stage may be spread over several, which are then kept for it, and may take parts from several stages,
for instance eyes that were trained while its ears were.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import yaml

from kimi_mm.checkpoint import INDEX, join_checkpoints
from kimi_mm.config_base import Config, ConfigError
from kimi_mm.data.manifest import write_aside
from kimi_mm.errors import UserError
from kimi_mm.training.recipe import recipes_root

log = logging.getLogger(__name__)

LEAST_SECONDS = 20.0  # a stage is not begun with less
AROUND_SECONDS = 60.0  # what a stage takes besides its training, at most: reading data, capturing graphs, writing
DATA = Path("data")  # where recipes look for it
# What calls without a resumable plan leave below DATA when they are done; a machine without network gets it that way.
PRODUCTS = {
    "text": "texts.jsonl.gz",
    "encoder": "whisper_tiny_en_encoder.safetensors",
    "unlabelled": "unlabelled/shards",
    "human": "human/adapt-shards",
    "art": "art/art.zip",
}


@dataclass(frozen=True, kw_only=True)
class StageConfig(Config):
    """One run.

    Args:
        name: its folder in WORK.
        recipe: that is run ("": none; the model is what `start` and `parts` are joined to).
        seconds: of training; the schedule follows them.
        needs: of what is prepared beside, how many shards must be there before it starts (0: all): {speech: 100}.
        start: stage whose model it starts from ("": what the recipe says).
        parts: what it takes from other stages: {vision: eyes}.
        gpus: that it is spread over, as many micro-batches as those make a step; on a machine with fewer, those.
        weights: format of its model, see `save_checkpoint` ("": what the recipe says).
        overrides: of the recipe.
        debug: overrides at debug size, in place of these.
    """

    name: str
    recipe: str = ""
    seconds: float = 0.0
    needs: dict[str, int] = field(default_factory=dict)
    start: str = ""
    parts: dict[str, str] = field(default_factory=dict)
    gpus: int = 1
    weights: str = ""
    overrides: tuple[str, ...] = ()
    debug: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.parts and not self.start:
            raise ConfigError(f"stage '{self.name}' takes parts, so it needs a start that they go into.")
        if not self.recipe and not self.parts:
            raise ConfigError(f"stage '{self.name}' has neither a recipe nor parts to join.")

    @property
    def made_from(self) -> list[str]:
        """Stages that must be done before it."""
        return [stage for stage in (self.start, *self.parts.values()) if stage]


@dataclass(frozen=True, kw_only=True)
class SittingConfig(Config):
    """What one machine does.

    Args:
        name: of the sitting.
        minutes: that it takes.
        gpus: most that are used.
        prepare: calls of `kimi-mm prepare`, for instance "human", done first; what is there already is not made again.
        beside: calls that go on while stages train, one after the other, on all cores but two, for instance
            "speech --hours 100".
        stages: in order.
    """

    name: str
    minutes: float
    gpus: int = 1
    prepare: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    stages: tuple[StageConfig, ...] = ()

    def __post_init__(self) -> None:
        if any(not 1 <= stage.gpus <= self.gpus for stage in self.stages):
            raise ConfigError(f"sitting '{self.name}': gpus of a stage must be from 1 to {self.gpus}.")
        seconds = sum(stage.seconds * stage.gpus for stage in self.stages)
        if seconds > 60 * self.minutes * self.gpus:
            raise ConfigError(
                f"sitting '{self.name}': its stages take {seconds:g} s of a GPU, more than {self.minutes:g} minutes."
            )
        calls = [call.split()[0] for call in self.beside]
        for stage in self.stages:
            for need in stage.needs:
                if need not in calls:
                    raise ConfigError(f"stage '{stage.name}' needs '{need}', which is not prepared beside.")


@dataclass(frozen=True, kw_only=True)
class ChainConfig(Config):
    """Sittings in order; a stage starts from one before it."""

    sittings: tuple[SittingConfig, ...] = ()

    def __post_init__(self) -> None:
        known: list[str] = []
        for stage in (stage for sitting in self.sittings for stage in sitting.stages):
            if stage.name in known:
                raise ConfigError(f"stage '{stage.name}' is there twice.")
            for source in stage.made_from:
                if source not in known:
                    raise ConfigError(f"stage '{stage.name}' starts from '{source}', which is no stage before it.")
            known.append(stage.name)


def load_chain(name: str) -> ChainConfig:
    """Reads a chain: a path, or a name below `recipes/chains`. ConfigError when it cannot be used."""
    folder = recipes_root() / "chains"
    path = next((p for p in (Path(name), folder / f"{name}.yaml") if p.is_file()), None)
    if path is None:
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise ConfigError(f"chain '{name}' not found. Known: {known}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys.")
    return ChainConfig.from_dict(values, where=str(path))


def run_chain(
    chain: ChainConfig,
    work: Path,
    *,
    sitting: str = "",
    minutes: float = 0.0,
    once: bool = False,
    debug: bool = False,
    say: Callable[[str], None] = log.info,
) -> bool:
    """Does one sitting, or goes on with it.

    Args:
        chain: of `load_chain`.
        work: folder of the stages' runs.
        sitting: its name; "": the first that is not done.
        minutes: after which to stop and save (0: no limit).
        once: whether these minutes are all there is: a stage for which they do not suffice is made shorter.
        debug: stages at debug size, on made-up data; nothing is prepared.
        say: called with what is going on.

    Returns:
        Whether the sitting is done.

    Raises:
        UserError: there is no such sitting, a model that it starts from is missing, or data cannot be prepared.
    """
    started = time.monotonic()
    chosen = _choose(chain, work, sitting)
    if chosen is None:
        say("every sitting is done.")
        return True
    own = {stage.name for stage in chosen.stages}
    for source in (source for stage in chosen.stages for source in stage.made_from):
        if source not in own and not _done(work, source):
            raise UserError(f"{work / source}: sitting '{chosen.name}' starts from this stage; bring its folder here.")
    waiting = [stage for stage in chosen.stages if not _done(work, stage.name)]
    if waiting and not debug:
        for call in chosen.prepare:
            if not _is_there(call):
                say(f"prepare {call}")
                _prepare(call, _left(minutes, started))
    gpus = 1 if debug else min(chosen.gpus, max(1, torch.cuda.device_count()))
    with Beside(chosen.beside if waiting and not debug else ()) as beside:
        clock = Clock(partial(_left, minutes, started), once)
        if gpus > 1:
            finished = _train_at_once(waiting, work, beside, clock, gpus=gpus, say=say)
        else:
            finished = _train_one_by_one(waiting, work, beside, clock, debug=debug, say=say)
    if not finished:
        return False
    later = ", ".join(_needed_later(chain, chosen, work)) or "nothing"
    say(f"sitting '{chosen.name}' is done; later ones need: {later}.")
    return True


@dataclass(frozen=True)
class Clock:
    """What is left of the time that a sitting was given.

    Args:
        left: seconds, None without a limit.
        once: whether there will be no more afterwards.
    """

    left: Callable[[], float | None]
    once: bool

    def is_up(self) -> bool:
        left = self.left()
        return left is not None and left < LEAST_SECONDS

    def overrides(self, seconds: float) -> list[str]:
        """Of a recipe that trains for so many seconds."""
        left = self.left()
        if left is None:
            return [f"train_seconds={seconds}"]
        if self.once:
            seconds = min(seconds, max(LEAST_SECONDS, left - AROUND_SECONDS))
        return [f"train_seconds={seconds}", f"time_limit_seconds={left}"]


def _train_one_by_one(
    stages: Sequence[StageConfig],
    work: Path,
    beside: Beside,
    clock: Clock,
    *,
    debug: bool,
    say: Callable[[str], None],
) -> bool:
    """Trains stages in this process; returns whether all are done."""
    from kimi_mm.training.run import train

    for stage in stages:
        beside.wait(stage.needs, clock.left())
        if clock.is_up():
            say(f"{stage.name}: not begun, the time is up; give the command again.")
            return False
        overrides = _start(stage, work, clock, debug=debug)
        if stage.recipe:
            say(f"train {stage.recipe} {' '.join(overrides)}")
            train(stage.recipe, debug=debug, output=work / stage.name, overrides=overrides)
        if not _done(work, stage.name):
            say(f"{stage.name}: stopped before its end; give the command again.")
            return False
    return True


def _train_at_once(
    stages: Sequence[StageConfig],
    work: Path,
    beside: Beside,
    clock: Clock,
    *,
    gpus: int,
    say: Callable[[str], None],
) -> bool:
    """Trains stages in processes of their own on GPUs of their own, which write to WORK/<stage>.log.

    A stage that fails does not stop those that do not need it. Returns whether all are done.
    """
    waiting = list(stages)
    running: dict[str, tuple[list[int], subprocess.Popen]] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            for name, (_, process) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    failed += [name] if process.returncode else []
                    say(f"{name}: {'done' if _done(work, name) else 'stopped before its end'}")
            if clock.is_up():
                waiting = []
            lost = {stage.name for stage in stages if not _done(work, stage.name)} - {s.name for s in waiting}
            lost -= set(running)
            waiting = [stage for stage in waiting if not lost & set(stage.made_from)]
            ready = [s for s in waiting if all(_done(work, name) for name in s.made_from) and beside.has(s.needs)]
            idle = [gpu for gpu in range(gpus) if not any(gpu in taken for taken, _ in running.values())]
            for stage in ready:
                wanted = min(stage.gpus, gpus)
                if len(idle) < wanted:
                    break  # what it waits for is not given to later ones
                mine, idle = idle[:wanted], idle[wanted:]
                waiting.remove(stage)
                overrides = _start(stage, work, clock)
                if stage.recipe:
                    say(f"train {stage.recipe} {' '.join(overrides)} on GPU {', '.join(map(str, mine))}")
                    running[stage.name] = mine, _train_on(mine, gpus, stage, work, overrides)
            time.sleep(0.2)
    finally:
        for _, process in running.values():
            process.terminate()  # it saves
        for _, process in running.values():
            process.wait()
    if failed:
        logs = ", ".join(f"{work / name}.log" for name in failed)
        raise UserError(f"{', '.join(failed)}: failed; what was said stands in {logs}.")
    missing = ", ".join(stage.name for stage in stages if not _done(work, stage.name))
    if missing:
        say(f"{missing}: not done, the time is up; give the command again.")
    return not missing


def _train_on(mine: list[int], gpus: int, stage: StageConfig, work: Path, overrides: list[str]) -> subprocess.Popen:
    launch = [sys.executable, "-m"]
    if len(mine) > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(len(mine)), "-m"]
        overrides = [*overrides, f"gradient_accumulation={len(mine)}"]
    command = [*launch, "kimi_mm", "train", stage.recipe, "--output", str(work / stage.name), *overrides]
    threads = str(max(1, (os.cpu_count() or 1) // (2 * gpus)))
    visible = ",".join(map(str, mine))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "CUDA_VISIBLE_DEVICES": visible}
    with (work / f"{stage.name}.log").open("ab") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def _start(stage: StageConfig, work: Path, clock: Clock, *, debug: bool = False) -> list[str]:
    """Joins what a stage starts from where it takes parts, and returns the overrides of its recipe."""
    overrides = list(stage.debug if debug else stage.overrides)
    start = work / stage.start / "model"
    if stage.parts:
        parts = {name: work / source / "model" for name, source in stage.parts.items()}
        if not stage.recipe:
            join_checkpoints(work / stage.name / "model", start, parts, weights=stage.weights or "fp16")
            write_aside(work / stage.name / "summary.json", b'{"finished": true}\n')
            return []
        joined = work / stage.name / "start"
        if not (joined / INDEX).is_file():
            join_checkpoints(joined, start, parts, weights="fp32")
        start = joined
    overrides += [f"init={json.dumps(str(start))}"] if stage.start else []
    overrides += [f"weights={stage.weights}"] if stage.weights else []
    return overrides + ([] if debug else clock.overrides(stage.seconds))


def _choose(chain: ChainConfig, work: Path, name: str) -> SittingConfig | None:
    if name:
        found = next((sitting for sitting in chain.sittings if sitting.name == name), None)
        if found is None:
            known = ", ".join(sitting.name for sitting in chain.sittings)
            raise UserError(f"there is no sitting '{name}'; there are {known}.")
        return found
    return next((s for s in chain.sittings if not all(_done(work, stage.name) for stage in s.stages)), None)


def _done(work: Path, stage: str) -> bool:
    """Whether a stage was trained to its end; its checkpoints need not have been brought along."""
    try:
        summary = json.loads((work / stage / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(summary.get("finished")) and (work / stage / "model").is_dir()


def _left(minutes: float, started: float) -> float | None:
    return 60 * minutes - (time.monotonic() - started) if minutes else None


class Beside:
    """Preparation that goes on in processes of its own; at the end of the `with` block what still runs is stopped.

    Args:
        calls: of `kimi-mm prepare`, done one after the other; each can be given again, but is not where it is noted
            in the folder of what it makes that it came to its end.
        data: folder that they write to.
    """

    def __init__(self, calls: Sequence[str], data: Path = DATA) -> None:
        self.data = data
        self._calls = [call for call in calls if not self._ended(call)]  # the first runs
        self._running: subprocess.Popen | None = None

    def __enter__(self) -> Beside:
        self._go_on()
        return self

    def has(self, needs: Mapping[str, int]) -> bool:
        """Whether so many shards of each kind are there (0: all of them). UserError: a call failed."""
        self._go_on()
        return not any(call.split()[0] in needs and self._lacks(call, needs[call.split()[0]]) for call in self._calls)

    def wait(self, needs: Mapping[str, int], seconds: float | None) -> None:
        """Returns once so many shards of each kind are there, or the time is up. UserError: a call failed."""
        started = time.monotonic()
        while not self.has(needs):
            if seconds is not None and time.monotonic() - started > seconds:
                log.info("prepare %s: not done, the time is up", ", ".join(self._calls))
                return
            time.sleep(0.2)

    def _go_on(self) -> None:
        """Starts the next call when one has ended."""
        if self._running is not None:
            code = self._running.poll()
            if code is None:
                return
            call = self._calls.pop(0)
            self._running = None
            if code:
                self._calls = []
                raise UserError(f"prepare {call}: failed; what it said stands above.")
            if self._note(call).parent.is_dir():
                write_aside(self._note(call), call.encode())
        if self._calls:
            processes = max(1, (os.cpu_count() or 1) - 2)
            command = ["nice", *_command(self._calls[0], self.data), "--processes", str(processes)]
            self._running = subprocess.Popen(command, start_new_session=True)

    def _note(self, call: str) -> Path:
        return self.data / call.split()[0] / "call.txt"

    def _ended(self, call: str) -> bool:
        note = self._note(call)
        return note.is_file() and note.read_text(encoding="utf-8") == call

    def _lacks(self, call: str, shards: int) -> bool:
        found = len(list((self.data / call.split()[0]).glob("*-[0-9]*.jsonl"))) if shards else 0
        return not 0 < shards <= found

    def __exit__(self, *_: object) -> None:
        if self._running is not None and self._running.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._running.pid, signal.SIGTERM)  # its workers, too
            self._running.wait()


def _is_there(call: str) -> bool:
    """Whether what a call makes was made, or brought along, before; shards go on by themselves."""
    product = PRODUCTS.get(call)
    return product is not None and (DATA / product).exists()


def _command(call: str, data: Path = DATA) -> list[str]:
    return [sys.executable, "-m", "kimi_mm", "prepare", *call.split(), "--data", str(data)]


def _prepare(call: str, seconds: float | None) -> None:
    try:
        code = subprocess.run(_command(call), timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        raise UserError(f"prepare {call}: the time is up; give the command again, it goes on.") from None
    if code:
        raise UserError(f"prepare {call}: failed; what it said stands above.")


def _needed_later(chain: ChainConfig, sitting: SittingConfig, work: Path) -> list[str]:
    """Folders that sittings after this one start from: model and summary of each are enough."""
    at = chain.sittings.index(sitting)
    made = {stage.name for before in chain.sittings[: at + 1] for stage in before.stages}
    wanted = dict.fromkeys(name for later in chain.sittings[at + 1 :] for s in later.stages for name in s.made_from)
    return [str(work / name) for name in wanted if name in made]
