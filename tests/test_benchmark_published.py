"""The benchmark of published shapes at its debug size: what it measures, prints and saves, and when it gives up."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import published
from benchmarks.published import main
from benchmarks.published_loop import PublishedLM, released_loop
from benchmarks.published_shapes import drawn, shaped
from kimi_mm.processing import ModelInputs
from kimi_mm.text.backbone import Backbone

SPEED = {"p50_ms", "p90_ms", "p99_ms", "tokens_per_s", "times", "peak_gib"}


def test_all(capsys, tmp_path):
    pytest.importorskip("transformers")
    main(["all", "--debug", "--device", "cpu", "--output", str(tmp_path / "deep" / "found.json")])
    found = json.loads((tmp_path / "deep" / "found.json").read_text())
    rows = found["rows"]
    assert [row["who"] for row in rows] == [
        "kimi_mm, eager",
        "transformers",
        "kimi_mm, eager, chunks as released",
        "kimi_mm, graphs, chunks as released",
        "kimi_mm, graphs, first chunk of 10 codes",
        "released loop",
    ]
    assert all(row.keys() >= SPEED and all(row[key] > 0 for key in SPEED) for row in rows)
    assert all(row["first_sound_s"] > 0 for row in rows[2:])
    assert rows[1]["times"] == rows[-1]["times"] == rows[-1]["first_sound_times_sooner"] == 1.0
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["found.json"]
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].strip().startswith("released loop")
    assert "x sooner" in printed


def test_on_a_cpu_in_int8(capsys, monkeypatch):
    main(["cpu", "--debug"])
    assert "s/token" in capsys.readouterr().out
    monkeypatch.setattr(published, "_available", lambda: 2**30)
    with pytest.raises(SystemExit, match=r"needs \d+\.\d GiB, 1\.0 GiB are free"):
        main(["cpu"])


@torch.inference_mode()
def test_the_released_loop_is_our_model():
    """With the same weights it gives the logits that we give, step for step behind its cache."""
    transformers = pytest.importorskip("transformers")
    config = shaped("audio", None, debug=True)
    ours = drawn(config, "cpu", torch.float32)
    ours.config = config.replace(hears=True)
    theirs = PublishedLM(config, "cpu", torch.float32)
    copy_weights(ours.backbone, theirs)
    ids = torch.randint(0, 200, (2, 1, 9))
    output = ours(ModelInputs(ids[0], ids[1], torch.tensor([9])))
    cache = transformers.DynamicCache(config=theirs.settings)
    theirs(ids[1][:, :5], ids[0][:, :5], cache, 0)
    for at in range(5, 9):
        audio, text = theirs(ids[1][:, at : at + 1], ids[0][:, at : at + 1], cache, at)
    for got, want in (
        (text, ours.backbone.text_logits(output.text_hidden)[:, -1]),
        (audio, ours.backbone.audio_logits(output.audio_hidden)[:, -1]),
    ):
        assert want.std() > 1e-3
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    loop = released_loop(theirs, ids, delay=6, blank=151_666, codes_from=0)
    given = [next(loop) for _ in range(8)]
    assert given[:6] == [None] * 6
    assert all(code is not None for code in given[6:])


def copy_weights(ours: Backbone, theirs: PublishedLM) -> None:
    names = {
        "input_layernorm": "mixer_norm",
        "post_attention_layernorm": "mlp_norm",
        "self_attn": "mixer",
        "mlp": "mlp",
    }
    for layer, mine in zip(theirs.layers, ours.decoder_layers(), strict=True):
        for name, parameter in layer.named_parameters():
            first, _, rest = name.partition(".")
            parameter.copy_(mine.get_parameter(f"{names[first]}.{rest}"))
    theirs.embed.weight.copy_(ours.embed_tokens.weight)
    theirs.norm.weight.copy_(ours.text.norm.weight)
    theirs.audio_norm.weight.copy_(ours.audio.norm.weight)
    theirs.head.weight.copy_(ours.lm_head.weight)
    theirs.audio_head.weight.copy_(ours.audio_head.weight)
