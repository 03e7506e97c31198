"""`kimi-mm transcribe` on real recordings: formats in and out, several files, standard input, interruption."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import soundfile

from kimi_mm.evaluation.wer import word_error_rate


def test_text_of_a_real_recording(kimi, clips):
    path, reference = clips[-1]
    result = kimi("transcribe", path)
    assert result.code == 0
    assert result.err == ""
    assert result.out.count("\n") == 1
    assert word_error_rate([reference], [result.out]).rate <= 0.5


def test_several_recordings_are_labelled_and_in_order(kimi, clips):
    paths = [path for path, _ in clips[:3]]
    result = kimi("transcribe", *paths)
    assert result.code == 0
    assert [line.split(": ")[0] for line in result.out.splitlines()] == [str(path) for path in paths]


def test_json_lines(kimi, clips):
    paths = [path for path, _ in clips[:2]]
    result = kimi("transcribe", *paths, "--format", "json")
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [row["file"] for row in rows] == [str(path) for path in paths]
    for row, path in zip(rows, paths, strict=True):
        assert set(row) == {"file", "model", "duration", "text", "segments"}
        assert row["model"] == "nano"
        assert row["duration"] == pytest.approx(soundfile.info(path).duration, abs=0.01)
        assert row["text"] == " ".join(segment["text"] for segment in row["segments"])
        for segment in row["segments"]:
            assert 0 <= segment["start"] < segment["end"] <= row["duration"] + 0.01


def test_subtitles_into_a_folder(kimi, clips, tmp_path):
    paths = [path for path, _ in clips[:2]]
    result = kimi("transcribe", *paths, "-f", "srt", "-o", f"{tmp_path / 'subtitles'}/")
    assert result.code == 0
    assert result.out == ""
    written = sorted((tmp_path / "subtitles").iterdir())
    assert [file.name for file in written] == sorted(f"{path.stem}.srt" for path in paths)
    assert all(file.read_text().startswith("1\n00:00:0") for file in written)


def test_one_file_for_all(kimi, clips, tmp_path):
    paths = [path for path, _ in clips[:2]]
    target = tmp_path / "all.txt"
    target.write_text("old")
    target.chmod(0o640)
    assert kimi("transcribe", *paths, "-o", target).code == 0
    assert len(target.read_text().splitlines()) == 2
    assert target.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["all.txt"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.wav", {"subtype": "PCM_16"}),
        ("a.flac", {}),
        ("a.ogg", {}),
        ("a.mp3", {}),
        ("float.wav", {"subtype": "FLOAT"}),
        ("eight-bit.wav", {"subtype": "PCM_U8"}),
        ("high.wav", {"rate": 192_000}),
        ("low.wav", {"rate": 8_000}),
        ("odd.wav", {"rate": 22_050, "channels": 2}),
        ("many.wav", {"channels": 5}),
    ],
)
def test_any_format_rate_and_number_of_channels(kimi, speech, name, options):
    result = kimi("transcribe", speech(name, **options))
    assert (result.code, result.err) == (0, "")
    assert len(result.out.split()) >= 1


def test_standard_input(kimi, clips):
    path, _ = clips[0]
    expected = kimi("transcribe", path).out
    with path.open("rb") as stream:
        piped = subprocess.run(
            [sys.executable, "-m", "kimi_mm", "transcribe", "-"],
            stdin=stream,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert (piped.returncode, piped.stderr) == (0, "")
    assert piped.stdout == expected


def test_empty_standard_input():
    piped = subprocess.run(
        [sys.executable, "-m", "kimi_mm", "transcribe", "-"], input=b"", capture_output=True, timeout=120
    )
    assert piped.returncode == 1
    assert piped.stderr.decode() == "kimi-mm: standard input: empty.\n"


def test_ctrl_c_leaves_nothing_half_written(clips, tmp_path):
    """A pipe that never ends keeps the command busy until the signal comes."""
    target = tmp_path / "out" / "a.txt"
    target.parent.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "kimi_mm", "transcribe", str(clips[0][0]), "-", "-o", str(target)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background makes them, and what they start, deaf to this signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while process.poll() is None and not _waits_for_input(process.pid) and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert list(target.parent.iterdir()) == []


def _waits_for_input(pid: int) -> bool:
    """Tells whether the process sleeps in read(0, ...); where the kernel has no such file, waits and says yes."""
    try:
        with open(f"/proc/{pid}/syscall") as file:
            return file.read().split()[:2] == ["0", "0x0"]
    except FileNotFoundError:
        time.sleep(20)
        return True
    except OSError:  # between fork and exec it may not be read
        return False
