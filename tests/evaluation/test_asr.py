"""Scoring prepared test sets: what is read, what is counted, what is said about damaged sets."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kimi_mm.errors import CheckpointError, UserError
from kimi_mm.evaluation.asr import SETS, collect, peak_memory_mib, read_set, recognise, score

TEXTS = ["Press one now.", "Goodbye.", "The call has ended."]


@pytest.fixture
def prepared(tmp_path):
    """A prepared set of three recordings in two shards; recording n holds the value n + 1 for n + 1 tenths."""
    folder = tmp_path / SETS["sent"]
    folder.mkdir(parents=True)
    for shard, members in enumerate(([0, 1], [2])):
        waves = [np.full(1600 * (n + 1), n + 1, np.int16) for n in members]
        starts = np.cumsum([0, *map(len, waves)])
        rows = [
            {"key": f"k{n}", "start": int(start), "samples": len(wave), "text": TEXTS[n]}
            for n, start, wave in zip(members, starts, waves, strict=False)
        ]
        np.save(folder / f"shard-{shard:05d}.npy", np.concatenate(waves))
        (folder / f"shard-{shard:05d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_reads_every_recording(prepared):
    found = read_set(prepared, "sent")
    assert [(item.key, item.text) for item in found] == [(f"k{n}", TEXTS[n]) for n in range(3)]
    for n, item in enumerate(found):
        assert item.wave.dtype == np.float32
        np.testing.assert_array_equal(item.wave, np.full(1600 * (n + 1), (n + 1) / 32768, np.float32))


def test_counts(prepared):
    heard = iter(["press two now", "goodbye", "call has ended now now"])
    fractions = []
    results = recognise(lambda wave: next(heard), read_set(prepared, "sent"), fractions.append)
    assert fractions == pytest.approx([1 / 3, 2 / 3, 1])
    scores = score("sent", results)
    # "goodbye" is normalised to two words.
    assert (scores["utterances"], scores["words"], scores["seconds"]) == (3, 9, 0.6)
    assert (scores["substitutions"], scores["deletions"], scores["insertions"]) == (1, 1, 2)
    assert scores["wer"] == pytest.approx(4 / 9)
    assert scores["wer_low"] <= scores["wer"] <= scores["wer_high"]
    assert scores["real_time_factor"] == pytest.approx(sum(r.elapsed for r in results) / 0.6)
    assert [(item["key"], item["errors"]) for item in scores["worst"]] == [("k2", 3), ("k0", 1)]
    assert scores["worst"][1]["alignment"].splitlines()[-1].split() == ["S"]


def test_result_is_plain_json(prepared):
    scores = score("sent", recognise(lambda wave: "goodbye", read_set(prepared, "sent")))
    result = json.loads(json.dumps(collect("nano", "nano", "cpu", [scores])))
    assert result["sets"][0]["set"] == "sent"
    assert result["normalizer"]
    assert 10 < result["peak_rss_mib"] < 100_000
    assert result["peak_rss_mib"] == pytest.approx(peak_memory_mib(), rel=0.5)


def test_unknown_or_unprepared_sets(prepared):
    with pytest.raises(UserError, match="'dogs' is unknown"):
        read_set(prepared, "dogs")
    with pytest.raises(CheckpointError, match="kimi-mm prepare"):
        read_set(prepared, "voice")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: {**row, "samples": 10**6}, "row 1 lies outside"),
        (lambda row: {key: row[key] for key in ("key", "start", "samples")}, "'text' is missing"),
        (lambda row: {**row, "start": "soon"}, "damaged"),
    ],
)
def test_damaged_sets_are_named(prepared, change, said):
    manifest = prepared / SETS["sent"] / "shard-00001.jsonl"
    manifest.write_text(json.dumps(change(json.loads(manifest.read_text()))))
    with pytest.raises(CheckpointError, match=said) as caught:
        read_set(prepared, "sent")
    assert "shard-00001" in str(caught.value)


def test_missing_audio_is_named(prepared):
    (prepared / SETS["sent"] / "shard-00000.npy").unlink()
    with pytest.raises(CheckpointError, match="shard-00000"):
        read_set(prepared, "sent")
