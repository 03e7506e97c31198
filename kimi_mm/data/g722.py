"""ITU-T G.722 decoder at 64 kbit/s (mode 1), many files in lockstep.

    byte ─┬─ low 6 bits ─► inverse quantiser ─► + prediction ─► low band  8 kHz ─┐
          └─ high 2 bits ► inverse quantiser ─► + prediction ─► high band 8 kHz ─┴─ QMF synthesis ─► 16 kHz

The predictors adapt on every sample, so time cannot be vectorised; files can. Both bands share one adaptive predictor
(block 4 of the recommendation), run on arrays [2, n]. Integer arithmetic is the recommendation's, with saturation.

    n  files still running     2  bands: low, high
"""

from __future__ import annotations

import numpy as np

Q2 = (-7408, -1616, 7408, 1616)
Q4 = (0, -20456, -12896, -8968, -6288, -4240, -2584, -1200, 20456, 12896, 8968, 6288, 4240, 2584, 1200, 0)
_Q6_HALF = (24808, 21904, 19008, 16704, 14984, 13512, 12280, 11192, 10232, 9360, 8576, 7856, 7192, 6576, 6000)
_Q6_HALF += (5456, 4944, 4464, 4008, 3576, 3168, 2776, 2400, 2032, 1688, 1360, 1040, 728)
Q6 = (-136,) * 4 + tuple(-q for q in _Q6_HALF) + _Q6_HALF + (432, 136, -432, -136)
LOG_TABLE = (2048, 2093, 2139, 2186, 2233, 2282, 2332, 2383, 2435, 2489, 2543, 2599, 2656, 2714, 2774, 2834)
LOG_TABLE += (2896, 2960, 3025, 3091, 3158, 3228, 3298, 3371, 3444, 3520, 3597, 3676, 3756, 3838, 3922, 4008)
LOW_STEP = (-60, 3042, 1198, 538, 334, 172, 58, -30, 3042, 1198, 538, 334, 172, 58, -30, -60)
HIGH_STEP = (798, -214, 798, -214)
QMF = (3, -11, 12, 32, -210, 951, 3876, -805, 362, -156, 53, -11)


def decode(streams: list[bytes]) -> list[np.ndarray]:
    """Decodes G.722 streams.

    Args:
        streams: one bytes object per file, one byte per two output samples.

    Returns:
        int16 arrays at 16 kHz, in the order given, with two samples per byte.
    """
    order = sorted(range(len(streams)), key=lambda i: -len(streams[i]))
    lengths = np.array([len(streams[i]) for i in order])
    steps = int(lengths[0]) if len(order) else 0
    data = np.zeros((steps, len(order)), np.uint8)
    for column, i in enumerate(order):
        data[: len(streams[i]), column] = np.frombuffer(streams[i], np.uint8)
    bands = _decode_bands(data, lengths)
    waves: list[np.ndarray] = [np.empty(0, np.int16)] * len(streams)
    for column, i in enumerate(order):
        waves[i] = _synthesis(bands[: len(streams[i]), :, column].astype(np.int64))
    return waves


def _decode_bands(data: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the reconstructed bands [steps, 2, n] int16 of bytes [steps, n]."""
    steps, n = data.shape
    out = np.zeros((steps, 2, n), np.int16)
    q2, q4, q6, table = (np.array(t, np.int32) for t in (Q2, Q4, Q6, LOG_TABLE))
    log_steps = np.stack([np.array(LOW_STEP), np.array(HIGH_STEP * 4)]).astype(np.int32)
    ceiling, base = np.array([[18432], [22528]], np.int32), np.array([[8], [10]], np.int32)
    state = _Predictor(n)
    scale, det = np.zeros((2, n), np.int32), np.array([[32], [8]], np.int32).repeat(n, 1)
    for t in range(steps):
        running = int(np.searchsorted(-lengths, -t))
        if running < n:
            n = running
            state.shrink(n)
            scale, det = scale[:, :n], det[:, :n]
        byte = data[t, :n]
        low, high = byte & 63, byte >> 6
        s = state.prediction
        difference = np.stack([q4[low >> 2], q2[high]])
        difference *= det
        difference >>= 15
        out[t, 0, :n] = np.clip(s[0] + ((det[0] * q6[low]) >> 15), -16384, 16383)
        out[t, 1, :n] = np.clip(s[1] + difference[1], -16384, 16383)
        scale = (scale * 127 >> 7) + np.stack([log_steps[0][low >> 2], log_steps[1][high]])
        np.clip(scale, 0, ceiling, out=scale)
        shift = base - (scale >> 11)
        fraction = table[(scale >> 6) & 31]
        det = np.where(shift < 0, fraction << np.maximum(-shift, 0), fraction >> np.maximum(shift, 0)) << 2
        state.update(difference)
    return out


class _Predictor:
    """Block 4: two poles and six zeros, adapted by the signs of past values."""

    def __init__(self, n: int) -> None:
        self.d = np.zeros((6, 2, n), np.int32)  # past quantised differences
        self.b = np.zeros((6, 2, n), np.int32)  # zeros
        self.a1, self.a2, self.p1, self.p2, self.r1, self.zeros, self.prediction = np.zeros((7, 2, n), np.int32)

    def shrink(self, n: int) -> None:
        self.d, self.b = self.d[:, :, :n].copy(), self.b[:, :, :n].copy()
        for name in ("a1", "a2", "p1", "p2", "r1", "zeros", "prediction"):
            setattr(self, name, getattr(self, name)[:, :n].copy())

    def update(self, d: np.ndarray) -> None:
        """Takes the new differences [2, n] and sets `prediction` for the next sample."""
        r = _saturate(self.prediction + d)
        p = _saturate(self.zeros + d)
        positive = p >= 0
        same1 = positive == (self.p1 >= 0)
        same2 = positive == (self.p2 >= 0)
        wide = _saturate(self.a1 << 2)
        a2 = (np.minimum(np.where(same1, -wide, wide), 32767) >> 7) + np.where(same2, 128, -128)
        a2 += self.a2 * 32512 >> 15
        np.clip(a2, -12288, 12288, out=a2)
        limit = 15360 - a2
        a1 = np.where(same1, 192, -192) + (self.a1 * 32640 >> 15)
        a1 = np.minimum(np.maximum(a1, -limit), limit).astype(np.int32)
        gain = np.where(d == 0, 0, 128)
        b = (self.b * 32640 >> 15) + np.where((self.d >= 0) == (d >= 0), gain, -gain)
        b = _saturate(b).astype(np.int32)
        self.d[1:] = self.d[:-1]
        self.d[0] = d
        poles = _saturate((a1 * _saturate(r + r) >> 15) + (a2 * _saturate(self.r1 + self.r1) >> 15))
        self.zeros = _saturate((b * _saturate(self.d + self.d) >> 15).sum(0, dtype=np.int32))
        self.prediction = _saturate(poles + self.zeros)
        self.a1, self.a2, self.b = a1, a2.astype(np.int32), b
        self.p1, self.p2, self.r1 = p, self.p1, r


def _saturate(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -32768, 32767)


def _synthesis(bands: np.ndarray) -> np.ndarray:
    """Joins bands [steps, 2] to 16 kHz int16 [2 * steps] by the 24-tap quadrature mirror filter."""
    if not len(bands):
        return np.zeros(0, np.int16)
    taps = np.array(QMF, np.int64)
    total, difference = bands[:, 0] + bands[:, 1], bands[:, 0] - bands[:, 1]
    even = np.convolve(difference, taps)[: len(bands)]
    odd = np.convolve(total, taps[::-1])[: len(bands)]
    wave = np.stack([even, odd], 1).reshape(-1) >> 11
    return _saturate(wave).astype(np.int16)
