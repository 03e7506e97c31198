"""`kimi-mm resynth`: a recording to codes and back, and what it refuses."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import soundfile

from kimi_mm.training.run import train


@pytest.fixture(scope="module")
def speaking(tmp_path_factory) -> str:
    """A model with a voice, at debug size."""
    folder = tmp_path_factory.mktemp("vocoder")
    train("vocoder/nano", debug=True, output=folder, overrides=["steps=1", "save_every=1"])
    return str(folder / "model")


@pytest.fixture(scope="module")
def mute(tmp_path_factory) -> str:
    """A model without a voice."""
    folder = tmp_path_factory.mktemp("text")
    train("text/nano", debug=True, output=folder, overrides=["steps=1", "save_every=1"])
    return str(folder / "model")


def test_speech_has_the_length_of_the_recording(kimi, speech, speaking, tmp_path):
    recording = speech("in.wav", rate=44_100, channels=2)
    out = tmp_path / "out.wav"
    result = kimi("resynth", recording, out, "--model", speaking)
    assert (result.code, result.out, result.err) == (0, "", "")
    info = soundfile.info(out)
    assert (info.samplerate, info.channels, info.subtype) == (24_000, 1, "PCM_16")
    assert info.frames == 1920 * math.ceil(soundfile.info(recording).duration * 12.5)


def test_the_seed_makes_the_sound(kimi, speech, speaking, tmp_path):
    recording = speech("in.wav")

    def sound(*options: object) -> np.ndarray:
        assert kimi("resynth", recording, tmp_path / "out.wav", "--model", speaking, *options).code == 0
        return soundfile.read(tmp_path / "out.wav")[0]

    plain = sound()
    assert np.array_equal(plain, sound())
    assert not np.array_equal(plain, sound("--seed", 1))
    assert len(sound("--steps", 5, "--voice", recording)) == len(plain)


def test_pipes(speech, speaking):
    import subprocess
    import sys

    command = [sys.executable, "-m", "kimi_mm", "resynth", "-", "-", "--model", speaking]
    done = subprocess.run(command, input=speech("in.wav").read_bytes(), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    wave, rate = soundfile.read(io.BytesIO(done.stdout))
    assert rate == 24_000
    assert len(wave) % 1920 == 0


def test_refusals(kimi, speech, speaking, mute, tmp_path):
    recording, out = speech("in.wav"), tmp_path / "out.wav"
    assert kimi("resynth", recording, tmp_path / "out.mp3").code == 2
    assert kimi("resynth", recording, recording).code == 2
    assert kimi("resynth", "-", out, "--voice", "-").code == 2
    assert kimi("resynth", recording, out, "--steps", 0).code == 2
    for arguments, reason in (
        ((recording, out, "--model", mute), "no voice"),
        ((recording, tmp_path / "nowhere" / "out.wav"), "does not exist"),
        ((tmp_path / "missing.wav", out, "--model", speaking), "no such file"),
    ):
        result = kimi("resynth", *arguments)
        assert (result.code, len(result.complaints)) == (1, 1)
        assert reason in result.complaints[0]
    short = tmp_path / "short.wav"
    soundfile.write(short, np.zeros(2400, np.float32), 24_000)
    result = kimi("resynth", recording, out, "--model", speaking, "--voice", short)
    assert "at least 0.5 s" in result.complaints[0]
    assert not out.exists()
