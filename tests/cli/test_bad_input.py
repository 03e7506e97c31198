"""Whatever is wrong with what the user gave: one clear sentence, the right exit code, the other files still done."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import soundfile

from kimi_mm.cli.demo import CLIPS

SHIPPED = CLIPS.parent / "nano"


def missing(folder):
    return folder / "missing.wav"


def empty(folder):
    (folder / "empty.wav").write_bytes(b"")
    return folder / "empty.wav"


def not_audio(folder):
    (folder / "letter.wav").write_text("Dear reader, this is a letter and not a recording.\n" * 20)
    return folder / "letter.wav"


def zero_length(folder):
    soundfile.write(folder / "nothing.wav", np.zeros(0, np.float32), 16_000)
    return folder / "nothing.wav"


def silence(folder):
    soundfile.write(folder / "silence.wav", np.zeros(32_000, np.float32), 16_000)
    return folder / "silence.wav"


def not_a_number(folder):
    wave = np.full(16_000, np.nan, np.float32)
    soundfile.write(folder / "nan.wav", wave, 16_000, subtype="FLOAT")
    return folder / "nan.wav"


def a_folder(folder):
    (folder / "folder.wav").mkdir()
    return folder / "folder.wav"


BAD = (missing, empty, not_audio, zero_length, silence, not_a_number, a_folder)


@pytest.mark.parametrize("make", BAD)
@pytest.mark.parametrize("command", ["transcribe", "tokenize"])
def test_one_bad_recording(kimi, tmp_path, make, command):
    if (command, make) == ("tokenize", silence):
        assert kimi(command, make(tmp_path)).code == 0
        return
    path = make(tmp_path)
    target = tmp_path / "out.txt"
    result = kimi(command, path, "-o", target)
    assert result.code == 1
    assert result.out == ""
    assert len(result.err.splitlines()) == 1
    assert result.complaints[0].count(str(path)) == 1
    assert not target.exists()


def test_good_recordings_are_done_beside_bad_ones(kimi, clips, tmp_path):
    good = [path for path, _ in clips[:2]]
    bad = [make(tmp_path) for make in BAD]
    result = kimi("transcribe", good[0], *bad, good[1])
    assert result.code == 1
    assert [line.split(": ")[0] for line in result.out.splitlines()] == [str(path) for path in good]
    assert len(result.complaints) == len(bad) + 1
    for path, line in zip(bad, result.complaints, strict=False):
        assert str(path) in line
    assert f"{len(bad)} of {len(bad) + 2}" in result.complaints[-1]


def test_output_below_a_file(kimi, clips, tmp_path):
    (tmp_path / "plain").write_text("")
    result = kimi("transcribe", clips[0][0], "-o", tmp_path / "plain" / "out.txt")
    assert result.code == 1
    assert f"{tmp_path / 'plain'} is not a folder" in result.complaints[0]
    result = kimi("transcribe", clips[0][0], "-o", f"{tmp_path / 'plain'}/")
    assert (result.code, len(result.complaints)) == (1, 1)


def test_output_in_a_missing_folder(kimi, clips, tmp_path):
    result = kimi("transcribe", clips[0][0], "-o", tmp_path / "missing" / "out.txt")
    assert result.code == 1
    assert "does not exist" in result.complaints[0]


@pytest.mark.parametrize(
    "arguments", [["x.wav", "y.wav", "-f", "srt"], ["a/x.wav", "b/x.wav", "-o", "out/"], ["-", "-"]]
)
def test_wrong_usage(kimi, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = kimi("transcribe", *arguments)
    assert (result.code, len(result.complaints)) == (2, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_result_never_replaces_its_recording(kimi, speech):
    path = speech("a.wav")
    before = path.read_bytes()
    assert kimi("transcribe", path, "-o", path).code == 2
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "arguments", [["transcribe"], ["transcribe", "a.wav", "--format", "doc"], ["sing"], ["--loud"]]
)
def test_unknown_arguments(kimi, arguments):
    result = kimi(*arguments)
    assert result.code == 2
    assert "Usage" in result.err


def test_unknown_model(kimi, clips):
    for command in ("transcribe", "info"):
        result = kimi(command, *([clips[0][0], "--model"] if command == "transcribe" else []), "giga")
        assert (result.code, len(result.complaints)) == (1, 1)
        assert "giga" in result.complaints[0]


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the shipped checkpoint, to be damaged."""
    return shutil.copytree(SHIPPED, tmp_path / "model")


def test_damaged_weights(kimi, checkpoint, clips):
    weights = sorted(checkpoint.glob("*.safetensors"))[0]
    weights.write_bytes(weights.read_bytes()[:1000])
    for command in (["transcribe", clips[0][0], "--model", checkpoint], ["info", checkpoint]):
        result = kimi(*command)
        assert (result.code, len(result.complaints)) == (1, 1)
        assert weights.name in result.complaints[0]


def test_config_with_an_unknown_key(kimi, checkpoint, clips):
    config = checkpoint / "config.yaml"
    config.write_text(config.read_text() + "colour: red\n")
    for command in (["transcribe", clips[0][0], "--model", checkpoint], ["info", checkpoint]):
        result = kimi(*command)
        assert (result.code, len(result.complaints)) == (1, 1)
        assert "config.yaml" in result.complaints[0]
        assert "'colour'" in result.complaints[0]


def test_unexpected_errors_have_no_traceback(kimi, clips, monkeypatch):
    import kimi_mm

    def broken(*_, **__):
        raise RuntimeError("boom")

    monkeypatch.setattr(kimi_mm, "load", broken, raising=False)
    result = kimi("transcribe", clips[0][0])
    assert result.code == 1
    assert "internal error, RuntimeError: boom" in result.complaints[0]
    monkeypatch.setenv("KIMI_MM_DEBUG", "1")
    from kimi_mm.cli.main import run

    with pytest.raises(RuntimeError, match="boom"):
        run(["transcribe", str(clips[0][0])])
