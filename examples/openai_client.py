"""The official OpenAI client against `kimi-mm serve`: `python examples/openai_client.py [RECORDING]`.

Start the server first; OPENAI_BASE_URL names it where it is not http://127.0.0.1:8000/v1, OPENAI_API_KEY holds its key.
"""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI

import kimi_mm

DEMO = Path(kimi_mm.__file__).parent / "pretrained" / "demo"


def main(recording: str | Path = DEMO / "vm-instructions.flac") -> None:
    recording = Path(recording)
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    model = client.models.list().data[0].id

    print("whole:", client.audio.transcriptions.create(file=recording, model=model).text)

    print("as it is heard: ", end="")
    for event in client.audio.transcriptions.create(file=recording, model=model, stream=True):
        if event.type == "transcript.text.delta":
            print(event.delta, end="", flush=True)
    print()

    print(client.audio.transcriptions.create(file=recording, model=model, response_format="srt"))

    sound = {"data": base64.b64encode(recording.read_bytes()).decode(), "format": recording.suffix[1:]}
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": [{"type": "input_audio", "input_audio": sound}]}],
        stream=True,
        stream_options={"include_usage": True},
    )
    print("in a chat: ", end="")
    for chunk in answer:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f"  ({chunk.usage.prompt_tokens} positions read, {chunk.usage.completion_tokens} written)")


if __name__ == "__main__":
    main(*sys.argv[1:2])
