"""`kimi-mm check-data`: bad lines on standard output, the exit code, and a file for programs."""

from __future__ import annotations

import json


def line(text: str) -> str:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
    return json.dumps({"messages": messages}) + "\n"


def test_good_data(kimi, tmp_path):
    data = tmp_path / "my.jsonl"
    data.write_text(line("One?") + line("Two?"))
    result = kimi("check-data", data)
    assert (result.code, result.complaints) == (0, [])
    assert "2 samples, 0 of them cannot be used" in result.out


def test_bad_data(kimi, tmp_path):
    data, found = tmp_path / "my.jsonl", tmp_path / "bad.jsonl"
    data.write_text(line("One?") + "{\n" + line("") + line("Four?"))
    result = kimi("check-data", data, "--json", found, "--limit", 1)
    assert result.code == 1
    assert result.out.splitlines()[0].startswith(f"{data}:2: not valid JSON")
    assert "... and 1 more." in result.out
    assert result.complaints == ["kimi-mm: 2 of 4 samples cannot be used."]
    assert [json.loads(row)["line"] for row in found.read_text().splitlines()] == [2, 3]
    assert kimi("check-data", tmp_path / "none.jsonl").code == 1
