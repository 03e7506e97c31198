"""Real processes for the tests of training: forked from a server that has imported everything once.

A worker is a function of a test's helper module; `start` runs it in a process of its own, `together` runs one process
for each rank with torch.distributed over gloo, as a launcher would.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["kimi_mm.training.run", "kimi_mm.training.trainer", "torch.utils.tensorboard"])


def start(worker: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Starts one process that runs `worker(*arguments)`."""
    process = _CONTEXT.Process(target=_run, args=(worker, arguments, {}, None), daemon=True)
    process.start()
    return process


def together(count: int, worker: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Runs `worker(*arguments)` in `count` processes that know each other; returns what each gave back, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results: Any = _CONTEXT.SimpleQueue()
    processes = []
    for rank in range(count):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in world.items()} if count > 1 else {}
        process = _CONTEXT.Process(target=_run, args=(worker, arguments, environment, (results, rank)), daemon=True)
        process.start()
        processes.append(process)
    for process in processes:
        process.join(timeout)
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
    outcomes: dict[int, Any] = {}
    while not results.empty():
        rank, error, value = results.get()
        assert error is None, f"rank {rank}:\n{error}"
        outcomes[rank] = value
    assert not stuck, f"{len(stuck)} of {count} processes did not end in {timeout} s"
    assert len(outcomes) == count, f"ranks {sorted(set(range(count)) - set(outcomes))} gave nothing back"
    return [outcomes[rank] for rank in range(count)]


def _run(worker: Callable[..., Any], arguments: tuple, environment: dict[str, str], answer: Any) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment, TOKENIZERS_PARALLELISM="false")
    try:
        value, error = worker(*arguments), None
    except BaseException:
        if answer is None:
            raise
        value, error = None, traceback.format_exc()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if answer is not None:
        answer[0].put((answer[1], error, value))
