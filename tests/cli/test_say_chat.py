"""`kimi-mm say` and `kimi-mm chat` on a tiny random model with a voice, and what they refuse."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import soundfile


def test_say_writes_whole_codes_and_follows_the_seed(kimi, speaking, tmp_path):
    def sound(*options: object) -> np.ndarray:
        out = tmp_path / "out.wav"
        result = kimi("say", "Hi. And yes.", "-o", out, "--model", speaking, *options)
        assert (result.code, result.out) == (0, "")
        info = soundfile.info(out)
        assert (info.samplerate, info.channels, info.subtype) == (24_000, 1, "PCM_16")
        return soundfile.read(out)[0]

    plain = sound()
    assert len(plain) % 1920 == 0
    assert len(plain) >= 2 * 1920  # two sentences, each with a code at least
    assert np.array_equal(plain, sound())
    assert not np.array_equal(plain, sound("--seed", 1))


def test_say_streams_to_a_pipe(speaking):
    command = [sys.executable, "-m", "kimi_mm", "say", "-", "-o", "-", "--model", speaking]
    done = subprocess.run(command, input=b"Hello there.", capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    wave, rate = soundfile.read(io.BytesIO(done.stdout))
    assert rate == 24_000
    assert 2 * len(wave) == len(done.stdout) - 44
    assert len(wave) % 1920 == 0


def test_say_refusals(kimi, speaking, tmp_path):
    out = tmp_path / "out.wav"
    assert kimi("say", "Hi.", "-o", tmp_path / "out.mp3", "--model", speaking).code == 2
    assert kimi("say", "Hi.", "--model", speaking).code == 2
    for arguments, reason in (
        (("...", "-o", out, "--model", speaking), "nothing that can be spoken"),
        (("", "-o", out, "--model", speaking), "nothing that can be spoken"),
        (("Hi.", "-o", tmp_path / "no" / "out.wav", "--model", speaking), "does not exist"),
        (("Hi.", "-o", out, "--model", speaking, "--voice", tmp_path / "none.wav"), "no such file"),
    ):
        result = kimi("say", *arguments)
        assert (result.code, len(result.complaints)) == (1, 1)
        assert reason in result.complaints[0]
    assert not out.exists()


def test_a_model_without_a_voice_says_so(kimi, ears, tmp_path):
    for command in (("say", "Hi.", "-o", tmp_path / "out.wav"), ("chat", "--text", "Hi.", "-o", tmp_path / "replies")):
        result = kimi(*command, "--model", ears)
        assert (result.code, len(result.complaints)) == (1, 1)
        assert "no voice" in result.complaints[0]


def test_chat_keeps_the_order_of_turns_and_the_history(kimi, speaking, speech, tmp_path):
    recording = speech("turn.wav", rate=22_050)
    replies = tmp_path / "replies"
    turns = ("--text", "Hi.", "--audio", recording, "--text", "Again.")
    result = kimi("chat", *turns, "--output", replies, "--json", "--model", speaking)
    assert (result.code, result.err) == (0, "")
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [next(iter(row["turn"].items())) for row in rows] == [
        ("text", "Hi."),
        ("audio", str(recording)),
        ("text", "Again."),
    ]
    for number, row in enumerate(rows, start=1):
        assert set(row["stopped"]) == {"text", "audio"}
        if row["audio"]:
            assert row["audio"] == str(replies / f"reply-{number:03d}.wav")
            assert soundfile.info(row["audio"]).frames == round(row["seconds"] * 24_000)
    alone = kimi("chat", "--text", "Again.", "--output", replies, "--json", "--model", speaking)
    assert json.loads(alone.out)["text"] != rows[2]["text"] or json.loads(alone.out)["seconds"] != rows[2]["seconds"]


def test_chat_through_a_pipe_goes_on_after_a_bad_turn(speaking, speech, tmp_path):
    lines = f"Hello.\n/audio {tmp_path / 'none.wav'}\n\n/audio {speech('turn.wav')}\n/quit\nnever\n"
    command = [sys.executable, "-m", "kimi_mm", "chat", "-o", str(tmp_path), "--json", "--model", speaking]
    done = subprocess.run(command, input=lines.encode(), capture_output=True, timeout=200)
    assert done.returncode == 1
    assert done.stderr.decode().count("kimi-mm: ") == 1
    assert "no such file" in done.stderr.decode()
    assert len(done.stdout.splitlines()) == 2
