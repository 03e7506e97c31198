"""The benchmark of the server runs at its debug size and prints what it promises."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from benchmarks.serving import main


def test_debug_size(capsys):
    main(["--debug"])
    lines = dict(re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines()[1:])
    assert float(lines["from the command to ready"].split()[0]) > 0
    p50, p90, p99 = map(float, re.findall(r"[\d.]+", lines["transcription of 2 s, p50 / p90 / p99"]))
    assert 0 < p50 <= p90 <= p99
    one, eight = (float(lines[f"chats a second, {who}"]) for who in ("one asker", "8 askers"))
    assert float(lines["8 askers against one"].split()[0]) == pytest.approx(eight / one, rel=0.02)
