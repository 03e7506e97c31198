"""Regions that compute in the precision of their tensors, whatever autocast says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_NOTHING = nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Context that switches autocast off for `device`; costs nothing when it is off already."""
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device) else _NOTHING


def autocast_enabled(device: torch.device) -> bool:
    """True inside an autocast region of this kind of device."""
    return torch.amp.autocast_mode.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
