"""A page of curves from a training run: one HTML file that needs nothing else.

    RUN/tensorboard/events* ─► scalars, steps in order ─► panels (losses, rates, norms, experts) ─► SVG inside one page

Several event files, as interrupted runs leave them, are joined; where they tell of the same step the latest one counts.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kimi_mm.data.manifest import write_aside
from kimi_mm.errors import UserError

Curve = list[tuple[int, float]]  # (step, value), steps rising

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Learning rate", ("lr",)),
    ("Tokens per second", ("tokens_per_second",)),
    ("Seconds per step", ("seconds_per_step",)),
    ("Gradient norm", ("grad_norm",)),
    ("Largest attention logit", ("qk_max",)),
    ("Fullest and emptiest expert (mean: 1)", ("load_max", "load_min")),
    ("Residual stream by depth (root mean square)", ("hidden/",)),
    ("Share of the device's peak (MFU)", ("mfu",)),
    ("Skipped steps", ("skipped_steps",)),
)


def read_run(run: str | Path) -> dict[str, Curve]:
    """Reads all scalars of a run.

    Args:
        run: folder that `kimi-mm train` wrote.

    Returns:
        Curves by name.

    Raises:
        UserError: there is no such run, or nothing was logged.
    """
    folder = Path(run) / "tensorboard"
    files = sorted(folder.glob("events*"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"{run}: no logs of a run here ({folder}/events*); give the folder of `kimi-mm train`.")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for name in events.Tags()["scalars"]:
            values = found.setdefault(name, {})
            values.update({event.step: float(event.value) for event in events.Scalars(name)})
    if not found:
        raise UserError(f"{run}: the run has logged nothing yet.")
    return {name: sorted(values.items()) for name, values in found.items()}


def write_report(run: str | Path, output: str | Path) -> Path:
    """Writes the page and returns its path; UserError when the run has no logs or the page cannot be written."""
    curves = read_run(run)
    text = page(curves, title=str(run), summary=_summary(Path(run)))
    output = Path(output)
    try:
        write_aside(output, text.encode("utf-8"))
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}).") from None
    return output


def page(curves: dict[str, Curve], title: str, summary: dict[str, float]) -> str:
    """Returns the page's HTML: a table of first, best and last values, and one panel a kind of curve."""
    claimed: set[str] = set()
    figures = []
    for name, patterns in PANELS:
        chosen = {key: curve for key, curve in curves.items() if key.startswith(patterns)}
        claimed |= set(chosen)
        if chosen:
            figures.append((name, chosen))
    losses = {key: curve for key, curve in curves.items() if key not in claimed}
    figures.insert(0, ("Losses", losses))
    drawn = "\n".join(
        f"<section><h2>{html.escape(name)}</h2>{_draw(chosen, log=name == 'Losses')}</section>"
        for name, chosen in figures
        if chosen
    )
    last = max(curve[-1][0] for curve in curves.values())
    facts = "".join(f"<li>{html.escape(key)}: {value:.5g}</li>" for key, value in sorted(summary.items()))
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p>{last} steps logged.</p>"
        + (f"<details><summary>Where it ended</summary><ul>{facts}</ul></details>" if facts else "")
        + f"{_table(losses)}<main>{drawn}</main></body></html>\n"
    )


def _summary(run: Path) -> dict[str, float]:
    try:
        values = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}


def _table(losses: dict[str, Curve]) -> str:
    rows = []
    for name, curve in sorted(losses.items()):
        values = [value for _, value in curve]
        best = min(curve, key=lambda point: point[1])
        cells = (f"{values[0]:.4g}", f"{best[1]:.4g} (step {best[0]})", f"{values[-1]:.4g}")
        rows.append(f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "<tr><th>loss</th><th>first</th><th>lowest</th><th>last</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>" if rows else ""


def _draw(curves: dict[str, Curve], log: bool) -> str:
    """Returns an SVG element with all curves of a panel; losses also as a running mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, (name, curve) in enumerate(sorted(curves.items())):
        steps, values = zip(*curve, strict=True)
        color = f"C{number % 10}"
        smooth = log and len(values) >= 20
        marker = "." if len(values) == 1 else ""
        axes.plot(steps, values, marker=marker, linestyle="-", color=color, alpha=0.3 if smooth else 1.0)
        axes.lines[-1].set_label("_" if smooth else name)
        if smooth:
            axes.plot(steps, _running_mean(values), color=color, label=name)
    if log and min(value for curve in curves.values() for _, value in curve) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2 if len(curves) > 6 else 1)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _running_mean(values: Iterable[float], width: int = 10) -> np.ndarray:
    data = np.asarray(list(values), float)
    sums = np.concatenate([[0.0], np.cumsum(data)])
    ends = np.arange(1, len(data) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


_STYLE = (
    "body{font:15px/1.4 sans-serif;margin:2em auto;max-width:1500px;padding:0 1em;color:#222}"
    "main{display:grid;grid-template-columns:repeat(auto-fit,minmax(480px,1fr));gap:1em}"
    "h2{font-size:1.05em;margin:.2em 0}svg{width:100%;height:auto}"
    "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left}"
)
