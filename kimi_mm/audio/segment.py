"""Cutting long recordings at silences, with no word lost.

    wave ─► level every 20 ms (dB) ─► speech where it rises above the noise floor ─► islands with margins
         ─► islands joined up to `max_seconds`, longer ones cut where they are quietest

Everything that could be speech is in exactly one piece; only stretches of clear silence longer than the margins are
left out.
"""

from __future__ import annotations

import numpy as np

FRAME = 320  # 20 ms at 16 kHz
SILENCE_DB = -65.0  # nothing below this level is speech
ABOVE_FLOOR_DB = 6.0  # speech is at least this far above the recording's noise floor
MARGIN_SECONDS = 0.4  # kept around every island
BRIDGE_SECONDS = 1.5  # pauses shorter than this never leave a gap


def split_at_silence(
    wave: np.ndarray, sample_rate: int = 16_000, max_seconds: float = 20.0, min_cut_seconds: float = 1.0
) -> list[tuple[int, int]]:
    """Returns pieces (start, end) in samples, in order, without overlap.

    Args:
        wave: mono [S], fp32 in [-1, 1].
        sample_rate: Hz.
        max_seconds: longest piece.
        min_cut_seconds: a forced cut leaves at least this much on both sides.

    Returns:
        No piece at all when the whole recording is silent, or empty.
    """
    if not len(wave):
        return []
    frame = FRAME * sample_rate // 16_000
    level = _level(wave, frame)
    loud = level > _threshold(level)
    pieces = []
    seconds_per_frame = frame / sample_rate
    for first, last in _islands(loud, seconds_per_frame):
        pieces += _cut(level, first, last, max_seconds, min_cut_seconds, seconds_per_frame)
    pieces = _join(pieces, max_seconds, seconds_per_frame)
    return [(first * frame, min(last * frame, len(wave))) for first, last in pieces]


def _level(wave: np.ndarray, frame: int) -> np.ndarray:
    """Level of each 20 ms frame in dB below full scale."""
    padded = np.pad(wave, (0, -len(wave) % frame)).reshape(-1, frame)
    padded = padded - padded.mean(1, keepdims=True)
    power = np.maximum(np.einsum("ij,ij->i", padded, padded, dtype=np.float64) / frame, 1e-12)
    return 10 * np.log10(power)


def _threshold(level: np.ndarray) -> float:
    """Level above which a frame may be speech.

    The floor is the 10th percentile; when the recording is hardly louder than that anywhere (steady noise, a tone, no
    pauses), everything above absolute silence counts.
    """
    floor, peak = np.percentile(level, 10), np.percentile(level, 99)
    relative = floor + ABOVE_FLOOR_DB if peak - floor > 15.0 else -np.inf
    # Even in noise, what lies 45 dB under the loudest speech is not a word.
    return float(max(SILENCE_DB, min(relative, peak - 15.0), peak - 45.0))


def _islands(loud: np.ndarray, seconds_per_frame: float) -> list[tuple[int, int]]:
    """Stretches (first, end) of frames that hold speech, margins included, small gaps bridged."""
    index = np.flatnonzero(loud)
    if not len(index):
        return []
    breaks = np.flatnonzero(np.diff(index) > BRIDGE_SECONDS / seconds_per_frame)
    firsts = index[np.concatenate([[0], breaks + 1])]
    lasts = index[np.concatenate([breaks, [len(index) - 1]])] + 1
    margin = int(MARGIN_SECONDS / seconds_per_frame)
    return [(max(0, int(a) - margin), min(len(loud), int(b) + margin)) for a, b in zip(firsts, lasts, strict=True)]


def _cut(
    level: np.ndarray, first: int, last: int, max_seconds: float, min_cut_seconds: float, seconds_per_frame: float
) -> list[tuple[int, int]]:
    """Cuts one island into pieces of at most `max_seconds`, each time in the quietest place of the later half."""
    longest = max(2, int(max_seconds / seconds_per_frame))
    keep = min(int(min_cut_seconds / seconds_per_frame), longest // 4)
    # A pause is a low level over a quarter of a second, not a single low frame.
    smooth = np.convolve(level, np.ones(13) / 13, mode="same")
    pieces = []
    while last - first > longest:
        low, high = first + longest // 2, min(first + longest, last - keep)
        at = low + int(np.argmin(smooth[low:high])) if high > low else first + longest
        pieces.append((first, at))
        first = at
    return [*pieces, (first, last)]


def _join(pieces: list[tuple[int, int]], max_seconds: float, seconds_per_frame: float) -> list[tuple[int, int]]:
    """Joins short neighbours whose gap is small, since words are heard better with context."""
    joined: list[tuple[int, int]] = []
    for first, last in pieces:
        near = joined and (first - joined[-1][1]) * seconds_per_frame < 1.0
        short = joined and (last - joined[-1][0]) * seconds_per_frame <= max_seconds * 0.6
        if near and short:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return joined
