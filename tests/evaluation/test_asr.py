"""Scoring prepared test sets: what is read, what is counted, what is said about damaged sets."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kimi_mm.data.asterisk import Prompt
from kimi_mm.data.human import write_clips
from kimi_mm.data.shards import Clip, write_shards
from kimi_mm.errors import CheckpointError, UserError
from kimi_mm.evaluation.asr import SETS, collect, read_set, recognise, score
from kimi_mm.evaluation.result import peak_memory_mib

TEXTS = ["Press one now.", "Goodbye.", "The call has ended."]


@pytest.fixture
def prepared(tmp_path):
    """Prepared sets: recording n holds the value n + 1 for n + 1 tenths of a second; all in "sent", one in "human"."""
    clips = [Clip(f"k{n}", text, "tone", np.full(1600 * (n + 1), n + 1, np.int16)) for n, text in enumerate(TEXTS)]
    write_shards(tmp_path / SETS["sent"], clips, per_shard=2)
    prompts = [
        Prompt(clip.id, clip.text, "test", scored=clip.id == "k2", seconds=len(clip.wave) / 16_000) for clip in clips
    ]
    write_clips(tmp_path / SETS["human-test"], prompts, {clip.id: clip.wave for clip in clips})
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
    result = json.loads(json.dumps(collect("nano", "nano", "cpu", 4, [scores])))
    assert result["sets"][0]["set"] == "sent"
    assert result["normalizer"]
    assert 10 < result["peak_rss_mib"] < 100_000
    assert result["peak_rss_mib"] == pytest.approx(peak_memory_mib(), rel=0.5)


def test_unknown_or_unprepared_sets(prepared):
    with pytest.raises(UserError, match="'dogs' is unknown"):
        read_set(prepared, "dogs")
    with pytest.raises(CheckpointError, match="kimi-mm prepare"):
        read_set(prepared, "voice")


def test_only_scored_prompts_of_the_human_set(prepared):
    found = read_set(prepared, "human-test")
    assert [(item.key, item.text) for item in found] == [("k2", TEXTS[2])]
    np.testing.assert_array_equal(found[0].wave, np.full(4800, 3 / 32768, np.float32))


def test_damaged_sets_are_named(prepared):
    manifest = prepared / SETS["sent"] / "shard-00001.jsonl"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "samples": 10**6}))
    with pytest.raises(UserError, match="shard-00001"):
        read_set(prepared, "sent")
    (prepared / SETS["human-test"] / "k2.flac").write_bytes(b"fLaC")
    with pytest.raises(UserError, match=r"k2\.flac"):
        read_set(prepared, "human-test")
