"""How fast `kimi-mm serve` answers on this machine: `python -m benchmarks.serving`.

Starts a server of its own on loopback and prints the time until it is ready, the latency of transcribing 10 s of the
shipped real recordings over HTTP, and how many times as many chats it answers when eight ask at once.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

ASKERS = 8


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--debug", action="store_true", help="a short clip, few rounds: shows that it works")
    given = parser.parse_args(arguments)
    import openai

    seconds, rounds, tokens = (2, 2, 4) if given.debug else (10, 50, 48)
    clip = recording(seconds)
    with server(given.model) as (url, ready):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        name = client.models.list().data[0].id

        def hear() -> float:
            start = time.perf_counter()
            client.audio.transcriptions.create(file=("clip.wav", clip), model=name)
            return time.perf_counter() - start

        def chat(_: int) -> None:
            sound = {"data": base64.b64encode(clip).decode(), "format": "wav"}
            part = {"type": "input_audio", "input_audio": sound}
            client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": [part]}],  # type: ignore[list-item]
                max_tokens=tokens,
            )

        hear()
        took = [hear() for _ in range(rounds)]
        chat(0)
        rates = {askers: _rate(chat, askers, ASKERS * (1 if given.debug else 4)) for askers in (1, ASKERS)}
    p50, p90, p99 = np.percentile(took, (50, 90, 99))
    print(f"{platform.machine()}, {os.cpu_count()} cores, model {name}")
    for label, value in [
        ("from the command to ready", f"{ready:.2f} s"),
        (f"transcription of {seconds} s, p50 / p90 / p99", f"{p50:.3f} / {p90:.3f} / {p99:.3f} s"),
        ("chats a second, one asker", f"{rates[1]:.3f}"),
        (f"chats a second, {ASKERS} askers", f"{rates[ASKERS]:.3f}"),
        (f"{ASKERS} askers against one", f"{rates[ASKERS] / rates[1]:.2f} x"),
    ]:
        print(f"{label:<48} {value}")


def recording(seconds: int) -> bytes:
    """Returns a WAV file with so many seconds of the shipped recordings, one after another."""
    import soundfile

    from kimi_mm.audio.io import read_audio
    from kimi_mm.cli.demo import CLIPS, read_clips

    wave = np.concatenate([read_audio(CLIPS / clip["file"])[0] for clip in read_clips()])
    file = io.BytesIO()
    soundfile.write(file, wave[: seconds * 16_000], 16_000, format="WAV")
    return file.getvalue()


@contextmanager
def server(model: str) -> Iterator[tuple[str, float]]:
    """Runs a server; gives its address, and the seconds that it took to be ready."""
    command = [sys.executable, "-m", "kimi_mm", "serve", "--model", model, "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "KIMI_MM_API_KEY"}
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        log = ""
        for line in process.stderr:
            log += line
            if found := re.search(r"ready at (http://\S+)", line):
                yield found[1], time.perf_counter() - start
                return
        raise SystemExit(f"the server did not start: {log}")
    finally:
        process.terminate()
        process.wait(30)


def _rate(chat, askers: int, count: int) -> float:
    start = time.perf_counter()
    with ThreadPoolExecutor(askers) as pool:
        list(pool.map(chat, range(count)))
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
