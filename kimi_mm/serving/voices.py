"""Speech of many replies at once: their codes wait until a window of the detokenizer is due, and windows are shared.

    step of the batch ─► a code for each voice ─► waits ─► some voice is about to fall silent, begins or ends
                                                            ─► every window that is due, side by side ─► waves

Windows depend on the number of codes alone (`kimi_mm.audio.detokenizer_stream`), so waiting changes no sample; it only
lets voices that began at different times meet. A voice waits no longer than its listener still has to listen to.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from kimi_mm.audio.detokenizer_stream import DetokenizerStream, advance
from kimi_mm.errors import AudioError
from kimi_mm.speech import samples_of

SPARE_SECONDS = 0.4  # of sound that its listener still has when a voice speaks on at the latest


class Voice:
    """The speech of one answer, over one or more rows.

    Args:
        stream: of the detokenizer, from `kimi_mm.speech.open_voice`.
    """

    def __init__(self, stream: DetokenizerStream) -> None:
        self.stream, self.rate = stream, stream.detokenizer.sample_rate
        self.spoken = False  # a code has been taken
        self._begun: float | None = None  # when its first sound went out
        self._samples = 0

    @property
    def due(self) -> bool:
        return self.stream.window > 0

    @property
    def urgent(self) -> bool:
        """Whether it has to speak now: it begins, or its listener has almost heard all there is."""
        heard = 0.0 if self._begun is None else time.monotonic() - self._begun
        return self.due and self._samples / self.rate - heard < SPARE_SECONDS

    def take(self, code: int) -> None:
        """Takes the next code."""
        self.stream.accept([code])
        self.spoken = True

    def sent(self, samples: int) -> None:
        """Books samples that went out."""
        if samples and self._begun is None:
            self._begun = time.monotonic()
        self._samples += samples


def speak(voices: Sequence[Voice], closing: Sequence[Voice] = ()) -> dict[int, np.ndarray | AudioError]:
    """Makes the sound that cannot wait, and with it all that is due.

    Args:
        voices: at work, each once.
        closing: those of them whose last code has been taken.

    Returns:
        By id(voice), for those voices that have any: samples [S] fp32 in [-1, 1], or the error where they are not
        numbers.
    """
    flushed = [voice for voice in closing if voice.spoken]
    due = [voice for voice in voices if voice.due]
    waves: dict[int, list[torch.Tensor]] = {}
    for group, final in ((due if _now(voices, due, closing) else [], False), (flushed, True)):
        for voice, wave in zip(group, advance([v.stream for v in group], [()] * len(group), final=final), strict=True):
            if len(wave):
                waves.setdefault(id(voice), []).append(wave)
                voice.sent(len(wave))
    found: dict[int, np.ndarray | AudioError] = {}
    for key, pieces in waves.items():
        try:
            found[key] = samples_of(torch.cat(pieces))
        except AudioError as error:
            found[key] = error
    return found


def _now(voices: Sequence[Voice], due: Sequence[Voice], closing: Sequence[Voice]) -> bool:
    """Tells whether what is due shall be spoken: nobody is left to wait for, or somebody cannot wait."""
    ended = set(map(id, closing))
    return len(due) == len(voices) or any(voice.urgent or id(voice) in ended for voice in due)
