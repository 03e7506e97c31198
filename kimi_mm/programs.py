"""Answers about a picture by programs: the model writes one, it is run, what it gives comes back, until it answers.

    user       [picture] The picture image has 168 x 112 pixels. How often is there a ball in the left half?
    assistant  a = crop(image, 0, 0, 84, 112)          program ─► interpreter (bounded) over the pixels
               answer(count(a, "ball"))
    system     2                                       its result, or the sentence that refuses it
    assistant  Two.                                    no program: the answer

The layout is that of zero-vision fine-tuning (`kimi_mm.data.programs.samples`; K2.5 report, section 4.2). Models with
eyes are shown the picture too, and lend their eyes to operations that colours alone cannot do (`EyesSeer`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kimi_mm.data.programs.eyes import EyesSeer
from kimi_mm.data.programs.interpreter import run
from kimi_mm.data.programs.language import ProgramError
from kimi_mm.data.programs.seers import PixelSeer
from kimi_mm.errors import UserError
from kimi_mm.vision.image import read_image

if TYPE_CHECKING:
    from kimi_mm.pipeline import KimiMM

MAX_PROGRAMS = 4  # in one answer
MAX_SECONDS = 20.0  # of one program
_LIKE_A_PROGRAM = re.compile(r"\s*[A-Za-z_]\w*\s*[=(]")


@dataclass(frozen=True)
class Turn:
    """One turn of an answer: `kind` is "program", "result", "refusal" (of a program) or "answer", the last one."""

    kind: str
    text: str


def answer_by_programs(
    engine: KimiMM,
    image: Any,
    question: str,
    *,
    show: bool = True,
    max_programs: int = MAX_PROGRAMS,
    max_seconds: float = MAX_SECONDS,
    max_tokens: int = 256,
) -> Iterator[Turn]:
    """Answers a question about one picture.

    Args:
        engine: a model that was taught to write programs (stage sft, recipe sft/nano-zero-vision).
        image: as for `KimiMM.describe`; a picture, not a clip.
        question: about it.
        show: put the picture into the prompt, where the model has eyes; otherwise programs are all that sees it.
        max_programs: that may be run.
        max_seconds: of each of them.
        max_tokens: of each turn of the model.

    Returns:
        Turns as they come; the last one is the answer.

    Raises:
        ImageError: the picture cannot be used.
        UserError: there is no question, or the model goes on writing programs.
    """
    if not question.strip():
        raise UserError("the question is empty.")
    eyes = engine.processor.vision
    rules = {} if eyes is None else {"alpha": eyes.config.input.alpha, "max_pixels": eyes.config.input.max_pixels}
    picture = read_image(image, **rules)
    pixels = np.asarray(picture.image)
    seer = PixelSeer(pixels) if eyes is None else EyesSeer(pixels, lambda part, asked: engine.describe(part, asked))
    text = f"The picture image has {pixels.shape[1]} x {pixels.shape[0]} pixels. {question.strip()}"
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if show and eyes is not None:
        parts.insert(0, {"type": "image", "image": picture})
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    back = ""
    for number in range(max_programs + 1):
        said = "".join(engine.reply(messages, max_tokens=max_tokens))
        if not _LIKE_A_PROGRAM.match(said):
            yield Turn("answer", said)
            return
        if number == max_programs:
            break
        yield Turn("program", said)
        turn = _run(said, seer, max_seconds)
        yield turn
        back = turn.text
        messages += [{"role": "assistant", "content": said}, {"role": "system", "content": back}]
    raise UserError(f"no answer after {max_programs} programs; the last one gave: {back}")


def _run(program: str, seer: PixelSeer, seconds: float) -> Turn:
    try:
        result = run(program, seer, seconds)
    except ProgramError as error:
        return Turn("refusal", str(error))
    return Turn(
        "result", result.answer or "\n".join(result.output) or "the program gives nothing; end it with answer(...)."
    )
