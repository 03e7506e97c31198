"""A chain of training runs in sittings: what trains a whole model on a machine that is to be had for minutes at a time.

    chain file ─► sittings ─► data that each needs, its stages with seconds ─► WORK/<stage>/model ─► the next stage

A sitting is what one machine does from start to end: everything that a later sitting needs of it are the models of its
stages. Within a sitting the command may be given as often as one likes: a stage that was stopped goes on, by its own
clock (`train_seconds`), and one that is done is passed over.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from kimi_mm.config_base import Config, ConfigError
from kimi_mm.errors import UserError
from kimi_mm.training.recipe import recipes_root

log = logging.getLogger(__name__)

LEAST_SECONDS = 20.0  # a stage is not begun with less
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
        recipe: that is run.
        seconds: of training; the schedule follows them.
        shards: of what is prepared beside that must be there before it starts (0: all of them).
        start: stage whose model it starts from ("": what the recipe says).
        overrides: of the recipe.
        debug: overrides at debug size, in place of these.
    """

    name: str
    recipe: str
    seconds: float
    shards: int = 0
    start: str = ""
    overrides: tuple[str, ...] = ()
    debug: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SittingConfig(Config):
    """What one machine does.

    Args:
        name: of the sitting.
        minutes: that it takes.
        prepare: calls of `kimi-mm prepare`, for instance "human", done first; what is there already is not made again.
        beside: calls that go on while stages train, on all cores but two, for instance "speech --hours 100".
        stages: in order.
    """

    name: str
    minutes: float
    prepare: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    stages: tuple[StageConfig, ...] = ()

    def __post_init__(self) -> None:
        seconds = sum(stage.seconds for stage in self.stages)
        if seconds > 60 * self.minutes:
            raise ConfigError(
                f"sitting '{self.name}': its stages take {seconds:g} s, more than {self.minutes:g} minutes."
            )


@dataclass(frozen=True, kw_only=True)
class ChainConfig(Config):
    """Sittings in order; a stage starts from one before it."""

    sittings: tuple[SittingConfig, ...] = ()

    def __post_init__(self) -> None:
        known: list[str] = []
        for stage in (stage for sitting in self.sittings for stage in sitting.stages):
            if stage.name in known:
                raise ConfigError(f"stage '{stage.name}' is there twice.")
            if stage.start and stage.start not in known:
                raise ConfigError(f"stage '{stage.name}' starts from '{stage.start}', which is no stage before it.")
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
    debug: bool = False,
    say: Callable[[str], None] = log.info,
) -> bool:
    """Does one sitting, or goes on with it.

    Args:
        chain: of `load_chain`.
        work: folder of the stages' runs.
        sitting: its name; "": the first that is not done.
        minutes: after which to stop and save (0: no limit).
        debug: stages at debug size, on made-up data; nothing is prepared.
        say: called with what is going on.

    Returns:
        Whether the sitting is done.

    Raises:
        UserError: there is no such sitting, a model that it starts from is missing, or data cannot be prepared.
    """
    from kimi_mm.training.run import train

    started = time.monotonic()
    chosen = _choose(chain, work, sitting)
    if chosen is None:
        say("every sitting is done.")
        return True
    for stage in chosen.stages:
        if stage.start and not _done(work, stage.start) and stage.start not in {s.name for s in chosen.stages}:
            raise UserError(
                f"{work / stage.start}: sitting '{chosen.name}' starts from this stage; bring its folder here."
            )
    waiting = [stage for stage in chosen.stages if not _done(work, stage.name)]
    if waiting and not debug:
        for call in chosen.prepare:
            if not _is_there(call):
                say(f"prepare {call}")
                _prepare(call, _left(minutes, started))
    with Beside(chosen.beside if waiting and not debug else ()) as beside:
        for stage in waiting:
            beside.wait(stage.shards, _left(minutes, started))
            left = _left(minutes, started)
            if left is not None and left < LEAST_SECONDS:
                say(f"{stage.name}: not begun, the time is up; give the command again.")
                return False
            overrides = list(stage.debug if debug else stage.overrides)
            overrides += [f"init={json.dumps(str(work / stage.start / 'model'))}"] if stage.start else []
            overrides += [] if debug else [f"train_seconds={stage.seconds}"]
            overrides += [] if left is None else [f"time_limit_seconds={left}"]
            say(f"train {stage.recipe} {' '.join(overrides)}")
            train(stage.recipe, debug=debug, output=work / stage.name, overrides=overrides)
            if not _done(work, stage.name):
                say(f"{stage.name}: stopped before its end; give the command again.")
                return False
    later = ", ".join(_needed_later(chain, chosen, work)) or "nothing"
    say(f"sitting '{chosen.name}' is done; later ones need: {later}.")
    return True


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
        calls: of `kimi-mm prepare`; all start at once, and each can be given again.
        data: folder that they write to.
    """

    def __init__(self, calls: Sequence[str], data: Path = DATA) -> None:
        self.calls, self.data = calls, data
        self.running: list[subprocess.Popen] = []

    def __enter__(self) -> Beside:
        processes = max(1, (os.cpu_count() or 1) - 2)
        for call in self.calls:
            command = ["nice", *_command(call, self.data), "--processes", str(processes)]
            self.running.append(subprocess.Popen(command, start_new_session=True))
        return self

    def wait(self, shards: int, seconds: float | None) -> None:
        """Returns once so many shards of each call are there, or all of them (0), or the time is up.

        Raises:
            UserError: a call failed.
        """
        started = time.monotonic()
        both = list(zip(self.calls, self.running, strict=True))
        while waiting := [call for call, process in both if self._lacks(call, process, shards)]:
            if seconds is not None and time.monotonic() - started > seconds:
                log.info("prepare %s: not done, the time is up", ", ".join(waiting))
                return
            time.sleep(0.2)

    def _lacks(self, call: str, process: subprocess.Popen, shards: int) -> bool:
        code = process.poll()
        if code:
            raise UserError(f"prepare {call}: failed; what it said stands above.")
        found = len(list((self.data / call.split()[0]).glob("*-[0-9]*.jsonl"))) if shards else 0
        return code is None and not 0 < shards <= found

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)  # its workers, too
                process.wait()


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
    wanted = dict.fromkeys(stage.start for later in chain.sittings[at + 1 :] for stage in later.stages)
    return [str(work / name) for name in wanted if name in made]
