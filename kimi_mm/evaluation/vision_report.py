"""Results of `kimi-mm eval vision` as tables: in the terminal's and in the model card's form.

The card's table stands between `<!-- vision:begin -->` and `<!-- vision:end -->`; see `report.replace_between_markers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kimi_mm.evaluation.report import percent
from kimi_mm.evaluation.result import check_keys
from kimi_mm.evaluation.vision import KIND, VERSION

BEGIN = "<!-- vision:begin -->"
END = "<!-- vision:end -->"
TITLES = {
    "naming": "naming, unseen compositions",
    "style": "naming in an art style never seen (OpenMoji)",
    "count": "counting, unseen compositions",
    "color": "colour, unseen compositions",
    "relation": "spatial relation, unseen compositions",
    "reading": "reading unseen words in unseen fonts",
    "digits": "scikit-learn's handwritten digits",
}
_TOP_KEYS = ("label", "model", "device", "threads", "peak_rss_mib", "first_word_seconds", "sets")
_SET_KEYS = ("set", "pictures", "metric", "value", "low", "high", "seconds_per_picture", "worst")
_HEAD = ("test set", "pictures", "metric", "% (95 % interval)", "seconds a picture")


def check_result(result: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns a result that is whole.

    Raises:
        UserError: it is another result, or names the key that is missing.
    """
    return check_keys(result, where, "kimi-mm eval vision", (KIND, VERSION), _TOP_KEYS, lambda _: _SET_KEYS)


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Returns the cells of one result, a row for each set."""
    return [
        (
            TITLES.get(str(row["set"]), str(row["set"])),
            str(row["pictures"]),
            str(row["metric"]),
            f"{percent(row['value'])} ({percent(row['low'])} to {percent(row['high'])})",
            f"{row['seconds_per_picture']:.2f}",
        )
        for row in result["sets"]
    ]


def markdown_table(results: Sequence[dict[str, Any]]) -> str:
    """Returns the table of a model card: a row per model and set, and a line on how each was measured."""
    head = ("model", *_HEAD)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for result in results:
        lines += [f"| {' | '.join((result['label'], *cells))} |" for cells in rows(result)]
    return "\n".join([*lines, "", *map(conditions, results)]) + "\n"


def conditions(result: dict[str, Any]) -> str:
    """Returns one line on the device, the memory and the time to the first word."""
    line = (
        f"{result['label']}: `kimi-mm eval vision`, greedy decoding, device {result['device']}, "
        f"{result['threads']} threads, peak memory {result['peak_rss_mib']:.0f} MiB"
    )
    latency = result["first_word_seconds"]
    if latency is None:
        return f"{line}."
    times = ", ".join(f"{name} {latency[name]:.2f} s" for name in ("p50", "p90", "p99"))
    return f"{line}; from a picture of 512 x 512 pixels to the first word {times} ({latency['runs']:.0f} runs)."


def terminal_table(result: dict[str, Any]) -> Any:
    """Returns the table that `rich` prints."""
    from rich.table import Table

    table = Table(*_HEAD)
    for cells in rows(result):
        table.add_row(*cells)
    return table
