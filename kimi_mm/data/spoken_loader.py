"""Batches of spoken answers: sentences to be read out, and dialogs whose questions are heard.

    dialogs, or single sentences ─► rows of like turns and length ─► Processor.streams ─► ids, places of codes, labels

Recordings travel as samples; their codes are made on the device, where the frozen tokenizer is, and put into the places
that `question_at` and `answer_at` tell. As with the other loaders the order depends on (seed, epoch) alone.

Shapes: B rows, K turns of a row, T positions, S samples at 16 kHz of the bucket, N = S / 1280 codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kimi_mm.data.dialog_sets import read_dialogs
from kimi_mm.data.loader import NOT_MINE, SAMPLE_RATE, SAMPLES_PER_CODE, SpeechShards, _Place
from kimi_mm.data.target_loader import TargetShards
from kimi_mm.data.targets import CANONICAL, TARGET_RATE
from kimi_mm.errors import CheckpointError
from kimi_mm.processing import IGNORE, Processor, Streams
from kimi_mm.training.speech_out_config import SpokenDataConfig

AROUND_QUESTION, AROUND_ANSWER = 6, 2  # markers of a turn: user_start ... assistant_start, and msg_end with room
END = -1  # audio label: the answer ends


@dataclass
class SpokenBatch:
    """Rows of K turns; recording k of row b is number b * K + k.

    questions [B * K, S] int16 at 16 kHz with `question_lengths` [B * K], None where nothing is asked; answers
    [B * K, 1.5 S] int16 at 24 kHz with `answer_lengths` [B * K] in samples at 16 kHz. ids [B, T]; `question_at` and
    `answer_at` [B, T] are the code that a position shows, counted over all recordings of the kind, -1 elsewhere.
    Labels are sparse: `text_labels` [P] at the flat positions `text_positions` [P]; `audio_labels` [Q], codes counted
    as in `answer_at` or END, at `audio_positions` [Q].
    """

    questions: torch.Tensor | None
    question_lengths: torch.Tensor | None
    answers: torch.Tensor
    answer_lengths: torch.Tensor
    text_ids: torch.Tensor
    audio_ids: torch.Tensor
    question_at: torch.Tensor
    answer_at: torch.Tensor
    text_positions: torch.Tensor
    text_labels: torch.Tensor
    audio_positions: torch.Tensor
    audio_labels: torch.Tensor


@dataclass(frozen=True)
class _Exchange:
    """One turn: the number of the question's recording (None: nothing is asked, or it is written) and the answer's."""

    question: int | None
    written: str
    answer: int


Row = tuple[_Exchange, ...]


class SpokenLoader(_Place):
    """Endless iterator of `SpokenBatch`; `state_dict` and `load_state_dict` restore its place.

    Args:
        config: folders and sizes.
        processor: lays out the streams.
        seed: of order and choice.
        dialogs: questions and answers of `config.dialogs` instead of sentences of `config.targets`.

    Raises:
        CheckpointError: a folder is missing, or holds nothing that fits.
    """

    def __init__(self, config: SpokenDataConfig, processor: Processor, seed: int, *, dialogs: bool) -> None:
        self.config, self.processor, self.seed, self.dialogs = config, processor, seed, dialogs
        folders = config.dialogs if dialogs else config.targets
        if not folders:
            raise CheckpointError(f"spoken.{'dialogs' if dialogs else 'targets'}: no folder is given.")
        self.targets = TargetShards(tuple(f"{folder}/answers" for folder in folders) if dialogs else folders)
        self.answers: dict[str, list[int]] = {}
        for number, item in enumerate(self.targets.utterances):
            if item.speaker == CANONICAL and self._fits(item.text, item.samples):
                self.answers.setdefault(item.text, []).append(number)
        self.heard = SpeechShards(tuple(f"{folder}/questions" for folder in folders)) if dialogs else None
        self.questions: dict[str, list[int]] = {}
        for number, item in enumerate(self.heard.utterances if self.heard else []):
            self.questions.setdefault(item.text, []).append(number)
        # Turns that could not be spoken leave a dialog without them, and so without sense: it is dropped.
        self.rows = [
            [(turn.question, turn.answer) for turn in dialog.turns]
            for folder in (folders if dialogs else ())
            for dialog in read_dialogs(folder)
            if all(turn.question in self.questions and turn.answer in self.answers for turn in dialog.turns)
        ]
        if not (self.rows if dialogs else self.answers):
            raise CheckpointError(f"{', '.join(folders)}: holds nothing in the voice '{CANONICAL}' that could be said.")

    def __iter__(self) -> Iterator[SpokenBatch]:
        mine = self._mine()
        while True:
            plan = self._plan(self.epoch)
            if not plan:
                raise CheckpointError("spoken: too few recordings for a single batch; make batch_seconds smaller.")
            while self.cursor < len(plan):
                seconds, rows = plan[self.cursor]
                self.cursor += 1
                yield self._batch(seconds, rows) if next(mine) else NOT_MINE
            self.epoch, self.cursor = self.epoch + 1, 0

    def _fits(self, text: str, samples: int) -> bool:
        """Whether the text ends before its speech, so that the end of the speech can be learnt."""
        codes = -(-samples * SAMPLE_RATE // (TARGET_RATE * SAMPLES_PER_CODE))
        return len(self.processor.tokenizer.encode(text)) < self.processor.audio_delay + codes

    def _plan(self, epoch: int) -> list[tuple[float, list[Row]]]:
        """Returns the epoch's batches: (bucket seconds, rows of equally many turns)."""
        rng = np.random.default_rng((self.seed, epoch, 3 + self.dialogs))
        waiting: dict[tuple[int, float], list[Row]] = {}
        plan = []
        for row in self._drawn(rng):
            seconds = max(self._seconds(exchange) for exchange in row)
            bucket = next((b for b in self.config.buckets if seconds <= b), None)
            if bucket is None:
                continue
            rows = waiting.setdefault((len(row), bucket), [])
            rows.append(row)
            if len(rows) == max(1, int(self.config.batch_seconds / (bucket * len(row)))):
                plan.append((bucket, waiting.pop((len(row), bucket))))
        return [plan[i] for i in rng.permutation(len(plan))]

    def _drawn(self, rng: np.random.Generator) -> Iterator[Row]:
        """Yields the rows of an epoch in random order, with a recording chosen for each text."""

        def one(numbers: list[int]) -> int:
            return numbers[rng.integers(len(numbers))]

        if not self.dialogs:
            numbers = [number for found in self.answers.values() for number in found]
            yield from ((_Exchange(None, "", int(number)),) for number in rng.permutation(numbers))
            return
        for i in rng.permutation(len(self.rows)):
            row = []
            for question, answer in self.rows[i]:
                spoken = rng.random() >= self.config.written_share
                heard = one(self.questions[question]) if spoken else None
                row.append(_Exchange(heard, "" if spoken else question, one(self.answers[answer])))
            yield tuple(row)

    def _seconds(self, exchange: _Exchange) -> float:
        """Returns the length of the longer recording; a written question counts a code for each token."""
        longest = self.targets.utterances[exchange.answer].samples / TARGET_RATE
        if exchange.question is not None and self.heard is not None:
            longest = max(longest, self.heard.utterances[exchange.question].samples / SAMPLE_RATE)
        tokens = len(self.processor.tokenizer.encode(exchange.written)) if exchange.written else 0
        return max(longest, tokens * SAMPLES_PER_CODE / SAMPLE_RATE)

    def _batch(self, seconds: float, rows: list[Row]) -> SpokenBatch:
        samples, turns = round(seconds * SAMPLE_RATE), len(rows[0])
        codes, delay, ids = samples // SAMPLES_PER_CODE, self.processor.audio_delay, self.processor.ids
        length = turns * (codes + delay + AROUND_ANSWER + (codes + AROUND_QUESTION if self.dialogs else 0))
        questions = np.zeros((len(rows) * turns, samples), np.int16)
        # Recordings that are not there have full length: attention over nothing would give no number.
        question_lengths = np.full(len(questions), samples)
        answers = np.zeros((len(questions), samples * 3 // 2), np.int16)
        answer_lengths = np.zeros(len(questions), np.int64)
        text, audio = (np.full((len(rows), length), ids["pad"], np.int64) for _ in range(2))
        shown = np.full((2, len(rows), length), -1, np.int64)  # questions, answers
        places: list[list[np.ndarray]] = [[], [], [], []]
        for b, row in enumerate(rows):
            slots = []  # of the recordings in the order of the prompt: 0 question or 1 answer, and its number
            for k, exchange in enumerate(row):
                number = b * turns + k
                if exchange.question is not None and self.heard is not None:
                    wave = self.heard.wave(self.heard.utterances[exchange.question])
                    questions[number, : len(wave)], question_lengths[number] = wave, len(wave)
                    slots.append((0, number))
                wave = self.targets.wave(self.targets.utterances[exchange.answer])
                answers[number, : len(wave)] = wave
                answer_lengths[number] = -(-len(wave) * 2 // 3)
                slots.append((1, number))
            streams = self._streams(row, question_lengths, answer_lengths, b * turns)
            size = len(streams)
            text[b, :size], audio[b, :size] = streams.text, streams.audio
            clip, place = np.asarray(streams.clip_index), np.asarray(streams.clip_row)
            for index, (kind, number) in enumerate(slots):
                at = np.flatnonzero(clip == index)
                shown[kind, b, at] = number * codes + place[at]
            spoken = shown[1, b, 1:size]
            ends = np.asarray(streams.audio_labels) == ids["msg_end"]
            at = np.flatnonzero((spoken >= 0) | ends[: size - 1])
            labels = np.asarray(streams.text_labels)
            known = np.flatnonzero(labels != IGNORE)
            new = (b * length + known, labels[known], b * length + at, np.where(ends[at], END, spoken[at]))
            for parts, part in zip(places, new, strict=True):
                parts.append(part)
        asked = (torch.from_numpy(questions), torch.from_numpy(question_lengths)) if self.dialogs else (None, None)
        rest = (answers, answer_lengths, text, audio, shown[0], shown[1], *map(np.concatenate, places))
        return SpokenBatch(*asked, *(torch.from_numpy(array) for array in rest))

    def _spelled(self, text: str, number: int, codes: int) -> list[int]:
        """Returns the ids of a sentence, some words by letter, unless that would take longer than to say it."""
        rng = np.random.default_rng((self.seed, self.epoch, number))
        one, several = self.config.spelled
        ids = self.processor.tokenizer.encode_words(text, lambda ids: rng.random() < (several if ids > 1 else one))
        return ids if len(ids) < self.processor.audio_delay + codes else self.processor.tokenizer.encode(text)

    def _streams(self, row: Row, question_lengths: np.ndarray, answer_lengths: np.ndarray, first: int) -> Streams:
        messages = []
        for k, exchange in enumerate(row):
            asked, said = (
                -(-int(lengths[first + k]) // SAMPLES_PER_CODE) for lengths in (question_lengths, answer_lengths)
            )
            if exchange.question is not None:
                messages.append({"role": "user", "content": [{"type": "audio", "num_codes": asked}]})
            elif exchange.written:
                messages.append({"role": "user", "content": exchange.written})
            words: dict[str, Any] = {"type": "text", "text": self.targets.utterances[exchange.answer].text}
            if not self.dialogs and any(self.config.spelled):
                ids = self._spelled(words["text"], exchange.answer, said)
                words |= {"ids": ids} if ids != self.processor.tokenizer.encode(words["text"]) else {}
            messages.append({"role": "assistant", "content": [words, {"type": "audio", "num_codes": said}]})
        return self.processor.streams(messages, output="speech", add_assistant_start=False)
