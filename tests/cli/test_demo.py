"""`kimi-mm demo` and `kimi-mm info` on what ships."""

from __future__ import annotations

import json
import re

import pytest
import soundfile
from PIL import Image

import kimi_mm
from kimi_mm.cli.demo import CLIPS, read_clips, speak_clip


def test_demo_prints_scores_and_draws(kimi, tmp_path):
    result = kimi("demo", "--output", tmp_path / "new")
    assert (result.code, result.err) == (0, "")
    clips = read_clips()
    assert result.out.count("  said   ") == result.out.count("  heard  ") == len(clips)
    whole = re.search(r"all: WER ([\d.]+) % of (\d+) words .* real-time factor ([\d.]+)", result.out)
    assert whole is not None
    assert float(whole[1]) <= 25.0
    assert int(whole[2]) >= 30
    with Image.open(tmp_path / "new" / "transcript.png") as picture:
        assert picture.width >= 1000
        assert len(picture.convert("RGB").getcolors(2**20) or range(999)) > 200
    answers = re.search(r"(\d) of 8 answers right", result.out)
    assert answers is not None
    assert int(answers[1]) >= 4
    names = ["answers.png", "resynth.wav", "say.wav", "speech.png", "transcript.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names


def test_demo_refuses_a_place_it_cannot_write_before_working(kimi, tmp_path):
    (tmp_path / "plain").write_text("")
    result = kimi("demo", "--output", tmp_path / "plain")
    assert (result.code, result.out, len(result.complaints)) == (1, "", 1)


def test_a_voice_says_a_sentence_and_a_clip(speaking, tmp_path):
    engine = kimi_mm.load(speaking)
    clip = min(read_clips(), key=lambda row: row["seconds"])
    lines = speak_clip(engine, clip, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resynth.wav", "say.wav", "speech.png"]
    assert [path in line for path, line in zip(("resynth.wav", "say.wav", "speech.png"), lines, strict=True)] == [
        True
    ] * 3
    info = soundfile.info(tmp_path / "resynth.wav")
    assert info.samplerate == 24_000
    assert info.duration == pytest.approx(clip["seconds"], abs=0.09)
    assert soundfile.info(tmp_path / "say.wav").frames % 1920 == 0
    with Image.open(tmp_path / "speech.png") as picture:
        assert picture.height > 500  # three spectrograms


def test_a_voice_that_chooses_no_codes_says_the_clip_alone(speaking, tmp_path):
    engine = kimi_mm.load(speaking)
    engine.model.backbone.audio = None
    lines = speak_clip(engine, min(read_clips(), key=lambda row: row["seconds"]), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resynth.wav", "speech.png"]
    assert len(lines) == 2


def test_shipped_recordings_carry_their_attribution():
    texts = [path.read_text() for path in CLIPS.iterdir() if path.suffix in (".md", ".txt")]
    assert any("Attribution-ShareAlike" in text for text in texts)


def test_info(kimi, nano):
    facts = json.loads(kimi("info", "--json").out)
    assert facts["name"] == nano.config.name
    total = int(facts["summary"]["parameters"].replace(",", ""))
    assert total == sum(parameters for parameters, _ in facts["parts"].values())
    tensors = {name: tensor for name, tensor in nano.model.state_dict().items() if "quantizer.ema_" not in name}
    assert total == sum(tensor.numel() for tensor in tensors.values())
    assert facts["card"]
    shown = kimi("info")
    assert shown.code == 0
    assert facts["summary"]["parameters"] in shown.out
