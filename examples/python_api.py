"""The Python API in one minute: `python examples/python_api.py [RECORDING]`.

Writes a recording down, shows the codes that the model hears, and hears it again as a stream.
"""

from __future__ import annotations

import sys
from pathlib import Path

import kimi_mm
from kimi_mm.audio.io import read_audio

DEMO = Path(kimi_mm.__file__).parent / "pretrained" / "demo"


def main(recording: str | Path = DEMO / "vm-instructions.flac") -> None:
    model = kimi_mm.load("nano")

    # A file, bytes or an array go in; text with the times of its pieces comes out.
    transcript = model.transcribe(recording)
    print(f"{transcript.duration:.1f} s: {transcript.text}")
    for segment in transcript.segments:
        print(f"  {segment.start:5.2f} to {segment.end:5.2f} s  {segment.text}")

    # 12.5 times a second the tokenizer gives a code and a row of continuous features.
    wave, _ = read_audio(recording)  # mono, 16 kHz, float32
    tokens = model.listen(wave)
    print(f"{len(tokens)} codes, features {tuple(tokens.features.shape)}; the first: {tokens.codes[:8].tolist()}")

    # The same codes come out piece by piece, while the sound still comes in.
    stream = model.tokenizer.stream(16_000)
    codes: list[int] = []
    for start in range(0, len(wave), 1600):
        codes += stream.push(wave[start : start + 1600]).codes.tolist()
    codes += stream.flush().codes.tolist()
    assert codes == tokens.codes.tolist()

    # A conversation with a recording in it, answered word by word.
    for piece in model.reply([{"role": "user", "content": [{"type": "audio", "audio": tokens}]}]):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:2])
