"""`kimi-mm prepare`: what it refuses, and that it leaves the finding of packages to the data modules."""

from __future__ import annotations

import json

import pytest

import kimi_mm.data.prepare as preparation


@pytest.fixture
def calls(monkeypatch):
    """Records the steps instead of running them; each step's own tests are in tests/data."""
    made = []

    def record(kind, out, **options):
        options["progress"]("step", 0, 0)
        made.append((kind, out, options["texts"]))
        return {"made": kind}

    monkeypatch.setattr(preparation, "prepare", record)
    monkeypatch.setattr(preparation, "human_shards", lambda folder, out: made.append(("shards", folder, out)))
    return made


def test_speech_makes_the_text_it_needs_first(kimi, tmp_path, calls):
    texts = tmp_path / "data" / preparation.TEXTS
    result = kimi("prepare", "speech", "--data", tmp_path / "data", "--count", 3)
    assert result.code == 0
    assert calls == [("text", tmp_path / "data", None), ("speech", tmp_path / "data" / "speech", texts)]
    assert [json.loads(line) for line in result.out.splitlines()] == [
        {"kind": "text", "made": "text"},
        {"kind": "speech", "made": "speech"},
    ]
    assert result.err == "step\nstep\n"


def test_all(kimi, tmp_path, calls):
    assert kimi("prepare", "all", "--data", tmp_path).code == 0
    human = tmp_path / "human"
    steps = ["text", "human", "shards", "encoder", "unlabelled", "eval", "speech"]
    steps += ["targets", "dialogs", "eval-speech", "judges", "art", "scenes", "programs"]
    assert [call[0] for call in calls] == steps
    assert calls[-7] == ("targets", tmp_path / "targets", tmp_path / "texts.jsonl.gz")
    assert calls[2] == ("shards", human / "adapt", human / "adapt-shards")


def test_refusals(kimi, tmp_path):
    assert kimi("prepare", "pictures").code == 2
    assert kimi("prepare", "speech", "--hours", 0).code == 2
    unknown = kimi("prepare", "speech", "--voices", "hibari,dogs", "--data", tmp_path / "data")
    assert kimi("prepare", "judges", "--voices", "hibari", "--data", tmp_path / "data").complaints == [
        "kimi-mm: --voices is for speech, dialogs, targets, not for judges."
    ]
    assert unknown.complaints == [
        "kimi-mm: Unknown voice 'dogs'; known are espeak, flite, hibari, or single ones of theirs."
    ]
    (tmp_path / "plain").write_text("")
    result = kimi("prepare", "text", "--data", tmp_path / "plain")
    assert (result.code, len(result.complaints)) == (1, 1)
