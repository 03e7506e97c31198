"""The tables that are made of evaluation results."""

from __future__ import annotations

import json

import pytest

from kimi_mm.errors import UserError
from kimi_mm.evaluation.report import BEGIN, END, load_result, markdown_table, replace_between_markers

ROW = {
    "set": "human-test",
    "utterances": 120,
    "words": 1300,
    "seconds": 540.0,
    "substitutions": 30,
    "deletions": 10,
    "insertions": 12,
    "wer": 0.04,
    "wer_low": 0.0312,
    "wer_high": 0.0491,
    "real_time_factor": 0.0514,
    "worst": [],
}
RESULT = {
    "kind": "kimi_mm.asr",
    "version": 1,
    "label": "nano",
    "model": "nano",
    "device": "cpu",
    "threads": 2,
    "normalizer": "en-1",
    "peak_rss_mib": 700.4,
    "sets": [ROW],
}


def test_table():
    zero_shot = {**RESULT, "label": "nano, zero-shot", "sets": [{**ROW, "wer": 0.2}]}
    lines = markdown_table([RESULT, zero_shot]).splitlines()
    assert lines[2] == ("| nano | human recordings, test half | 120 | 1300 | 4.0 (3.1 to 4.9) | 30 / 10 / 12 | 0.051 |")
    assert lines[3].startswith("| nano, zero-shot | human recordings, test half | 120 | 1300 | 20.0 ")
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[4:] == [
        "",
        "Measured by `kimi-mm eval asr`, greedy decoding, device cpu, 2 threads, peak memory 700 MiB, normaliser en-1.",
    ]


def test_only_what_is_between_the_markers_changes():
    document = f"# Title\n\n{BEGIN}\nold\n{END}\n\nrest\n"
    once = replace_between_markers(document, "| new |\n", "README.md")
    assert once == f"# Title\n\n{BEGIN}\n\n| new |\n\n{END}\n\nrest\n"
    assert replace_between_markers(once, "| new |\n", "README.md") == once


@pytest.mark.parametrize("document", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{END}"])
def test_markers_must_be_there(document):
    with pytest.raises(UserError, match=r"README\.md"):
        replace_between_markers(document, "x", "README.md")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("not json", "not JSON"),
        (json.dumps([1]), "not a result"),
        (json.dumps({**RESULT, "version": 2}), "version"),
        (json.dumps({key: value for key, value in RESULT.items() if key != "label"}), "label"),
        (json.dumps({**RESULT, "sets": [{"set": "sent"}]}), "sent"),
    ],
)
def test_bad_results_are_named(tmp_path, content, named):
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(UserError, match=named) as caught:
        load_result(path)
    assert "result.json" in str(caught.value)


def test_missing_result(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_result(tmp_path / "none.json")
