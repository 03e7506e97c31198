import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kimi_mm.audio.io import write_wav
from kimi_mm.data.shards import read_shards, shard_path
from kimi_mm.data.synthesis import PROBE, PlannedClip, make_plan, resample, speak, synthesise, trim
from kimi_mm.data.targets import TARGET_WEIGHTS
from kimi_mm.data.text import Sentence
from kimi_mm.data.voices import (
    SEEN_WEIGHTS,
    TRAINING_WEIGHTS,
    UNSEEN,
    VoiceError,
    draw_morph,
    find_program,
    make_voice,
    parse_wav,
    scale_pitch,
    training_weights,
    warp_axis,
)
from kimi_mm.errors import UserError

SENTENCES = [Sentence(f"{i:012x}", f"This is sentence number {i} of the test.", "web", False) for i in range(40)]


def tone(hertz: float, seconds: float, rate: int) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def test_plan_uses_every_sentence_before_any_twice_and_keeps_test_voices_out() -> None:
    plan = make_plan(SENTENCES, count=100, seed=1)
    counts = Counter(clip.id for clip in plan)
    assert len(plan) == 100
    assert set(counts.values()) == {2, 3}
    assert {clip.voice for clip in plan} <= set(TRAINING_WEIGHTS)
    assert not set(TRAINING_WEIGHTS) & set(UNSEEN)
    assert len({(clip.id, clip.voice, clip.copy) for clip in plan}) == 100
    assert plan == make_plan(SENTENCES, count=100, seed=1)
    assert plan != make_plan(SENTENCES, count=100, seed=2)
    assert len(make_plan(SENTENCES)) == 40
    assert 0.04 < len(make_plan(SENTENCES, hours=0.05)) * 3.1 / 3600 < 0.06


def test_voices_of_some_synthesisers() -> None:
    assert training_weights(["hibari", "flite", "espeak"]) == TRAINING_WEIGHTS
    assert set(training_weights(["hibari"])) == {"hibari-heart", "hibari-morph"}
    assert training_weights(["hibari-heart"], TARGET_WEIGHTS) == {"hibari-heart": TARGET_WEIGHTS["hibari-heart"]}
    with pytest.raises(VoiceError, match="'flite'"):
        training_weights(["flite"], TARGET_WEIGHTS)
    with pytest.raises(VoiceError, match="'festival'"):
        training_weights(["hibari", "festival"])


def test_plans_that_would_spoil_a_test_are_refused() -> None:
    with pytest.raises(UserError, match="kept for testing"):
        make_plan(SENTENCES, voice_weights={"flite-awb": 1.0})
    held = [Sentence("0", "A held out sentence.", "web", True)]
    with pytest.raises(UserError, match="held-out"):
        make_plan(held)
    assert make_plan(held, voice_weights={"flite-awb": 1.0}, allow_unseen=True)[0].voice == "flite-awb"
    with pytest.raises(UserError, match="Unknown voice 'nobody'"):
        make_plan(SENTENCES, voice_weights={"nobody": 1.0})
    with pytest.raises(UserError, match="Nothing to synthesise"):
        make_plan([])


def test_resampling_keeps_a_tone_and_its_length() -> None:
    out = resample(tone(440.0, 0.5, 24_000), 24_000)
    assert len(out) == 8000
    np.testing.assert_allclose(out[800:-800], tone(440.0, 0.5, 16_000)[800:-800], atol=0.01)


def test_trim_leaves_a_margin() -> None:
    quiet = np.zeros(8000, np.float32)
    out = trim(np.concatenate([quiet, tone(200.0, 1.0, 16_000), quiet]))
    assert abs(len(out) - (16_000 + 2 * 1920)) <= 320
    assert len(trim(quiet)) == 0


def test_morphs_move_pitch_and_formants_by_their_factors() -> None:
    f0 = np.array([0.0, 100.0, 200.0, 0.0], np.float32)
    np.testing.assert_allclose(scale_pitch(f0, 0.6, 1.0), [0, 60, 120, 0], rtol=1e-5)
    lively = scale_pitch(f0, 1.0, 1.5)
    assert lively[2] / lively[1] == pytest.approx(2**1.5, rel=1e-5)
    spectrum = np.exp(-0.5 * ((np.arange(601) - 200) / 10.0) ** 2)[:, None].astype(np.float32)
    assert abs(int(warp_axis(spectrum, 0.8)[:, 0].argmax()) - 160) <= 1
    np.testing.assert_allclose(warp_axis(spectrum, 1.0), spectrum, atol=1e-6)
    draws = np.array([draw_morph(np.random.default_rng(i)) for i in range(500)])
    low, high = draws.min(0), draws.max(0)
    assert (low >= [0.48, 0.80, 0.7]).all()
    assert (high <= [1.3, 1.14, 1.4]).all()
    assert np.corrcoef(np.log(draws[:, 0]), draws[:, 1])[0, 1] > 0.8


def test_wav_of_a_pipe_has_a_made_up_length() -> None:
    body = np.array([0, 16384, -32768], "<i2").tobytes()
    head = b"RIFF" + b"\xff" * 4 + b"WAVEfmt " + (16).to_bytes(4, "little")
    head += b"\x01\x00\x01\x00" + (22050).to_bytes(4, "little") + (44100).to_bytes(4, "little") + b"\x02\x00\x10\x00"
    wave, rate = parse_wav(head + b"data" + b"\xff\xff\xff\x7f" + body)
    assert rate == 22050
    np.testing.assert_allclose(wave, [0.0, 0.5, -1.0])
    with pytest.raises(VoiceError):
        parse_wav(b"")


def program_that_says(folder: Path, words: str) -> Path:
    """A program in flite's place that speaks a text with these words, and ends with an error at any other."""
    write_wav(folder / "said.wav", 0.3 * tone(200.0, 0.6, 16_000), 16_000)
    program = folder / "flite"
    # The last argument is where the wave goes.
    case = f'*"{words}"*) for out; do :; done; cp {folder}/said.wav "$out";; *) exit 139;;'
    program.write_text(f'#!/bin/sh\ncase "$*" in {case} esac\n')
    program.chmod(0o755)
    return program


def test_a_voice_that_cannot_speak_here_is_found_out_before_the_rest_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KIMI_MM_FLITE", str(program_that_says(tmp_path, "nothing of the kind")))
    plan = [PlannedClip(s.id, s.text, "flite-rms") for s in SENTENCES[:4]]
    with pytest.raises(VoiceError, match=r"'flite-rms' cannot say a word here.*failed"):
        synthesise(plan, tmp_path / "out", 1)
    assert not list((tmp_path / "out").glob("shard-*"))


def test_a_voice_that_leaves_out_much_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KIMI_MM_FLITE", str(program_that_says(tmp_path, PROBE)))
    plan = [PlannedClip(s.id, text, "flite-slt") for s, text in zip(SENTENCES, [PROBE, "A.", "B."], strict=False)]
    report = synthesise(plan, tmp_path / "out", 1)
    assert (report.utterances, len(report.skipped)) == (1, 2)
    assert "'flite-slt' left out 2 of 3 utterances" in caplog.text


def test_missing_programs_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("KIMI_MM_FLITE", raising=False)
    with pytest.raises(VoiceError, match=r"'flite' was not found.*KIMI_MM_FLITE.*--tools"):
        make_voice("flite-rms")
    program = tmp_path / "usr" / "bin" / "flite"
    program.parent.mkdir(parents=True)
    (tmp_path / "usr" / "lib" / "x86_64-linux-gnu").mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    path, environment = find_program("flite", "KIMI_MM_FLITE", tmp_path)
    assert path == str(program)
    assert str(tmp_path / "usr/lib/x86_64-linux-gnu") in environment["LD_LIBRARY_PATH"].split(":")


@pytest.mark.parametrize("engine", ["flite", "espeak"])
def test_voices_of_a_program_differ(engine: str) -> None:
    if shutil.which({"espeak": "espeak-ng"}.get(engine, engine)) is None:
        pytest.skip(f"{engine} is not installed")
    voices = [v for v in (*TRAINING_WEIGHTS, *UNSEEN) if v.startswith(engine)]
    waves = {make_voice(v)("Hello there.", np.random.default_rng(0)).wave.tobytes() for v in voices}
    assert len(waves) == len(voices)
    morphs = [make_voice(f"{engine}-morph")("Hello there.", np.random.default_rng(i)) for i in range(6)]
    assert len({speech.settings for speech in morphs}) == 6
    assert all(12_000 <= speech.sample_rate <= 27_000 and speech.sample_rate % 400 == 0 for speech in morphs)


def test_the_test_set_of_seen_voices_keeps_its_mixture() -> None:
    assert set(SEEN_WEIGHTS) == {v for v in TRAINING_WEIGHTS if v not in ("flite-morph", "espeak-morph")}
    assert sum(SEEN_WEIGHTS.values()) == pytest.approx(1.0)
    assert sum(TRAINING_WEIGHTS.values()) == pytest.approx(1.0)


@pytest.mark.slow
def test_synthesis_is_the_same_for_any_number_of_processes_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("hibari")
    plan = make_plan(SENTENCES[:6], voice_weights={"hibari-heart": 1.0, "hibari-morph": 2.0}, seed=3)
    report = synthesise(plan, tmp_path / "one", 1, seed=3, per_shard=2)
    assert report.utterances == 6
    assert not report.skipped
    calls: list[tuple[int, int]] = []
    synthesise(plan, tmp_path / "two", 2, seed=3, per_shard=3, progress=lambda *c: calls.append(c))
    assert calls[-1] == (6, 6)
    first, second = list(read_shards(tmp_path / "one")), list(read_shards(tmp_path / "two"))
    for a, b, planned in zip(first, second, plan, strict=True):
        assert (a.id, a.voice) == (b.id, b.voice)
        assert a.voice.split(":")[0] == planned.voice
        np.testing.assert_array_equal(a.wave, b.wave)
    np.testing.assert_array_equal(speak(plan[0], seed=3).wave, first[0].wave)

    index = shard_path(tmp_path / "one", 1)
    before, untouched = index.with_suffix(".npy").read_bytes(), shard_path(tmp_path / "one", 0).stat().st_mtime_ns
    index.unlink()
    index.with_suffix(".npy").unlink()
    synthesise(plan, tmp_path / "one", 1, seed=3, per_shard=2)
    assert index.with_suffix(".npy").read_bytes() == before
    assert shard_path(tmp_path / "one", 0).stat().st_mtime_ns == untouched
    with pytest.raises(UserError, match="another plan"):
        synthesise(plan[:4], tmp_path / "one", 1, seed=3, per_shard=2)


def test_a_voice_that_returns_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from kimi_mm.data import synthesis
    from kimi_mm.data.voices import Speech

    def silent(text: str, rng: np.random.Generator) -> Speech:
        return Speech(np.zeros(16_000, np.float32), 16_000, "")

    monkeypatch.setattr(synthesis, "_voice", lambda name, tools: silent)
    with pytest.raises(VoiceError, match=r"0\.00 s of speech"):
        speak(PlannedClip("0", "Nothing is heard.", "flite-rms"))
