"""The training loop: exact resume, any number of processes, TensorBoard, a progress bar.

loaders ─► batch ─► objective ─► loss ─► backward ─► clip ─► guard ─► optimiser ─► (experts, codebook, QK-clip) ─► log
"""

from __future__ import annotations

import logging
import random
import signal
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.distributed.tensor import DTensor

from kimi_mm.audio.quantizer import VectorQuantizer
from kimi_mm.data.document_loader import DocumentLoader
from kimi_mm.data.loader import Prefetcher, SpeechLoader, TextLoader
from kimi_mm.data.scene_loader import SceneLoader
from kimi_mm.data.spoken_loader import SpokenLoader
from kimi_mm.data.target_loader import TargetLoader
from kimi_mm.errors import CheckpointError
from kimi_mm.model import Model
from kimi_mm.text.attention import PeakLogits
from kimi_mm.text.moe import Router
from kimi_mm.training import qk_clip
from kimi_mm.training.curves import Curves
from kimi_mm.training.guard import Guard
from kimi_mm.training.meters import ConsoleTable, Meters
from kimi_mm.training.muon import Muon, is_hidden_matrix
from kimi_mm.training.parallel import Parallel, join_processes, own_device
from kimi_mm.training.recipe import DOCUMENTS, OptimConfig, Recipe
from kimi_mm.training.schedule import lr_factor, source_of_step
from kimi_mm.training.state import list_states, load_state, remove_leftovers, save_state
from kimi_mm.training.state_sharded import SHARDS, group_state, read_any, save_sharded, whole_tensors
from kimi_mm.training.upload import Upload

log = logging.getLogger(__name__)


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Splits trainable parameters: decay for matrices, none for vectors and decays; encoder and eyes have own rates.

    Groups carry `muon` True for the matrices that muonclip orthogonalises, and a `name` that is the same however the
    parameters are sharded. torch's AdamW wants sharded and whole parameters apart.
    """
    groups: dict[tuple[bool, float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            plain, scale, muon = _group_of(name, parameter, config)
            apart = config.optimizer == "adamw" and isinstance(parameter, DTensor)
            groups.setdefault((plain, scale, muon, apart), []).append(parameter)
    return [
        {
            "params": parameters,
            "name": f"{'vectors' if plain else 'muon' if muon else 'matrices'} x{scale:g}",
            "muon": muon,
            "weight_decay": 0.0 if plain else config.weight_decay,
            "lr": config.lr * scale,
            "peak_lr": config.lr * scale,
        }
        for (plain, scale, muon, _), parameters in groups.items()
    ]


def parameter_names(module: nn.Module, config: OptimConfig) -> list[str]:
    """Names of the trained parameters in the order in which the optimiser of a single process numbers them."""
    groups: dict[tuple[bool, float, bool], list[str]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(_group_of(name, parameter, config), []).append(name)
    return [name for names in groups.values() for name in names]


def _group_of(name: str, parameter: nn.Parameter, config: OptimConfig) -> tuple[bool, float, bool]:
    """Whether a parameter goes without decay, the factor on its rate, and whether Muon updates it."""
    plain = parameter.dim() < 2 or any(part in name for part in ("A_log", "dt_bias", "query", "embed"))
    muon = config.optimizer == "muonclip" and not plain and is_hidden_matrix(name, parameter)
    scale = config.encoder_lr_scale if ".encoder." in name else 1.0
    scale = config.vision_lr_scale if name.startswith("vision.") else scale
    return plain, scale, muon


def make_optimizer(module: nn.Module, config: OptimConfig, fused: bool) -> torch.optim.Optimizer:
    """Builds the recipe's optimiser; muonclip also makes the attention layers note their largest logits."""
    groups, betas = parameter_groups(module, config), (config.betas[0], config.betas[1])
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=betas, fused=fused)
    qk_clip.track(module)
    return Muon(groups, momentum=config.momentum, betas=betas)


class Trainer:
    """Runs one recipe over one objective.

    Args:
        recipe: what to do.
        objective: module that maps a batch to a dictionary of losses with the key "loss".
        speech, text, scenes, documents, spoken: loaders; which of them a step uses follows from stage and shares.
        run: folder for checkpoints and logs.
    """

    def __init__(
        self,
        recipe: Recipe,
        objective: nn.Module,
        speech: SpeechLoader | TargetLoader | None,
        text: TextLoader | None,
        run: Path,
        scenes: SceneLoader | None = None,
        documents: DocumentLoader | None = None,
        spoken: dict[str, SpokenLoader] | None = None,
    ) -> None:
        self.recipe, self.run = recipe, run
        join_processes()
        device = own_device()
        random.seed(recipe.seed)
        torch.manual_seed(recipe.seed)
        self.names = parameter_names(objective, recipe.optim)
        self.parallel = Parallel(recipe, objective, device)
        self.objective = objective
        frozen = {name for name, parameter in objective.named_parameters() if not parameter.requires_grad}
        self.fixed = frozenset(frozen if recipe.init and recipe.stage in DOCUMENTS else ())  # checkpoints leave it out
        self.optimizer = make_optimizer(objective, recipe.optim, fused=device.type == "cuda")
        self.loaders = {"speech": speech, "text": text, "scenes": scenes, "documents": documents, **(spoken or {})}
        self.guard = Guard(recipe.guard)
        graphs = recipe.cuda_graphs and device.type == "cuda"
        self.meters = Meters(self.parallel.backbone, device, recipe.peak_tflops, hooks=not graphs)
        self.table = ConsoleTable()
        self.step = 0
        self.asked = False  # this process was asked to stop
        self.stopped = False  # all processes stop after this step
        self.started = 0.0
        self.spent = 0.0  # seconds of training in earlier starts
        self.clock = 0.0  # seconds of training up to this step, on which all processes agree

    # ---- the loop ----------------------------------------------------------------------------------------------

    def train(self, *, resume: bool = True) -> dict[str, float]:
        """Trains to `recipe.steps`, or until the time limit or SIGTERM; returns the last logged numbers."""
        recipe, self.started = self.recipe, time.monotonic()
        self.run.mkdir(parents=True, exist_ok=True)
        if self.parallel.main:
            remove_leftovers(self.run)
        if resume and (states := list_states(self.run)):
            self._restore(states[-1])
        sources = {
            name: Prefetcher(self.parallel.deal(loader), upload=Upload(self.parallel.device))
            for name, loader in self.loaders.items()
            if loader is not None
        }
        self.clock = self.spent
        self.stopped = self.finished
        previous = signal.signal(signal.SIGTERM, self._on_sigterm) if _in_main_thread() else None
        curves = Curves(self.run) if self.parallel.main else None
        window: list[dict[str, torch.Tensor]] = []
        logged: dict[str, float] = {}
        self.objective.train()
        try:
            with _progress(recipe, self.parallel.main) as (bar, task):
                bar.update(task, completed=self.step)
                mark, marked = time.monotonic(), self.step
                while self.step < recipe.steps and not self.stopped:
                    window += self._one_step(sources)
                    self.step += 1
                    bar.update(task, completed=self.step)
                    if self._logs(self.step):
                        logged = self._mean(window)
                        if self.guard.skipped:
                            logged["skipped_steps"] = float(self.guard.skipped)
                        seconds = time.monotonic() - mark
                        logged["seconds_per_step"] = seconds / (self.step - marked)
                        logged |= self.meters.speed(seconds, self.parallel.groups, self.parallel.world)
                        logged["lr"] = self.optimizer.param_groups[0]["lr"]
                        mark, marked, window = time.monotonic(), self.step, []
                        self._report(logged, curves, bar)
                    if self.step == recipe.stop_after:
                        self.stopped = True
                    if recipe.time_limit_seconds and time.monotonic() - self.started > recipe.time_limit_seconds:
                        self.asked = True
                    if self.finished:
                        self.asked = True
                    if self.asked and self.parallel.world == 1:  # several processes agree on it during a step
                        self.stopped = True
                    if self.step % recipe.save_every == 0 or self.stopped or self.step == recipe.steps:
                        self._save(sources, last=self.stopped or self.step == recipe.steps)
        finally:
            for source in sources.values():
                source.close()
            if curves is not None:
                curves.close()
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)
        return logged

    def _one_step(self, sources: dict[str, Prefetcher]) -> list[dict[str, torch.Tensor]]:
        """Takes a step; returns the losses of each of this process's micro-batches, and the numbers of the step."""
        recipe = self.recipe
        factor = lr_factor(self._progress(), recipe.steps, recipe.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        origin = source_of_step(recipe, self.step)
        self.meters.awake = self._logs(self.step + 1)
        parts = []
        for number in range(self.parallel.micro_batches):
            batch = sources[origin].next()
            self.meters.take(batch)
            self.parallel.seed(self.step, number)
            with self.parallel.accumulating(last=number == self.parallel.micro_batches - 1):
                with torch.autocast(self.parallel.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                    losses = self.parallel.step(batch, self._progress() >= recipe.augment_from * recipe.steps)
                (losses["loss"] / self.parallel.micro_batches).backward()
            parts.append({name: value.detach() for name, value in losses.items()})
        self.parallel.finish_gradients()
        norm = self._clip()
        numbers = {"grad_norm": norm, **self.meters.hidden()}
        taken = self._agree(origin, torch.stack([part["loss"] for part in parts]).mean(), norm)
        if taken:
            self.optimizer.step()
            numbers |= self._after_update()
        else:
            self._forget_step()
        self.optimizer.zero_grad(set_to_none=True)
        return [*parts, numbers] if taken else []

    def _agree(self, origin: str, loss: torch.Tensor, norm: torch.Tensor) -> bool:
        """Decides with all processes whether the step is taken, whether it is the last, and what time it is.

        The one wait for the device in a step.
        """
        own = [torch.full((), value, device=loss.device) for value in (float(self.asked), self.seconds)]
        means = self.parallel.mean(torch.stack([loss.float(), *own]))
        mean_loss, stopped, self.clock, size = torch.cat([means, norm.float()[None]]).tolist()
        self.stopped = self.stopped or stopped > 0
        return self.guard.passes(self.step, origin, mean_loss, size)

    def _after_update(self) -> dict[str, torch.Tensor]:
        """What follows an optimiser step: experts are balanced, codebooks move, attention logits are clipped."""
        found: dict[str, torch.Tensor] = {}
        if self.parallel.backbone is not None:
            self.parallel.sum_loads()
            if self.meters.awake:
                found = self.meters.loads()
            self.parallel.backbone.update_expert_bias()
        self.parallel.sum_codes()
        for module in self.objective.modules():
            if isinstance(module, VectorQuantizer):
                module.update_codebook()
        if self.recipe.optim.optimizer == "muonclip":
            found["qk_max"] = qk_clip.apply(self.objective, self.recipe.optim.qk_clip)
        return found

    def _logs(self, step: int) -> bool:
        return step % self.recipe.log_every == 0 or step == self.recipe.steps

    def _forget_step(self) -> None:
        """Drops what the layers counted during a step that is not taken."""
        for module in self.objective.modules():
            if isinstance(module, Router):
                module.load.zero_()
            if isinstance(module, PeakLogits):
                module.peak.zero_()
            if isinstance(module, VectorQuantizer):
                module.counted = None

    def _clip(self) -> torch.Tensor:
        """Clips gradients, by `clip_groups` where an objective has parts that do not share a loss; returns a norm."""
        groups = getattr(self.objective, "clip_groups", None)
        parts = [self.objective.parameters()] if groups is None else groups()
        return torch.stack([self.parallel.clip(part, self.recipe.optim.grad_clip) for part in parts]).norm()

    def _progress(self) -> int:
        """Returns the step that the schedule is at; by the clock, where the recipe says so and that is further."""
        if not self.recipe.train_seconds or self.step < self.recipe.optim.warmup_steps:
            return self.step
        return max(self.step, int(self.clock / self.recipe.train_seconds * self.recipe.steps))

    @property
    def seconds(self) -> float:
        """Seconds of training, those of earlier starts included."""
        return self.spent + time.monotonic() - self.started

    @property
    def finished(self) -> bool:
        """Whether the run is at its end: all its steps are taken, or its seconds spent."""
        return self.step >= self.recipe.steps or 0 < self.recipe.train_seconds <= self.clock

    def whole_model(self, model: Model) -> Model | None:
        """Returns the trained model, whole and on the CPU, on the main process; None on others. All call this."""
        if self.parallel.world == 1:
            return model.cpu()
        tensors = whole_tensors(model)
        if not self.parallel.main:
            return None
        plain = Model(model.config)
        plain.load_state_dict(tensors)
        learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(learns[name])
        return plain

    # ---- state -------------------------------------------------------------------------------------------------

    def _save(self, sources: dict[str, Prefetcher], last: bool) -> None:
        """Writes a checkpoint; if that fails, goes on with the older ones, unless nothing would come after."""
        extra = {
            "step": self.step,
            "seconds": self.seconds,
            "guard": self.guard.state_dict(),
            "loaders": {name: source.state for name, source in sources.items()},
            "python_rng": list(random.getstate()[1]),
        }
        try:
            if self.parallel.world == 1:
                extra["optimizer"] = self.optimizer.state_dict()
                save_state(self.run, self.step, self.objective, extra, leave=self.fixed)
            else:
                extra["groups"] = group_state(self.optimizer)
                save_sharded(self.run, self.step, self.objective, self.optimizer, extra)
        except CheckpointError as error:
            if last:
                raise
            log.warning("%s Training goes on.", error)

    def _restore(self, path: Path) -> None:
        if self.parallel.world == 1 and not (path / SHARDS).is_dir():
            extra = load_state(path, self.objective, self.fixed)
            try:
                self.optimizer.load_state_dict(extra["optimizer"])
            except (KeyError, ValueError) as error:
                raise CheckpointError(
                    f"{path}: holds the state of another optimiser or of other trained parts ({error}); "
                    "train as before, or start anew with --no-resume."
                ) from None
        else:
            extra = read_any(path, self.objective, self.optimizer, self.names)
        self.step = extra["step"]
        self.spent = extra.get("seconds", 0.0)  # checkpoints of 0.1 have neither of the two
        if "guard" in extra:
            self.guard.load_state_dict(extra["guard"])
        for name, state in extra["loaders"].items():
            loader = self.loaders[name]
            if loader is not None:
                loader.load_state_dict(state)
        random.setstate((3, tuple(extra["python_rng"]), None))
        log.info("resumed from %s", path)

    def _on_sigterm(self, *_: object) -> None:
        self.asked = True

    def _mean(self, window: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Means over micro-batches and steps of a window and over all processes, of which some may lack a number."""
        names = self.parallel.union({name for numbers in window for name in numbers})
        if not names:
            return {}
        device = self.parallel.device
        found = {name: [n[name].float().to(device) for n in window if name in n] for name in names}
        zero = torch.zeros((), device=device)  # of what this process lacks
        sums = [torch.stack(found[name]).sum() if found[name] else zero for name in names]
        counts = torch.tensor([float(len(found[name])) for name in names], device=device)
        both = torch.stack([torch.stack(sums), counts])
        both = self.parallel.mean(both)
        return Meters.roots(dict(zip(names, (both[0] / both[1]).tolist(), strict=True)))

    def _report(self, numbers: dict[str, float], curves: Curves | None, bar: Progress) -> None:
        if curves is not None:
            curves.add(numbers, self.step)
        if self.parallel.main:
            for line in self.table.lines(f"step {self.step}/{self.recipe.steps}", numbers):
                bar.console.print(line, highlight=False, soft_wrap=True)


class _progress:
    """A rich progress bar on the main process, on standard error."""

    def __init__(self, recipe: Recipe, show: bool) -> None:
        from rich.console import Console

        columns = (TextColumn(recipe.stage), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not show)
        self.total = recipe.steps

    def __enter__(self) -> tuple[Progress, Any]:
        self.bar.start()
        return self.bar, self.bar.add_task("train", total=self.total)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()
