"""Decoding loops over the two streams.

    prefill prompt ─► hidden at each row's last position ─► next text id ─► step ─► ... ─► text_eos

The audio stream is held at `text_blank` while only text is wanted (Kimi-Audio report, section 3: output "text").
Shapes: B rows, T prompt positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kimi_mm.generation_graphs import Steps
from kimi_mm.model import Model
from kimi_mm.processing import ModelInputs


@dataclass(frozen=True)
class TextSampling:
    """How text ids are chosen: greedy at temperature 0, otherwise top-k sampling from `generator`."""

    temperature: float = 0.0
    top_k: int = 0
    max_tokens: int = 256


@dataclass(frozen=True)
class TextResult:
    """Generated ids without `text_eos`, their mean log-probability, and why the row stopped.

    `stop_reason` is "eos", "budget" (max tokens) or "loop" (the tail repeats itself).
    """

    ids: list[int]
    mean_logprob: float
    stop_reason: str


@torch.inference_mode()
def generate_text(
    model: Model,
    inputs: ModelInputs,
    *,
    sampling: TextSampling | None = None,
    budgets: list[int] | None = None,
    generator: torch.Generator | None = None,
) -> list[TextResult]:
    """Generates text for every row of a batch; rows that finish leave the batch at once.

    Args:
        inputs: prompts, right-padded; each ends with `assistant_start`.
        sampling: greedy by default.
        budgets: most tokens per row, at most `sampling.max_tokens`.
        generator: source of randomness when the temperature is above 0.

    Returns:
        One `TextResult` per row, in order.
    """
    sampling = sampling or TextSampling()
    vocab, batch = model.config.vocab, len(inputs.lengths)
    eos, blank = vocab.special("text_eos"), vocab.special("text_blank")
    limits = [min(limit, sampling.max_tokens) for limit in (budgets or [sampling.max_tokens] * batch)]
    device = inputs.text_ids.device
    cache = model.backbone.new_cache(batch, device=device, audio=False)
    hidden = model(inputs, cache).text_hidden
    hidden = hidden[torch.arange(batch, device=device), inputs.lengths.to(device) - 1][:, None]

    tokens: list[list[int]] = [[] for _ in range(batch)]
    scores = [0.0] * batch
    reasons = ["budget"] * batch
    alive = [row for row in range(batch) if limits[row] > 0]
    if len(alive) < batch:
        cache, hidden = cache.select(alive), hidden[alive]
    steps = Steps(model, cache, room=max(limits, default=0))
    while alive:
        logits = text_logits(model, hidden)
        chosen = choose_text(logits, sampling, generator)
        logprobs = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0].tolist()
        keep = []
        for slot, (row, token) in enumerate(zip(alive, chosen.tolist(), strict=True)):
            scores[row] += logprobs[slot]
            if token == eos:
                reasons[row] = "eos"
                continue
            tokens[row].append(token)
            if period := loop_period(tokens[row]):
                tokens[row] = tokens[row][: len(tokens[row]) - 2 * period]
                reasons[row] = "loop"
            elif len(tokens[row]) < limits[row]:
                keep.append(slot)
        if not keep:
            break
        if len(keep) < len(alive):
            steps.select(keep)
            chosen = chosen[keep]
            alive = [alive[slot] for slot in keep]
        hidden = steps(chosen, torch.full_like(chosen, blank)).text_hidden
    steps.close()
    return [
        TextResult(ids, score / max(1, len(ids) + (reason == "eos")), reason)
        for ids, score, reason in zip(tokens, scores, reasons, strict=True)
    ]


@torch.inference_mode()
def stream_text(
    model: Model,
    inputs: ModelInputs,
    *,
    sampling: TextSampling | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yields the text ids of one row as they are chosen, without `text_eos`; stops as `generate_text` does.

    Args:
        inputs: one prompt, B = 1, that ends with `assistant_start`.
        sampling: greedy by default.
        generator: source of randomness when the temperature is above 0.
    """
    sampling = sampling or TextSampling()
    vocab, tokens = model.config.vocab, []
    eos, blank = vocab.special("text_eos"), vocab.special("text_blank")
    cache = model.backbone.new_cache(1, device=inputs.text_ids.device, audio=False)
    hidden = model(inputs, cache).text_hidden[:, int(inputs.lengths[0]) - 1, None]
    steps = Steps(model, cache, room=sampling.max_tokens)
    try:
        while len(tokens) < sampling.max_tokens:
            logits = text_logits(model, hidden)
            chosen = choose_text(logits, sampling, generator)
            tokens.append(int(chosen))
            if tokens[-1] == eos or loop_period(tokens):
                return
            yield tokens[-1]
            hidden = steps(chosen, torch.full_like(chosen, blank)).text_hidden
    finally:  # also when whoever reads the stream stops reading
        steps.close()


def loop_period(tokens: list[int], copies: int = 3, longest: int = 24) -> int:
    """Returns the length of a phrase that ends the list `copies` times in a row (0: none).

    Single ids must repeat eight times, so that spoken repetitions such as "nine nine nine" pass.
    """
    for period in range(1, longest + 1):
        times = 8 if period == 1 else max(copies, 4 if period < 4 else copies)
        if len(tokens) < period * times:
            break
        tail = tokens[-period:]
        if all(tokens[-period * (n + 1) : -period * n] == tail for n in range(1, times)):
            return period
    return 0


def text_logits(model: Model, hidden: torch.Tensor) -> torch.Tensor:
    """Returns fp32 logits [B, ids] of the last of hidden [B, T, D]; all but text ids and `text_eos` forbidden.

    A vocabulary without audio is a published text model's, whose specials (tool calls, <think>) are part of its text.
    """
    vocab = model.config.vocab
    # Text and special ids come first; the audio codes after them would cost half of the product.
    logits = model.backbone.text_logits(hidden, vocab.audio_offset)[:, -1].float()
    if not vocab.num_audio_codes:
        return logits
    eos = vocab.special("text_eos")
    keep = logits[:, eos].clone()
    logits[:, vocab.num_text_tokens :] = float("-inf")
    logits[:, eos] = keep
    return logits


def choose_text(logits: torch.Tensor, sampling: TextSampling, generator: torch.Generator | None) -> torch.Tensor:
    """Chooses one id [B] for each row of logits [B, ids]; greedy choices draw nothing from `generator`."""
    if sampling.temperature <= 1e-6:  # below, logits over it overflow
        return logits.argmax(-1)
    scaled = logits / sampling.temperature
    if sampling.top_k:
        floor = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < floor, float("-inf"))
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator)[:, 0]
