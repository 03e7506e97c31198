"""How soon a spoken answer begins: `turns` talks to /v1/realtime as a microphone does, at the pace of real time.

    recording, its last sound at t0 ─► pieces of 40 ms ─► silence ─► ... ─► response.output_audio.delta at t1

t1 - t0 holds the silence that the voice activity detector waits for (500 ms unless told otherwise), what of the turn is
still to be tokenized, the prompt, the first codes and their sound.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Sequence

import numpy as np
import openai

from kimi_mm.serving.sounds import pcm16

RATE = 24_000
PIECE = RATE // 25  # samples that a microphone sends at once
PATIENCE = 15.0  # seconds until an answer has begun


def speaks(client: openai.OpenAI, model: str) -> bool:
    """Whether a model answers aloud."""
    with client.realtime.connect(model=model) as connection:
        created = connection.recv()
        return "audio" in (getattr(created.session, "output_modalities", None) or [])  # type: ignore[union-attr]


def turns(client: openai.OpenAI, model: str, waves: Sequence[np.ndarray]) -> list[float]:
    """Says each recording in a conversation of its own and returns the seconds from its last sound to the first answer.

    Args:
        client: of the server.
        model: that answers.
        waves: [S] at 24 kHz each.

    Raises:
        RuntimeError: an answer did not begin, or the server sent an error.
    """
    return [_turn(client, model, wave) for wave in waves]


def _turn(client: openai.OpenAI, model: str, wave: np.ndarray) -> float:
    loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
    wave = wave[: loud[-1] + 1]
    with client.realtime.connect(model=model) as connection:
        heard, start = threading.Event(), time.perf_counter()

        def talk() -> None:
            sent = 0
            while not heard.is_set() and sent < len(wave) + PATIENCE * RATE:
                piece = np.zeros(PIECE, np.float32)
                part = wave[sent : sent + PIECE]
                piece[: len(part)] = part
                data = base64.b64encode(pcm16(piece)).decode()
                sent += PIECE
                time.sleep(max(0.0, start + sent / RATE - time.perf_counter()))  # sound is there when it has been made
                connection.input_audio_buffer.append(audio=data)
            if not heard.is_set():
                connection.close()

        microphone = threading.Thread(target=talk)
        microphone.start()
        try:
            for event in connection:
                if event.type == "error":
                    raise RuntimeError(f"the server sent an error: {event.error.message}")
                if event.type == "response.output_audio.delta":
                    return time.perf_counter() - (start + len(wave) / RATE)
            raise RuntimeError(f"no answer began within {PATIENCE:g} s.")
        finally:
            heard.set()
            microphone.join()
