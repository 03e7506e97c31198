"""The benchmark of the server runs at its debug size and prints what it promises."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from benchmarks.serving import main


def test_debug_size(capsys):
    main(["--debug", "--minutes", "0.05"])
    lines = dict(re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines()[1:])
    assert float(lines["from the command to ready"].split()[0]) > 0
    assert lines["8 cut streams: held afterwards"].startswith("0, after ")
    assert lines["mixed load of 0.05 min"].endswith("left in the middle")
    assert (lines["errors"], lines["answers that differ from those alone"]) == ("0", "0")
    assert float(lines["memory after warm-up, at the end"].split(",")[0]) > 100
    p50, p90, p99 = map(float, re.findall(r"[\d.]+", lines["transcription of 2 s, p50 / p90 / p99"]))
    assert 0 < p50 <= p90 <= p99
    p50, p95 = map(float, re.findall(r"[\d.]+", lines["last sound to first of the answer, p50 / p95"])[:2])
    assert 0 < p50 <= p95
    one, eight = (float(lines[f"chats a second, {who}"]) for who in ("one asker", "8 askers"))
    assert float(lines["8 askers against one"].split()[0]) == pytest.approx(eight / one, rel=0.02)
