"""Who may ask and how much: keys, hosts, origins, bodies that are too large or too slow, slow headers, who leaves."""

from __future__ import annotations

import socket
import time

import pytest
import requests

from tests.serving.conftest import KEY

BEARER = {"Authorization": f"Bearer {KEY}"}


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/health", {}, 200),
        ("/v1/models", {}, 401),
        ("/v1/models", {"Authorization": "Bearer wrong"}, 401),
        ("/v1/models", BEARER, 200),
        ("/v1/models", {**BEARER, "Host": "rebound.example"}, 403),
        ("/v1/models", {**BEARER, "Origin": "https://elsewhere.example"}, 403),
        ("/nowhere", BEARER, 404),
    ],
)
def test_who_may_ask(tiny, path, headers, status):
    answer = requests.get(tiny.url + path, headers=headers, timeout=20)
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["message"].endswith(".")


def pieces(count: int):
    yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    for _ in range(count):
        yield b"x" * 65536


def test_too_large_with_and_without_a_declared_length(tiny):
    url = f"{tiny.url}/v1/audio/transcriptions"
    answer = requests.post(url, headers=BEARER, files={"file": b"x" * 2_000_000}, data={"model": "able"}, timeout=20)
    assert answer.status_code == 413
    headers = {**BEARER, "Content-Type": "multipart/form-data; boundary=b"}
    answer = requests.post(url, headers=headers, data=pieces(17), timeout=20)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("sent", [b"GET /hea", b""])
def test_slow_headers_end_the_connection(tiny, sent):
    with socket.create_connection(tiny.address, timeout=10) as slow:
        slow.sendall(sent)
        began = time.monotonic()
        assert slow.recv(100) == b""
        assert time.monotonic() - began < 20
    assert requests.get(f"{tiny.url}/health", timeout=20).status_code == 200
