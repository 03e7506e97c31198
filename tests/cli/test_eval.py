"""`kimi-mm eval asr` on a small prepared set of real recordings, and the tables made of its result."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kimi_mm.audio.io import read_audio
from kimi_mm.data.asterisk import Prompt
from kimi_mm.data.human import write_clips
from kimi_mm.evaluation.asr import SETS


@pytest.fixture
def data(clips, tmp_path):
    """A data folder whose set human-test holds two of the shipped recordings."""
    chosen = [(path.stem, text, np.round(read_audio(path)[0] * 32767).astype(np.int16)) for path, text in clips[:2]]
    prompts = [Prompt(key, text, "test", scored=True, seconds=len(wave) / 16_000) for key, text, wave in chosen]
    write_clips(tmp_path / "data" / SETS["human-test"], prompts, {key: wave for key, _, wave in chosen})
    return tmp_path / "data"


def test_scores_and_card(kimi, data, tmp_path):
    result = tmp_path / "result.json"
    shown = kimi("eval", "asr", "--set", "human-test", "--data", data, "--json", result, "--label", "shipped")
    assert (shown.code, shown.err) == (0, "")
    assert "normaliser" in shown.out
    scores = json.loads(result.read_text())["sets"][0]
    assert (scores["set"], scores["utterances"]) == ("human-test", 2)
    assert 0 <= scores["wer"] <= 0.6
    assert scores["real_time_factor"] > 0

    table = kimi("eval", "card", result)
    assert table.code == 0
    assert table.out.splitlines()[2].startswith("| shipped | human recordings, test half | 2 |")

    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- scores:begin -->\n<!-- scores:end -->\nafter\n")
    assert kimi("eval", "card", result, "--write", readme).code == 0
    assert readme.read_text() == (
        f"before\n<!-- scores:begin -->\n\n{table.out.strip()}\n\n<!-- scores:end -->\nafter\n"
    )


def test_limit(kimi, data, tmp_path):
    result = tmp_path / "result.json"
    assert kimi("eval", "asr", "--set", "human-test", "--data", data, "--json", result, "--limit", 1).code == 0
    assert json.loads(result.read_text())["sets"][0]["utterances"] == 1


def test_bad_arguments(kimi, data, tmp_path):
    assert kimi("eval", "asr", "--set", "dogs", "--data", data).code == 2
    unprepared = kimi("eval", "asr", "--set", "voice", "--data", data)
    assert (unprepared.code, len(unprepared.complaints)) == (1, 1)
    assert "kimi-mm prepare" in unprepared.complaints[0]
    unwritable = kimi("eval", "asr", "--set", "human-test", "--data", data, "--json", tmp_path / "no" / "r.json")
    assert (unwritable.code, unwritable.out) == (1, "")
    assert kimi("eval", "card", tmp_path / "none.json").code == 1
