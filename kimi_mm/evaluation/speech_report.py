"""Results of `kimi-mm eval speech` as tables: in the terminal's and in the model card's form.

The card's table stands between `<!-- speech:begin -->` and `<!-- speech:end -->`; see `report.replace_between_markers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kimi_mm.evaluation.report import percent
from kimi_mm.evaluation.result import check_keys
from kimi_mm.evaluation.speech import KIND, VERSION

BEGIN = "<!-- speech:begin -->"
END = "<!-- speech:end -->"
TITLES = {
    "teacher": "the teacher's recordings",
    "resynthesis": "resynthesis of the teacher",
    "conversion": "resynthesis of another voice",
    "reading": "text to speech",
    "teacher-answers": "the teacher's answers",
    "answers": "spoken answers to held-out questions",
}
_TOP_KEYS = ("label", "model", "device", "threads", "normalizer", "peak_rss_mib", "stream", "sets")
_SPEECH_KEYS = ("utterances", "words", "wer", "wer_low", "wer_high", "ovrl", "cosine", "real_time_factor", "worst")
_ANSWER_KEYS = ("turns", "accuracy", "low", "high", "kinds", "worst")
_HEAD = ("test set", "spoken", "WER % (95 % interval)", "right % (95 % interval)", "OVRL", "cosine", "real-time factor")


def check_result(result: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns a result that is whole.

    Raises:
        UserError: it is another result, or names the key that is missing.
    """
    return check_keys(result, where, "kimi-mm eval speech", (KIND, VERSION), _TOP_KEYS, _keys_of)


def _keys_of(scores: dict[str, Any]) -> tuple[str, ...]:
    return _ANSWER_KEYS if "turns" in scores else _SPEECH_KEYS


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Returns the cells of one result, a row for each set."""
    table = []
    for row in result["sets"]:
        title = TITLES.get(str(row["set"]), str(row["set"]))
        if "turns" in row:
            right = f"{percent(row['accuracy'])} ({percent(row['low'])} to {percent(row['high'])})"
            table.append((title, f"{row['turns']} answers", "", right, "", "", ""))
            continue
        wer = f"{percent(row['wer'])} ({percent(row['wer_low'])} to {percent(row['wer_high'])})"
        factor = "" if row["real_time_factor"] is None else f"{row['real_time_factor']:.2f}"
        spoken = f"{row['utterances']} sentences, {row['words']} words"
        table.append((title, spoken, wer, "", f"{row['ovrl']:.2f}", f"{row['cosine']:.3f}", factor))
    return table


def markdown_table(results: Sequence[dict[str, Any]]) -> str:
    """Returns the table of a model card: a row per model and set, and a line on how each was measured."""
    head = ("model", *_HEAD)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for result in results:
        lines += [f"| {' | '.join((result['label'], *cells))} |" for cells in rows(result)]
    return "\n".join([*lines, "", *map(conditions, results)]) + "\n"


def conditions(result: dict[str, Any]) -> str:
    """Returns one line on the judges, the device, and the times of the stream."""
    line = (
        f"{result['label']}: `kimi-mm eval speech`, device {result['device']}, {result['threads']} threads, peak "
        f"memory {result['peak_rss_mib']:.0f} MiB; WER and answers by Whisper tiny.en, normaliser "
        f"{result['normalizer']}, OVRL by DNSMOS P.835, cosine to the teacher's voice by Resemblyzer (above 0.733: "
        "the same voice)"
    )
    stream = result["stream"]
    if stream is None:
        return f"{line}."
    times = ", ".join(f"{name} {stream['first_audio_seconds'][name] * 1e3:.0f} ms" for name in ("p50", "p90", "p99"))
    line += f"; first sound after {stream['first_chunk_codes']} codes: {times} of computing"
    line += f"; codes to sound at a real-time factor of {stream['real_time_factor']:.2f}"
    if stream["seam_energy"] is not None:
        line += f"; seam energy {stream['seam_energy']:.2f} (teacher {stream['seam_energy_teacher']:.2f})"
    return f"{line}."


def terminal_table(result: dict[str, Any]) -> Any:
    """Returns the table that `rich` prints."""
    from rich.table import Table

    table = Table(*_HEAD)
    for cells in rows(result):
        table.add_row(*cells)
    return table
