"""`kimi-mm demo` and `kimi-mm info` on what ships."""

from __future__ import annotations

import json
import re

from PIL import Image

from kimi_mm.cli.demo import CLIPS, read_clips


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
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["transcript.png"]


def test_demo_refuses_a_place_it_cannot_write_before_working(kimi, tmp_path):
    (tmp_path / "plain").write_text("")
    result = kimi("demo", "--output", tmp_path / "plain")
    assert (result.code, result.out, len(result.complaints)) == (1, "", 1)


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
