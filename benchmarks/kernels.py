"""Our Triton kernels beside fla-core's, our plain PyTorch, and the floor that the card's bandwidth and matmul rate set.

    python -m benchmarks.kernels                                   the table, about a minute on one H100 without fla
    python -m benchmarks.kernels --ops kda_forward,moe_forward --json out.json --picture docs/kernels.png
    python -m benchmarks.kernels --warm 12                         compiles in 12 processes first: minutes less with fla
    python -m benchmarks.kernels --sweep moe_forward               tries other block sizes for one operation
    python -m benchmarks.kernels --debug                           tiny sizes on a CPU, the references only

Times are medians over random data, the L2 cache flushed between runs where bytes decide: `replay` of a CUDA graph (the
kernels alone) and `eager` (from the call until the device is done). The floor is the larger of bytes / copy bandwidth
and FLOPs / matmul rate, both measured in the same run. fla-core tunes itself at its first call, which can take minutes;
that shows under `first`, as does the compilation of our kernels.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_accuracy import kda_errors
from benchmarks.kernel_cases import CASES, COLUMNS, Case
from benchmarks.kernel_sweep import sweep
from benchmarks.kernel_warm import warm
from benchmarks.timing import Ceilings, Timer, measure_ceilings, peak_mib

KDA_SHAPES = [(1, 1000, 2, 128, 128), (1, 500, 2, 128, 64)]  # B, T, H, K, V of the accuracy table


def main(arguments: list[str] | None = None) -> None:
    """Runs what the command line asks for and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", help=f"comma-separated, of {', '.join(CASES)}; all by default")
    parser.add_argument("--columns", default=",".join(COLUMNS), help="comma-separated, of ours, fla, reference")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--picture", type=Path, help="draw ours, fla's and the floor into this file")
    parser.add_argument(
        "--warm", type=int, default=0, metavar="N", help="compile in N processes before anything is timed"
    )
    parser.add_argument("--sweep", choices=CASES, metavar="OP", help="search better block sizes for one operation")
    parser.add_argument("--seconds", type=float, default=240.0, help="how long a sweep, or --warm, may take")
    parser.add_argument("--debug", action="store_true", help="tiny sizes on a CPU")
    options = parser.parse_args(arguments)
    names, columns = _names(parser, options.ops, CASES), _names(parser, options.columns, COLUMNS)

    device = "cpu" if options.debug else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --debug runs tiny sizes on a CPU")
    timer = Timer(device, 0.01 if options.debug else 0.3)
    ceilings = measure_ceilings(timer, 1 if options.debug else 1024)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: copies {ceilings.copy / 1e12:.3g} TB/s, ", end="")
    print(f"multiplies {ceilings.matmul / 1e12:.3g} TFLOP/s")
    if options.sweep:
        sweep(CASES[options.sweep](device), timer, ceilings, options.seconds)
        return
    columns = _present(columns, device)
    if options.warm:
        warm(options.warm, names, columns, device, options.seconds)

    results: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "copy_bytes_per_second": ceilings.copy,
        "matmul_flops_per_second": ceilings.matmul,
        "rows": {},
        "accuracy": [],
    }
    for op in names:
        results["rows"][op] = _measure(op, columns, timer, ceilings)
        _write(results, options.json)  # what is measured is kept, however the run ends
    if any(op.startswith("kda") for op in names):
        shapes = [(1, 40, 1, 16, 8)] if options.debug else KDA_SHAPES
        results["accuracy"] = [errors for shape in shapes for errors in kda_errors(device, shape, columns)]
    _print_accuracy(results["accuracy"])
    _print_table(results["rows"])
    _write(results, options.json)
    if options.picture:
        draw(results, options.picture)


def _write(results: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        aside = path.with_name(path.name + ".tmp")
        aside.write_text(json.dumps(results, indent=1) + "\n")
        aside.replace(path)


def _names(parser: argparse.ArgumentParser, given: str | None, known: Any) -> list[str]:
    names = list(known) if given is None else [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in known:
            parser.error(f"unknown '{name}'; known are {', '.join(known)}")
    return names


def _present(columns: list[str], device: str) -> list[str]:
    """The columns that can run here; says why the others cannot."""
    if device == "cpu":
        print("On a CPU only the reference runs.")
        return [column for column in columns if column == "reference"]
    if "fla" in columns and importlib.util.find_spec("fla") is None:
        print("fla-core is not installed (pip install fla-core==0.6.0), so its column is left out.")
        columns = [column for column in columns if column != "fla"]
    return columns


def _measure(op: str, columns: list[str], timer: Timer, ceilings: Ceilings) -> dict[str, Any]:
    """One row: every column's times and memory, or its error."""
    try:
        case = CASES[op](timer.device)
    except Exception as error:
        print(f"{op}: {_reason(error)}")
        return {"title": op, "floor_ms": None, "columns": {}}
    floor = ceilings.floor(case.moved, case.flops)
    row: dict[str, Any] = {"title": case.title, "floor_ms": floor, "bytes": case.moved, "flops": case.flops}
    row["columns"] = {column: _column(case, column, timer) for column in columns if column in case.columns}
    print(f"{op}: {case.title}; floor {floor:.4g} ms")
    for column, figures in row["columns"].items():
        shown = [f"{key} {value:.4g}" if isinstance(value, float) else value for key, value in figures.items()]
        print(f"    {column:9s} {', '.join(shown)}")
    if timer.device == "cuda":
        torch.cuda.empty_cache()
    return row


def _column(case: Case, column: str, timer: Timer) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    try:
        start = time.perf_counter()
        call = case.columns[column]()
        call()
        if timer.device == "cuda":
            torch.cuda.synchronize()
            figures["first_s"] = time.perf_counter() - start
            figures["peak_mib"] = peak_mib(call)
        figures["eager_ms"] = timer.eager(call, case.flush)
        if timer.device == "cuda":
            figures["replay_ms"] = timer.replayed(call, case.flush)
    except Exception as error:  # one that fails must not end the table
        figures["error"] = _reason(error)
    return figures


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _best(figures: dict[str, Any] | None) -> float | None:
    """Replayed milliseconds, or eager ones where there is no graph."""
    return None if figures is None else figures.get("replay_ms", figures.get("eager_ms"))


def _print_table(rows: dict[str, Any]) -> None:
    print("\nreplayed ms (e: eager only)       floor       ours        fla  reference  fla/ours  of floor")
    for op, row in rows.items():
        times = {column: _best(row["columns"].get(column)) for column in COLUMNS}
        cells = [_cell(times[column], row["columns"].get(column, {})) for column in COLUMNS]
        mine, theirs, floor = times["ours"], times["fla"], row["floor_ms"]
        gain = f"{theirs / mine:9.2f}x" if mine and theirs else " " * 10
        share = f"{100 * floor / mine:8.0f}%" if mine and floor else ""
        print(f"{op:28s} {'' if floor is None else f'{floor:.4f}':>10s} {' '.join(cells)} {gain} {share}")


def _cell(milliseconds: float | None, figures: dict[str, Any]) -> str:
    if milliseconds is None:
        return f"{'failed' if 'error' in figures else '-':>10s}"
    return f"{milliseconds:.4f}".rjust(9) + (" " if "replay_ms" in figures else "e")


def _print_accuracy(accuracy: list[dict[str, Any]]) -> None:
    if not accuracy:
        return
    print("\nKDA, relative RMS error against the float64 recurrence")
    for line in accuracy:
        shown = " ".join(f"{name} {value:.1e}" for name, value in line["errors"].items())
        print(f"    {line['shape']:28s} {line['gate']:9s} {line['column']:9s} {shown or line['error']}")


def draw(results: dict[str, Any], path: Path) -> None:
    """Bars of our time, fla's and the floor of every operation, on a logarithmic axis; the reference's without ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in results["rows"].values() if row["floor_ms"]]
    series = [("floor", "#b0b7c3", [row["floor_ms"] for row in rows])]
    for column, label, color in (
        ("ours", "kimi_mm", "#1f6feb"),
        ("fla", "fla-core", "#d4820f"),
        ("reference", "plain PyTorch", "#7a8699"),
    ):
        times = [_best(row["columns"].get(column)) for row in rows]
        if any(times) and (column != "reference" or len(series) == 1):
            series.append((label, color, times))
    figure, axes = plt.subplots(figsize=(9, 0.62 * len(rows) + 1.4), layout="constrained")
    height = 0.8 / len(series)
    for place, (label, color, times) in enumerate(series):
        at = [index + (place - (len(series) - 1) / 2) * height for index in range(len(rows))]
        drawn = axes.barh(at, [time or float("nan") for time in times], height, label=label, color=color)
        axes.bar_label(drawn, [f" {time:.3g}" if time else "" for time in times], fontsize=7)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.margins(x=0.08)
    axes.set_xlabel("milliseconds, median of replayed CUDA graphs")
    axes.set_title(f"{results['device']}, torch {results['torch']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower right", ncols=len(series), frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
