"""Results of an evaluation as a machine-readable dictionary, a terminal table and the table of a model card.

The model card's and README's tables stand between the markers `<!-- scores:begin -->` and `<!-- scores:end -->`;
`kimi-mm eval card RESULT.json --write FILE` replaces what is between them, so that no score is typed by hand.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kimi_mm.errors import UserError
from kimi_mm.evaluation.result import check_keys

KIND = "kimi_mm.asr"
VERSION = 1
BEGIN = "<!-- scores:begin -->"
END = "<!-- scores:end -->"

_SET_TITLES = {
    "human-test": "human recordings, test half",
    "human-adapt": "human recordings, adaptation half",
    "sent": "unseen sentences, seen synthetic voices",
    "voice": "unseen sentences, unseen voices",
    "demo": "shipped demo clips",
}
_SET_KEYS = (
    "set",
    "utterances",
    "words",
    "substitutions",
    "deletions",
    "insertions",
    "wer",
    "wer_low",
    "wer_high",
    "real_time_factor",
)
_TOP_KEYS = ("label", "model", "device", "threads", "normalizer", "peak_rss_mib", "sets")


def read_result(path: Path) -> dict[str, Any]:
    """Reads a file that one of the `kimi-mm eval ... --json` wrote, of whatever kind.

    Raises:
        UserError: the file cannot be read, or is none.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValueError:
        raise UserError(f"{path}: not JSON; give a file that 'kimi-mm eval ... --json' wrote.") from None
    if not isinstance(result, dict):
        raise UserError(f"{path}: not a result of 'kimi-mm eval ... --json'.")
    return result


def load_result(path: Path) -> dict[str, Any]:
    """Reads a file that `kimi-mm eval asr --json` wrote.

    Raises:
        UserError: the file cannot be read, or is another kind of file; names what is missing.
    """
    kind = (KIND, VERSION)
    return check_keys(read_result(path), str(path), "kimi-mm eval asr", kind, _TOP_KEYS, lambda _: _SET_KEYS)


def markdown_table(results: Sequence[dict[str, Any]]) -> str:
    """Returns the table of a model card.

    Args:
        results: one or more evaluation results, for instance of the zero-shot and of the adapted model.

    Returns:
        Markdown; one row per model and set, and one line that says how it was measured.
    """
    lines = [
        "| model | test set | utterances | words | WER % (95 % interval) | S / D / I | real-time factor |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for row in result["sets"]:
            lines.append(
                f"| {result['label']} | {set_title(row['set'])} | {row['utterances']} | {row['words']} | "
                f"{percent(row['wer'])} ({percent(row['wer_low'])} to {percent(row['wer_high'])}) | "
                f"{row['substitutions']} / {row['deletions']} / {row['insertions']} | {row['real_time_factor']:.3f} |"
            )
    lines.append("")
    groups: dict[tuple[str, int, int, str], float] = {}
    for result in results:
        key = (result["device"], result["threads"], result.get("beams", 1), result["normalizer"])
        groups[key] = max(groups.get(key, 0.0), result["peak_rss_mib"])
    lines.extend(_conditions(*key, peak) for key, peak in groups.items())
    return "\n".join(lines) + "\n"


def replace_between_markers(document: str, table: str, where: str, begin: str = BEGIN, end: str = END) -> str:
    """Returns `document` with what stands between the markers `begin` and `end` replaced by `table`.

    Raises:
        UserError: `where` (a file name) does not have the two markers once each, in order.
    """
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise UserError(f"{where}: needs the lines '{begin}' and '{end}' once each, in this order.")
    head, rest = document.split(begin)
    return f"{head}{begin}\n\n{table.strip()}\n\n{end}{rest.split(end)[1]}"


def set_title(name: str) -> str:
    """Returns the words that stand for a set's name in tables."""
    return _SET_TITLES.get(name, name)


def percent(fraction: float) -> str:
    """Returns a fraction as per cent with one decimal, without the sign."""
    return f"{100 * fraction:.1f}"


def _conditions(device: str, threads: int, beams: int, normalizer: str, peak_rss_mib: float) -> str:
    decoding = "greedy decoding" if beams == 1 else f"{beams} beams"
    return (
        f"Measured by `kimi-mm eval asr`, {decoding}, device {device}, {threads} threads, "
        f"peak memory {peak_rss_mib:.0f} MiB, normaliser {normalizer}."
    )
