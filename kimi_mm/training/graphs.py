"""Parts of a training step as CUDA graphs, one for each batch shape.

    batch ─► Replayed (augmentation, audio tokenizer; no gradients) ─► GraphedBackbone (forward, backward) ─► losses
    batch ─► GraphedLosses (everything of a stage whose batches have one shape; forward, backward) ─────────► losses

Small models are bound by kernel launches, thousands a step; a captured graph replays them all at once. Loaders give
batches of a few fixed shapes, so a handful of captures serve a whole run. The optimiser stays eager.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kimi_mm.text.backbone import Backbone
from kimi_mm.training.upload import capturing

log = logging.getLogger(__name__)


class _Embedded(nn.Module):
    """Ids and features to the text branch's hidden state."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        padded = (*inputs, *[None] * (4 - len(inputs)))
        return self.backbone(self.backbone.embed(*padded)).text_hidden  # type: ignore[arg-type]


class _InAutocast(nn.Module):
    """A module as it is captured: with casts that are made anew, since a cached copy of a weight sees no updates."""

    def __init__(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", dtype=self.dtype or torch.bfloat16, enabled=bool(self.dtype), cache_enabled=False):
            return self.module(*inputs)


class _Losses(nn.Module):
    """A function to named losses as a module to their values, with the parameters of `owner`."""

    def __init__(self, owner: nn.Module, function: Callable[..., dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self.owner, self.function = owner, function
        self.names: tuple[str, ...] = ()

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        losses = self.function(*inputs)
        self.names = tuple(losses)
        return tuple(losses.values())


class Graphed:
    """Callable that stands for a module during training: forward and backward are captured once for each shape.

    Args:
        module: from tensors to a tensor, or to a tuple of them; must not read anything back. Its parameters are read
            and receive gradients in place. When a shape is first seen, no autograd graph made eagerly may still hold
            one of them: it ties the gradient to the default stream, which the capture of a backward must not enter.
        enabled: False runs eagerly, as on a CPU. Gradient accumulation is not possible when True, since replays
            overwrite the gradients they returned.
    """

    def __init__(self, module: nn.Module, enabled: bool) -> None:
        self.module, self.enabled = module, enabled
        self._graphs: dict[tuple, nn.Module] = {}
        self._pool = None

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """Returns what the module returns; with graphs it is valid until the next call of the same shapes."""
        if not (self.enabled and inputs[0].is_cuda and torch.is_grad_enabled()):
            return self.module(*inputs)
        key = tuple((tuple(t.shape), t.dtype) for t in inputs)
        if key not in self._graphs:
            self._graphs[key] = self._capture(inputs)
        return self._graphs[key](*inputs)

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> nn.Module:
        started = time.monotonic()
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # Capturing must not move the random numbers of the run: a resumed one captures again.
        draws = torch.cuda.get_rng_state()
        with capturing, torch.autocast("cuda", enabled=False):
            graphed = torch.cuda.make_graphed_callables(
                _InAutocast(self.module, dtype),
                tuple(t.clone() for t in inputs),
                allow_unused_input=True,
                pool=self._pool,
            )
        torch.cuda.set_rng_state(draws)
        log.info("captured %s in %.1f s", [tuple(t.shape) for t in inputs], time.monotonic() - started)
        return graphed  # type: ignore[return-value]


class GraphedBackbone(Graphed):
    """Stands for "embed, then forward": (text_ids, audio_ids[, features, feature_mask]) to hidden states [B, T, D]."""

    def __init__(self, backbone: Backbone, enabled: bool) -> None:
        super().__init__(_Embedded(backbone), enabled)


class GraphedLosses(Graphed):
    """Stands for a function from tensors to named losses, random draws included, which differ in each replay.

    Args:
        owner: module that holds all parameters which the losses train.
        function: from tensors to losses.
        enabled: as of `Graphed`.
    """

    def __init__(self, owner: nn.Module, function: Callable[..., dict[str, torch.Tensor]], enabled: bool) -> None:
        self._losses = _Losses(owner, function)
        super().__init__(self._losses, enabled)

    def __call__(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns losses that stay valid: what is logged is averaged over many steps."""
        values = super().__call__(*inputs)
        return {name: value.clone() for name, value in zip(self._losses.names, values, strict=True)}


class Replayed:
    """Callable that stands for a function without gradients: captured once for each set of shapes, then replayed.

    Args:
        function: from tensors to a tuple of tensors; must not read anything back. Random draws differ in each replay.
        enabled: False, and anything but a CUDA device, calls the function itself.
    """

    def __init__(self, function: Callable[..., tuple[torch.Tensor, ...]], enabled: bool) -> None:
        self.function, self.enabled = function, enabled
        self._graphs: dict[tuple, tuple] = {}

    @torch.no_grad()
    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the function's results; with graphs they are valid until the next call of the same shapes."""
        if not (self.enabled and inputs[0].is_cuda):
            return self.function(*inputs)
        key = (torch.is_autocast_enabled("cuda"), *((tuple(t.shape), t.dtype) for t in inputs))
        if key not in self._graphs:
            self._graphs[key] = self._capture(inputs)
        graph, held, results = self._graphs[key]
        for mine, given in zip(held, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return results

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> tuple:
        held = tuple(t.clone() for t in inputs)
        # Capturing must not move the random numbers of the run: a resumed one captures again.
        draws = torch.cuda.get_rng_state()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.function(*held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with capturing, torch.cuda.graph(graph):
            results = self.function(*held)
        torch.cuda.set_rng_state(draws)
        return graph, held, results
