"""Chooses the implementation of a kernel: Triton where there is one for the device, the reference elsewhere.

The choice is made once per (operation, device type) and logged with its reason. `KIMI_MM_KERNELS` overrides it:
`auto` (default), `reference`, or `triton`, which refuses where no Triton kernel can run. Triton runs on CUDA; on a CPU
only when asked for, in Triton's interpreter (TRITON_INTERPRET=1), which is slow and meant for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from kimi_mm.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

MODES = ("auto", "reference", "triton")
# Where the operations live: package, and the module of the Triton twin in it.
_HOMES = {
    "chunk_kda": ("kda", "triton"),
    "kda_step": ("kda", "triton_step"),
    "kda_decode": ("kda", "triton_step"),
    "short_conv": ("conv", "triton"),
    "gated_rms_norm": ("norm", "triton"),
    "attn_res_mix": ("attn_res", "triton"),
    "attn_res_mix_norm": ("attn_res", "triton"),
    "attn_res_begin": ("attn_res", "triton"),
    "attn_res_finish": ("attn_res", "triton"),
    "attn_res_finish_norm": ("attn_res", "triton"),
    "moe_route": ("moe", "triton"),
    "moe_experts": ("moe", "triton"),
    "linear_cross_entropy": ("cross_entropy", "triton"),
}

log = logging.getLogger(__name__)


class KernelError(UserError):
    """A kernel that was asked for and does not exist here."""


def resolve(op: str, device: torch.device | str, force: str | None = None) -> Callable[..., Any]:
    """Returns the function that runs `op` on `device`.

    Args:
        op: name of a public function of `kimi_mm.kernels`.
        device: only its type matters.
        force: "reference" or "triton"; None follows KIMI_MM_KERNELS.

    Raises:
        KernelError: if the mode is unknown, or Triton was asked for and has no kernel for `op` on that device.
    """
    return _resolve(op, device if isinstance(device, str) else device.type, force)


def dispatched(op: str, specification: Callable[P, R]) -> Callable[P, R]:
    """Wraps a reference function into one that runs the implementation for its first tensor's device."""

    name = next(iter(inspect.signature(specification).parameters))

    @functools.wraps(specification)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0] if args else kwargs[name]
        if not isinstance(first, torch.Tensor):
            first = first[0] if first else None
        return _resolve(op, "cpu" if first is None else first.device.type, None)(*args, **kwargs)

    return call


def forget() -> None:
    """Drops all choices, so that a changed KIMI_MM_KERNELS is read again."""
    _resolve.cache_clear()


@functools.cache
def _resolve(op: str, device_type: str, force: str | None) -> Callable[..., Any]:
    device_type = device_type.partition(":")[0]
    mode = force or os.environ.get("KIMI_MM_KERNELS", "auto")
    if mode not in MODES:
        raise KernelError(f"KIMI_MM_KERNELS='{mode}' must be one of {', '.join(MODES)}.")
    if op not in _HOMES:
        raise KernelError(f"Unknown kernel '{op}'; known are {', '.join(_HOMES)}.")
    package, twin = _HOMES[op]
    interpreted = mode == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if mode == "reference":
        chosen, reason = "reference", "asked for"
    elif importlib.util.find_spec("triton") is None:
        chosen, reason = "reference", "the package triton is not installed"
    elif device_type != "cuda" and not interpreted:
        chosen, reason = "reference", f"Triton needs CUDA, the tensors are on {device_type}"
    else:
        chosen, reason = twin, "Triton's interpreter" if device_type != "cuda" else "CUDA device"
    if mode == "triton" and chosen == "reference":
        raise KernelError(f"KIMI_MM_KERNELS=triton: {op}: {reason}; use 'auto' or 'reference'.")
    log.info("kernel %s on %s: %s (%s)", op, device_type, chosen, reason)
    return getattr(importlib.import_module(f"kimi_mm.kernels.{package}.{chosen}"), op)
