"""What the small Triton kernels share: the device of a launch and the checks before it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; a tenth of the time that Triton's own takes outside of kernels."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Context in which Triton launches on the device of `x`."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def check_tensors(first: Tensor, expected: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Refuses tensors of another shape than expected, on another device than `first`, or of no float dtype.

    Args:
        first: the tensor whose device decides.
        expected: name -> (tensor or None, its shape).

    Raises:
        ValueError: naming the argument, what it is and what it should be.
    """
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} is {list(tensor.shape)} where {list(shape)} is expected.")
        if tensor.device != first.device:
            raise ValueError(f"{name} lies on {tensor.device}, not on {first.device}; bring the tensors together.")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; take bfloat16, float16 or float32, or the reference kernels.")


def check_index(name: str, index: Tensor, size: int | None, device: torch.device) -> Tensor:
    """Returns `index` [size] (None: any size from 1), int32 or int64, contiguous on `device`.

    Raises:
        ValueError: if it has another shape or dtype.
    """
    if index.dim() != 1 or index.shape[0] < 1 or (size is not None and index.shape[0] != size):
        raise ValueError(f"{name} is {list(index.shape)} where {'[N + 1]' if size is None else [size]} is expected.")
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {index.dtype} where int32 or int64 is expected.")
    return index.to(device).contiguous()


def check_bounds(cu_seqlens: Tensor, T: int, device: torch.device) -> Tensor:
    """Returns cu_seqlens [N + 1] on `device`; its values are looked at only where the host knows them.

    Raises:
        ValueError: if it has another shape or dtype, or does not rise from 0 to T.
    """
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist() if cu_seqlens.dim() == 1 else []
        if bounds and (bounds[0] != 0 or bounds[-1] != T or any(end < start for start, end in pairwise(bounds))):
            raise ValueError(f"cu_seqlens must rise from 0 to {T}, got {bounds[:3]}..{bounds[-1]}.")
    return check_index("cu_seqlens", cu_seqlens, None, device)
