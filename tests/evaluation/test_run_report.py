"""The page of a run: what was logged is on it, several log files are one run, and it needs nothing from outside."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from kimi_mm.cli.errors import describe
from kimi_mm.errors import UserError
from kimi_mm.evaluation.run_report import page, read_run, write_report
from kimi_mm.training.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was stopped and went on: two log files."""
    output = tmp_path_factory.mktemp("runs") / "sft & more"
    for options in (["stop_after=2"], []):
        train("pretrain/nano", debug=True, output=output, overrides=options)
    return output


def test_curves_of_an_interrupted_run_are_joined(run):
    curves = read_run(run)
    assert [step for step, _ in curves["loss"]] == [1, 2, 3, 4]
    assert {"lr", "tokens_per_second", "grad_norm", "qk_max", "load_max", "hidden/00", "speech", "asr"} <= set(curves)
    assert all(value > 0 for _, value in curves["tokens_per_second"])


def test_the_page_shows_them_and_stands_alone(run):
    path = write_report(run, run / "report.html")
    text = path.read_text(encoding="utf-8")
    HTMLParser().feed(text)
    for title in ("Losses", "Learning rate", "Tokens per second", "expert", "Residual stream", "attention logit"):
        assert title in text
    assert text.count("<svg") >= 6
    assert "sft &amp; more" in text
    assert "sft & more" not in text
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", text)
    assert "<script" not in text


def test_the_table_has_first_lowest_and_last():
    text = page({"loss": [(1, 4.0), (2, 1.5), (3, 2.0)], "lr": [(1, 0.1)]}, "a run", {})
    assert "<th>loss</th><td>4</td><td>1.5 (step 2)</td><td>2</td>" in text
    assert "<th>lr</th>" not in text


def test_folders_without_a_run(tmp_path):
    with pytest.raises(UserError, match="no logs of a run") as error:
        read_run(tmp_path)
    assert "kimi-mm train" in describe(error.value)
