"""The training loop: accelerate for devices and precision, exact resume, TensorBoard, a progress bar.

loaders ─► batch ─► objective ─► loss ─► backward ─► clip ─► guard ─► optimiser ─► (expert bias, QK-clip) ─► log / save
"""

from __future__ import annotations

import dataclasses
import logging
import random
import signal
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from kimi_mm.data.loader import Prefetcher, SpeechLoader, TextBatch, TextLoader
from kimi_mm.data.scene_loader import SceneLoader
from kimi_mm.data.target_loader import TargetLoader
from kimi_mm.errors import CheckpointError
from kimi_mm.text.attention import PeakLogits
from kimi_mm.text.backbone import Backbone
from kimi_mm.text.moe import Router
from kimi_mm.training import qk_clip
from kimi_mm.training.guard import Guard
from kimi_mm.training.muon import Muon, is_hidden_matrix
from kimi_mm.training.recipe import OptimConfig, Recipe
from kimi_mm.training.schedule import lr_factor, source_of_step
from kimi_mm.training.state import list_states, load_state, remove_leftovers, save_state

log = logging.getLogger(__name__)


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Splits trainable parameters: decay for matrices, none for vectors and decays; encoder and eyes have own rates.

    Groups carry `muon` True for the matrices that muonclip orthogonalises.
    """
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            plain = parameter.dim() < 2 or any(part in name for part in ("A_log", "dt_bias", "query", "embed"))
            muon = config.optimizer == "muonclip" and not plain and is_hidden_matrix(name, parameter)
            scale = config.encoder_lr_scale if ".encoder." in name else 1.0
            scale = config.vision_lr_scale if name.startswith("vision.") else scale
            groups.setdefault((plain, scale, muon), []).append(parameter)
    return [
        {
            "params": parameters,
            "muon": muon,
            "weight_decay": 0.0 if plain else config.weight_decay,
            "lr": config.lr * scale,
            "peak_lr": config.lr * scale,
        }
        for (plain, scale, muon), parameters in groups.items()
    ]


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
        speech, text, scenes: loaders; which of them a step uses follows from the stage and the shares.
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
    ) -> None:
        self.recipe, self.run = recipe, run
        self.accelerator = Accelerator(mixed_precision="no" if recipe.precision == "fp32" else recipe.precision)
        set_seed(recipe.seed)
        optimizer = make_optimizer(objective, recipe.optim, fused=self.accelerator.device.type == "cuda")
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.loaders = {"speech": speech, "text": text, "scenes": scenes}
        self.guard = Guard(recipe.guard)
        self.step = 0
        self.stopped = False
        self.started = 0.0

    # ---- the loop ----------------------------------------------------------------------------------------------

    def train(self, *, resume: bool = True) -> dict[str, float]:
        """Trains to `recipe.steps`, or until the time limit or SIGTERM; returns the last logged numbers."""
        recipe, self.started = self.recipe, time.monotonic()
        self.run.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.run)
        if resume and (states := list_states(self.run)):
            self._restore(states[-1])
        sources = {name: Prefetcher(loader) for name, loader in self.loaders.items() if loader is not None}
        previous = signal.signal(signal.SIGTERM, self._on_sigterm) if _in_main_thread() else None
        writer = _summary_writer(self.run)
        window: list[dict[str, torch.Tensor]] = []
        logged: dict[str, float] = {}
        self.objective.train()
        try:
            with _progress(recipe, self.accelerator.is_local_main_process) as (bar, task):
                bar.update(task, completed=self.step)
                mark, marked = time.monotonic(), self.step
                while self.step < recipe.steps and not self.stopped:
                    window.append(self._one_step(sources))
                    self.step += 1
                    bar.update(task, completed=self.step)
                    if self.step % recipe.log_every == 0 or self.step == recipe.steps:
                        logged = _mean(window)
                        if self.guard.skipped:
                            logged["skipped_steps"] = float(self.guard.skipped)
                        logged["seconds_per_step"] = (time.monotonic() - mark) / (self.step - marked)
                        mark, marked, window = time.monotonic(), self.step, []
                        self._report(logged, writer, bar)
                    if self.step == recipe.stop_after:
                        self.stopped = True
                    if recipe.time_limit_seconds and time.monotonic() - self.started > recipe.time_limit_seconds:
                        self.stopped = True
                    if self.step % recipe.save_every == 0 or self.stopped or self.step == recipe.steps:
                        self._save(sources, last=self.stopped or self.step == recipe.steps)
        finally:
            for source in sources.values():
                source.close()
            writer.close()
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)
        return logged

    def _one_step(self, sources: dict[str, Prefetcher]) -> dict[str, torch.Tensor]:
        recipe = self.recipe
        factor = lr_factor(self._progress(), recipe.steps, recipe.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        origin = source_of_step(recipe, self.step)
        parts = []
        for _ in range(recipe.gradient_accumulation):
            batch = self._to_device(sources[origin].next())
            with self.accelerator.autocast():
                losses = self._losses(batch)
            self.accelerator.backward(losses["loss"] / recipe.gradient_accumulation)
            parts.append({name: value.detach() for name, value in losses.items()})
        numbers = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        norm = self._clip()
        numbers["grad_norm"] = norm
        # The one place of a step that waits for the device.
        loss, size = torch.stack([numbers["loss"].float(), norm.float()]).tolist()
        if self.guard.passes(self.step, origin, loss, size):
            self.optimizer.step()
            numbers |= self._after_update()
        else:
            self._forget_step()
            numbers = {}
        self.optimizer.zero_grad(set_to_none=True)
        return numbers

    def _after_update(self) -> dict[str, torch.Tensor]:
        """What follows an optimiser step: experts are balanced, attention logits are clipped."""
        objective = self.accelerator.unwrap_model(self.objective)
        backbone = getattr(objective, "backbone", None)
        if isinstance(backbone, Backbone):
            backbone.update_expert_bias()
        if self.recipe.optim.optimizer == "muonclip":
            return {"qk_max": qk_clip.apply(objective, self.recipe.optim.qk_clip)}
        return {}

    def _forget_step(self) -> None:
        """Drops what the layers counted during a step that is not taken."""
        for module in self.accelerator.unwrap_model(self.objective).modules():
            if isinstance(module, Router):
                module.load.zero_()
            if isinstance(module, PeakLogits):
                module.peak.zero_()

    def _clip(self) -> torch.Tensor:
        """Clips gradients, by `clip_groups` where an objective has parts that do not share a loss; returns a norm."""
        groups = getattr(self.accelerator.unwrap_model(self.objective), "clip_groups", None)
        parts = [self.objective.parameters()] if groups is None else groups()
        norms = [self.accelerator.clip_grad_norm_(part, self.recipe.optim.grad_clip) for part in parts]
        return torch.stack([torch.as_tensor(norm).float() for norm in norms]).norm()

    def _progress(self) -> int:
        """Returns the step that the schedule is at; by the clock, where the recipe says so and that is further."""
        if not self.recipe.anneal_by_time or self.step < self.recipe.optim.warmup_steps:
            return self.step
        share = (time.monotonic() - self.started) / self.recipe.time_limit_seconds
        return max(self.step, int(share * self.recipe.steps))

    def _losses(self, batch: Any) -> dict[str, torch.Tensor]:
        if isinstance(batch, TextBatch) and self.recipe.stage in ("asr", "vision"):
            return self.accelerator.unwrap_model(self.objective).text_losses(batch)
        if isinstance(batch, TextBatch):
            return self.objective(batch)
        return self.objective(batch, self.step >= self.recipe.augment_from * self.recipe.steps)

    def _to_device(self, batch: Any) -> Any:
        device = self.accelerator.device
        moved = {
            field.name: value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value
            for field in dataclasses.fields(batch)
            if isinstance(value := getattr(batch, field.name), torch.Tensor)
        }
        return dataclasses.replace(batch, **moved)

    # ---- state -------------------------------------------------------------------------------------------------

    def _save(self, sources: dict[str, Prefetcher], last: bool) -> None:
        """Writes a checkpoint; if that fails, goes on with the older ones, unless nothing would come after."""
        if not self.accelerator.is_main_process:
            return
        extra = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "guard": self.guard.state_dict(),
            "loaders": {name: source.state for name, source in sources.items()},
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "python_rng": list(random.getstate()[1]),
        }
        try:
            save_state(self.run, self.step, self.accelerator.unwrap_model(self.objective), extra)
        except CheckpointError as error:
            if last:
                raise
            log.warning("%s Training goes on.", error)

    def _restore(self, path: Path) -> None:
        extra = load_state(path, self.accelerator.unwrap_model(self.objective))
        self.step = extra["step"]
        self.optimizer.load_state_dict(extra["optimizer"])
        if "guard" in extra:  # checkpoints from before there was one
            self.guard.load_state_dict(extra["guard"])
        for name, state in extra["loaders"].items():
            loader = self.loaders[name]
            if loader is not None:
                loader.load_state_dict(state)
        torch.set_rng_state(extra["torch_rng"])
        if extra["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(extra["cuda_rng"])
        random.setstate((3, tuple(extra["python_rng"]), None))
        log.info("resumed from %s", path)

    def _on_sigterm(self, *_: object) -> None:
        self.stopped = True

    def _report(self, numbers: dict[str, float], writer: Any, bar: Progress) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, self.step)
        if self.accelerator.is_local_main_process:
            line = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            bar.console.print(f"step {self.step}/{self.recipe.steps}  {line}", highlight=False, soft_wrap=True)


def _mean(window: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    names = {name for numbers in window for name in numbers}
    return {
        name: float(torch.stack([n[name].float().cpu() for n in window if name in n]).mean()) for name in sorted(names)
    }


def _summary_writer(run: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"))


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
