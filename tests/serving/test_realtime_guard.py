"""/v1/realtime against clients that mean harm: raw WebSockets with bad events, frames, origins, keys, and no end."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.serving.conftest import KEY, Server

SOUND = base64.b64encode(bytes(4800)).decode()


@contextmanager
def enter(server: Server, **options) -> Iterator[ClientConnection]:
    """Opens a session and takes its greeting."""
    headers = {"Authorization": f"Bearer {server.key}"} if server.key else {}
    headers |= options.pop("additional_headers", {})
    address = server.url.replace("http", "ws") + "/v1/realtime?model=" + server.model
    with connect(address, additional_headers=headers, open_timeout=20, **options) as connection:
        assert json.loads(connection.recv(20))["type"] == "session.created"
        yield connection


def told(connection: ClientConnection) -> dict:
    return json.loads(connection.recv(20))


EVENTS = [
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[]", "the event"),
    ("3", "the event"),
    ("{}", "needs a 'type'"),
    ('{"type": "nonsense"}', "no event of this type"),
    ('{"type": ["session.update"]}', "no event of this type|needs a 'type'"),
    ('{"type": "session.update"}', "session"),
    ('{"type": "session.update", "session": {"colour": "red"}}', "session.colour: is not known"),
    ('{"type": "session.update", "session": {"model": "other"}}', "not loaded"),
    ('{"type": "session.update", "session": {"audio": {"input": {"format": {"type": "audio/pcmu"}}}}}', "format"),
    ('{"type": "session.update", "session": {"audio": {"input": {"turn_detection": {"threshold": 9}}}}}', "threshold"),
    ('{"type": "session.update", "session": {"tools": [{}]}}', "tools"),
    ('{"type": "session.update", "session": {"instructions": "\\ud800"}}', "surrogate"),
    ('{"type": "input_audio_buffer.append"}', "audio"),
    ('{"type": "input_audio_buffer.append", "audio": "***"}', "base64"),
    ('{"type": "input_audio_buffer.append", "audio": "AAAA"}', "16-bit"),
    ('{"type": "input_audio_buffer.commit"}', "less than 100 ms"),
    ('{"type": "conversation.item.create", "item": {"type": "function_call"}}', "item"),
    ('{"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": []}}', "content"),
    ('{"type": "conversation.item.delete", "item_id": "x"}', "no item"),
    ('{"type": "conversation.item.retrieve", "item_id": "x"}', "no item"),
    ('{"type": "conversation.item.truncate", "item_id": "x", "content_index": 0, "audio_end_ms": 1}', "no item"),
    ('{"type": "conversation.item.truncate", "item_id": "x", "content_index": 0, "audio_end_ms": -1}', "audio_end_ms"),
    ('{"type": "response.cancel"}', "no such answer"),
    ('{"type": "response.create", "response": {"output_modalities": ["smell"]}}', "output_modalities"),
]


def test_bad_events_get_error_events_and_the_session_goes_on(tiny):
    with enter(tiny) as connection:
        for number, (text, words) in enumerate(EVENTS):
            if text.startswith('{"type"'):
                text = text[:-1] + f', "event_id": "mine-{number}"' + "}"
            connection.send(text)
            event = told(connection)
            assert event["type"] == "error", text
            assert any(word in event["error"]["message"] for word in words.split("|")), event
            assert event["error"]["type"] == "invalid_request_error"
            assert event["error"]["event_id"] == (f"mine-{number}" if text.startswith('{"type"') else None)
        connection.send(b"\x00\x01")
        assert "binary" in told(connection)["error"]["message"]
        connection.send(json.dumps({"type": "response.create"}))
        assert told(connection)["type"] == "response.created"
        done = told(connection)
        assert (done["type"], done["response"]["status"]) == ("response.done", "failed")
        assert "nothing to answer" in done["response"]["status_details"]["error"]["message"]
        picture = {"type": "input_image", "image_url": "http://127.0.0.1/a.png"}
        item = {"type": "message", "role": "user", "content": [picture]}
        connection.send(json.dumps({"type": "conversation.item.create", "item": item}))
        assert "only data: URLs" in told(connection)["error"]["message"]
        picture["image_url"] = "data:image/png;base64,AAAA"
        connection.send(json.dumps({"type": "conversation.item.create", "item": item}))
        connection.send(json.dumps({"type": "response.create"}))
        while (event := told(connection))["type"] != "response.done":
            assert event["type"] in ("conversation.item.added", "conversation.item.done", "response.created")
        assert event["response"]["status"] == "failed"
        connection.send(json.dumps({"type": "session.update", "session": {"instructions": "red"}}))
        assert told(connection)["session"]["instructions"] == "red"


def test_the_buffer_of_a_session_without_turns_is_bounded(started):
    server = started("nano", "{turn_seconds: 1}")
    with enter(server) as connection:
        change = {"audio": {"input": {"turn_detection": None}}}
        connection.send(json.dumps({"type": "session.update", "session": change}))
        assert told(connection)["type"] == "session.updated"
        for _ in range(11):
            connection.send(json.dumps({"type": "input_audio_buffer.append", "audio": SOUND}))
        assert "commit or clear" in told(connection)["error"]["message"]
        connection.send(json.dumps({"type": "input_audio_buffer.clear"}))
        assert told(connection)["type"] == "input_audio_buffer.cleared"
        connection.send(json.dumps({"type": "input_audio_buffer.append", "audio": SOUND}))
        connection.send(json.dumps({"type": "input_audio_buffer.clear"}))
        assert told(connection)["type"] == "input_audio_buffer.cleared"


def frame(opcode: int, payload: bytes, masked: bool = True, final: bool = True) -> bytes:
    head = bytes([(128 if final else 0) | opcode])
    mask = os.urandom(4) if masked else b""
    bit = 128 if masked else 0
    size = len(payload)
    head += bytes([bit | size]) if size < 126 else bytes([bit | 127]) + struct.pack(">Q", size)
    return head + mask + (bytes(b ^ mask[i % 4] for i, b in enumerate(payload)) if masked else payload)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(1, b"\xff\xfe{"), 1007),
        (frame(1, b"{}", masked=False), 1002),
        (frame(3, b"{}"), 1002),
        (frame(9, bytes(200)), 1002),
        (frame(0, b"{}"), 1002),
        (bytes([0x81, 0xFF]) + struct.pack(">Q", 2**40) + bytes(4), 1009),
        (os.urandom(4096), None),
        (frame(1, b'{"type"', final=False), None),
    ],
    # Masks are drawn at random; processes that share the tests must call them by the same names.
    ids=["text", "unmasked", "reserved code", "long ping", "nothing to continue", "too long", "noise", "unfinished"],
)
def test_bad_frames_close_cleanly(tiny, data, code):
    with socket.create_connection(tiny.address, timeout=20) as raw:
        key = base64.b64encode(os.urandom(16)).decode()
        raw.sendall(
            f"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        got = raw.recv(65536)
        assert b" 101 " in got.split(b"\r\n")[0]
        while b"session.created" not in got:
            got += raw.recv(65536)
        raw.sendall(data)
        if code is not None:
            rest = b""
            while piece := raw.recv(65536):
                rest += piece
            at = rest.rindex(b"\x88")
            assert struct.unpack(">H", rest[at + 2 : at + 4])[0] == code
    tiny.wait_until("kimi_mm_sessions", 0)


def test_who_may_not_connect(tiny):
    def refused(**options) -> int:
        with pytest.raises(InvalidStatus) as caught, enter(tiny, **options):
            pass
        body = json.loads(caught.value.response.body)
        assert body["error"]["message"].endswith(".")
        return caught.value.response.status_code

    assert refused(additional_headers={"Authorization": "Bearer wrong"}) == 401
    assert refused(additional_headers={"Origin": "http://evil.example"}) == 403
    assert refused(additional_headers={"Authorization": ""}) == 401
    with enter(tiny, additional_headers={"Origin": tiny.url}):
        pass
    protocols = ["realtime", f"openai-insecure-api-key.{KEY}"]
    with enter(tiny, additional_headers={"Authorization": ""}, subprotocols=protocols) as connection:
        assert connection.subprotocol == "realtime"


def test_sessions_are_few_and_end(started):
    server = started("nano", "{max_sessions: 2, silent_seconds: 1.0, session_seconds: 2.5}")
    with enter(server) as first, enter(server) as second:
        with pytest.raises(InvalidStatus) as caught, enter(server):
            pass
        assert caught.value.response.status_code == 429
        with pytest.raises(ConnectionClosed) as closed:
            first.recv(20)
        assert (closed.value.rcvd.code, "nothing was said" in closed.value.rcvd.reason) == (1008, True)
        end = time.monotonic() + 20
        with pytest.raises(ConnectionClosed) as closed:  # noqa: PT012
            while time.monotonic() < end:
                second.send(json.dumps({"type": "input_audio_buffer.clear"}))
                second.recv(20)
                time.sleep(0.1)
    server.wait_until("kimi_mm_sessions", 0)


def test_who_leaves_in_the_middle_frees_all(tiny):
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "red dogs"}]}
    for _ in range(5):
        with enter(tiny) as connection:
            connection.send(json.dumps({"type": "conversation.item.create", "item": item}))
            connection.send(json.dumps({"type": "response.create"}))
            while told(connection)["type"] != "response.output_audio.delta":
                pass
            connection.socket.shutdown(socket.SHUT_RDWR)
    for name in ("sessions", "rows_running", "rows_waiting", "requests_active", "cache_bytes"):
        tiny.wait_until(f"kimi_mm_{name}", 0)


def test_who_does_not_read_is_left(tiny):
    with enter(tiny, max_queue=1) as connection:
        many = json.dumps({"type": "conversation.item.retrieve", "item_id": "x" * 128})
        with pytest.raises((ConnectionClosed, TimeoutError)):  # noqa: PT012
            for _ in range(200_000):
                connection.send(many)
    tiny.wait_until("kimi_mm_sessions", 0, 30)
