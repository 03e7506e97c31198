"""KDA on a CPU: our chunk form against the torch fallback of transformers' kimi_linear, same inputs, same process.

    python benchmarks/kda_cpu.py --threads 2

Prints one row per shape: median and best milliseconds of each, the ratio of the bests, and the largest difference.
The fallback takes the log-decay, so its gate is computed outside its time; ours computes it inside.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from kimi_mm.kernels import chunk_kda
from kimi_mm.kernels.kda.reference import kda_gate

SHAPES = [  # B, T, H, K = V
    (1, 200, 4, 64),
    (4, 200, 4, 64),
    (1, 1000, 4, 64),
    (1, 2048, 4, 64),
    (1, 2048, 4, 128),
    (1, 2048, 8, 128),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shapes", type=int, nargs="*", help="rows of the table to run; all by default")
    parser.add_argument("--backward", action="store_true", help="time forward + backward")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

    print(f"torch {torch.__version__}, {arguments.threads} threads, fp32, median / best of {arguments.repeats} runs")
    print("|    B |     T |    H |  K=V | gate     | fallback ms     | ours ms         | ratio | max diff |")
    print("|-----:|------:|-----:|-----:|:---------|----------------:|----------------:|------:|---------:|")
    for B, T, H, K in (SHAPES[i] for i in arguments.shapes or range(len(SHAPES))):
        for gate in ("bounded", "softplus"):
            inputs = _inputs(B, T, H, K)
            q, k, v, z, beta = inputs
            A_log = torch.zeros(H)
            g = kda_gate(z, gate, A_log, None, None).detach()

            def theirs(q=q, k=k, v=v, g=g, beta=beta) -> Tensor:
                return chunk_kimi_delta_attention(q, k, v, g, beta.sigmoid(), use_qk_l2norm_in_kernel=True)[0]

            def ours(q=q, k=k, v=v, z=z, beta=beta, gate=gate, A_log=A_log) -> Tensor:
                options = {"gate": gate, "A_log": A_log, "qk_l2norm": True, "beta_sigmoid": True}
                return chunk_kda(q, k, v, z, beta, **options)[0]

            difference = float((theirs() - ours()).abs().max())
            slow = _time(theirs, inputs, arguments.repeats, arguments.backward)
            fast = _time(ours, inputs, arguments.repeats, arguments.backward)
            print(
                f"| {B:4d} | {T:5d} | {H:4d} | {K:4d} | {gate:8s} | {slow[0]:7.1f} {slow[1]:7.1f} "
                f"| {fast[0]:7.1f} {fast[1]:7.1f} | {slow[1] / fast[1]:5.1f} | {difference:8.1e} |"
            )


def _inputs(B: int, T: int, H: int, K: int) -> list[Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, H, K) for _ in range(3))
    return [q, k, v, torch.randn(B, T, H, K) - 2.0, torch.randn(B, T, H)]


def _time(run: Callable[[], Tensor], inputs: list[Tensor], repeats: int, backward: bool) -> tuple[float, float]:
    """Median and best milliseconds of one call, after a warm-up."""
    for tensor in inputs:
        tensor.requires_grad_(backward)
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        out = run()
        if backward:
            out.sum().backward()
        taken.append((time.perf_counter() - start) * 1e3)
    for tensor in inputs:
        tensor.requires_grad_(False)
        tensor.grad = None
    return statistics.median(taken[1:]), min(taken[1:])


if __name__ == "__main__":
    main()
