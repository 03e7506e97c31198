"""Spreads an objective over the processes of a run: DDP or FSDP2, experts and stretches of rows over groups of ranks.

    ranks            data groups x context ranks; consecutive ranks share rows, and consecutive ranks share experts
    micro-batches    gradient_accumulation of them make a step, dealt to the data groups in turn
    experts          cut along E, tokens travel (kimi_mm.text.expert_parallel)
    rows             cut along T (kimi_mm.text.context)
    gradients        averaged over all ranks by DDP or FSDP2; here, in one go, small and expert ones, and all of them
                     where CUDA graphs write them, which know nothing of DDP's hooks
    FSDP2            matrices of each layer in fp32 shards, gathered in bf16; vectors and routers stay whole, in fp32

A step does not depend on how it is spread: micro-batches, their random draws and all counts are those of one process.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from kimi_mm.audio.quantizer import Counted, VectorQuantizer
from kimi_mm.config import ConfigError
from kimi_mm.data.loader import TextBatch
from kimi_mm.processing import IGNORE
from kimi_mm.text.backbone import Backbone, DecoderLayer
from kimi_mm.text.context import Context
from kimi_mm.text.expert_parallel import ExpertPlace
from kimi_mm.text.mlp import DenseMLP
from kimi_mm.text.moe import Experts, Router
from kimi_mm.training.document_objective import DocumentObjective
from kimi_mm.training.recipe import MIXED, Recipe
from kimi_mm.training.sharding import expert_places, local


def join_processes() -> None:
    """Makes this process one of the run's, if a launcher (torchrun, accelerate) started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(_local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def leave_processes() -> None:
    """Ends what `join_processes` began, its threads included; call it when nothing refers to the model any more.

    A thread of gloo takes Python's lock to let go of a tensor, and aborts the process if Python is ending by then.
    Threads end with their group, and a group when nothing holds it: no model, and no mesh, of which PyTorch caches
    some for good.
    """
    if not dist.is_initialized():
        return
    gc.collect()  # models are full of cycles
    for mesh in [found for found in gc.get_objects() if type(found) is DeviceMesh]:
        getattr(mesh, "_pg_registry", {}).clear()
    dist.destroy_process_group()


def own_device() -> torch.device:
    """Returns this process's device: the GPU of its number on its host, Apple's, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", _local_rank())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def from_main(make: Callable[[], Any]) -> Any:
    """Returns what `make` returns on rank 0, on all ranks; they wait for it. Without other processes, just calls it."""
    if not dist.is_initialized():
        return make()
    box = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


class TrainingStep(nn.Module):
    """An objective behind one forward, on which DDP and FSDP hang; cuts rows for context parallelism."""

    def __init__(self, objective: nn.Module, recipe: Recipe, context: Context | None) -> None:
        super().__init__()
        self.objective, self.recipe, self.context = objective, recipe, context

    def forward(self, batch: Any, augmented: bool) -> dict[str, Tensor]:
        """Returns the losses of a micro-batch, for which "loss" is to be minimised."""
        share = None
        if self.context is not None:
            labels = self.context.cut(batch.labels)
            share = self.context.size * (labels != IGNORE).sum() / (batch.labels != IGNORE).sum().clamp_min(1)
            ids = {name: self.context.cut(getattr(batch, name)) for name in ("text_ids", "audio_ids")}
            batch = replace(batch, **ids, labels=labels)
        if not isinstance(batch, TextBatch):
            losses = self.objective(batch, augmented)
        elif self.recipe.stage in MIXED:
            losses = self.objective.text_losses(batch)  # type: ignore[operator]
        else:
            losses = self.objective(batch)
        return losses if share is None else {name: loss * share for name, loss in losses.items()}


class Dealt:
    """A loader of which every data group keeps one micro-batch in `groups`; its state is the same on all ranks.

    What other groups keep is not even made, where that takes time.
    """

    def __init__(self, loader: Any, group: int, groups: int) -> None:
        self.loader, self.group, self.groups = loader, group, groups
        loader.group, loader.groups = group, groups

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            mine = None
            for number in range(self.groups):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                if number == self.group:
                    mine = batch
            yield mine

    def state_dict(self) -> Any:
        return self.loader.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.loader.load_state_dict(state)


class Parallel:
    """The processes of a run, and what they do together.

    Args:
        recipe: its `parallel` section, precision and gradient_accumulation.
        objective: what is trained; it is moved to the device, and its modules are changed in place.
        device: of this process.

    Raises:
        ConfigError: if the processes cannot be used as the recipe says.
    """

    def __init__(self, recipe: Recipe, objective: nn.Module, device: torch.device) -> None:
        config = recipe.parallel
        self.config, self.recipe, self.device = config, recipe, device
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.main = self.rank == 0
        backbone = getattr(objective, "backbone", None)
        self.backbone = backbone if isinstance(backbone, Backbone) else None
        moe = None if self.backbone is None else self.backbone.config.moe
        if config.expert > 1 and self.backbone is None:
            raise ConfigError(f"parallel.expert={config.expert}: stage '{recipe.stage}' trains no experts.")
        config.check_world(self.world, None if moe is None else moe.num_experts, recipe.gradient_accumulation)
        if config.context > 1 and recipe.stage != "text":
            raise ConfigError(f"parallel.context={config.context}: only the text stage cuts its rows.")
        self.groups = self.world // config.context
        self.group = self.rank // config.context
        if recipe.cuda_graphs and self.micro_batches > 1:
            raise ConfigError(
                f"cuda_graphs: a process cannot accumulate {self.micro_batches} micro-batches, since replays overwrite "
                f"gradients; set gradient_accumulation={self.groups}, or cuda_graphs=false."
            )
        self.objective = objective.to(device)
        if self.world > 1 and isinstance(objective, DocumentObjective):
            objective.everywhere = True
        self.context = self._context() if config.context > 1 else None
        step = TrainingStep(objective, recipe, self.context)
        if config.expert > 1:
            self._spread_experts()
        self._prepare_layers()
        self.step = self._wrap(step)
        self._places = expert_places(objective)
        self._apart = self._averaged_here()
        names = {id(p): name for name, p in objective.named_parameters()}
        self._place_of = {number: self._places[name] for number, name in names.items() if name in self._places}

    # ---- setting up --------------------------------------------------------------------------------------------

    def _context(self) -> Context:
        assert self.backbone is not None
        mesh = init_device_mesh(self.device.type, (self.groups, self.config.context), mesh_dim_names=("data", "row"))
        context = Context(mesh.get_group("row"))
        self.backbone.context = context
        return context

    def _spread_experts(self) -> None:
        assert self.backbone is not None
        assert self.backbone.config.moe is not None
        copies, shards = self.world // self.config.expert, 1
        if self.config.data == "fsdp":  # stacks are cut between experts only, so their number bounds the shards
            shards = math.gcd(copies, self.backbone.config.moe.num_experts // self.config.expert)
        names = ("replica", "shard", "expert")
        mesh = init_device_mesh(self.device.type, (copies // shards, shards, self.config.expert), mesh_dim_names=names)
        flat = DeviceMesh(self.device.type, mesh.mesh.transpose(1, 2).flatten(1))
        whole = DeviceMesh(self.device.type, mesh.mesh.flatten(0, 1))
        place, number = ExpertPlace(whole, flat, shards), mesh.get_local_rank("expert")
        cut = mesh["shard"] if shards == copies else mesh["replica", "shard"]
        for module in self.objective.modules():
            if isinstance(module, Experts):
                for name, weight in list(module.named_parameters()):
                    part = weight.detach().chunk(self.config.expert)[number].clone()
                    setattr(module, name, nn.Parameter(part, requires_grad=weight.requires_grad))
                module.place = place
                if shards > 1:
                    fully_shard(module, mesh=cut, mp_policy=self._precision())

    def _prepare_layers(self) -> None:
        for module in self.objective.modules():
            if isinstance(module, DecoderLayer):
                module.recompute = self.config.checkpoint_activations
            if isinstance(module, DenseMLP) and self.config.compile:
                module.compile()

    def _wrap(self, step: TrainingStep) -> nn.Module:
        if self.world == 1:
            return step
        if self.config.data == "ddp" and self.recipe.cuda_graphs:
            for tensor in (*step.parameters(), *step.buffers()):
                dist.broadcast(tensor.detach(), 0)
            return step
        if self.config.data == "ddp":
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(step, list(expert_places(step)))
            return DistributedDataParallel(step, broadcast_buffers=False, find_unused_parameters=True)
        mesh = init_device_mesh(self.device.type, (self.world,))
        experts = expert_places(step)
        apart = {p for name, p in step.named_parameters() if name in experts or _stays_whole(name, p)}
        options = {"mesh": mesh, "mp_policy": self._precision(), "ignored_params": apart}
        for module in step.modules():
            if isinstance(module, DecoderLayer):
                fully_shard(module, **options)
        fully_shard(step, **options)
        return step

    def _precision(self) -> MixedPrecisionPolicy:
        if self.recipe.precision == "fp32":
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def _averaged_here(self) -> list[tuple[list[nn.Parameter], dist.ProcessGroup]]:
        """Parameters whose gradients neither DDP nor FSDP averages, with the ranks that hold copies of them."""
        if self.world == 1:
            return []
        whole, experts, place = [], [], None
        for name, parameter in self.objective.named_parameters():
            if not parameter.requires_grad or isinstance(parameter, DTensor):
                continue
            if name in self._places:
                place = self._places[name]
                experts.append(parameter)
            elif self.config.data == "fsdp" or self.recipe.cuda_graphs:
                whole.append(parameter)
        found: list[tuple[list[nn.Parameter], dist.ProcessGroup]] = []
        if whole:
            assert dist.group.WORLD is not None
            found.append((whole, dist.group.WORLD))
        if place is not None and place.copies > 1:
            found.append((experts, place.mesh.get_group(0)))
        return found

    # ---- what a step needs -------------------------------------------------------------------------------------

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step that this process works on."""
        return self.recipe.gradient_accumulation // self.groups

    def deal(self, loader: Any) -> Any:
        """Returns a loader of this process's share of the micro-batches."""
        return loader if self.groups == 1 else Dealt(loader, self.group, self.groups)

    def seed(self, step: int, number: int) -> None:
        """Seeds the random draws of this process's micro-batch `number` of a step, whichever process draws them."""
        micro_batch = number * self.groups + self.group
        torch.manual_seed(((self.recipe.seed * 1_000_003 + step) * 10_007 + micro_batch) % 2**63)

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: under DDP gradients travel after the last one only.

        FSDP2 sends them after each, for it would keep whole ones until then.
        """
        outer: AbstractContextManager = contextlib.nullcontext()
        if isinstance(self.step, DistributedDataParallel) and not last:
            outer = self.step.no_sync()
        with outer:
            yield

    def finish_gradients(self) -> None:
        """Averages the gradients that are left to average, in one go for each group of ranks."""
        for parameters, group in self._apart:
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                flat = torch.cat([g.float().flatten() for g in gradients])
                dist.all_reduce(flat, group=group)
                flat /= dist.get_world_size(group)
                for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                    gradient.copy_(part.view_as(gradient))
        self._drop_unreached()

    def _drop_unreached(self) -> None:
        """Leaves parts that no micro-batch of the step has reached without gradients, as they are in one process."""
        if self.world == 1 or not isinstance(self.objective, DocumentObjective):
            return
        parts = self.objective.optional_parts()
        reached = torch.tensor([float(name in self.objective.reached) for name in parts])
        dist.all_reduce(reached)  # on the CPU: the device need not be waited for
        self.objective.reached = set()
        for parameters, known in zip(parts.values(), reached.tolist(), strict=True):
            for parameter in parameters if not known else ():
                parameter.grad = None

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Scales gradients so that their norm over all ranks is at most `limit`; returns the norm before."""
        given = [p for p in parameters if p.grad is not None]
        if not given:
            return torch.zeros((), device=self.device)
        gradients = [local(p.grad) for p in given]  # type: ignore[arg-type]
        squares = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)]).square()
        if self.world > 1:
            copies = torch.tensor([float(self._copies(p)) for p in given]).to(squares.device, non_blocking=True)
            total = (squares / copies).sum()
            dist.all_reduce(total)
        else:
            total = squares.sum()
        norm = total.sqrt()
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp_max(1.0))
        return norm

    def _copies(self, parameter: nn.Parameter) -> int:
        """How many ranks hold the same numbers of a parameter."""
        place = self._place_of.get(id(parameter))
        if place is not None:
            return place.copies // place.shards if isinstance(parameter, DTensor) else place.copies
        return 1 if isinstance(parameter, DTensor) else self.world

    def sum_loads(self) -> None:
        """Adds up the picks that the routers of all ranks counted."""
        if self.world == 1 or self.backbone is None:
            return
        routers = [module for module in self.backbone.modules() if isinstance(module, Router)]
        if routers:
            loads = torch.cat([router.load for router in routers])
            dist.all_reduce(loads)
            for router, load in zip(routers, loads.split([len(router.load) for router in routers]), strict=True):
                router.load.copy_(load)

    def sum_codes(self) -> None:
        """Puts together what the quantizers of all ranks counted, see `kimi_mm.audio.quantizer.Counted`."""
        for module in self.objective.modules() if self.world > 1 else ():
            if isinstance(module, VectorQuantizer) and (counted := module.counted) is not None:
                best = counted.keys.clone()
                dist.all_reduce(best, dist.ReduceOp.MAX)
                won = (counted.keys == best) & best.isfinite()
                both = torch.cat([counted.sums, torch.where(won[:, None], counted.spares, 0.0)], 1)
                dist.all_reduce(both)
                sums, spares = both.split([counted.sums.shape[1], counted.spares.shape[1]], 1)
                module.counted = Counted(sums, best, spares)

    def mean(self, numbers: Tensor) -> Tensor:
        """Averages numbers of any shape over the ranks."""
        if self.world > 1:
            numbers = numbers.clone()
            dist.all_reduce(numbers)
            numbers /= self.world
        return numbers

    def union(self, names: set[str]) -> list[str]:
        """Returns, sorted, the names that any rank has."""
        if self.world > 1:
            everywhere: list[set[str]] = [set()] * self.world
            dist.all_gather_object(everywhere, names)
            names = set().union(*everywhere)
        return sorted(names)


def _stays_whole(name: str, parameter: nn.Parameter) -> bool:
    """True for what is small and wants fp32: vectors, decays, routers."""
    return parameter.dim() < 2 or name.endswith("router.weight")
