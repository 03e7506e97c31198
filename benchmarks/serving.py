"""How fast `kimi-mm serve` answers on this machine: `python -m benchmarks.serving`.

Starts a server of its own on loopback and prints the time until it is ready, the latency of transcribing 10 s of the
shipped real recordings over HTTP, how many times as many chats it answers when eight ask at once, and what 200 cut
streams leave behind; of a model with a voice also how soon after the user's last sound a spoken answer begins.
`--minutes 30` adds a mixed load: errors, answers that differ from those a lone asker gets, and growth of memory after
warm-up.
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
import openai

from benchmarks.serving_load import Load, disconnects, mixed_load
from benchmarks.serving_talk import RATE, speaks, turns

ASKERS = 8


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--minutes", type=float, default=0.0, metavar="M", help="of mixed load")
    parser.add_argument("--debug", action="store_true", help="a short clip, few rounds: shows that it works")
    given = parser.parse_args(arguments)

    seconds, rounds, tokens, cuts = (2, 2, 4, 8) if given.debug else (10, 50, 48, 200)
    clip = recording(seconds)
    with server(given.model) as (url, ready, pid):
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
        spoken = turns(client, name, questions(1 if given.debug else 24)) if speaks(client, name) else []
        freed, held = disconnects(url, clip, cuts)
        load = mixed_load(url, pid, clips(2 if given.debug else 8), 60 * given.minutes) if given.minutes else None
    p50, p90, p99 = np.percentile(took, (50, 90, 99))
    print(f"{platform.machine()}, {os.cpu_count()} cores, model {name}")
    for label, value in [
        ("from the command to ready", f"{ready:.2f} s"),
        (f"transcription of {seconds} s, p50 / p90 / p99", f"{p50:.3f} / {p90:.3f} / {p99:.3f} s"),
        ("chats a second, one asker", f"{rates[1]:.3f}"),
        (f"chats a second, {ASKERS} askers", f"{rates[ASKERS]:.3f}"),
        (f"{ASKERS} askers against one", f"{rates[ASKERS] / rates[1]:.2f} x"),
        *(_talk_lines(spoken) if spoken else []),
        (f"{cuts} cut streams: held afterwards", f"{sum(held.values()):.0f}, after {freed:.2f} s"),
        *(_load_lines(load) if load else []),
    ]:
        print(f"{label:<48} {value}")
    if load:
        for problem in [*load.errors, *load.mixed_up][:10]:
            print(problem)


def _talk_lines(spoken: list[float]) -> list[tuple[str, str]]:
    p50, p95 = np.percentile(spoken, (50, 95))
    return [("last sound to first of the answer, p50 / p95", f"{p50:.3f} / {p95:.3f} s")]


def _load_lines(load: Load) -> list[tuple[str, str]]:
    after, end, growth = load.growth()
    answers = ", ".join(f"{count} {name}" for name, count in sorted(load.answers.items()))
    return [
        (f"mixed load of {load.seconds / 60:g} min", f"{answers}; {load.left} left in the middle"),
        ("errors", f"{len(load.errors)}"),
        ("answers that differ from those alone", f"{len(load.mixed_up)}"),
        ("memory after warm-up, at the end", f"{after:.0f}, {end:.0f} MiB ({growth:+.1f} %)"),
    ]


def clips(count: int) -> list[bytes]:
    """Returns shipped recordings."""
    from kimi_mm.cli.demo import CLIPS, read_clips

    return [(CLIPS / clip["file"]).read_bytes() for clip in read_clips()[:count]]


def questions(count: int) -> list[np.ndarray]:
    """Returns shipped recordings, again and again, as a microphone hears them: [S] at 24 kHz."""
    from kimi_mm.audio.io import read_audio
    from kimi_mm.cli.demo import CLIPS, read_clips

    waves = [read_audio(CLIPS / clip["file"], RATE)[0] for clip in read_clips()]
    return [waves[number % len(waves)] for number in range(count)]


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
def server(model: str) -> Iterator[tuple[str, float, int]]:
    """Runs a server; gives its address, the seconds that it took to be ready, and its process' number."""
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
                yield found[1], time.perf_counter() - start, process.pid
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
