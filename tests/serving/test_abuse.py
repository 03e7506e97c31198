"""Clients that mean harm or know no better, on raw sockets: refused with a sentence, and nobody else notices."""

from __future__ import annotations

import gzip
import io
import json
import select
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import requests
import soundfile

from tests.serving.conftest import KEY, Server
from tests.serving.test_chat import ask, sound, user

JSON = "Content-Type: application/json\r\n"
FORM = "Content-Type: multipart/form-data; boundary=b\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"
CHAT = "POST /v1/chat/completions"
HEAR = "POST /v1/audio/transcriptions"
GAUGES = ("requests_active", "requests_waiting", "rows_running", "rows_waiting", "cache_bytes")


def request(line: str, headers: str = "", body: bytes | None = None) -> bytes:
    """Returns a request as it goes over the wire, with the key and, where there is a body, its length."""
    length = "" if body is None else f"Content-Length: {len(body)}\r\n"
    head = f"{line} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n"
    return (head + headers + length + "\r\n").encode("latin-1") + (body or b"")


def say(server: Server, data: bytes) -> bytes:
    """Sends what need not be HTTP, and returns all that comes back until the server hangs up."""
    with socket.create_connection(server.address, 20) as line:
        answer = b""
        try:
            line.sendall(data)
            while piece := line.recv(65536):
                answer += piece
        except ConnectionError:  # it hung up on what it had not read
            pass
    return answer


def is_well(server: Server) -> None:
    assert requests.get(f"{server.url}/health", timeout=20).json() == {"status": "ok", "model": server.model}
    for gauge in GAUGES:
        server.wait_until(f"kimi_mm_{gauge}", 0)


def fields(count: int) -> bytes:
    part = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
    return part * count + b"--b--\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), 400, id="a TLS greeting"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 403, id="HTTP/2"),
        pytest.param(b"\x00\xff\xfe\r\n\r\n", 400, id="no HTTP at all"),
        pytest.param(b"GET /v1/models HTTP/1.1\r\n\r\n", 400, id="no Host"),
        pytest.param(request("BREW /v1/models"), 405, id="a method nobody knows"),
        pytest.param(request("GET /v1/models/%ff%fe%00"), 404, id="a path that is not UTF-8"),
        pytest.param(request("GET /static/..%2f..%2fapp.py"), 404, id="a path that leads out"),
        pytest.param(request("GET /v1/models", "X: \xff\xfe\r\n"), 200, id="a header that is not UTF-8"),
        pytest.param(request("GET /v1/models", "Authorization: Bearer \xff\r\n"), 200, id="a second key, not UTF-8"),
        pytest.param(request("GET /" + "a" * 2**20), 400, id="an endless address"),
        pytest.param(request("GET /v1/models", "X: y\r\n" * 200_000), 400, id="200,000 headers"),
        pytest.param(request(CHAT, JSON + "Content-Length: -1\r\n"), 400, id="a negative length"),
        pytest.param(request(CHAT, JSON + "Content-Length: 2\r\n", b"{}{}"), 400, id="two lengths"),
        pytest.param(request(CHAT, JSON + CHUNKED) + b"zz\r\n{}\r\n0\r\n\r\n", 400, id="chunks of no length"),
        pytest.param(request(CHAT, JSON + CHUNKED, b"0\r\n\r\nGET /v1/models HTTP/1.1\r\n\r\n"), 400, id="two bodies"),
        pytest.param(
            request(CHAT, JSON, b'{"model": "able", "seed": 1' + b"0" * 10_000 + b"}"), 400, id="long numbers"
        ),
        pytest.param(request(CHAT, JSON, b'{"model": "\xff\xfe"}'), 400, id="JSON that is not UTF-8"),
        pytest.param(request(CHAT, JSON, b'{"a":' * 150_000), 400, id="deep JSON"),
        pytest.param(
            request(CHAT, JSON, json.dumps({str(at): at for at in range(50_000)}).encode()), 400, id="wide JSON"
        ),
        pytest.param(
            request(CHAT, JSON + "Content-Encoding: gzip\r\n", gzip.compress(b" " * 10**8)), 400, id="a gzip bomb"
        ),
        pytest.param(request(HEAR, FORM, fields(10_000)), 400, id="10,000 parts"),
        pytest.param(request(HEAR, FORM, b"--b\r\n" + b"a: b\r\n" * 50_000), 400, id="a part of headers alone"),
        pytest.param(
            request(HEAR, FORM, fields(3).replace(b'"a"', b'"model\xff"')), 400, id="a field that is not UTF-8"
        ),
        pytest.param(request(HEAR, FORM, b"--b"), 400, id="a form cut short"),
        pytest.param(request(HEAR, "Content-Type: multipart/form-data\r\n", fields(1)), 400, id="no boundary"),
    ],
)
def test_nonsense_is_refused(tiny, data, status):
    answer = say(tiny, data)
    assert answer.split(b"\r\n")[0].split()[1:2] == [str(status).encode()], answer[:300]
    if answer.partition(b"\r\n\r\n")[2].startswith(b'{"error"'):
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"].endswith(".")
    is_well(tiny)


def test_a_hundred_slow_clients_are_cut_off_and_others_answered(tiny):
    body = json.dumps({"model": tiny.model, "messages": [{"role": "user", "content": "red"}]}).encode()
    starts = [b"", b"GET /v1/mod", request(CHAT, JSON, body)[:-10], request(CHAT, JSON + CHUNKED) + b"4\r\n{"]
    slow = [socket.create_connection(tiny.address, 20) for _ in range(100)]
    try:
        for at, line in enumerate(slow):
            line.sendall(starts[at % len(starts)])
        assert ask(tiny).choices[0].message.content == ask(tiny).choices[0].message.content != ""
        answers = [line.recv(65536) for line in slow]  # blocks until the server has had enough
    finally:
        for line in slow:
            line.close()
    assert {bytes(answer[:12]) for answer in answers[0::4] + answers[1::4]} == {b""}
    assert {bytes(answer[:12]) for answer in answers[2::4] + answers[3::4]} == {b"HTTP/1.1 408"}
    is_well(tiny)


def test_leaving_in_the_middle_of_anything(tiny):
    body = json.dumps({"model": tiny.model, "messages": user(sound()), "max_tokens": 999, "temperature": 2}).encode()
    text = json.dumps({"model": tiny.model, "input": "What is in the image? " * 60, "response_format": "pcm"}).encode()
    whole = [
        request(CHAT, JSON, body),
        request(CHAT, JSON, body.replace(b'"model"', b'"stream": true, "model"')),
        request("POST /v1/audio/speech", JSON, text),
        request(HEAR, FORM, form(tiny.model, wav(np.sin(np.arange(16_000 * 5) / 9)))),
        request(HEAR, FORM, form(tiny.model, wav(np.sin(np.arange(16_000 * 5) / 9)), stream="true")),
    ]

    def leave(number: int) -> None:
        data = whole[number % len(whole)]
        with socket.create_connection(tiny.address, 20) as line:
            line.sendall(data[: -len(data) // 3] if number % 3 == 0 else data)
            time.sleep(0.03 * (number % 4))
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    quiet = ask(tiny).choices[0].message.content
    with ThreadPoolExecutor(9) as pool:
        others = [pool.submit(ask, tiny) for _ in range(4)]
        list(pool.map(leave, range(40)))
        assert {other.result().choices[0].message.content for other in others} == {quiet}
    is_well(tiny)


def form(model: str, file: bytes, **values: str) -> bytes:
    parts = [(f'name="{name}"', value.encode()) for name, value in {"model": model, **values}.items()]
    parts.append(('name="file"; filename="a.wav"', file))
    return b"".join(
        f"--b\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + value + b"\r\n" for head, value in parts
    ) + (b"--b--\r\n")


def wav(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, format="WAV")
    return buffer.getvalue()


def flac(seconds: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(seconds * 16_000, np.int16), 16_000, format="FLAC")
    return buffer.getvalue()


def test_silence_that_unpacks_to_hours(tiny):
    bomb = flac(2 * 3600)
    assert len(bomb) < 2**20
    # The number of samples stands in 36 bits behind the rate; zero means that it is not known.
    for claimed in (None, 0, 2**32 - 1):
        data = bytearray(bomb)
        if claimed is not None:
            data[21] &= 0xF0
            data[22:26] = struct.pack(">I", claimed)
        with pytest.raises(openai.BadRequestError, match="longer than 60 seconds"):
            tiny.client(timeout=20).audio.transcriptions.create(file=("a.flac", bytes(data)), model=tiny.model)
    is_well(tiny)


def test_who_asks_and_never_reads(tiny):
    """A thousand requests in a row, and not one answer taken: the line is cut when the time to read is up."""
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    line.settimeout(20)
    with line:
        line.connect(tiny.address)
        asked = request("GET /openapi.json").replace(b"Connection: close\r\n", b"")
        line.setblocking(False)
        waiting, sent = asked * 2000, 0
        poll = select.poll()
        poll.register(line, select.POLLERR | select.POLLHUP)
        end = time.monotonic() + 20
        while not poll.poll(100):
            assert time.monotonic() < end, "the line is still open"
            try:
                sent += line.send(waiting[sent:])
            except BlockingIOError:
                continue
            except ConnectionError:
                break
    is_well(tiny)
