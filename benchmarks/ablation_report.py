"""The report of `benchmarks.ablations`: tables of held-out losses, and a picture of training curves."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ablation_scores import HIGHER_IS_BETTER
from kimi_mm.data.manifest import write_aside
from kimi_mm.errors import UserError

BEGIN, END = "<!-- ablations:begin -->", "<!-- ablations:end -->"
Curve = list[list[float]]  # of [step, loss]


def tables(names: list[str], sizes: list[int], results: list[list[dict[str, Any]]]) -> str:
    """Returns a Markdown table for every measure that the results have.

    Args:
        names: of the arms; the others are compared with the first.
        sizes: parameters of their backbones.
        results: of each arm, one a seed that is done: `seed`, and `scores` by measure.
    """
    measures = dict.fromkeys(measure for found in results for r in found for measure in r["scores"])
    return "\n".join(_table(measure, names, sizes, results) for measure in measures or ["scores"])


def _table(measure: str, names: list[str], sizes: list[int], results: list[list[dict[str, Any]]]) -> str:
    """A line an arm: parameters, score of every seed, mean, difference to the first arm over the seeds that both have,
    and in how many of these it is better."""
    sign = 1 if measure in HIGHER_IS_BETTER else -1
    lines = [
        f"| arm | parameters | {measure}, by seed | mean | minus the first | better in |",
        "|---|---|---|---|---|---|",
    ]
    scored = [{r["seed"]: r["scores"][measure] for r in found if measure in r["scores"]} for found in results]
    for number, (name, size, own) in enumerate(zip(names, sizes, scored, strict=True)):
        gaps = [own[seed] - scored[0][seed] for seed in own if seed in scored[0]]
        by_seed = ", ".join(f"{own[seed]:.3f}" for seed in sorted(own)) or "-"
        mean = f"{statistics.mean(own.values()):.3f}" if own else "-"
        compared = number > 0 and len(gaps) > 0
        gap = f"{statistics.mean(gaps):+.3f}" if compared else ""
        wins = f"{sum(sign * gap > 0 for gap in gaps)} of {len(gaps)}" if compared else ""
        lines.append(f"| {name} | {size / 1e6:.3f} M | {by_seed} | {mean} | {gap} | {wins} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, questions: dict[str, dict[str, list[Curve]]]) -> None:
    """Draws the curves of every question: for each arm the mean over its seeds, and their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(questions), 3.8), layout="constrained")
    for axes, (title, arms) in zip(np.atleast_1d(figure.subplots(1, len(questions))), questions.items(), strict=True):
        for number, (name, curves) in enumerate(arms.items()):
            if not curves:
                continue
            steps = sorted(set.intersection(*({int(step) for step, _ in curve} for curve in curves)))
            values = np.asarray([[{int(s): v for s, v in curve}[step] for step in steps] for curve in curves])
            smooth = np.asarray([_running_mean(row) for row in values])
            axes.plot(steps, smooth.mean(0), color=f"C{number}", label=name)
            axes.fill_between(steps, smooth.min(0), smooth.max(0), color=f"C{number}", alpha=0.15, linewidth=0)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("step")
        axes.set_ylabel("training loss, nats a token")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def write_between(path: Path, text: str) -> None:
    """Replaces what stands between the markers of a page; UserError where it has none."""
    page = path.read_text(encoding="utf-8") if path.exists() else f"{BEGIN}\n{END}\n"
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise UserError(f"{path}: needs the lines {BEGIN} and {END}, once each, around the report.")
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    write_aside(path, f"{before}{BEGIN}\n{text}{END}{after}".encode())


def _running_mean(values: np.ndarray, width: int = 5) -> np.ndarray:
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)
