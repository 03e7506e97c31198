"""The model as people use it: load by name, transcribe a recording of any length, ask about pictures and clips, talk.

recording ─► 16 kHz mono ─► pieces cut at silences ─► codes + features ─► prompts ─► text, piece by piece
pictures, clips ─► patches ─► rows ─► prompt with the question ─► text, word by word
turns, or text to be spoken ─► prompt ─► text and codes ─► text and 24 kHz speech, piece by piece (`kimi_mm.speech`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kimi_mm.audio.detokenizer import Detokenizer, SpeakerPrompt
from kimi_mm.audio.detokenizer_config import StreamingConfig
from kimi_mm.audio.detokenizer_stream import check_codes
from kimi_mm.audio.io import read_audio, to_mono_16k
from kimi_mm.audio.segment import split_at_silence
from kimi_mm.audio.tokenizer import AudioTokenizer
from kimi_mm.audio.tokens import AudioTokens
from kimi_mm.beam_search import BEAMS, beam_search
from kimi_mm.checkpoint import PRETRAINED, find_checkpoint, load_checkpoint
from kimi_mm.config import ModelConfig
from kimi_mm.errors import CheckpointError, UserError
from kimi_mm.generation import TextResult, TextSampling, generate_text, stream_text
from kimi_mm.generation_speech import SpeechSampling
from kimi_mm.model import Model
from kimi_mm.processing import AudioClip, ModelInputs, Streams
from kimi_mm.processing_published import processor_for
from kimi_mm.speech import Speaker
from kimi_mm.text.sentences import speakable
from kimi_mm.text.tokenizer import TextPieces, TextTokenizer
from kimi_mm.types import Event, Segment, Transcript, WavePiece
from kimi_mm.vision.processing import VisionItem

if TYPE_CHECKING:
    from kimi_mm.programs import Turn

SAMPLE_RATE = 16_000
QUESTION = "What is in the picture?"


def load(
    name_or_path: str | Path = "nano",
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype | str | None = None,
    weights: str | None = None,
    drop: Sequence[str] = (),
    audio_tokenizer: str | Path | None = None,
    offload: str | None = None,
) -> KimiMM:
    """Loads a model: the shipped "nano", a checkpoint folder, or a published model.

    A published model (Kimi-Audio, Kimi-Linear, K2.5, Kimi-VL) may be a folder as downloaded, one that `kimi-mm convert`
    wrote, or a repository of the Hugging Face hub; nothing of it is executed.

    Args:
        name_or_path: name, folder, or "owner/name".
        device: of the model.
        dtype: of the weights, "bfloat16" or a torch dtype; None: fp32 for ours, as stored for a published model.
        weights: "int8" or "int4" for the matrices of the backbone, None for none.
        drop: parts to leave out: "voice" (detokenizer), "audio_branch" (and voice: text answers only), "vision".
        audio_tokenizer: folder or repository of GLM-4-Voice's tokenizer, for Kimi-Audio as downloaded.
        offload: "cpu" or "disk" keeps the backbone's layers there and brings each to `device` when its turn comes
            (needs accelerate; "disk" needs a converted folder).

    Raises:
        CheckpointError: when there is no such model or its files are damaged.
    """
    from kimi_mm.conversion.hub import is_repository

    path = find_checkpoint(name_or_path)
    if not path.is_dir() and not is_repository(name_or_path):
        known = sorted(p.parent.name for p in PRETRAINED.glob("*/config.yaml"))
        raise CheckpointError(
            f"model '{name_or_path}' is neither a folder nor shipped nor a repository (owner/name); "
            f"shipped: {', '.join(known)}."
        )
    plain = dtype is None and weights is None and offload is None and not drop
    if plain and (path / "config.yaml").is_file() and not (path / "published.json").is_file():
        return KimiMM(*load_checkpoint(path, device))
    from kimi_mm.conversion.load import load_model

    source = path if path.is_dir() else str(name_or_path)
    model, tokenizer = load_model(source, device, dtype, weights, tuple(drop), audio_tokenizer, offload)
    return KimiMM(model, tokenizer)


class KimiMM:
    """A loaded model with its processor; methods take files or arrays and give plain results."""

    def __init__(self, model: Model, text_tokenizer: TextTokenizer) -> None:
        self.model = model.eval()
        self.processor = processor_for(model.config, text_tokenizer)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def tokenizer(self) -> AudioTokenizer:
        """The 12.5 Hz audio tokenizer. UserError when the model does not hear."""
        if not self.config.hears:
            raise UserError(f"model '{self.config.name}' does not hear; take one that does, such as 'nano'.")
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
        beams: int = BEAMS,
        progress: Callable[[float], None] | None = None,
    ) -> Transcript:
        """Writes down what is said in a recording.

        Args:
            audio: a file path, "-" for standard input, encoded bytes, or samples: float in [-1, 1] or int16, [S] or
                [channels, S].
            sample_rate: of samples given as an array, Hz.
            batch_size: pieces decoded together.
            beams: readings of each piece that are followed side by side; 1 is greedy decoding, the fastest.
            progress: called with the share done, from 0 to 1.

        Returns:
            The text, with start and end of every piece in seconds. A silent recording has no segments.

        Raises:
            AudioError: when the recording cannot be read or used.
            ValueError: for fewer than one beam.
        """
        if beams < 1:
            raise ValueError(f"beams={beams}: at least one reading has to go on.")
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
            for i, text in zip(chosen, self._recognise([wave[slice(*pieces[i])] for i in chosen], beams), strict=True):
                texts[i] = text
            if progress:
                progress(min(1.0, (at + len(chosen)) / len(order)))
        segments = [
            Segment(start / SAMPLE_RATE, end / SAMPLE_RATE, text)
            for (start, end), text in zip(pieces, texts, strict=True)
            if text
        ]
        return Transcript(" ".join(segment.text for segment in segments), seconds, segments)

    def _recognise(self, waves: list[np.ndarray], beams: int, retry: bool = True) -> list[str]:
        """Transcribes pieces of at most 30 s; a piece whose text ran away is cut in two and heard again."""
        results = self._decode(waves, beams)
        texts = []
        for wave, result in zip(waves, results, strict=True):
            text = self.processor.tokenizer.decode(result.ids)
            if retry and (halves := second_hearing(wave, result.stop_reason)) is not None:
                text = " ".join(filter(None, self._recognise(halves, beams, retry=False)))
            texts.append(text)
        return texts

    @torch.inference_mode()
    def _decode(self, waves: list[np.ndarray], beams: int) -> list[TextResult]:
        if not waves:
            return []
        clips = [AudioClip(t.codes, t.features) for t in self.tokenizer.encode_batch(waves)]
        rows = [self.processor.transcription(len(clip.codes)) for clip in clips]
        inputs = self.processor.collate(rows, [[clip] for clip in clips]).to(self.device)
        budgets = [transcription_budget(wave) for wave in waves]
        if beams == 1:
            return generate_text(self.model, inputs, budgets=budgets)
        return beam_search(self.model, inputs, beams=beams, budgets=budgets)

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

    def describe_by_programs(self, image: Any, question: str, **options: Any) -> Iterator[Turn]:
        """Answers a question about one picture by programs that the model writes, turn by turn.

        Arguments, turns and errors as for `kimi_mm.programs.answer_by_programs`.
        """
        from kimi_mm.programs import answer_by_programs

        return answer_by_programs(self, image, question, **options)

    def reply(
        self, messages: Sequence[dict[str, Any]], *, max_tokens: int = 256, temperature: float = 0.0
    ) -> Iterator[str]:
        """Continues a conversation with pictures, clips and recordings in any of its turns, word by word.

        Args:
            messages: as for `stream`; the last one is the user's.
            max_tokens, temperature: as for `describe_stream`.
        """
        streams, clips, items = self.read(messages)
        inputs = self.processor.collate([streams], [clips], [items]).to(self.device)
        return self._answer(inputs, TextSampling(temperature=temperature, max_tokens=max_tokens), None)

    def stream(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        sampling: SpeechSampling | None = None,
        generator: torch.Generator | None = None,
        voice: SpeakerPrompt | None = None,
        streaming: StreamingConfig | None = None,
    ) -> Iterator[Event]:
        """Answers a conversation with text and speech, both as they come.

        Args:
            messages: as for `Processor.see`; recordings are {"type": "audio", "audio": source}, with a "sample_rate"
                where the source is an array, and speech said before is {"type": "audio", "codes": [...]}.
            sampling: of both streams, and their budgets.
            generator: source of all randomness, on any device; None starts one at seed 0.
            voice: of `detokenizer.prompt`, to speak like; None is the model's own.
            streaming: chunk sizes and solver of the speech; None takes the config's.

        Returns:
            `TextPiece`, `CodePiece`, `WavePiece` in any order, and one `Stopped` at the end.

        Raises:
            UserError: the model has no voice, or a message cannot be used.
        """
        speaker = Speaker(self, sampling, generator, voice, streaming)
        streams, clips, items = self.read(messages, output="speech")
        return speaker.reply(self.processor.collate([streams], [clips], [items]).to(self.device))

    def speak(self, text: str, **options: Any) -> np.ndarray:
        """Speaks a text of any length: samples [S] fp32 in [-1, 1] at `detokenizer.sample_rate`; see `speak_stream`."""
        pieces = [event.wave for event in self.speak_stream(text, **options) if isinstance(event, WavePiece)]
        return np.concatenate(pieces)

    def speak_stream(
        self,
        text: str,
        *,
        sampling: SpeechSampling | None = None,
        generator: torch.Generator | None = None,
        voice: SpeakerPrompt | None = None,
        streaming: StreamingConfig | None = None,
    ) -> Iterator[Event]:
        """Speaks a text sentence by sentence; arguments, events and errors as for `stream`.

        Raises:
            UserError: the model has no voice, or the text has nothing that can be spoken.
        """
        return Speaker(self, sampling, generator, voice, streaming).speak(speakable(text))

    def voice(
        self, audio: str | Path | bytes | np.ndarray | torch.Tensor, *, sample_rate: int = SAMPLE_RATE
    ) -> SpeakerPrompt:
        """Returns the `SpeakerPrompt` of a recording (arguments as for `transcribe`), which `stream` then speaks like.

        Raises:
            AudioError: the recording is too short or cannot be used.
        """
        rate = self.detokenizer.sample_rate
        if isinstance(audio, (str, Path, bytes)):
            audio, sample_rate = read_audio(audio, rate)[0], rate
        return self.detokenizer.prompt(audio, sample_rate, self.tokenizer.encode(audio, sample_rate).codes)

    def listen(
        self, audio: str | Path | bytes | np.ndarray | torch.Tensor | AudioTokens, sample_rate: int = SAMPLE_RATE
    ) -> AudioTokens:
        """Returns the codes and features of a recording; arguments and errors as for `transcribe`."""
        if isinstance(audio, AudioTokens):
            return audio
        if isinstance(audio, (str, Path, bytes)):
            return self.tokenizer.encode(read_audio(audio)[0])
        return self.tokenizer.encode(audio, sample_rate)

    @torch.inference_mode()
    def read(
        self, messages: Sequence[dict[str, Any]], output: str = "text"
    ) -> tuple[Streams, list[AudioClip], list[VisionItem]]:
        """Reads the pictures and recordings of a conversation and lays out its prompt.

        Args:
            messages: as for `stream`.
            output: "text", or "speech" for text and audio.

        Returns:
            The streams, up to the place where the model answers; the recordings, and the pictures and chunks, in order.

        Raises:
            UserError: a message cannot be used.
        """
        seen, items = self.processor.see(messages)
        clips: list[AudioClip] = []
        for message in seen:
            parts = message.get("content")
            if not isinstance(parts, list):
                continue
            for at, part in enumerate(parts):
                if part.get("type") == "audio" and "audio" in part:
                    tokens = self.listen(part["audio"], part.get("sample_rate", SAMPLE_RATE))
                    clips.append(AudioClip(tokens.codes, tokens.features))
                    parts[at] = {"type": "audio", "num_codes": len(tokens)}
                elif part.get("type") == "audio" and "codes" in part:
                    check_codes(part["codes"], self.config.vocab.num_audio_codes)
        return self.processor.streams(seen, output=output), clips, items

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
        pieces = TextPieces(self.processor.tokenizer)
        for token in stream_text(self.model, inputs, sampling=sampling, generator=generator):
            if piece := pieces.push(token):
                yield piece

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def transcription_budget(wave: np.ndarray) -> int:
    """Most text ids a piece of speech may get: fast speech stays below eight a second; the rest is for short clips."""
    return 12 + 8 * len(wave) // SAMPLE_RATE


def second_hearing(wave: np.ndarray, stop_reason: str) -> list[np.ndarray] | None:
    """Returns the halves in which a piece is heard again when its text ran away, or None when it ended well."""
    if stop_reason == "eos" or len(wave) < 4 * SAMPLE_RATE:
        return None
    return [wave[slice(*half)] for half in split_at_silence(wave, max_seconds=0.6 * len(wave) / SAMPLE_RATE)]
