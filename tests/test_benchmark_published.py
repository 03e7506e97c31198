"""The benchmark of published shapes runs at its debug size and prints what it promises."""

from __future__ import annotations

import json

import pytest

from benchmarks.published import main


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["linear"], {"prefill_s", "p50_ms", "p99_ms", "tokens_per_s", "peak_gib"}),
        (["audio", "--weights", "int8"], {"first_code_s", "p50_ms", "codes_per_s", "peak_gib"}),
    ],
)
def test_debug_size(arguments, keys, capsys):
    pytest.importorskip("transformers")
    main([*arguments, "--debug", "--device", "cpu"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert keys <= lines[0].keys()
    assert all(lines[0][key] > 0 for key in keys)
    assert [line["who"] for line in lines] == (["kimi_mm", "transformers"] if arguments == ["linear"] else ["kimi_mm"])
