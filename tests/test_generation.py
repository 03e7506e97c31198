"""Text decoding: batches equal rows alone, budgets and loops end rows, sampling follows its generator."""

import pytest
import torch

from kimi_mm.config import ModelConfig
from kimi_mm.generation import TextSampling, generate_text, loop_period
from kimi_mm.model import Model
from kimi_mm.processing import AudioClip, Processor
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.training.recipe import recipes_root


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return Model(ModelConfig.from_yaml(recipes_root() / "models" / "debug.yaml")).eval()


@pytest.fixture(scope="module")
def prompts(model):
    processor = Processor(model.config.vocab, TextTokenizer.train(["a few words"] * 3, 300))

    def build(sizes):
        generator = torch.Generator().manual_seed(0)
        clips = [
            AudioClip(torch.randint(64, (n,), generator=generator), torch.randn(n, 128, generator=generator))
            for n in (3, 9, 5)
        ]
        chosen = [clips[i] for i in sizes]
        return processor.collate([processor.transcription(len(c.codes)) for c in chosen], [[c] for c in chosen])

    return build


def test_batch_equals_alone(model, prompts):
    together = generate_text(model, prompts([0, 1, 2]), budgets=[7, 7, 7])
    for row in range(3):
        alone = generate_text(model, prompts([row]), budgets=[7])[0]
        assert alone.ids == together[row].ids
        assert alone.mean_logprob == pytest.approx(together[row].mean_logprob, abs=1e-5)


def test_budgets_are_kept_per_row(model, prompts):
    results = generate_text(model, prompts([0, 1, 2]), budgets=[2, 0, 5])
    assert all(len(r.ids) <= n for r, n in zip(results, (2, 0, 5), strict=True))
    assert results[1].stop_reason == "budget"


def test_only_text_comes_out(model, prompts):
    sampling = TextSampling(temperature=5.0, max_tokens=40)
    generator = torch.Generator().manual_seed(0)
    for result in generate_text(model, prompts([0, 1, 2]), sampling=sampling, generator=generator):
        assert all(i < model.config.vocab.num_text_tokens for i in result.ids)


def test_sampling_follows_the_generator(model, prompts):
    sampling = TextSampling(temperature=1.0, top_k=20, max_tokens=12)
    runs = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        results = generate_text(model, prompts([0, 1]), sampling=sampling, generator=generator)
        runs.append([result.ids for result in results])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize(
    ("tokens", "period"),
    [
        ([1, 2, 3], 0),
        ([9, 9, 9], 0),  # "nine nine nine" is speech
        ([9] * 8, 1),
        ([1, *[2, 3] * 4], 2),
        ([*[1, 2, 3, 4, 5] * 3], 5),
        ([*[1, 2, 3, 4, 5] * 2], 0),
        ([], 0),
    ],
)
def test_loops_are_found(tokens, period):
    assert loop_period(tokens) == period
