"""`kimi-mm report`: a page of a run, and what it says where there is none."""

from __future__ import annotations


def test_report_of_a_run(kimi, tmp_path):
    run = tmp_path / "run"
    assert kimi("train", "text/nano", "--debug", "--output", run, "steps=2", "optim.warmup_steps=1").code == 0
    result = kimi("report", run)
    assert (result.code, result.out.strip()) == (0, str(run / "report.html"))
    assert "<svg" in (run / "report.html").read_text(encoding="utf-8")
    other = tmp_path / "page.html"
    assert kimi("report", run, "--output", other).code == 0
    assert other.is_file()


def test_no_run(kimi, tmp_path):
    result = kimi("report", tmp_path)
    assert (result.code, len(result.complaints)) == (1, 1)
    assert "no logs of a run" in result.complaints[0]
