"""What a server under load must not do: fail, mix answers up, keep what its askers left behind, or grow.

`mixed_load`: askers want transcripts, streams, chats and codes in random order, some of them leave in the middle, and
each answer is compared with the one that a lone asker got. `disconnects`: streams that are cut without a word.
"""

from __future__ import annotations

import base64
import json
import random
import re
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import openai
import requests

GAUGES = ("requests_active", "requests_waiting", "rows_running", "rows_waiting", "cache_bytes")
LEAVING = 0.05  # share of the requests whose askers leave in the middle


@dataclass
class Load:
    """What came of a mixed load; memory in MiB, of the server's process."""

    seconds: float
    answers: Counter[str] = field(default_factory=Counter)
    left: int = 0
    errors: list[str] = field(default_factory=list)
    mixed_up: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds since the start, MiB

    def growth(self) -> tuple[float, float, float]:
        """Returns memory after warm-up (a fifth of the time), in the last fifth, and the growth in percent."""
        spans = [(0.2, 0.4), (0.8, 1.01)]
        after, end = (
            float(np.median([mib for at, mib in self.memory if low <= at / self.seconds < high])) for low, high in spans
        )
        return after, end, 100 * (end / after - 1)


def mixed_load(url: str, pid: int, clips: list[bytes], seconds: float, askers: int = 8, seed: int = 0) -> Load:
    """Asks for `seconds` and returns what came of it.

    Args:
        url: of the server.
        pid: of its process.
        clips: sound files.
        askers: that ask one after another, all the time.
    """
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    kinds = _kinds(client, url, client.models.list().data[0].id, clips)
    names = sorted(kinds)
    alone = {name: kinds[name]() for name in names}
    load, lock = Load(seconds), threading.Lock()
    start = time.monotonic()

    def asker(number: int) -> None:
        draw = random.Random(f"{seed} {number}")
        while time.monotonic() - start < seconds:
            name = draw.choice(names)
            try:
                if draw.random() < LEAVING:
                    _leave_in_the_middle(url, clips[0], draw.random())
                    with lock:
                        load.left += 1
                    continue
                answer = kinds[name]()
            except Exception as error:
                with lock:
                    load.errors.append(f"{name}: {error!r}")
                continue
            with lock:
                load.answers[name.split()[0]] += 1
                if answer != alone[name]:
                    load.mixed_up.append(f"{name}: {answer!r}, alone {alone[name]!r}")

    with ThreadPoolExecutor(askers) as pool:
        futures = [pool.submit(asker, number) for number in range(askers)]
        while not all(future.done() for future in futures):
            load.memory.append((time.monotonic() - start, memory_mib(pid)))
            time.sleep(min(1.0, seconds / 20))
    for future in futures:
        future.result()
    return load


def _kinds(client: openai.OpenAI, url: str, model: str, clips: list[bytes]) -> dict[str, Callable[[], str]]:
    """Every question by its name; each gives the whole answer as text."""

    def transcript(clip: bytes) -> str:
        return client.audio.transcriptions.create(file=("a.flac", clip), model=model).text

    def stream(clip: bytes) -> str:
        events = client.audio.transcriptions.create(file=("a.flac", clip), model=model, stream=True)
        return "".join(event.delta for event in events if event.type == "transcript.text.delta")

    def codes(clip: bytes) -> str:
        return requests.post(f"{url}/v1/audio/codes", files={"file": clip}, timeout=120).text

    def chat(parts: list[dict], **options) -> str:
        messages = [{"role": "user", "content": parts}]
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=48, **options)  # type: ignore[call-overload]
        if options.get("stream"):
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        return answer.choices[0].message.content

    kinds: dict[str, Callable[[], str]] = {}
    for number, clip in enumerate(clips):
        part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(clip).decode(), "format": "flac"}}
        kinds[f"transcript {number}"] = lambda clip=clip: transcript(clip)
        kinds[f"stream {number}"] = lambda clip=clip: stream(clip)
        kinds[f"codes {number}"] = lambda clip=clip: codes(clip)
        kinds[f"chat {number}"] = lambda part=part: chat([part])
        kinds[f"chat-stream {number}"] = lambda part=part: chat([part], stream=True)
        kinds[f"sampled {number}"] = lambda part=part, number=number: chat([part], temperature=1.0, seed=number)
    return kinds


def _leave_in_the_middle(url: str, clip: bytes, when: float) -> None:
    """Asks for a streamed chat and cuts the line: before the answer or within it."""
    host, port = re.fullmatch(r"http://(.+):(\d+)", url).groups()  # type: ignore[union-attr]
    sound = {"data": base64.b64encode(clip).decode(), "format": "flac"}
    message = {"role": "user", "content": [{"type": "input_audio", "input_audio": sound}]}
    model = requests.get(f"{url}/v1/models", timeout=120).json()["data"][0]["id"]
    options = {"stream": True, "max_tokens": 2000, "temperature": 2.0}  # hot, so that it does not end by itself
    body = json.dumps({"model": model, "messages": [message], **options}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), 120) as line:
        line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        seen, wanted = b"", int(when * 6)
        while seen.count(b"data: ") < wanted and (piece := line.recv(4096)):
            seen += piece
        # A reset, as by a cable pulled out.
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def disconnects(url: str, clip: bytes, count: int, askers: int = 8) -> tuple[float, dict[str, float]]:
    """Cuts `count` streams; returns the seconds until nothing is held any more (inf: never), and the gauges then."""
    with ThreadPoolExecutor(askers) as pool:
        list(pool.map(lambda number: _leave_in_the_middle(url, clip, (number % 10) / 10), range(count)))
    start = time.monotonic()
    while any((held := gauges(url)).values()):
        if time.monotonic() - start > 30:
            return float("inf"), held
        time.sleep(0.01)
    return time.monotonic() - start, held


def gauges(url: str) -> dict[str, float]:
    """Returns what the server holds for requests, from /metrics."""
    page = requests.get(f"{url}/metrics", timeout=20).text
    values = dict(re.findall(r"^kimi_mm_(\w+) (\S+)$", page, re.M))
    return {name: float(values[name]) for name in GAUGES}


def memory_mib(pid: int) -> float:
    """Returns the resident memory of a process."""
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024
