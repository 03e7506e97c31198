"""Batches on their way to the device, from a loader's own thread: the step under way does not wait for the next one.

loader's thread:   batch ─► pinned ─► copied on a stream of its own ─► event
training thread:                                                       └─► waited for by the device, not the host
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch

from kimi_mm.processing import move

# A capture fails if another thread allocates meanwhile: whoever captures, and whoever uploads, holds this.
capturing = threading.Lock()


@dataclasses.dataclass
class Sent:
    """A batch whose tensors are being copied; `copied` is None where nothing has to be waited for."""

    batch: Any
    copied: torch.cuda.Event | None


class Upload:
    """Moves batches to a device.

    Args:
        device: on anything but a CUDA device `send` copies at once, which for a CPU is not at all.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, batch: Any) -> Sent:
        """Begins to copy a batch: a dataclass of tensors and other values, or something with a method `to`."""
        if self._stream is None:
            return Sent(to_device(batch, self.device), None)
        with capturing, torch.cuda.stream(self._stream):
            moved = to_device(batch, self.device)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return Sent(moved, copied)

    def receive(self, sent: Sent) -> Any:
        """Returns the batch for use on the current stream."""
        if sent.copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(sent.copied)
            # The memory was allocated on the other stream, which must not take it back before this one is done.
            for tensor in _tensors(sent.batch):
                tensor.record_stream(stream)
        return sent.batch


def to_device(batch: Any, device: torch.device) -> Any:
    """Returns a batch with its tensors on a device."""
    if hasattr(batch, "to"):
        return batch.to(device)
    moved = {
        field.name: move(value, device)
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor)
    }
    return dataclasses.replace(batch, **moved)


def _tensors(value: Any) -> list[torch.Tensor]:
    """Returns the device's tensors among the fields of nested dataclasses."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_cuda else []
    if not dataclasses.is_dataclass(value):
        return []
    return [tensor for field in dataclasses.fields(value) for tensor in _tensors(getattr(value, field.name))]
