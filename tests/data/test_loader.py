"""Batches: an order that depends on the seed alone, exact restoring, prompts as inference lays them out."""

import gzip
import itertools
import json
from itertools import islice

import numpy as np
import pytest
import torch

from kimi_mm.config import VocabConfig
from kimi_mm.data.debug import write_debug_data
from kimi_mm.data.loader import Prefetcher, SpeechLoader, TextLoader, polish, spell, training_texts
from kimi_mm.errors import CheckpointError
from kimi_mm.processing import IGNORE, Processor
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.training.parallel import Dealt
from kimi_mm.training.recipe import SpeechDataConfig, TextDataConfig


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_debug_data(tmp_path_factory.mktemp("debug"))


@pytest.fixture(scope="module")
def processor(corpus):
    tokenizer = TextTokenizer.train(training_texts(corpus[1]), 384)
    return Processor(VocabConfig(num_text_tokens=384, num_audio_codes=64), tokenizer)


@pytest.fixture
def speech(corpus, processor):
    config = SpeechDataConfig(
        folders=(str(corpus[0]),), batch_seconds=8.0, buckets=(2.56, 5.12), max_seconds=5.0, tokens_per_second=30.0
    )
    return lambda seed=0: SpeechLoader(config, processor, seed)


def same(a, b):
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def spread_labels(batch):
    """Labels [B, T] with IGNORE where there is none."""
    full = torch.full(batch.text_ids.shape, IGNORE).flatten()
    return full.scatter(0, batch.positions, batch.labels).view(batch.text_ids.shape)


def test_order_follows_the_seed(speech):
    first, again, other = (list(islice(speech(seed), 5)) for seed in (0, 0, 1))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not all(same(a, b) for a, b in zip(first, other, strict=True) if a.waves.shape == b.waves.shape)


def test_a_process_makes_its_share_of_the_batches_only(speech):
    whole, made = list(islice(speech(), 12)), 0
    loader = speech()
    dealt = Dealt(loader, group=1, groups=3)
    make = loader._batch

    def counted(*arguments):
        nonlocal made
        made += 1
        return make(*arguments)

    loader._batch = counted
    mine = list(islice(dealt, 4))
    assert all(same(a, b) for a, b in zip(mine, whole[1::3], strict=True))
    assert made == 4
    rest = speech()
    rest.load_state_dict(loader.state_dict())
    assert same(next(iter(rest)), list(islice(speech(), 13))[12])


def test_restored_loader_goes_on_with_the_next_batch(speech):
    loader = Prefetcher(speech(), depth=3)
    for _ in range(7):
        loader.next()
    resumed = speech()
    resumed.load_state_dict(loader.state)
    assert same(loader.next(), next(iter(resumed)))
    loader.close()


def test_rows_are_laid_out_as_in_inference(speech, processor):
    for batch in islice(speech(), 4):
        labels = spread_labels(batch)
        for row in range(len(batch.waves)):
            codes = int((batch.feature_row[row] >= 0).sum())
            answer = labels[row][labels[row] != IGNORE].tolist()
            assert answer[-1] == processor.ids["text_eos"]
            expected = processor.transcription(codes, processor.tokenizer.decode(answer[:-1]))
            n = len(expected)
            assert batch.audio_ids[row, :n].tolist() == expected.audio
            assert batch.text_ids[row, :n].tolist() == expected.text
            assert labels[row, :n].tolist() == expected.text_labels
            assert (batch.text_ids[row, n:] == processor.ids["pad"]).all()
            assert codes == batch.code_counts[row] == -(-int(batch.wave_lengths[row]) // 1280)


def test_ctc_targets_are_the_text(speech, processor):
    batch = next(iter(speech()))
    start, labels = 0, spread_labels(batch)
    assert batch.character_counts == tuple(batch.character_lengths.tolist())
    for row, length in enumerate(batch.character_lengths.tolist()):
        answer = labels[row][labels[row] != IGNORE].tolist()[:-1]
        assert batch.characters[start : start + length].tolist() == spell(processor.tokenizer.decode(answer)).tolist()
        start += length
    assert start == len(batch.characters)


def test_text_rows_hold_whole_sentences(corpus, processor):
    loader = TextLoader(TextDataConfig(path=str(corpus[1]), row_tokens=32, batch_rows=2), processor, 0)
    batch = next(iter(loader))
    flat_text, flat_audio, labels = (t.flatten() for t in (batch.text_ids, batch.audio_ids, batch.labels))
    starts = (flat_audio == processor.ids["assistant_start"]).nonzero()[:, 0]
    assert len(starts) > 1
    assert (flat_text[starts] == processor.ids["text_blank"]).all()
    assert (labels[:-1][labels[:-1] != IGNORE] == flat_text[1:][labels[:-1] != IGNORE]).all()


def test_written_dialogs_stand_among_sentences(tmp_path):
    words = ["brook", "table", "river", "stone", "garden", "window", "silver", "candle", "market", "bridge"]
    rows = [{"text": f"The {a} is near the {b}.", "source": "wordnet"} for a in words for b in words if a != b]
    rows += [
        {"text": f"{a.capitalize()}: a thing that people know.", "source": "gloss", "speech": False} for a in words
    ]
    path = tmp_path / "texts.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    processor = Processor(VocabConfig(num_text_tokens=384), TextTokenizer.train([row["text"] for row in rows], 384))
    loader = TextLoader(TextDataConfig(path=str(path), row_tokens=32, batch_rows=2, dialogs=40), processor, 0)
    ids, order = processor.ids, loader._order(0)
    assert sorted(order.tolist()) == list(range(len(loader.text)))
    for start, end in itertools.pairwise(loader.starts):  # every conversation is whole, in order
        at = int(np.flatnonzero(order == start)[0])
        assert order[at : at + end - start].tolist() == list(range(start, end))
    asked, answered = (np.flatnonzero(loader.audio == ids[f"{role}_start"]) for role in ("user", "assistant"))
    assert len(asked) >= 40
    assert (loader.labels[answered] != IGNORE).all()
    for start, end in zip(asked, answered[np.searchsorted(answered, asked)], strict=True):
        assert (loader.labels[start:end] == IGNORE).all()
    batches = iter(loader)
    next(batches)
    again = TextLoader(loader.config, processor, 0)
    again.load_state_dict(loader.state_dict())
    assert same(next(iter(again)), next(batches))


def test_errors_reach_the_caller(corpus, processor):
    config = SpeechDataConfig(folders=(str(corpus[0]),), batch_seconds=5000.0)
    with pytest.raises(CheckpointError, match="too few utterances"):
        Prefetcher(SpeechLoader(config, processor, 0)).next()


@pytest.mark.parametrize(
    ("raw", "written"),
    [("a  heavy truck", "A heavy truck."), ("Why?", "Why?"), ("so, then,", "So, then."), ("", "")],
)
def test_polish(raw, written):
    assert polish(raw) == written
