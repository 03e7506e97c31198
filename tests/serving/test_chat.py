"""/v1/chat/completions by the official client: turns, parts, streams, ends, leaving, bad input."""

from __future__ import annotations

import base64
import io
import json
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import requests
import soundfile
from PIL import Image

from kimi_mm.cli.demo import CLIPS, read_clips
from kimi_mm.serving.chat import Until

TURNS = [
    {"role": "system", "content": "red"},
    {"role": "user", "content": "What is in the image?"},
    {"role": "assistant", "content": "dogs"},
    {"role": "user", "content": [{"type": "text", "text": "red dogs"}, {"type": "text", "text": " of a video"}]},
]
BUFFER = io.BytesIO()
soundfile.write(BUFFER, 0.3 * np.sin(np.arange(16_000) * 0.05), 16_000, format="WAV")
TONE = BUFFER.getvalue()
PIXELS = io.BytesIO()
Image.new("RGB", (40, 30), "red").save(PIXELS, "PNG")
PICTURE = "data:image/png;base64," + base64.b64encode(PIXELS.getvalue()).decode()


def ask(server, messages=TURNS, **options):
    options = {"max_tokens": 12, "model": server.model, **options}
    return server.client().chat.completions.create(messages=messages, **options)


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def sound(data: bytes = TONE):
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


def picture(url: str = PICTURE):
    return {"type": "image_url", "image_url": {"url": url}}


def post(server, body: bytes | dict, **options) -> requests.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    return requests.post(f"{server.url}/v1/chat/completions", data=data, headers=headers, timeout=20, **options)


def test_turns_are_answered_as_by_the_model(tiny, able):
    answer = ask(tiny)
    [choice] = answer.choices
    assert choice.message.content == "".join(able.reply(TURNS, max_tokens=12))
    assert len(choice.message.content) > 3
    assert (choice.message.role, choice.finish_reason, answer.model) == ("assistant", "length", "able")
    assert answer.usage.prompt_tokens == len(able.read(TURNS)[0])
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_streams_say_the_same(tiny):
    chunks = list(ask(tiny, stream=True, stream_options={"include_usage": True}))
    whole = ask(tiny)
    text = [chunk.choices[0].delta.content for chunk in chunks[:-2]]
    assert "".join(text) == whole.choices[0].message.content
    assert len(text) > 2
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in ask(tiny, stream=True))


def test_sounds_and_pictures(tiny, able):
    parts = [sound(), picture(), {"type": "text", "text": "red?"}]
    heard = {"type": "audio", "audio": TONE}
    seen = {"type": "image", "image": PIXELS.getvalue()}
    for sent, meant in [(parts, [heard, seen, parts[2]]), (parts[:1], [heard]), (parts[1:], [seen, parts[2]])]:
        answer = ask(tiny, user(*sent), max_completion_tokens=8)
        assert answer.choices[0].message.content == "".join(able.reply(user(*meant), max_tokens=8))
        assert answer.usage.prompt_tokens == len(able.read(user(*meant))[0])


def test_temperature_and_seed(tiny):
    def draw(seed: int) -> str:
        return ask(tiny, temperature=1.5, seed=seed, max_tokens=20).choices[0].message.content

    assert draw(3) == draw(3)
    assert len({draw(seed) for seed in range(4)}) > 1
    assert ask(tiny, temperature=1e-300).choices == ask(tiny).choices  # found by fuzzing


def test_ends(nano, tiny):
    clip = min(read_clips(), key=lambda clip: clip["seconds"])
    said = ask(nano, user(sound((CLIPS / clip["file"]).read_bytes())), max_tokens=128).choices[0]
    heard = nano.client().audio.transcriptions.create(file=CLIPS / clip["file"], model="nano")
    assert (said.message.content, said.finish_reason) == (heard.text, "stop")
    text = ask(tiny).choices[0].message.content
    stop = text[3:5]
    cut = ask(tiny, stop=[stop, "never said"]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (text[: text.index(stop)], "stop")
    chunks = list(ask(tiny, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == cut.message.content


@pytest.mark.parametrize("size", [1, 2, 7])
def test_stop_texts_are_found_across_pieces(size):
    until, text = Until(["abc", "bd"]), "xxabxababxbdabc"
    said = "".join(until.push(text[at : at + size]) for at in range(0, len(text), size) if not until.ended)
    assert (said, until.ended) == ("xxabxababx", True)
    until = Until(["abc"])
    assert until.push("xxab") + until.rest() == "xxab"


def test_many_at_once_are_not_mixed_up(tiny):
    texts = ["red", "dogs", "What is", "a video of 0123", "0", "image"]

    def one(text: str) -> str:
        return ask(tiny, [{"role": "user", "content": text}], max_tokens=30).choices[0].message.content

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(one, texts * 2)) == [one(text) for text in texts] * 2


def test_what_a_model_lacks(hearing):
    with pytest.raises(openai.BadRequestError, match="has no eyes") as caught:
        ask(hearing, user(picture()))
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="does not speak"):
        ask(hearing, modalities=["text", "audio"], audio={"voice": "alloy", "format": "wav"})


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([picture("http://127.0.0.1:1/a.png")], "only data: URLs"),
        ([picture("file:///etc/passwd")], "only data: URLs"),
        ([picture("/etc/passwd")], "only data: URLs"),
        ([picture("data:image/png;base64,AAAA")], "not a picture"),
        ([picture(PICTURE[:80])], "damaged|base64"),
        ([sound(b"not a sound")], "not a sound file"),
        ([sound(TONE[:20])], "not a sound file|no samples"),
        ([{"type": "input_audio", "input_audio": {"data": "***", "format": "wav"}}], "not base64"),
        ([picture()] * 65, "more than 64"),
        ([{"type": "text", "text": "a red dog " * 40_000}], "longer than 8192"),
        ([{"type": "refusal", "refusal": "no"}], "does not match"),
        ([], "non-empty"),
    ],
)
def test_bad_parts(tiny, parts, words):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=words):
            ask(tiny, user(*parts), stream=stream)


def test_ten_thousand_parts(tiny):
    answer = post(tiny, {"model": "able", "messages": user(*[{"type": "text", "text": "a"}] * 10_000)})
    assert (answer.status_code, "more than 4096" in answer.text) == (400, True)


def test_bomb_is_refused_by_its_header(tiny):
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    with pytest.raises(openai.BadRequestError, match="pixels"):
        ask(tiny, user(picture("data:image/png;base64," + base64.b64encode(bomb.getvalue()).decode())))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "pirate", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content.text"),
        ({"messages": [{"role": "user", "content": [{"type": "\ud800"}]}]}, "messages.0.content.parts.0"),
        ({"model": "\ud800"}, "model"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"tools": [{}]}, "tools"),
        ({"stop": [""]}, "stop"),
        ({"modalities": ["smell"]}, "modalities.0"),
    ],
)
def test_wrong_fields(tiny, change, param):
    answer = post(tiny, {"model": "able", "messages": TURNS, **change})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe{}", b'{"model": "\xff"}', b"[" * 100_000, b"null"])
def test_bodies_that_are_no_json(tiny, body):
    answer = post(tiny, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].endswith(".")


def test_forty_abrupt_disconnects_free_every_slot(tiny):
    body = json.dumps({"model": "able", "messages": TURNS, "stream": True, "max_tokens": 4000, "temperature": 2})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {tiny.key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"

    def leave(number: int) -> bytes:
        with socket.create_connection(tiny.address, 20) as line:
            line.sendall((head + body).encode())
            seen = b""
            while seen.count(b"data: ") < number % 4:  # some leave before the first word
                seen += line.recv(4096)
            # Closed with a reset, as by a cable pulled out.
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        return seen

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(leave, range(40)))
    assert sum(b"200 OK" in part for part in seen) == 30
    for gauge in ("requests_active", "requests_waiting", "rows_running", "rows_waiting", "cache_bytes"):
        tiny.wait_until(f"kimi_mm_{gauge}", 0)
    assert len(ask(tiny).choices[0].message.content) > 3
