"""Speech that comes out while it is being chosen.

    prompt ─► TwoStreams ─┬─ text ids ─► pieces of text
                          └─ codes ────► DetokenizerStream ─► pieces of wave

A spoken text is a reply whose text is given: each sentence is one reply, and one detokenizer stream says them all.
Codes go to the detokenizer one by one; its noise comes from a generator of its own, so that the samples depend on
codes and seed alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from kimi_mm.audio.detokenizer import SpeakerPrompt
from kimi_mm.audio.detokenizer_config import StreamingConfig
from kimi_mm.audio.detokenizer_stream import DetokenizerStream
from kimi_mm.errors import AudioError
from kimi_mm.generation_speech import SpeechSampling, TwoStreams
from kimi_mm.processing import ModelInputs
from kimi_mm.text.tokenizer import TextPieces
from kimi_mm.types import CodePiece, Event, Stopped, TextPiece, WavePiece

if TYPE_CHECKING:
    from kimi_mm.pipeline import KimiMM

# Speech has about 14 characters a second, a code is 80 ms; far off on either side something went wrong.
SLOWEST_CODES_PER_CHARACTER, FASTEST_CHARACTERS_PER_CODE, SPARE_CODES = 2, 4, 30


class Speaker:
    """One reply or one text on its way out of a model.

    Args:
        engine: a model with a voice.
        sampling: of both streams.
        generator: source of all randomness; None starts one at seed 0.
        voice: to speak in.
        streaming: chunk sizes and solver.

    Raises:
        UserError: the model has no voice.
    """

    def __init__(
        self,
        engine: KimiMM,
        sampling: SpeechSampling | None = None,
        generator: torch.Generator | None = None,
        voice: SpeakerPrompt | None = None,
        streaming: StreamingConfig | None = None,
    ) -> None:
        self.engine = engine
        self.sampling = sampling or SpeechSampling()
        self.generator = generator or torch.Generator().manual_seed(0)
        self.rate = engine.detokenizer.sample_rate
        self._out = open_voice(engine, self.generator, voice, streaming)
        self._spoken = False

    def reply(self, inputs: ModelInputs) -> Iterator[Event]:
        """Yields the reply to a prompt, B = 1."""
        streams = TwoStreams(self.engine.model, inputs, sampling=self.sampling, generator=self.generator)
        return self._reply(streams)

    def speak(self, sentences: Sequence[str]) -> Iterator[Event]:
        """Yields sentences and their speech; `Stopped` says "budget" for the audio where any sentence ran out of it."""
        processor = self.engine.processor
        prompt = processor.collate([processor.streams([], output="speech")], [[]]).to(self.engine.device)
        plans = [
            TwoStreams(
                self.engine.model,
                prompt,
                sampling=within(self.sampling, sentence),
                forced=[processor.tokenizer.encode(sentence)],
                generator=self.generator,
            )
            for sentence in sentences
        ]
        return self._speak(sentences, plans)

    def _reply(self, streams: TwoStreams) -> Iterator[Event]:
        pieces = TextPieces(self.engine.processor.tokenizer)
        for [step] in streams:
            if step.text is not None and (piece := pieces.push(step.text)):
                yield TextPiece(piece)
            yield from self._say(step.code)
        yield from self._end()
        yield _stopped(streams)

    def _speak(self, sentences: Sequence[str], plans: Sequence[TwoStreams]) -> Iterator[Event]:
        for number, (sentence, streams) in enumerate(zip(sentences, plans, strict=True)):
            yield TextPiece(sentence if not number else f" {sentence}")
            for [step] in streams:
                yield from self._say(step.code)
        yield from self._end()
        ends = {streams.results[0].audio_stop for streams in plans}
        yield Stopped("eos", "budget" if "budget" in ends else "eos")

    def _say(self, code: int | None) -> Iterator[Event]:
        if code is None:
            return
        yield CodePiece((code,))
        self._spoken = True
        yield from self._wave(self._out.push([code]))

    def _end(self) -> Iterator[Event]:
        if self._spoken:
            yield from self._wave(self._out.flush())

    def _wave(self, wave: torch.Tensor) -> Iterator[Event]:
        if len(wave):
            yield WavePiece(samples_of(wave), self.rate)


def open_voice(
    engine: KimiMM,
    generator: torch.Generator,
    voice: SpeakerPrompt | None = None,
    streaming: StreamingConfig | None = None,
) -> DetokenizerStream:
    """Opens the way from codes to sound; the seed of its noise is drawn from `generator`.

    Raises:
        UserError: the model has no voice.
    """
    seed = torch.randint(2**31, (1,), generator=generator, device=generator.device)
    noise = torch.Generator().manual_seed(int(seed))
    return engine.detokenizer.stream(prompt=voice, generator=noise, streaming=streaming)


def samples_of(wave: torch.Tensor) -> np.ndarray:
    """Returns a wave [S] of the detokenizer as samples in [-1, 1].

    Raises:
        AudioError: some are not numbers.
    """
    samples = wave.cpu().numpy().astype(np.float32)
    if not np.isfinite(samples).all():
        raise AudioError("the model made samples that are not numbers; its weights are damaged.")
    return samples.clip(-1.0, 1.0)


def within(sampling: SpeechSampling, sentence: str) -> SpeechSampling:
    """Keeps the speech of a sentence within what its length can mean."""
    most = SPARE_CODES + SLOWEST_CODES_PER_CHARACTER * len(sentence)
    least = 1 + len(sentence) // (4 * FASTEST_CHARACTERS_PER_CODE)
    return dataclasses.replace(
        sampling,
        max_audio_codes=min(most, sampling.max_audio_codes),
        min_audio_codes=max(least, sampling.min_audio_codes),
    )


def _stopped(streams: TwoStreams) -> Stopped:
    result = streams.results[0]
    assert result.text_stop is not None
    assert result.audio_stop is not None
    return Stopped(result.text_stop, result.audio_stop)
