"""The ablations at debug size: every question end to end, going on, several runs at a time, and the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import ablations
from benchmarks.ablation_cases import QUESTIONS, SCALES, matched, parameters, text_model
from benchmarks.ablation_report import BEGIN, END, tables, write_between
from kimi_mm.errors import UserError


def test_every_question_end_to_end(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n{BEGIN}\nold\n{END}\nAfter.\n")
    command = ["--scale", "debug", "--seeds", "1", "--work", str(tmp_path / "work"), "--write", str(page)]
    assert ablations.main(command) == 0
    text = page.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "old" not in text
    for question in QUESTIONS.values():
        assert f"### {question.title}" in text
        for arm in question.arms(SCALES["debug"]):
            assert f"| {arm.name} |" in text
    assert page.with_suffix(".png").stat().st_size > 10_000
    results = list((tmp_path / "work").glob("*/result.json"))
    runs = {arm.key(0) for question in QUESTIONS.values() for arm in question.arms(SCALES["debug"])}
    assert len(runs) == len(results) == 9  # Block AttnRes by AdamW is the same run in three questions
    times = {path: path.stat().st_mtime_ns for path in results}
    capsys.readouterr()
    assert ablations.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in results} == times
    assert "seed 0" not in capsys.readouterr().err


def test_several_at_a_time_and_interrupted(tmp_path):
    """Ctrl-C leaves runs that the same command finishes, with the numbers of runs that were left alone."""
    work = tmp_path / "work"
    options = ["--scale", "debug", "--seeds", "1", "--questions", "residual", "--jobs", "2", "--work", str(work)]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.ablations", *options], stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not list(work.glob("*/phase-0/step-*")) and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.wait(timeout=60)
    assert ablations.main([*options, "--jobs", "1"]) == 0
    assert ablations.main([*options[:-1], str(tmp_path / "alone"), "--jobs", "1"]) == 0
    for arm in QUESTIONS["residual"].arms(SCALES["debug"]):
        one, other = (
            json.loads((place / arm.key(0) / "result.json").read_text()) for place in (work, tmp_path / "alone")
        )
        assert one["scores"] == other["scores"]
        assert one["curve"] == other["curve"]


def test_what_is_missing_is_said(tmp_path, capsys):
    assert ablations.main(["--scale", "cpu", "--data", str(tmp_path), "--work", str(tmp_path / "work")]) == 1
    assert "kimi-mm prepare text" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ablations.main(["--questions", "taste"])
    assert "there is no question 'taste'" in capsys.readouterr().err
    page = tmp_path / "page.md"
    page.write_text("no markers")
    with pytest.raises(UserError, match="needs the lines"):
        write_between(page, "text")


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_arms_have_the_same_number_of_parameters(scale):
    for question in QUESTIONS.values():
        sizes = [parameters(arm.model) for arm in question.arms(scale)]
        assert max(sizes) - min(sizes) < (0.03 if scale is SCALES["debug"] else 0.01) * max(sizes)
    assert matched(text_model(scale), parameters(text_model(scale))) == text_model(scale)


def test_tables_compare_over_common_seeds():
    first = [{"seed": s, "scores": {"text loss": v, "accuracy": v}} for s, v in enumerate((1.0, 2.0, 3.0))]
    second = [{"seed": s, "scores": {"text loss": v, "accuracy": v}} for s, v in ((0, 0.5), (2, 3.5))]
    text = tables(["a", "b"], [1_000_000, 1_100_000], [first, second])
    loss, accuracy = (part for part in text.split("\n\n") if part)
    assert "| a | 1.000 M | 1.000, 2.000, 3.000 | 2.000 |  |  |" in loss
    assert "| b | 1.100 M | 0.500, 3.500 | 2.000 | +0.000 | 1 of 2 |" in loss
    assert "1 of 2" in accuracy
