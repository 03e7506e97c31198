"""Times of operations, and the ceilings of the card they are compared with.

`replayed` captures an operation in a CUDA graph and times its replays with events: the kernels alone, without launches.
`eager` times a call from Python until the device is done. Both flush the L2 cache before every run when asked to, and
give medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSH_BYTES = 2**28  # several times the L2 cache of any card
MIN_REPEATS, MAX_REPEATS = 5, 100


@dataclass(frozen=True)
class Ceilings:
    """What the card does at most: bytes per second copied (read + written), and bf16 FLOP per second."""

    copy: float
    matmul: float

    def floor(self, moved: float, flops: float) -> float:
        """Least milliseconds for so many bytes and FLOPs."""
        return 1e3 * max(moved / self.copy, flops / self.matmul)


class Timer:
    """Times calls on one device.

    Args:
        device: "cuda", or "cpu", where every time is that of a call.
        seconds: about how long one measurement may take, the warm-up apart.
    """

    def __init__(self, device: str, seconds: float = 0.4) -> None:
        self.device, self.seconds = device, seconds
        size = FLUSH_BYTES if device == "cuda" else 0
        self._flushed = torch.empty(size, dtype=torch.int8, device=device)

    def replayed(self, call: Callable[[], object], flush: bool = True) -> float:
        """Median milliseconds of the replays of `call` as a CUDA graph.

        Raises:
            RuntimeError: if `call` cannot be captured, as it reads something back.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()
        try:
            return self._events(graph.replay, flush)
        finally:
            torch.cuda.synchronize()
            del kept
            graph.reset()

    def eager(self, call: Callable[[], object], flush: bool = True) -> float:
        """Median milliseconds from the call until the device is done."""
        call()
        repeats = self._repeats(self._wall(call, flush))
        return statistics.median(self._wall(call, flush) for _ in range(repeats))

    def _events(self, run: Callable[[], object], flush: bool) -> float:
        def once(count: int) -> list[float]:
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
            for before, after in events:
                if flush:
                    self._flushed.zero_()
                before.record()
                run()
                after.record()
            torch.cuda.synchronize()
            return [before.elapsed_time(after) for before, after in events]

        return statistics.median(once(self._repeats(once(3)[-1])))

    def _wall(self, call: Callable[[], object], flush: bool) -> float:
        if self.device == "cuda":
            if flush:
                self._flushed.zero_()
            torch.cuda.synchronize()
        start = time.perf_counter()
        kept = call()
        if self.device == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - start
        del kept
        return taken * 1e3

    def _repeats(self, milliseconds: float) -> int:
        return max(MIN_REPEATS, min(MAX_REPEATS, int(self.seconds * 1e3 / max(milliseconds, 1e-3))))


def measure_ceilings(timer: Timer, size: int) -> Ceilings:
    """Copy bandwidth over `size` MiB, and the rate of a square product of bf16 (fp32 on a CPU) on random data.

    Bandwidth is the better of the driver's copy and of a kernel that writes what it read: on an H100 the former stays
    a tenth below what kernels reach.
    """
    device = timer.device
    source = torch.randn(size * 2**18, device=device)
    target = torch.empty_like(source)
    side = 8192 if device == "cuda" else 256
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    if device == "cuda":
        a, b = a.bfloat16(), b.bfloat16()
    run = timer.replayed if device == "cuda" else timer.eager
    copied = min(run(lambda: target.copy_(source)), run(lambda: torch.neg(source, out=target)))
    multiplied = run(lambda: a @ b, False)
    return Ceilings(2 * 4 * source.numel() / copied * 1e3, 2 * side**3 / multiplied * 1e3)


def peak_mib(call: Callable[[], object]) -> float:
    """MiB that a call allocates at its peak, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 2**20
