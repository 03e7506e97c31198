"""What the results of all evaluations share: how they were measured, and the check of a file that holds one."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterable
from typing import Any

from kimi_mm.errors import UserError


def conditions(kind: str, version: int, label: str, model: str, device: str) -> dict[str, Any]:
    """Returns what every machine-readable result begins with.

    Args:
        kind, version: of the result.
        label: what tables call the model.
        model: name or folder that was loaded.
        device: where it ran.
    """
    import torch

    from kimi_mm import __version__

    return {
        "kind": kind,
        "version": version,
        "label": label,
        "model": model,
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "peak_rss_mib": round(peak_memory_mib(), 1),
        "software": {"kimi_mm": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def check_keys(
    result: dict[str, Any],
    where: str,
    command: str,
    kind: tuple[str, int],
    top: Iterable[str],
    of_set: Callable[[dict[str, Any]], Iterable[str]],
) -> dict[str, Any]:
    """Returns a result that is whole.

    Args:
        result: as read.
        where: the file, for messages.
        command: that writes such results.
        kind: and version that it must have.
        top: keys that it must have.
        of_set: those that one of its sets must have.

    Raises:
        UserError: it is of another kind, or names the key that is missing.
    """
    if (result.get("kind"), result.get("version")) != kind:
        raise UserError(f"{where}: not a result of '{command} --json' (kind {kind[0]}, version {kind[1]}).")
    for key in top:
        if key not in result:
            raise UserError(f"{where}: the key '{key}' is missing.")
    for scores in result["sets"]:
        for key in of_set(scores):
            if key not in scores:
                raise UserError(f"{where}: the key '{key}' of set '{scores.get('set', '?')}' is missing.")
    return result


def peak_memory_mib() -> float:
    """Returns the most memory that this process has held so far, in MiB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
