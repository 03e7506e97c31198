"""Answers in text and speech as rows of the running batch: conversations, and texts read out sentence by sentence.

    Prompt ─► SpokenRow ─► ids, codes, waves ─► whole characters ─► Event
    text ─► sentences ─► one row each, one voice for all ─► Event

The events are those of `KimiMM.stream` and `KimiMM.speak_stream` with the same generator.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

import torch

from kimi_mm.errors import UserError
from kimi_mm.generation_speech import Reply, SpeechSampling
from kimi_mm.pipeline import KimiMM
from kimi_mm.serving.batch import Prompt, Row, SpokenRow
from kimi_mm.serving.engine import Engine
from kimi_mm.serving.voices import Voice
from kimi_mm.speech import open_voice, within
from kimi_mm.text.sentences import speakable
from kimi_mm.text.tokenizer import TextPieces
from kimi_mm.types import CodePiece, TextPiece, WavePiece


def speaks(model: KimiMM) -> bool:
    """Tells whether a model chooses codes to say, and has a voice that says them."""
    return model.config.detokenizer is not None and model.config.backbone.audio_head


def check_voice(model: KimiMM) -> int:
    """Returns the rate of a model's voice, Hz.

    Raises:
        UserError: it has none.
    """
    if not model.config.backbone.audio_head:
        raise UserError(f"model '{model.config.name}' does not speak; take a checkpoint with an audio branch.")
    return model.detokenizer.sample_rate


def spoken_row(model: KimiMM, prompt: Prompt, sampling: SpeechSampling, generator: torch.Generator) -> SpokenRow:
    """Returns a row that answers a prompt, which was laid out for speech; its state is kept for the next turn.

    Args:
        sampling: of both streams, and their budgets.
        generator: source of all randomness of this answer.

    Raises:
        UserError: the model has no voice.
    """
    check_voice(model)
    voice = Voice(open_voice(model, generator))
    reply = Reply(model.config.vocab, model.config.audio_delay, sampling, generator=generator)
    return SpokenRow(prompt, reply=reply, voice=voice, kept=True)


async def answer(engine: Engine, row: SpokenRow) -> AsyncGenerator[TextPiece | CodePiece | WavePiece, None]:
    """Runs a row and yields text, codes and waves as they come; `row.reply.result` says how it ended."""
    pieces = TextPieces(engine.model.processor.tokenizer)
    async with engine.speech(row) as given:
        async for item in given:
            if isinstance(item, CodePiece | WavePiece):
                yield item
            elif text := pieces.push(item):
                yield TextPiece(text)


async def written(engine: Engine, row: Row) -> AsyncGenerator[TextPiece, None]:
    """Runs a row that is answered in text, and yields whole characters as they come."""
    pieces = TextPieces(engine.model.processor.tokenizer)
    async with engine.text(row) as ids:
        async for token in ids:
            if text := pieces.push(token):
                yield TextPiece(text)


async def read_out(engine: Engine, text: str) -> AsyncGenerator[WavePiece, None]:
    """Speaks a text of any length.

    Raises:
        UserError: the model has no voice, or the text has nothing that can be spoken.
    """
    model, generator = engine.model, torch.Generator().manual_seed(0)
    check_voice(model)
    sentences = speakable(text)
    voice = Voice(open_voice(model, generator))
    prompt = Prompt(model.processor.streams([], output="speech"))
    for number, sentence in enumerate(sentences, start=1):
        said = model.processor.tokenizer.encode(sentence)
        reply = Reply(model.config.vocab, model.config.audio_delay, within(SpeechSampling(), sentence), said, generator)
        row = SpokenRow(prompt, reply=reply, voice=voice, last=number == len(sentences))
        async with engine.speech(row) as given:
            async for item in given:
                if isinstance(item, WavePiece):
                    yield item
