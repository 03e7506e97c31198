"""The model as people use it: load by name, transcribe a recording of any length, ask about pictures and clips.

recording ─► 16 kHz mono ─► pieces cut at silences ─► codes + features ─► prompts ─► text, piece by piece
pictures, clips ─► patches ─► rows ─► prompt with the question ─► text, word by word
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kimi_mm.audio.detokenizer import Detokenizer
from kimi_mm.audio.io import read_audio, to_mono_16k
from kimi_mm.audio.segment import split_at_silence
from kimi_mm.audio.tokenizer import AudioTokenizer
from kimi_mm.checkpoint import load_checkpoint
from kimi_mm.config import ModelConfig
from kimi_mm.errors import CheckpointError, UserError
from kimi_mm.generation import TextResult, TextSampling, generate_text, stream_text
from kimi_mm.model import Model
from kimi_mm.processing import AudioClip, ModelInputs, Processor
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.types import Segment, Transcript
from kimi_mm.vision.processing import VisionItem, VisionProcessor

SAMPLE_RATE = 16_000
QUESTION = "What is in the picture?"
PRETRAINED = Path(__file__).parent / "pretrained"


def load(name_or_path: str | Path = "nano", device: str | torch.device = "cpu") -> KimiMM:
    """Loads a model: the shipped "nano", or a checkpoint folder.

    Raises:
        CheckpointError: when there is no such model or its files are damaged.
    """
    path = Path(name_or_path)
    shipped = PRETRAINED / path
    if not path.is_dir() and (shipped / "config.yaml").is_file():
        path = shipped
    if not path.is_dir():
        known = sorted(p.parent.name for p in PRETRAINED.glob("*/config.yaml"))
        raise CheckpointError(f"model '{name_or_path}' is neither a folder nor shipped; shipped: {', '.join(known)}.")
    return KimiMM(*load_checkpoint(path, device))


class KimiMM:
    """A loaded model with its processor; methods take files or arrays and give plain results."""

    def __init__(self, model: Model, text_tokenizer: TextTokenizer) -> None:
        self.model = model.eval()
        vision = None if model.config.vision is None else VisionProcessor(model.config.vision)
        self.processor = Processor(model.config.vocab, text_tokenizer, vision, model.config.audio_delay)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def tokenizer(self) -> AudioTokenizer:
        """The 12.5 Hz audio tokenizer."""
        return self.model.audio

    @property
    def detokenizer(self) -> Detokenizer:
        """Codes to 24 kHz speech. UserError when the model has no voice."""
        if self.model.detokenizer is None:
            raise UserError(
                f"model '{self.config.name}' has no voice; take a checkpoint whose config has 'detokenizer'."
            )
        return self.model.detokenizer

    def transcribe(
        self,
        audio: str | Path | bytes | np.ndarray | torch.Tensor,
        *,
        sample_rate: int = SAMPLE_RATE,
        batch_size: int = 8,
        progress: Callable[[float], None] | None = None,
    ) -> Transcript:
        """Writes down what is said in a recording.

        Args:
            audio: a file path, "-" for standard input, encoded bytes, or samples: float in [-1, 1] or int16, [S] or
                [channels, S].
            sample_rate: of samples given as an array, Hz.
            batch_size: pieces decoded together.
            progress: called with the share done, from 0 to 1.

        Returns:
            The text, with start and end of every piece in seconds. A silent recording has no segments.

        Raises:
            AudioError: when the recording cannot be read or used.
        """
        if isinstance(audio, (str, Path, bytes)):
            wave, seconds = read_audio(audio)
        else:
            wave = to_mono_16k(audio, sample_rate)
            seconds = len(wave) / SAMPLE_RATE
        pieces = split_at_silence(wave)
        # Pieces of like length share a batch; results go back to their places.
        order = sorted(range(len(pieces)), key=lambda i: pieces[i][1] - pieces[i][0], reverse=True)
        texts = [""] * len(pieces)
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            for i, text in zip(chosen, self._recognise([wave[slice(*pieces[i])] for i in chosen]), strict=True):
                texts[i] = text
            if progress:
                progress(min(1.0, (at + len(chosen)) / len(order)))
        segments = [
            Segment(start / SAMPLE_RATE, end / SAMPLE_RATE, text)
            for (start, end), text in zip(pieces, texts, strict=True)
            if text
        ]
        return Transcript(" ".join(segment.text for segment in segments), seconds, segments)

    def _recognise(self, waves: list[np.ndarray], retry: bool = True) -> list[str]:
        """Transcribes pieces of at most 30 s; a piece whose text ran away is cut in two and heard again."""
        results = self._decode(waves)
        texts = []
        for wave, result in zip(waves, results, strict=True):
            text = self.processor.tokenizer.decode(result.ids)
            if retry and result.stop_reason != "eos" and len(wave) >= 4 * SAMPLE_RATE:
                halves = split_at_silence(wave, max_seconds=0.6 * len(wave) / SAMPLE_RATE)
                text = " ".join(filter(None, self._recognise([wave[slice(*half)] for half in halves], retry=False)))
            texts.append(text)
        return texts

    @torch.inference_mode()
    def _decode(self, waves: list[np.ndarray]) -> list[TextResult]:
        if not waves:
            return []
        clips = [AudioClip(t.codes, t.features) for t in self.tokenizer.encode_batch(waves)]
        rows = [self.processor.transcription(len(clip.codes)) for clip in clips]
        inputs = self.processor.collate(rows, [[clip] for clip in clips]).to(self.device)
        # Fast speech stays below eight tokens a second; the rest is room for short clips.
        budgets = [12 + 8 * len(wave) // SAMPLE_RATE for wave in waves]
        return generate_text(self.model, inputs, budgets=budgets)

    def describe(self, images: Any, question: str = QUESTION, **options: Any) -> str:
        """Answers a question about pictures and clips; arguments as for `describe_stream`, which gives it in pieces."""
        return "".join(self.describe_stream(images, question, **options))

    def describe_stream(
        self,
        images: Any,
        question: str = QUESTION,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Iterator[str]:
        """Answers a question about pictures and clips, word by word.

        Args:
            images: one or a list, shown in this order: paths, "-", data: URLs, bytes, PIL images, arrays, video files,
                or items that `look` returned.
            question: asked after them.
            max_tokens: longest answer.
            temperature: 0 is greedy; above it, ids are drawn from `generator`.

        Returns:
            Pieces of the answer, whole characters each.

        Raises:
            ImageError: a picture cannot be used.
            UserError: the model has no eyes, or there is no picture or no question.
        """
        sampling = TextSampling(temperature=temperature, max_tokens=max_tokens)
        return self._answer(self.question_inputs(self.look(images), question), sampling, generator)

    def reply(
        self, messages: Sequence[dict[str, Any]], *, max_tokens: int = 256, temperature: float = 0.0
    ) -> Iterator[str]:
        """Continues a conversation with pictures and clips in any of its turns, word by word.

        Args:
            messages: as for `Processor.see`; the last one is the user's.
            max_tokens, temperature: as for `describe_stream`.
        """
        seen, items = self.processor.see(messages)
        inputs = self.processor.collate([self.processor.streams(seen)], [[]], [items]).to(self.device)
        return self._answer(inputs, TextSampling(temperature=temperature, max_tokens=max_tokens), None)

    def look(self, images: Any) -> list[VisionItem]:
        """Reads one or a list of pictures and clips into patches; what was left out stands in the items' `notes`.

        Items that were read before pass through.
        """
        vision = self.processor.vision
        if vision is None:
            raise UserError(f"model '{self.config.name}' has no eyes; take a checkpoint whose config has 'vision'.")
        items: list[VisionItem] = []
        for source in images if isinstance(images, (list, tuple)) else [images]:
            items.extend([source] if isinstance(source, VisionItem) else vision.load(source))
        return items

    def question_inputs(self, items: Sequence[VisionItem], question: str, answer: str | None = None) -> ModelInputs:
        """Returns the prompt of a question about items, and behind it an answer when there is one."""
        if not items:
            raise UserError("there is no picture to look at.")
        if not question.strip():
            raise UserError("the question is empty.")
        streams = self.processor.question(items, question, answer)
        return self.processor.collate([streams], [[]], [items]).to(self.device)

    def _answer(self, inputs: ModelInputs, sampling: TextSampling, generator: torch.Generator | None) -> Iterator[str]:
        ids: list[int] = []
        given = ""
        for token in stream_text(self.model, inputs, sampling=sampling, generator=generator):
            ids.append(token)
            text = self.processor.tokenizer.decode(ids)
            # A character of several bytes is whole only when its last id has come.
            if len(text) > len(given) and not text.endswith("\ufffd"):
                yield text[len(given) :]
                given = text

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device
