"""The model as people use it: load by name, transcribe a recording of any length.

recording ─► 16 kHz mono ─► pieces cut at silences ─► codes + features ─► prompts ─► text, piece by piece
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from kimi_mm.audio.io import read_audio, to_mono_16k
from kimi_mm.audio.segment import split_at_silence
from kimi_mm.audio.tokenizer import AudioTokenizer
from kimi_mm.checkpoint import load_checkpoint
from kimi_mm.config import ModelConfig
from kimi_mm.errors import CheckpointError
from kimi_mm.generation import TextResult, generate_text
from kimi_mm.model import Model
from kimi_mm.processing import AudioClip, Processor
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.types import Segment, Transcript

SAMPLE_RATE = 16_000
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
        self.processor = Processor(model.config.vocab, text_tokenizer)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def tokenizer(self) -> AudioTokenizer:
        """The 12.5 Hz audio tokenizer."""
        return self.model.audio

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

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device
