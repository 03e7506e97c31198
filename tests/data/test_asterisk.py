import hashlib
from pathlib import Path

import numpy as np
import pytest

from kimi_mm.data.asterisk import Prompt, clean_prompts, split_halves, spoken_text
from kimi_mm.data.g722 import decode
from kimi_mm.data.human import DEMO_KEYS, read_clips
from kimi_mm.data.text import word_grams
from kimi_mm.errors import UserError
from kimi_mm.evaluation.normalize import normalize_english

GOLDEN = "cf25daf26696eb104630c8ea5a9c730fc3dca85eacca1716e8e1e29558e84e64"
DEMO = Path(__file__).parents[2] / "kimi_mm" / "pretrained" / "demo"


def test_g722_equals_a_published_decoder_bit_for_bit() -> None:
    # The digest is of what ffmpeg 5.1 (-f g722) decodes from the same bytes.
    data = np.random.default_rng(7).integers(0, 256, 1500, dtype=np.uint8).tobytes()
    (wave,) = decode([data])
    assert wave.dtype == np.int16
    assert hashlib.sha256(wave.astype("<i2").tobytes()).hexdigest() == GOLDEN


def test_g722_files_in_lockstep_equal_files_alone() -> None:
    rng = np.random.default_rng(0)
    streams = [rng.integers(0, 256, n, dtype=np.uint8).tobytes() for n in (40, 0, 333, 120)]
    for stream, wave in zip(streams, decode(streams), strict=True):
        assert len(wave) == 2 * len(stream)
        np.testing.assert_array_equal(wave, decode([stream])[0])


def test_cleaning_drops_notes_and_marks_scored_prompts() -> None:
    texts = {
        "a": "press # to exit, or 5",
        "b": "[tone]",
        "c": "IAX (note)",
        "d": "At the tone...",
        "e": "M I S D N",
        "letters/a": "a",
        "f": "...has joined the conference.",
        "g": "Hours",
    }
    kept = {p.key: p for p in clean_prompts([Prompt(k, t) for k, t in texts.items()])}
    assert {k: p.text for k, p in kept.items()} == {
        "a": "Press pound to exit, or five.",
        "f": "Has joined the conference.",
        "g": "Hours.",
    }
    assert [kept[k].scored for k in "afg"] == [True, True, False]
    assert spoken_text("who i am:") == "Who I am."


def test_halves_share_no_sentence_and_no_four_words() -> None:
    rng = np.random.default_rng(3)
    words = [f"w{i}" for i in range(30)]
    prompts = [Prompt(f"k{i}", " ".join(rng.choice(words[: 5 + i], rng.integers(1, 12)))) for i in range(60)]
    prompts.append(Prompt("again", prompts[7].text.upper()))
    split, sizes = split_halves(prompts)
    assert [p.key for p in split] == [p.key for p in prompts]
    halves = {h: [normalize_english(p.text) for p in split if p.half == h] for h in ("adapt", "test")}
    assert not set(halves["adapt"]) & set(halves["test"])
    grams = {h: {g for t in texts for g in word_grams(t, 4)} for h, texts in halves.items()}
    assert not grams["adapt"] & grams["test"]
    counts = {h: sum(len(t.split()) for t in texts) for h, texts in halves.items()}
    assert sum(counts.values()) == sum(sizes)
    assert abs(counts["adapt"] - counts["test"]) <= max(sizes)
    assert split_halves(prompts)[0] == split


def test_shipped_demo_clips_are_complete() -> None:
    clips = read_clips(DEMO, scored_only=True)
    assert [clip.id for clip in clips] == list(DEMO_KEYS)
    for clip in clips:
        assert 2.0 <= len(clip.wave) / 16_000 <= 10.0
        assert np.abs(clip.wave).max() > 1000
    assert "Allison Smith" in (DEMO / "ATTRIBUTION.txt").read_text()


def test_clips_outside_their_folder_are_refused(tmp_path: Path) -> None:
    row = '{"id": "a", "file": "../x.flac", "text": "a", "seconds": 1, "scored": true}\n'
    (tmp_path / "manifest.jsonl").write_text(row)
    with pytest.raises(UserError, match=r"manifest\.jsonl:1: path '\.\./x\.flac' leaves"):
        read_clips(tmp_path)
