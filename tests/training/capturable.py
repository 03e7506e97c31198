"""Says on a CPU what a CUDA graph would not take: reading values back, shapes that follow from values, host data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = (
    "_local_scalar_dense",
    "nonzero",
    "nonzero_static",
    "masked_select",
    "equal",
    "bincount",
    "_unique",
    "_unique2",
)
READS += ("unique_dim", "unique_consecutive", "is_nonzero")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
HOST_DATA = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer, torch.Tensor.new_tensor}
TO_HOST = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.item, torch.Tensor.pin_memory}
FACTORIES = {
    torch.arange,
    torch.linspace,
    torch.zeros,
    torch.ones,
    torch.full,
    torch.empty,
    torch.eye,
    torch.scalar_tensor,
}
FACTORIES |= {torch.rand, torch.randn, torch.randint, torch.randperm, torch.hann_window, torch.tril_indices}


class NotCapturable(AssertionError):
    """Something that a capture on a GPU would fail at, or freeze."""


class _Functions(TorchFunctionMode):
    """What Python calls: data of the host, and tensors that would be made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in HOST_DATA | TO_HOST:
            raise NotCapturable(f"{func.__name__} moves data between host and device")
        if func in FACTORIES and kwargs.get("device") is None and kwargs.get("out") is None:
            raise NotCapturable(f"{func.__name__} without a device makes a tensor on the host")
        if func is torch.Tensor.to and "cpu" in map(str, [*args[1:], kwargs.get("device")]):
            raise NotCapturable("to(cpu) waits for the device")
        return func(*args, **kwargs)


class _Operators(TorchDispatchMode):
    """What operators see: reads of values, and sizes that depend on them, in forward and backward."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in READS:
            raise NotCapturable(f"{name} reads values back")
        if name == "lift_fresh":
            raise NotCapturable("a tensor is made from data of the host")
        if name in INDEXED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise NotCapturable(f"{name} with a mask has a shape that depends on values")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise NotCapturable("repeat_interleave by counts, without output_size")
        return func(*args, **kwargs)


class Capturing:
    """Context within which everything that cannot be captured raises `NotCapturable`."""

    def __enter__(self) -> None:
        self._modes = (_Functions(), _Operators())
        for mode in self._modes:
            mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


def in_live_graphs(module: nn.Module) -> list[str]:
    """Names of the parameters that an autograd graph holds; one made outside the capture's stream would break it."""
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad and _is_held(parameter)]


def _is_held(parameter: nn.Parameter) -> bool:
    # The node that collects a parameter's gradient lives as long as a graph needs it, and what is noted on it as well.
    get_gradient_edge(parameter).node.metadata["seen"] = True
    return "seen" in get_gradient_edge(parameter).node.metadata
