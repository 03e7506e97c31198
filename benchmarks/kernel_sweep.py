"""Searches better block sizes for one operation: every number of its tables is halved, doubled or moved, one by one.

Tiles and warps are also doubled or halved together: a wider tile alone may spill where more warps would hold it. Where
a module has ENGINES and CHOICES, who multiplies is tried as well.
"""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.kernel_cases import Case
from benchmarks.timing import Ceilings, Timer

Leaf = dict[str, Any]
GAIN = 0.985  # a change has to be this much faster to stay


def sweep(case: Case, timer: Timer, ceilings: Ceilings, seconds: float) -> None:
    """Walks downhill from the shipped sizes and prints every trial, then what to write into the tables.

    Args:
        case: only its column "ours" runs.
        seconds: no new trial starts after this many.
    """
    start = time.monotonic()
    run = timer.replayed if timer.device == "cuda" else timer.eager
    column = "ours" if timer.device == "cuda" else "reference"
    call = case.columns[column]()

    def measure() -> float:
        call()
        return run(call, case.flush)

    best = measure()
    floor = ceilings.floor(case.moved, case.flops)
    print(f"{case.title}: {best:.4f} ms as shipped, floor {floor:.4f} ms")
    leaves = [leaf for leaf in _leaves(case.tables) if _matters(leaf[1], call)]
    print(f"tables in use: {', '.join(path for path, *_ in leaves) or 'none'}")
    changed: dict[str, Leaf] = {}
    for path, leaf, choices in leaves:
        for move in _moves(leaf, choices):
            if time.monotonic() - start > seconds:
                print(f"stopped after {seconds:.0f} s")
                _summary(changed, best)
                return
            best = _try(path, leaf, move, best, measure, changed)
    _summary(changed, best)


def _try(
    path: str, leaf: Leaf, move: Leaf, best: float, measure: Callable[[], float], changed: dict[str, Leaf]
) -> float:
    kept = dict(leaf)
    leaf.update(move)
    said = f"    {path} " + ", ".join(f"{key} {kept[key]} -> {value}" for key, value in move.items())
    try:
        taken = measure()
    except Exception as error:  # too much shared memory, or sizes that a kernel cannot take
        lines = str(error).strip().splitlines()
        print(f"{said}: {type(error).__name__} {lines[0][:80] if lines else ''}")
        leaf.update(kept)
        return best
    print(f"{said}: {taken:.4f} ms{' kept' if taken < GAIN * best else ''}")
    if taken < GAIN * best:
        changed[path] = leaf
        return taken
    leaf.update(kept)
    return best


def _summary(changed: dict[str, Leaf], best: float) -> None:
    print(f"best: {best:.4f} ms")
    for path, leaf in changed.items():
        print(f"    {path} = {leaf}")
    if not changed:
        print("    the shipped sizes stay")


def _leaves(modules: tuple[str, ...]) -> Iterator[tuple[str, Leaf, Leaf]]:
    """Name, entry, and what else its strings may be, of everything in the tables."""
    for name in modules:
        try:
            module, short = importlib.import_module(name), name.removeprefix("kimi_mm.kernels.")
        except ModuleNotFoundError as error:
            print(f"no tables in {name}: {error}")
            continue
        for table in ("ENGINES", "CONFIGS"):
            for path, leaf in _walk(f"{short}.{table}", getattr(module, table, {})):
                yield path, leaf, getattr(module, "CHOICES", {})


def _walk(path: str, table: dict[Any, Any]) -> Iterator[tuple[str, Leaf]]:
    if not any(isinstance(value, dict) for value in table.values()):
        if table:
            yield path, table
        return
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _walk(f"{path}[{key!r}]", value)


def _matters(leaf: Leaf, call: Callable[[], object]) -> bool:
    """True if the operation uses this entry: zeros in it then make the call fail before any launch."""
    if any(isinstance(value, str) for value in leaf.values()):
        return True
    kept = dict(leaf)
    leaf.update(dict.fromkeys(leaf, 0))
    try:
        call()
    except Exception:
        return True
    finally:
        leaf.update(kept)
    return False


def _moves(leaf: Leaf, choices: Leaf) -> Iterator[Leaf]:
    """Changes to try, each from what the entry holds by then: one key, then tiles together with warps."""
    for key in list(leaf):
        for candidate in _neighbours(key, leaf[key], choices):
            yield {key: candidate}
    tiles = [key for key, value in leaf.items() if type(value) is int and not key.startswith(("num_", "maxnreg"))]
    if "num_warps" not in leaf:
        return
    for count in range(1, min(len(tiles), 3) + 1):
        for together in itertools.combinations(tiles, count):
            for factor in (2.0, 0.5):
                move = {key: int(leaf[key] * factor) for key in (*together, "num_warps")}
                if min(move.values()) >= 1 and move["num_warps"] <= 16:
                    yield move


def _neighbours(key: str, value: Any, choices: Leaf) -> list[Any]:
    if isinstance(value, str):
        return [choice for choice in choices.get(key, ()) if choice != value]
    if isinstance(value, bool):
        return [not value]
    if key == "maxnreg":
        return [most for most in (0, 96, 128, 168) if most != value]
    if key == "num_stages":
        return [stages for stages in (value - 1, value + 1, value + 2) if 1 <= stages <= 6]
    if key == "num_warps":
        return [warps for warps in (value // 2, value * 2) if 1 <= warps <= 16]
    return [size for size in (value // 2, value * 2) if size >= 1]
