"""Real processes for the tests of training: forked from a server that has imported everything once.

A worker is a function of a test's helper module; `start` runs it in a process of its own, `together` runs one process
for each rank with torch.distributed over gloo, as a launcher would.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["kimi_mm.training.run", "kimi_mm.training.trainer", "torch.utils.tensorboard"])


def start(worker: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Starts one process that runs `worker(*arguments)`."""
    process = _CONTEXT.Process(target=_run, args=(worker, arguments, {}, None), daemon=True)
    process.start()
    return process


def start_together(count: int, worker: Callable[..., Any], *arguments: Any) -> list[BaseProcess]:
    """Starts `count` processes that know each other, each running `worker(*arguments)`."""
    return [process for process, _ in _start_all(count, worker, arguments)]


def together(count: int, worker: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Runs `worker(*arguments)` in `count` processes that know each other; returns what each gave back, by rank."""
    started = _start_all(count, worker, arguments)
    readers = {reader: rank for rank, (_, reader) in enumerate(started)}
    outcomes: dict[int, Any] = {}
    limit = time.monotonic() + timeout
    try:
        while readers and (ready := connection.wait(list(readers), max(0.0, limit - time.monotonic()))):
            for reader in ready:
                rank = readers.pop(reader)
                try:
                    error, value = reader.recv()
                except EOFError:
                    error, value = "ended without a result", None
                assert error is None, f"rank {rank}: {error}"
                outcomes[rank] = value
        assert not readers, f"ranks {sorted(readers.values())} did not end in {timeout} s"
    finally:
        for process, _ in started:
            if len(outcomes) < count:
                process.kill()
            process.join()
    return [outcomes[rank] for rank in range(count)]


def print_nowhere() -> None:
    """Lets this process print to nowhere: its output may be a file, which a limit on files would hold for as well."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def _start_all(count: int, worker: Callable[..., Any], arguments: tuple) -> list[tuple[BaseProcess, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(count):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in world.items()} if count > 1 else {}
        reader, writer = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_run, args=(worker, arguments, environment, writer), daemon=True)
        process.start()
        writer.close()
        started.append((process, reader))
    return started


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
        answer.send((error, value))
