"""`kimi-mm train` at debug size, and what it says to bad recipes."""

from __future__ import annotations

import json

import pytest


def test_debug_run_goes_on_where_it_stopped(kimi, tmp_path):
    run = tmp_path / "run"
    first = kimi("train", "asr/nano", "--debug", "--output", run, "steps=2", "save_every=1")
    assert first.code == 0
    assert json.loads((run / "summary.json").read_text())["step"] == 2
    assert kimi("train", "asr/nano", "--debug", "--output", run, "steps=3", "save_every=1").code == 0
    assert json.loads((run / "summary.json").read_text())["step"] == 3
    assert kimi("info", run / "model").code == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["asr/giga"], "asr/giga"),
        (["asr/nano", "colour=red"], "colour"),
        (["asr/nano", "steps"], "key=value"),
        (["asr/nano", "steps=many"], "steps"),
    ],
)
def test_bad_recipes(kimi, tmp_path, arguments, named):
    result = kimi("train", *arguments, "--output", tmp_path / "run")
    assert (result.code, len(result.complaints)) == (1, 1)
    assert named in result.complaints[0]
    assert not (tmp_path / "run").exists()
