"""Compiles what the kernel benchmark will run, in several processes at once, so that its first calls find it cached.

fla-core tries dozens of variants of each kernel at its first call, one compilation after another. Here every process
starts at another place of each list and times nothing, so that together they compile the whole list once.

    python -m benchmarks.kernels --warm 12
"""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from benchmarks.kernel_cases import CASES

FLA_MODULES = ("fla.ops.kda", "fla.ops.attnres")


def warm(processes: int, ops: Sequence[str], columns: Sequence[str], device: str, seconds: float) -> None:
    """Runs every operation once in each of `processes` processes; those still at it after `seconds` are ended."""
    environment = {**os.environ, "FLA_CACHE_RESULTS": "0"}  # choices are for the timed run to make
    command = [sys.executable, "-m", "benchmarks.kernel_warm", device, ",".join(columns), ",".join(ops), str(processes)]
    workers = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for rank in range(processes)
    ]
    for worker in workers:
        try:
            worker.wait(seconds)
        except subprocess.TimeoutExpired:
            seconds = 0.0
            worker.kill()
            worker.wait()


def _rotate(rank: int, processes: int) -> None:
    """Lets every list of variants start elsewhere, and takes the first that compiles for the best."""
    from triton.runtime.autotuner import Autotuner

    for module in FLA_MODULES:
        importlib.import_module(module)
    for tuner in [found for found in gc.get_objects() if isinstance(found, Autotuner)]:
        start = len(tuner.configs) * rank // processes
        tuner.configs = tuner.configs[start:] + tuner.configs[:start]
        tuner._do_bench = lambda call, quantiles=None: (call(), [1.0, 1.0, 1.0])[1]


def main(device: str, columns: str, ops: str, processes: str, rank: str) -> None:
    """One process: builds and calls every case; what fails here fails again where it is reported."""
    if "fla" in columns.split(","):
        _rotate(int(rank), int(processes))
    for op in ops.split(","):
        case = CASES[op](device)
        for column in columns.split(","):
            if column in case.columns:
                try:
                    case.columns[column]()()
                except Exception as error:
                    print(f"{op} {column}: {error}", file=sys.stderr)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
