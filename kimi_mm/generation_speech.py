"""Two streams at once: text, and the speech that says it a few steps later.

    step     0    1    2        ...  d       d + 1  ...                       d = delay
    text     t0   t1   text_eos ...  _       _      ...  forced to blank once it has ended
    audio    _    _    _        ...  c0      c1     ...  msg_end ends the reply

The loop is Kimi-Audio's (released code, generation): text is drawn before audio; the audio stream is blank for `delay`
steps; the end of the text stops nothing, the end of the audio (msg_end or media_end) stops all. Beyond it: ids that
make no sense in a stream cannot be drawn, each stream has a budget of its own, and text whose audio budget is spent
goes on to its own end.

Shapes: B rows, V ids that a stream may choose from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from kimi_mm.config import VocabConfig
from kimi_mm.errors import UserError
from kimi_mm.generation import loop_period
from kimi_mm.generation_graphs import Steps
from kimi_mm.model import Model
from kimi_mm.processing import ModelInputs


@dataclass(frozen=True)
class TokenSampling:
    """How ids of one stream are chosen.

    Args:
        temperature: 0 is greedy.
        top_k: draw among the k likeliest ids; 0: among all.
        top_p: draw among the likeliest ids that together have this probability.
        repetition_penalty: above 1 makes ids of the last `penalty_window` steps less likely, as soon as there are more
            steps than that: logits below 0 are multiplied by it, others divided.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    penalty_window: int = 64

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError("temperature and top_k must not be negative, top_p must lie above 0 and not above 1.")
        if self.repetition_penalty < 1 or self.penalty_window < 1:
            raise UserError("repetition_penalty and penalty_window must be at least 1.")


@dataclass(frozen=True)
class SpeechSampling:
    """Sampling of both streams (defaults as published), their budgets, and the fewest codes before speech may end."""

    text: TokenSampling = field(default_factory=lambda: TokenSampling(top_k=5, penalty_window=16))
    audio: TokenSampling = field(default_factory=lambda: TokenSampling(temperature=0.8, top_k=10, penalty_window=64))
    max_text_tokens: int = 512
    max_audio_codes: int = 1500
    min_audio_codes: int = 0

    def __post_init__(self) -> None:
        if min(self.max_text_tokens, self.max_audio_codes, self.min_audio_codes) < 0:
            raise UserError("budgets must not be negative.")


@dataclass(frozen=True)
class Step:
    """What one step gave to one row: a text id (neither end nor blank) and a code without offset, None where none."""

    row: int
    text: int | None
    code: int | None


@dataclass
class SpeechResult:
    """A reply: text ids and codes, and why each stream stopped; None while it goes on.

    `text_stop`: "eos", "budget", "loop" (the tail repeats itself), or "audio" (the speech ended first).
    `audio_stop`: "eos", or "budget".
    """

    text_ids: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    text_stop: str | None = None
    audio_stop: str | None = None

    @property
    def done(self) -> bool:
        return self.audio_stop == "eos" or (self.audio_stop is not None and self.text_stop is not None)


class Reply:
    """One reply on its way: its result, what it was fed so far, and what it may still choose.

    Args:
        vocab: ids of both streams.
        delay: steps by which audio trails text.
        sampling: of both streams, and their budgets.
        forced: the text ids that it has to say; None where it chooses them.
        generator: source of randomness; None starts one at seed 0.
        row: its number, for `Step`.
    """

    def __init__(
        self,
        vocab: VocabConfig,
        delay: int,
        sampling: SpeechSampling | None = None,
        forced: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        row: int = 0,
    ) -> None:
        self.vocab, self.delay, self.row = vocab, delay, row
        self.sampling = sampling or SpeechSampling()
        self.forced = None if forced is None else list(forced)
        self.generator = generator or torch.Generator().manual_seed(0)
        self.result = SpeechResult()
        self.text_history: list[int] = []
        self.audio_history: list[int] = []
        self._eos, self._blank = vocab.special("text_eos"), vocab.special("text_blank")
        self._ends = (vocab.special("msg_end"), vocab.special("media_end"))
        if not self.sampling.max_audio_codes:
            self.result.audio_stop = "budget"
        if forced is None and not self.sampling.max_text_tokens:
            self.result.text_stop = "budget"

    @property
    def longest(self) -> int:
        """Most steps that it can take."""
        said = self.sampling.max_text_tokens if self.forced is None else len(self.forced) + 1
        return max(said, self.delay + self.sampling.max_audio_codes + 1)

    @property
    def chooses_text(self) -> bool:
        return self.forced is None and self.result.text_stop is None

    @property
    def chooses_audio(self) -> bool:
        return len(self.audio_history) >= self.delay and self.result.audio_stop is None

    def text(self, logits: torch.Tensor | None) -> int:
        """Returns the next text id, chosen from logits [V] where it `chooses_text`."""
        if self.result.text_stop is not None:
            return self._blank
        if self.forced is not None:
            said = len(self.result.text_ids)
            return self.forced[said] if said < len(self.forced) else self._eos
        assert logits is not None
        allowed = _only(logits[None].float(), range(self.vocab.num_text_tokens), (self._eos,))
        return choose(allowed, self.sampling.text, [self.text_history], self.generator)[0]

    def audio(self, logits: torch.Tensor | None) -> int:
        """Returns the next audio id, chosen from logits [V] where it `chooses_audio`."""
        if not self.chooses_audio:
            return self._blank
        assert logits is not None
        first, offset = self.vocab.num_text_tokens, self.vocab.audio_offset
        early = len(self.audio_history) - self.delay < self.sampling.min_audio_codes
        ends = () if early else tuple(end - first for end in self._ends)
        allowed = logits[None, first:].float()
        allowed = _only(allowed, range(offset - first, allowed.shape[-1]), ends)
        history = [id - first for id in self.audio_history]
        return first + choose(allowed, self.sampling.audio, [history], self.generator)[0]

    def take(self, text: int, audio: int) -> Step:
        """Books what was chosen, decides what stops, and returns the text id and the code that it gave."""
        result, given, code = self.result, None, None
        self.text_history.append(text)
        self.audio_history.append(audio)
        if result.text_stop is None and text == self._eos:
            result.text_stop = "eos"
        elif result.text_stop is None:
            given = text
            result.text_ids.append(text)
            if self.forced is None and (period := loop_period(result.text_ids)):
                result.text_ids = result.text_ids[: len(result.text_ids) - 2 * period]
                result.text_stop, given = "loop", None
            elif self.forced is None and len(result.text_ids) >= self.sampling.max_text_tokens:
                result.text_stop = "budget"
        if audio >= self.vocab.audio_offset:
            code = audio - self.vocab.audio_offset
            result.codes.append(code)
            if len(result.codes) >= self.sampling.max_audio_codes:
                result.audio_stop = "budget"
        elif audio in self._ends:
            result.audio_stop = "eos"
            result.text_stop = result.text_stop or "audio"
        return Step(self.row, given, code)


def next_ids(
    model: Model, replies: Sequence[Reply], text_hidden: torch.Tensor, audio_hidden: torch.Tensor
) -> tuple[list[int], list[int]]:
    """Chooses the next ids of both streams; a head runs only for the replies that choose by it.

    Args:
        model: with an audio branch.
        replies: B of them, not done.
        text_hidden, audio_hidden: [B, D], of each one's last position.
    """
    backbone, bound = model.backbone, model.config.vocab.audio_offset
    texts = [row for row, reply in enumerate(replies) if reply.chooses_text]
    codes = [row for row, reply in enumerate(replies) if reply.chooses_audio]
    text_logits = dict(zip(texts, backbone.text_logits(text_hidden[texts], bound) if texts else (), strict=True))
    audio_logits = dict(zip(codes, backbone.audio_logits(audio_hidden[codes]) if codes else (), strict=True))
    # Text is drawn before audio.
    chosen = [reply.text(text_logits.get(row)) for row, reply in enumerate(replies)]
    return chosen, [reply.audio(audio_logits.get(row)) for row, reply in enumerate(replies)]


class TwoStreams:
    """Generates replies of text and speech for a batch; iterate to run it, then read `results`.

    Args:
        model: with an audio branch.
        inputs: prompts, right-padded; each ends with `assistant_start`.
        sampling: of both streams.
        forced: for each row the text ids that it has to say, or None where it chooses them.
        delay: steps by which audio trails text; None takes the model's.
        generator: source of randomness, on any device.
        graphs: see `generation_graphs.Steps`.

    Raises:
        UserError: the model has no audio branch.
    """

    def __init__(
        self,
        model: Model,
        inputs: ModelInputs,
        *,
        sampling: SpeechSampling | None = None,
        forced: Sequence[Sequence[int] | None] | None = None,
        delay: int | None = None,
        generator: torch.Generator | None = None,
        graphs: bool | None = None,
    ) -> None:
        if model.backbone.audio is None:
            raise UserError(f"model '{model.config.name}' does not speak; its config has no 'backbone.audio_head'.")
        self.model, self.inputs, self.graphs = model, inputs, graphs
        delay = model.config.audio_delay if delay is None else delay
        generator = generator or torch.Generator().manual_seed(0)
        texts = forced or [None] * len(inputs.lengths)
        self._rows = [
            Reply(model.config.vocab, delay, sampling, text, generator, row) for row, text in enumerate(texts)
        ]
        assert len(self._rows) == len(inputs.lengths)
        self.results = [row.result for row in self._rows]

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[Step]]:
        """Yields what each step gave to the rows that are not done."""
        model, inputs, device = self.model, self.inputs, self.inputs.text_ids.device
        batch = len(inputs.lengths)
        alive = [row for row in self._rows if not row.result.done]
        cache = model.backbone.new_cache(batch, device=device)
        output = model(inputs, cache)
        last = torch.arange(batch, device=device), inputs.lengths.to(device) - 1
        text_hidden, audio_hidden = output.text_hidden[last], _there(output.audio_hidden)[last]
        if len(alive) < batch:
            keep = [row.row for row in alive]
            cache, text_hidden, audio_hidden = cache.select(keep), text_hidden[keep], audio_hidden[keep]
        if not alive:
            return
        steps = Steps(model, cache, room=max(row.longest for row in alive), graphs=self.graphs)
        try:
            while True:
                texts, codes = next_ids(model, alive, text_hidden, audio_hidden)
                yield [row.take(text, code) for row, text, code in zip(alive, texts, codes, strict=True)]
                keep = [slot for slot, row in enumerate(alive) if not row.result.done]
                if not keep:
                    return
                if len(keep) < len(alive):
                    alive = [alive[slot] for slot in keep]
                    texts, codes = ([part[slot] for slot in keep] for part in (texts, codes))
                    steps.select(keep)
                output = steps(*(torch.tensor(part, device=device) for part in (texts, codes)))
                text_hidden, audio_hidden = output.text_hidden[:, -1], _there(output.audio_hidden)[:, -1]
        finally:  # also when whoever listens stops
            steps.close()

    def run(self) -> list[SpeechResult]:
        """Runs to the end and returns the results, one for each row."""
        for _ in self:
            pass
        return self.results


def choose(
    logits: torch.Tensor, sampling: TokenSampling, histories: Sequence[Sequence[int]], generator: torch.Generator
) -> list[int]:
    """Chooses one id for each row of logits [B, V] fp32; greedy choices draw nothing.

    Args:
        logits: changed in place where a penalty applies; -inf forbids.
        sampling: of this stream.
        histories: B lists of ids chosen so far, for the penalty; ids outside [0, V) count for nothing.
        generator: one uniform number a row is drawn from it.
    """
    window, penalty = sampling.penalty_window, sampling.repetition_penalty
    for row, history in enumerate(histories):
        if penalty > 1 and len(history) > window:
            recent = sorted({id for id in history[-window:] if 0 <= id < logits.shape[-1]})
            scores = logits[row, recent]
            logits[row, recent] = torch.where(scores < 0, scores * penalty, scores / penalty)
    if sampling.temperature <= 1e-6:
        return logits.argmax(-1).tolist()
    size = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    values, ids = (logits / sampling.temperature).topk(size, dim=-1)
    chances = values.softmax(-1)
    # The first id always stays; others as long as those before them leave something of top_p.
    chances = chances.masked_fill(chances.cumsum(-1) - chances >= sampling.top_p, 0.0)
    sums = chances.cumsum(-1)
    drawn = torch.rand(len(logits), 1, generator=generator, device=generator.device).to(sums)
    place = (sums <= drawn * sums[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(-1, place.clamp_max((chances > 0).sum(-1, keepdim=True) - 1))[:, 0].tolist()


def _only(logits: torch.Tensor, kept: range, also: Sequence[int]) -> torch.Tensor:
    """Forbids in logits [B, V] all ids but the range `kept` and those in `also`."""
    allowed = torch.full_like(logits, float("-inf"))
    allowed[:, kept.start : kept.stop] = logits[:, kept.start : kept.stop]
    for id in also:
        allowed[:, id] = logits[:, id]
    return allowed


def _there(hidden: torch.Tensor | None) -> torch.Tensor:
    assert hidden is not None
    return hidden
