"""What a detokenizer asks of its DiT, as functions of tensors alone, so that CUDA graphs can replay them.

A small batch of short chunks keeps a GPU waiting for launches: thousands for one window. A graph needs fixed shapes,
so the past is then padded to its full length and hidden by a mask; one graph serves all windows of a size.

Shapes: B rows, N codes, T = 4 N frames, C past frames, M mel bins, L layers, H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from kimi_mm.audio.detokenizer_config import StreamingConfig
from kimi_mm.audio.dit import DiT
from kimi_mm.audio.dit_cache import DiTCache
from kimi_mm.audio.flow import integrate, time_grid

Tensors = tuple[torch.Tensor, ...]


class Replay:
    """Runs a DiT directly, or by graphs.

    Args:
        dit: its parameters are read in place; not owned.
        enabled: pad the past and replay; False runs directly, without padding.
    """

    def __init__(self, dit: DiT, enabled: bool = False) -> None:
        self.dit, self.enabled = dit, enabled
        self._functions: dict[StreamingConfig | None, Callable[..., Tensors]] = {}

    def solve(
        self, noise: torch.Tensor, codes: torch.Tensor, cache: DiTCache, counts: list[int], config: StreamingConfig
    ) -> torch.Tensor:
        """See `Detokenizer.solve`."""
        return self._call(config, partial(follow_flow, self.dit, config), noise, codes, cache, counts)[0]

    def keys_values(self, mel: torch.Tensor, codes: torch.Tensor, cache: DiTCache, counts: list[int]) -> Tensors:
        """Returns unrotated keys and values [L, B, H, T, K] of finished frames."""
        return self._call(None, partial(read_frames, self.dit), mel, codes, cache, counts)

    def _call(
        self,
        key: StreamingConfig | None,
        function: Callable[..., Tensors],
        x: torch.Tensor,
        codes: torch.Tensor,
        cache: DiTCache,
        counts: list[int],
    ) -> Tensors:
        if not self.enabled:
            return function(x, codes, cache.keys, cache.values, cache.visible(counts))
        if key not in self._functions:
            self._functions[key] = replayed(function)
        cache = cache.padded(self.dit.config.context_frames)
        return self._functions[key](x, codes, cache.keys, cache.values, cache.visible(counts, always=True))


def follow_flow(
    dit: DiT,
    config: StreamingConfig,
    noise: torch.Tensor,
    codes: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor | None,
) -> Tensors:
    """Follows the flow from noise [B, T, M] to normalised mel, given codes [B, N] and a past.

    Guidance w follows v(null) + w (v(codes) - v(null)) (Ho & Salimans 2022); the past keeps its codes.
    """
    cond, guided = dit.condition(codes), config.guidance != 1.0
    context = dit.context_of(keys, values, seen, noise.shape[1])
    if guided:
        cond = torch.cat([cond, dit.condition(torch.full_like(codes, dit.null_code))])
        context = context.repeated(2)

    def velocity(x: torch.Tensor, time: float) -> torch.Tensor:
        t = torch.full((1, 1), time, device=x.device)
        if not guided:
            return dit(x, t, cond, context).float()
        with_codes, without = dit(torch.cat([x, x]), t, cond, context).float().chunk(2)
        return without + config.guidance * (with_codes - without)

    return (integrate(velocity, noise, time_grid(config.steps, config.time_grid), config.solver),)


def read_frames(
    dit: DiT,
    mel: torch.Tensor,
    codes: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor | None,
) -> Tensors:
    """Reads finished frames [B, T, M] as the past of what follows; see `DiT.keys_values`."""
    return dit.keys_values(mel, dit.condition(codes), dit.context_of(keys, values, seen, mel.shape[1]))


def replayed(function: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """Returns the function as CUDA graphs whose results stay valid; on other devices the function itself."""
    from kimi_mm.training.graphs import Replayed

    run = Replayed(function, enabled=True)

    def call(*inputs: torch.Tensor) -> Tensors:
        results = run(*inputs)
        return tuple(t.clone() for t in results) if inputs[0].is_cuda else results

    return call
