"""/v1/audio/transcriptions by the official client: forms, streams, many at once, bad recordings, start and stop."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import requests
import soundfile

from kimi_mm.cli.demo import CLIPS, read_clips
from kimi_mm.evaluation.wer import word_error_rate

CLIP = next(clip for clip in read_clips() if clip["file"] == "privacy-unident.flac")
FILE = (CLIPS / CLIP["file"]).read_bytes()


def wav(samples: np.ndarray, rate: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV")
    return buffer.getvalue()


def hear(server, data: bytes = FILE, name: str = "clip.flac", **options):
    return server.client().audio.transcriptions.create(file=(name, data), model=server.model, **options)


def test_models(nano):
    [model] = nano.client().models.list().data
    assert model.id == "nano"
    assert nano.client().models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError, match="this server has 'nano'") as caught:
        nano.client().models.retrieve("gpt-4o")
    assert caught.value.code == "model_not_found"


def test_forms(nano):
    plain = hear(nano)
    assert word_error_rate([CLIP["text"]], [plain.text], draws=0).rate < 0.35
    assert plain.usage.seconds == pytest.approx(CLIP["seconds"], abs=0.1)
    assert hear(nano, response_format="text") == plain.text + "\n"
    verbose = hear(nano, response_format="verbose_json", timestamp_granularities=["segment"])
    assert verbose.text == plain.text
    assert verbose.segments[0].start == 0.0
    assert verbose.segments[-1].end == pytest.approx(verbose.duration, abs=0.5)
    srt, vtt = hear(nano, response_format="srt"), hear(nano, response_format="vtt")
    assert srt.startswith("1\n00:00:00,000 --> 00:00:0")
    assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:0")
    assert plain.text in srt
    with pytest.raises(openai.BadRequestError, match="single words"):
        hear(nano, response_format="verbose_json", timestamp_granularities=["word"])


def test_streamed_words(nano):
    events = list(hear(nano, stream=True))
    deltas = [event.delta for event in events if event.type == "transcript.text.delta"]
    assert len(deltas) > 2
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == "".join(deltas) == hear(nano).text


def test_silence_has_no_words(nano):
    assert hear(nano, wav(np.zeros(16_000)), "silence.wav").text == ""


def test_many_at_once_are_not_mixed_up(nano):
    clips = read_clips()[:4]
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda clip: hear(nano, (CLIPS / clip["file"]).read_bytes()).text, clips * 2))
    assert texts[:4] == texts[4:]
    assert len(set(texts)) == 4
    assert nano.metrics()["kimi_mm_cache_bytes"] == 0


@pytest.mark.parametrize(
    ("data", "name", "words"),
    [
        (b"", "a.wav", "empty"),
        (b"not a sound", "a.wav", "not a sound file"),
        (FILE[:60], "a.flac", "not a sound file|no samples"),
        (wav(np.full(800, np.nan)).replace(b"", b""), "a.wav", None),
        (wav(np.zeros(0)), "a.wav", "no samples"),
    ],
)
def test_bad_recordings(nano, data, name, words):
    if words is None:
        buffer = io.BytesIO()
        soundfile.write(buffer, np.full(800, np.nan), 16_000, format="WAV", subtype="FLOAT")
        data, words = buffer.getvalue(), "NaN"
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        hear(nano, data, name)
    assert caught.value.type == "invalid_request_error"


def test_wrong_fields(nano):
    url = f"{nano.url}/v1/audio/transcriptions"
    for files, fields, param in [
        ({"file": FILE}, {"model": "nano", "response_format": "pdf"}, "response_format"),
        ({"file": FILE}, {}, "model"),
        ({}, {"model": "nano"}, "file"),
    ]:
        answer = requests.post(url, files=files, data=fields, timeout=20)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    answer = requests.post(url, data=b"\xff\xfe{", headers={"Content-Type": "multipart/form-data"}, timeout=20)
    assert answer.status_code == 400


def test_full_server_says_when_to_come_again(started):
    server = started("nano", "{max_requests: 1, max_waiting: 1}")
    long = wav(np.concatenate([soundfile.read(io.BytesIO(FILE))[0]] * 10), soundfile.info(io.BytesIO(FILE)).samplerate)
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda _: _raw(server, long), range(5)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [200, 200, 429, 429, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"


def test_stopping_finishes_those_inside(started):
    server = started("nano")
    clip = max(read_clips(), key=lambda clip: clip["seconds"])
    answers: list[requests.Response] = []
    asker = threading.Thread(target=lambda: answers.append(_raw(server, (CLIPS / clip["file"]).read_bytes())))
    asker.start()
    server.wait_until("kimi_mm_requests_active", 1)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) in (0, 128 + signal.SIGTERM, -signal.SIGTERM)
    asker.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["text"]
    assert "Traceback" not in "".join(server.log)


def test_time_is_up(started):
    server = started("nano", "{request_seconds: 0.05}")
    answer = _raw(server, FILE)
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")
    server.wait_until("kimi_mm_rows_running", 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nowhere"], "neither a folder nor shipped"),
        (["--host", "203.0.113.7"], "cannot be taken"),
        (["--api-key-file", "nowhere"], "cannot be read"),
    ],
)
def test_bad_starts(arguments, words):
    command = [sys.executable, "-m", "kimi_mm", "serve", "--port", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_port_in_use(nano):
    command = [sys.executable, "-m", "kimi_mm", "serve", "--port", str(nano.address[1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "cannot be taken" in done.stderr) == (1, True), done.stderr


def test_openapi_describes_it(nano):
    paths = json.loads(requests.get(f"{nano.url}/openapi.json", timeout=20).text)["paths"]
    assert {"/health", "/metrics", "/v1/models", "/v1/audio/transcriptions"} <= set(paths)


def _raw(server, data: bytes) -> requests.Response:
    url = f"{server.url}/v1/audio/transcriptions"
    return requests.post(url, files={"file": ("clip.wav", data)}, data={"model": server.model}, timeout=60)
