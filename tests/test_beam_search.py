"""Beam search: one beam is greedy decoding, enough of them find what trying everything finds, rows stay apart."""

import pytest
import torch

from kimi_mm.beam_search import beam_search
from kimi_mm.config import ModelConfig
from kimi_mm.generation import generate_text, text_logits
from kimi_mm.model import Model
from kimi_mm.processing import AudioClip, Processor
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.training.recipe import recipes_root


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = Model(ModelConfig.from_yaml(recipes_root() / "models" / "debug.yaml")).eval()
    with torch.no_grad():  # far from uniform, and with an end that is worth considering
        model.backbone.embed_tokens.weight.mul_(6.0)
        model.backbone.embed_tokens.weight[model.config.vocab.special("text_eos")] *= 2.0
    return model


@pytest.fixture(scope="module")
def prompts(model):
    processor = Processor(model.config.vocab, TextTokenizer.train(["a few words"] * 3, 300))
    generator = torch.Generator().manual_seed(0)
    clips = [
        AudioClip(torch.randint(64, (n,), generator=generator), torch.randn(n, 128, generator=generator))
        for n in (3, 9, 5)
    ]

    def build(numbers):
        chosen = [clips[i] for i in numbers]
        return processor.collate([processor.transcription(len(c.codes)) for c in chosen], [[c] for c in chosen])

    return build


def test_one_beam_is_greedy(model, prompts):
    greedy = generate_text(model, prompts([0, 1, 2]), budgets=[9, 5, 7])
    single = beam_search(model, prompts([0, 1, 2]), beams=1, budgets=[9, 5, 7])
    for a, b in zip(greedy, single, strict=True):
        assert (a.ids, a.stop_reason) == (b.ids, b.stop_reason)
        assert a.mean_logprob == pytest.approx(b.mean_logprob, abs=1e-5)


def test_batch_equals_alone(model, prompts):
    together = beam_search(model, prompts([0, 1, 2]), beams=3, budgets=[7, 4, 7])
    for row, budget in enumerate((7, 4, 7)):
        [alone] = beam_search(model, prompts([row]), beams=3, budgets=[budget])
        assert alone.ids == together[row].ids
        assert alone.mean_logprob == pytest.approx(together[row].mean_logprob, abs=1e-5)


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("row", [0, 1, 2])
@torch.inference_mode()
def test_enough_beams_find_the_best_of_all(model, prompts, row, power):
    """All texts of at most two ids are scored one by one; the search must return the best."""
    vocab = model.config.vocab
    eos, count = vocab.special("text_eos"), vocab.num_text_tokens
    inputs = prompts([row])
    cache = model.backbone.new_cache(1)
    first = text_logits(model, model(inputs, cache).text_hidden).log_softmax(-1)[0]
    ids = torch.arange(count)
    blank = torch.full((count,), vocab.special("text_blank"))
    second = text_logits(model, model.step(ids, blank, cache.select([0] * count)).text_hidden).log_softmax(-1)
    both = first[:count, None] + second[:, :count]
    a, b = divmod(int(both.argmax()), count)
    ends = first[:count] + second[:, eos]
    candidates = [
        (float(first[eos]), []),
        (float(ends.max()) / 2**power, [int(ends.argmax())]),
        (float(both.max()) / 2**power, [a, b]),
    ]
    [found] = beam_search(model, inputs, beams=count, budgets=[2], length_power=power)
    assert found.ids == max(candidates)[1]


def test_budgets_are_kept(model, prompts):
    results = beam_search(model, prompts([0, 1, 2]), beams=4, budgets=[2, 0, 5])
    assert all(len(r.ids) <= n for r, n in zip(results, (2, 0, 5), strict=True))
    assert (results[1].ids, results[1].stop_reason) == ([], "budget")


def test_repeating_is_the_last_resort(model, prompts):
    """With the end out of reach every reading comes to repeat itself; it is cut as in greedy decoding."""
    table, eos = model.backbone.embed_tokens.weight, model.config.vocab.special("text_eos")
    kept = table[eos].clone()
    with torch.no_grad():
        table[eos] = 0.0
    try:
        [greedy] = generate_text(model, prompts([1]), budgets=[200])
        [single] = beam_search(model, prompts([1]), beams=1, budgets=[200])
    finally:
        with torch.no_grad():
            table[eos] = kept
    assert greedy.stop_reason == "loop"
    assert (single.ids, single.stop_reason) == (greedy.ids, "loop")


def test_no_beam():
    with pytest.raises(ValueError, match="beams=0"):
        beam_search(None, None, beams=0, budgets=[1])  # type: ignore[arg-type]
