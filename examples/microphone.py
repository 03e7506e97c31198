"""Words while you speak: `python examples/microphone.py` (pip install sounddevice), or with `--file RECORDING`.

    microphone ─► pieces of 0.1 s ─► AudioStream ─► codes and features, every 2 s ─┐
                        └─► quiet for 0.6 s after speech ──────────────────────────┴─► words

The sound is tokenized while it comes in; at a pause only the words are left to be found.
"""

from __future__ import annotations

import argparse
import queue
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import kimi_mm
from kimi_mm.audio.io import read_audio
from kimi_mm.audio.tokens import AudioTokens, join

RATE = 16_000
PIECE = RATE // 10
LOUD = 0.01  # root mean square of a piece with speech
PAUSE = 6  # pieces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="take the sound from a recording, at the pace of the clock")
    parser.add_argument("--fast", action="store_true", help="with --file: as fast as the machine goes")
    given = parser.parse_args()
    model = kimi_mm.load("nano")
    pieces = microphone() if given.file is None else recording(given.file, given.fast)
    try:
        for heard in utterances(model, pieces):
            start = time.perf_counter()
            for word in model.reply([{"role": "user", "content": [{"type": "audio", "audio": heard}]}], max_tokens=128):
                print(word, end="", flush=True)
            print(f"   [{len(heard)} codes, {time.perf_counter() - start:.2f} s after the pause]", flush=True)
    except KeyboardInterrupt:
        print()


def utterances(model: kimi_mm.KimiMM, pieces: Iterator[np.ndarray]) -> Iterator[AudioTokens]:
    """Yields the codes and features of each stretch of speech, at the pause after it."""
    stream, tokens, quiet = model.tokenizer.stream(RATE), [], PAUSE
    for piece in pieces:
        loud = float(np.sqrt(np.mean(piece**2))) > LOUD
        quiet = 0 if loud else quiet + 1
        if quiet < PAUSE:
            tokens.append(stream.push(piece))
        elif tokens:
            yield join([*tokens, stream.flush()])
            stream, tokens = model.tokenizer.stream(RATE), []
    if tokens:
        yield join([*tokens, stream.flush()])


def recording(path: Path, fast: bool) -> Iterator[np.ndarray]:
    wave, _ = read_audio(path)
    for start in range(0, len(wave), PIECE):
        if not fast:
            time.sleep(PIECE / RATE)
        yield wave[start : start + PIECE]


def microphone() -> Iterator[np.ndarray]:
    import sounddevice

    heard: queue.Queue[np.ndarray] = queue.Queue()
    with sounddevice.InputStream(RATE, PIECE, channels=1, callback=lambda data, *_: heard.put(data[:, 0].copy())):
        print("speak; Ctrl-C ends it", flush=True)
        while True:
            yield heard.get()


if __name__ == "__main__":
    main()
