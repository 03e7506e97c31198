"""What a run shows of itself beside its losses: speed, expert loads, hidden states by depth; and the table it prints.

    batches ─► tokens ─► tokens/s, MFU (active parameters of the backbone against the device's peak)
    routers ─► largest and smallest load of an expert, as shares of the mean
    layers  ─► root mean square of the residual stream after each (forward hooks that sleep between logged steps)

Everything is read at logged steps only. Names with a slash ("hidden/03") go to TensorBoard only.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from kimi_mm.text.attn_res import AttnResStream, Stream
from kimi_mm.text.backbone import Backbone, DecoderLayer
from kimi_mm.text.moe import Router
from kimi_mm.training.costs import count
from kimi_mm.training.devices import known_device

HEADER_EVERY = 30


class Meters:
    """Measures of one process.

    Args:
        backbone: None for objectives without one; then there are no numbers but the seconds.
        device: of this process.
        peak_tflops: of the device; 0 looks it up by its name, and without a known name there is no MFU.
        hooks: whether layers may be watched; not where they run as CUDA graphs.
    """

    def __init__(self, backbone: Backbone | None, device: torch.device, peak_tflops: float, hooks: bool) -> None:
        self.backbone = backbone
        self.awake = False
        self._tokens = 0
        self._flops = 0.0
        self._squares: dict[str, list[Tensor]] = defaultdict(list)
        self._costs = None if backbone is None else count(backbone.config)
        self._peak = peak_tflops * 1e12
        if not self._peak and device.type == "cuda":
            known = known_device(torch.cuda.get_device_name(device))
            self._peak = 0.0 if known is None else known.flops
        if backbone is not None and hooks:
            for number, layer in enumerate(backbone.decoder_layers()):
                layer.register_forward_hook(self._watch(f"hidden/{number:02d}"))

    def take(self, batch: Any) -> None:
        """Counts the positions of a micro-batch that this process works on."""
        ids = getattr(getattr(batch, "inputs", batch), "text_ids", None)
        if ids is not None and self._costs is not None:
            self._tokens += ids.numel()
            self._flops += ids.numel() * self._costs.training_flops(ids.shape[-1])

    def speed(self, seconds: float, groups: int, world: int) -> dict[str, float]:
        """Returns and forgets what was counted since the last call.

        Args:
            seconds: since then.
            groups: processes, or groups of processes that share rows, that count different positions.
            world: processes.
        """
        found = {"tokens_per_second": self._tokens * groups / seconds} if self._tokens else {}
        if self._tokens and self._peak:
            found["mfu"] = self._flops * groups / seconds / (self._peak * world)
        self._tokens, self._flops = 0, 0.0
        return found

    def loads(self) -> dict[str, Tensor]:
        """Returns the loads of the fullest and the emptiest expert of any layer; the mean is 1."""
        routers = [] if self.backbone is None else [m for m in self.backbone.modules() if isinstance(m, Router)]
        counted = [router.load / router.load.mean().clamp_min(1e-9) for router in routers if router.training]
        if not counted:
            return {}
        return {
            "load_max": torch.stack([x.max() for x in counted]).max(),
            "load_min": torch.stack([x.min() for x in counted]).min(),
        }

    def hidden(self) -> dict[str, Tensor]:
        """Returns and forgets the mean squares of the stream after each layer; see `roots`."""
        found = {name: torch.stack(squares).mean() for name, squares in self._squares.items()}
        self._squares.clear()
        return found

    @staticmethod
    def roots(numbers: dict[str, float]) -> dict[str, float]:
        """Takes the roots of mean squares, after they have been averaged over steps and processes."""
        return {name: x**0.5 if name.startswith("hidden/") else x for name, x in numbers.items()}

    def _watch(self, name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, stream: Stream) -> None:
            if self.awake and isinstance(layer, DecoderLayer):
                x = stream.partial if isinstance(stream, AttnResStream) else stream.x
                if x is not None:
                    self._squares[name].append(x.detach().float().square().mean())

        return hook


class ConsoleTable:
    """Lines of numbers under a header, which is printed again when the columns change and every so many lines."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._lines = 0

    def lines(self, step: str, numbers: dict[str, float]) -> list[str]:
        """Returns what to print for one step."""
        names = [name for name in numbers if "/" not in name]
        widths = [max(9, len(name)) for name in names]
        made = []
        if names != self._names or self._lines % HEADER_EVERY == 0:
            self._names, self._lines = names, 0
            titles = "  ".join(name.rjust(width) for name, width in zip(names, widths, strict=True))
            made.append(f"{' ' * len(step)}  {titles}")
        self._lines += 1
        values = (f"{numbers[name]:.4g}".rjust(width) for name, width in zip(names, widths, strict=True))
        return [*made, f"{step}  {'  '.join(values)}"]
