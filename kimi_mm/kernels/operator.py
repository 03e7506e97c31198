"""Torch custom operators that skip torch's dispatcher wherever nothing traces.

    call ─┬─ compiled, traced, or under a dispatch mode ─► torch custom operator (fake, autograd)
          ├─ a gradient is wanted ──────────────────────► autograd function around the implementation
          └─ otherwise ─────────────────────────────────► the implementation itself

The way through a custom operator and its autograd costs the host 0.15 ms forward and 0.3 ms more backward for a list
of nine tensors, where the GPU needs 0.5 ms for both; straight calls cost a tenth and a third of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class Operator:
    """One custom operator; `operator` makes it from an implementation.

    Args:
        name: "namespace::name".
        implementation: from tensors (or lists of them) and options to a tensor or a tuple of tensors.
        options: `mutates_args` and `schema`, as `torch.library.custom_op` takes them.
    """

    def __init__(self, name: str, implementation: Callable[..., Any], **options: Any) -> None:
        self.implementation = implementation
        self.traced = torch.library.custom_op(name, implementation, **options)
        self.mutates = bool(options["mutates_args"])
        self.gradients: Callable[..., Any] | None = None
        self.keep: Callable[..., None] = _nothing

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Registers what the operator returns for tensors without data."""
        return self.traced.register_fake(fake)

    def register_autograd(self, gradients: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Registers the backward pass, as `torch.library.register_autograd` describes it.

        Args:
            gradients: from the context and the gradients of all outputs to those of all arguments; must not look at
                `ctx.needs_input_grad`.
            setup_context: saves what `gradients` needs.
        """
        self.traced.register_autograd(gradients, setup_context=setup_context)
        self.gradients, self.keep = gradients, setup_context

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return self.traced(*args)
        tensors = list(_tensors(args))
        if any(type(x) is not Tensor and type(x) is not nn.Parameter for x in tensors):
            return self.traced(*args)
        if not torch.is_grad_enabled() or not (self.mutates or any(x.requires_grad for x in tensors)):
            return self.implementation(*args)
        if self.gradients is None:
            return self.traced(*args)  # which notes what changes in place, and refuses a backward pass
        widths = tuple(len(x) if isinstance(x, (list, tuple)) else None for x in args)
        flat = [y for x, width in zip(args, widths, strict=True) for y in ((x,) if width is None else x)]
        return _Straight.apply(self, widths, *flat)


def operator(name: str, **options: Any) -> Callable[[Callable[..., Any]], Operator]:
    """Decorates an implementation, as `torch.library.custom_op` does; see `Operator`."""
    options.setdefault("mutates_args", ())
    return lambda implementation: Operator(name, implementation, **options)


class _Straight(torch.autograd.Function):
    """An operator's implementation and gradients; lists of tensors travel flat, `widths` tells where they stood."""

    @staticmethod
    def forward(ctx: Any, op: Operator, widths: Sequence[int | None], *flat: Any) -> Any:
        left = iter(flat)
        args = tuple(next(left) if width is None else [next(left) for _ in range(width)] for width in widths)
        output = op.implementation(*args)
        ctx.op, ctx.widths = op, widths
        op.keep(ctx, args, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        found = ctx.op.gradients(ctx, *gradients)
        flat: list[Tensor | None] = []
        for width, gradient in zip(ctx.widths, found if isinstance(found, tuple) else (found,), strict=True):
            if width is None:
                flat.append(gradient)
            else:
                flat.extend([None] * width if gradient is None else gradient)
        return None, None, *flat


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from x


def _nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Saves nothing."""
