"""Speech that comes out while codes still come in, for one stream or many at once.

    push(codes) ─► waiting codes, with their noise ─► window = first_chunk / chunk + look-ahead codes ─► ODE ─► mel
                                                        │                             keep all but the look-ahead
    past (DiTCache) ◄─ finished frames, read at t ~ 1 ◄─┴──────────────────── mel ─► vocoder (its own state) ─► wave
    flush()     ─► the last window, look-ahead included

Windows depend on the number of codes alone and noise on the number of the code, so that the samples are the same
however the codes are cut into pieces. Frames enter the past only when the next window begins: sound comes out first.

Shapes: B streams, T frames of a window, M mel bins, S samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from kimi_mm.audio.detokenizer_config import StreamingConfig
from kimi_mm.audio.dit_cache import DiTCache
from kimi_mm.audio.vocoder import VocoderState
from kimi_mm.errors import AudioError

if TYPE_CHECKING:
    from kimi_mm.audio.detokenizer import Detokenizer

T = TypeVar("T")
Job = tuple["DetokenizerStream", int]  # a stream and the codes of its window
Codes = Sequence[int] | np.ndarray | torch.Tensor


@dataclass
class DetokenizerState:
    """All that a stream remembers. Tensors are replaced, never written, so that copies may share them."""

    cache: DiTCache
    vocoder: VocoderState
    generator: torch.Generator
    noise: torch.Tensor  # [4 * waiting, M]
    waiting: tuple[int, ...] = ()  # codes whose sound is not out yet
    spoken: tuple[tuple[int, ...], torch.Tensor] | None = None  # codes and mel [T, M] that are not in the cache yet
    begun: bool = False

    def clone(self) -> DetokenizerState:
        """Returns an independent copy."""
        twin = copy.copy(self)
        twin.generator = torch.Generator(self.generator.device)
        twin.generator.set_state(self.generator.get_state())
        return twin


class DetokenizerStream:
    """One utterance on its way out; open it with `Detokenizer.stream`.

    Args:
        detokenizer: does the work.
        state: where the stream begins.
        config: chunk sizes and solver.
    """

    def __init__(self, detokenizer: Detokenizer, state: DetokenizerState, config: StreamingConfig) -> None:
        self.detokenizer, self.state, self.config = detokenizer, state, config
        self.closed = False

    def push(self, codes: Codes) -> torch.Tensor:
        """Takes the next codes, any number of them, and returns the wave [S] that became certain.

        Raises:
            AudioError: on a code outside the codebook (the stream stays as it was), or after `flush`.
        """
        return advance([self], [codes])[0]

    def flush(self) -> torch.Tensor:
        """Ends the stream and returns the rest of the wave; 1920 samples for each code in all.

        Raises:
            AudioError: when the stream was flushed before.
        """
        return advance([self], [()], final=True)[0]

    def clone(self) -> DetokenizerStream:
        """Returns a stream that goes on from here on its own."""
        twin = copy.copy(self)
        twin.state = self.state.clone()
        return twin

    def accept(self, codes: Codes) -> None:
        """Takes codes without making sound of them yet; `push` and `advance` do. Errors as of `push`."""
        if self.closed:
            raise AudioError("this stream was flushed already; open another one.")
        self._accept(check_codes(codes, self.detokenizer.config.dit.codebook_size))

    def _accept(self, codes: list[int]) -> None:
        """Adds codes and draws their noise: one draw a code, so that the numbers do not depend on the pieces."""
        if not codes:
            return
        state, config = self.state, self.detokenizer.config
        shape = (config.frames_per_code, config.mel.num_mel_bins)
        drawn = [torch.randn(shape, generator=state.generator, device=state.generator.device) for _ in codes]
        state.noise = torch.cat([state.noise, torch.cat(drawn).to(state.noise.device)])
        state.waiting += tuple(codes)

    @property
    def window(self) -> int:
        """How many codes the next window has; 0 as long as some are missing."""
        config = self.config
        need = config.chunk_codes + config.look_ahead_codes if self.state.begun else config.first_chunk_codes
        return need if len(self.state.waiting) >= need else 0


def advance(streams: Sequence[DetokenizerStream], codes: Sequence[Codes], *, final: bool = False) -> list[torch.Tensor]:
    """Pushes codes into several streams of one detokenizer; whatever is due is computed side by side.

    Args:
        streams: in any states, each at most once.
        codes: the next codes of each, maybe none.
        final: ends all of them.

    Returns:
        The wave [S] of each that became certain, fp32 in [-1, 1].

    Raises:
        AudioError: on a code outside the codebook or a stream that has ended; nothing is changed then.
    """
    size = streams[0].detokenizer.config.dit.codebook_size if streams else 0
    taken = [check_codes(piece, size) for piece in codes]
    if any(stream.closed for stream in streams):
        raise AudioError("this stream was flushed already; open another one.")
    for stream, piece in zip(streams, taken, strict=True):
        stream._accept(piece)
        stream.closed = final
    out: dict[int, list[torch.Tensor]] = {id(stream): [] for stream in streams}

    def speak(jobs: list[Job], last: bool) -> None:
        for group in _grouped(jobs, lambda job: _solver(job[0].config)):
            for (stream, _), wave in zip(group, _speak(group, last), strict=True):
                out[id(stream)].append(wave)

    while due := [(stream, window) for stream in streams if (window := stream.window)]:
        speak(due, False)
    if final:
        speak([(stream, len(stream.state.waiting)) for stream in streams], True)
    return [torch.cat([stream.state.noise.new_zeros(0), *out[id(stream)]]) for stream in streams]


def check_codes(codes: Codes, codebook_size: int) -> list[int]:
    """Returns codes as a list.

    Raises:
        AudioError: when they are not whole numbers in [0, codebook_size).
    """
    values = np.asarray(torch.as_tensor(codes).cpu() if isinstance(codes, torch.Tensor) else codes)
    if values.size == 0:
        return []
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise AudioError(f"codes must be a list of whole numbers, got {values.dtype} of shape {list(values.shape)}.")
    if values.min() < 0 or values.max() >= codebook_size:
        bad = int(values.min() if values.min() < 0 else values.max())
        raise AudioError(f"code {bad} is not in the codebook, which has {codebook_size} codes from 0 on.")
    return values.tolist()


@torch.inference_mode()
def _speak(jobs: list[Job], final: bool) -> list[torch.Tensor]:
    """Solves for the windows of several streams and vocodes what each may keep."""
    detokenizer, config = jobs[0][0].detokenizer, jobs[0][0].config
    states, frames = [stream.state for stream, _ in jobs], detokenizer.config.frames_per_code
    mels = [state.noise[:0] for state in states]
    solved = [i for i, (_, window) in enumerate(jobs) if window]
    if solved:
        _remember(detokenizer, [states[i] for i in solved if states[i].spoken is not None])
        windows = [states[i].waiting[: jobs[i][1]] for i in solved]
        counts = [len(window) * frames for window in windows]
        noise = _padded([states[i].noise[:n] for i, n in zip(solved, counts, strict=True)])
        cache = DiTCache.stack([states[i].cache for i in solved])
        mel = detokenizer.solve(noise, detokenizer.pad_codes(windows), cache, counts, config)
        for row, i in enumerate(solved):
            mels[i] = _keep(jobs[i][0], windows[row], mel[row, : counts[row]], final)
    waves = list(mels)
    for group in _grouped(range(len(jobs)), lambda i: (len(mels[i]), states[i].vocoder.shape)):
        mel = detokenizer.mel.denormalize(torch.stack([mels[i] for i in group]))
        before = VocoderState.stack([states[i].vocoder for i in group])
        wave, after = detokenizer.vocoder.step(mel, before, final)
        for row, i in enumerate(group):
            waves[i], states[i].vocoder = wave[row].float(), after.row(row)
    return waves


def _remember(detokenizer: Detokenizer, states: list[DetokenizerState]) -> None:
    """Writes the frames spoken last into the past."""
    pending = [state.spoken for state in states if state.spoken is not None]
    if not pending:
        return
    codes = detokenizer.pad_codes([codes for codes, _ in pending])
    mel, counts = _padded([mel for _, mel in pending]), [len(mel) for _, mel in pending]
    cache = detokenizer.remember(mel, codes, DiTCache.stack([state.cache for state in states]), counts)
    for row, state in enumerate(states):
        state.cache, state.spoken = cache.row(row), None


def _keep(stream: DetokenizerStream, window: tuple[int, ...], mel: torch.Tensor, final: bool) -> torch.Tensor:
    """Takes the solved mel [T, M] of a window out of what waits; returns the part that is spoken."""
    state, frames = stream.state, stream.detokenizer.config.frames_per_code
    count = len(window) - (0 if final else stream.config.look_ahead_codes)
    kept = mel[: count * frames]
    state.waiting, state.noise = state.waiting[count:], state.noise[count * frames :]
    state.spoken, state.begun = (window[:count], kept), True
    return kept


def _solver(config: StreamingConfig) -> tuple:
    return config.steps, config.solver, config.time_grid, config.guidance


def _padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _grouped(items: Iterable[T], key: Callable[[T], Any]) -> list[list[T]]:
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
