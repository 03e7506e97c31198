"""Batches of documents: mixture, packing efficiency, exact resuming, and rows as inference lays them out."""

from itertools import islice

import numpy as np
import pytest
import torch

from kimi_mm.config import VocabConfig
from kimi_mm.data.debug import write_debug_conversations, write_debug_data
from kimi_mm.data.document_config import DataSourceConfig, DocumentDataConfig
from kimi_mm.data.document_loader import DocumentLoader, DocumentSource, collate
from kimi_mm.data.document_sources import open_sources
from kimi_mm.data.documents import DocumentMaker
from kimi_mm.data.loader import Prefetcher, training_texts
from kimi_mm.errors import UserError
from kimi_mm.processing import AudioClip, Processor
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.vision.processing import VisionProcessor
from tests.vision.tiny import EYES


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    _, texts = write_debug_data(tmp_path_factory.mktemp("debug"))
    tokenizer = TextTokenizer.train(training_texts(texts), 384)
    processor = Processor(VocabConfig(num_text_tokens=384, num_audio_codes=64), tokenizer, VisionProcessor(EYES))
    return DocumentMaker(processor, lambda source: AudioClip(torch.arange(7), torch.ones(7, 4)), speaks=True)


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    return str(write_debug_conversations(tmp_path_factory.mktemp("talk"), count=30))


def opened(talk, maker, **options):
    sources, report = open_sources(DocumentDataConfig(sources=(DataSourceConfig(files=(talk,)),)), maker)
    assert not report.problems
    return DocumentLoader(sources, maker, **{"batch_positions": 128, "look_ahead": 16, **options})


def made_up(lengths, **options):
    config = DataSourceConfig(**options)
    groups = ("image",) if options.get("name") == "seen" else ("text",)
    return DocumentSource(config, (), np.zeros((len(lengths), 2), np.int64), np.asarray(lengths), groups)


def numbers(batch):
    inputs = [value for value in vars(batch.inputs).values() if isinstance(value, torch.Tensor)]
    return [*inputs, batch.positions, batch.labels, torch.tensor(batch.label_counts)]


@pytest.mark.parametrize("pack", [True, False])
def test_resumed_loader_gives_the_batches_of_an_uninterrupted_one(talk, maker, pack):
    whole = [numbers(batch) for batch in islice(opened(talk, maker, pack=pack), 24)]
    ahead = Prefetcher(opened(talk, maker, pack=pack), depth=3)
    for _ in range(11):
        ahead.next()
    resumed = opened(talk, maker, pack=pack)
    resumed.load_state_dict(ahead.state)
    ahead.close()
    for want, batch in zip(whole[11:], resumed, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(want, numbers(batch), strict=True))


def test_order_follows_the_seed_and_every_epoch_shows_everything(maker):
    loader = DocumentLoader([made_up([10] * 40)], maker, batch_positions=50, look_ahead=20, seed=1)
    other = DocumentLoader([made_up([10] * 40)], maker, batch_positions=50, look_ahead=20, seed=2)
    rows, others = ([pair[1] for _ in range(16) for pair in each.next_row()] for each in (loader, other))
    assert rows != others
    assert np.bincount(rows, minlength=40).max() <= 3


def test_packing_is_97_per_cent_full_on_lengths_like_nanos(maker):
    """Positions of nano's mixture: sentences, recordings of 1 to 24 s with their text, pictures with questions."""
    rng = np.random.default_rng(0)
    sources = [
        made_up(np.clip(rng.lognormal(3.2, 0.6, 2000), 6, 200).astype(int), weight=2.0),
        made_up((rng.uniform(1, 24, 1000) * 17 + 12).astype(int), weight=5.0),
        made_up(rng.integers(30, 340, 1000), weight=3.0),
    ]
    loader = DocumentLoader(sources, maker, batch_positions=4096)
    fill = [sum(loader.length(*pair) for pair in loader.next_row()) / loader.capacity for _ in range(200)]
    assert np.mean(fill) > 0.97
    padded = DocumentLoader(sources, maker, batch_positions=4096, pack=False)
    shares = []
    for _ in range(100):
        lengths = [padded.length(*pair) for pair in padded.next_row()]
        shares.append(sum(lengths) / (max(lengths) * len(lengths)))
    assert np.mean(shares) > 0.85  # rows of like length waste little


def test_every_stretch_has_the_mixture_of_the_weights(maker):
    sources = [made_up([7, 30, 90] * 20, weight=3.0, name="read"), made_up([40] * 50, weight=1.0, name="seen")]
    for options, share in (({}, 0.25), ({"vision_share": 0.1}, 0.1)):
        loader = DocumentLoader(sources, maker, batch_positions=300, look_ahead=64, **options)
        for _ in range(3):
            drawn = [0, 0]
            for pair in (pair for _ in range(100) for pair in loader.next_row()):
                drawn[pair[0]] += loader.length(*pair)
            assert drawn[1] / sum(drawn) == pytest.approx(share, abs=0.02)
    with pytest.raises(UserError, match="sources without"):
        DocumentLoader(sources[1:], maker, batch_positions=300, vision_share=0.1)


def test_few_documents_make_small_batches(maker):
    loader = DocumentLoader([made_up([10, 20, 30])], maker, batch_positions=4096)
    for _ in range(6):
        assert sorted(loader.next_row()) == [[0, 0], [0, 1], [0, 2]]


def test_changed_data_is_noticed(maker):
    state = DocumentLoader([made_up([10, 20, 30])], maker, batch_positions=64).state_dict()
    with pytest.raises(UserError, match="changed since"):
        DocumentLoader([made_up([10, 20])], maker, batch_positions=64).load_state_dict(state)
    with pytest.raises(UserError, match="not a single sample"):
        DocumentLoader([made_up([])], maker, batch_positions=64)


def test_packed_rows_are_the_documents_one_after_the_other(talk, maker):
    loader = opened(talk, maker, batch_positions=256)
    for row in (loader.next_row() for _ in range(5)):
        documents = [loader._read(*pair) for pair in row]
        batch = collate(documents, maker.processor, pack=True)
        bounds = batch.inputs.cu_seqlens.tolist()
        assert batch.inputs.text_ids.shape == (1, bounds[-1])
        seen = heard = 0
        for document, start, end in zip(documents, bounds[:-1], bounds[1:], strict=True):
            alone = collate([document], maker.processor, pack=True)
            assert torch.equal(batch.inputs.text_ids[:, start:end], alone.inputs.text_ids)
            assert torch.equal(batch.inputs.audio_ids[:, start:end], alone.inputs.audio_ids)
            here = (batch.positions >= start) & (batch.positions < end)
            assert torch.equal(batch.positions[here] - start, alone.positions)
            assert torch.equal(batch.labels[here], alone.labels)
            groups = torch.arange(len(batch.label_counts)).repeat_interleave(torch.tensor(batch.label_counts))
            assert {batch.group_names[i] for i in groups[here].tolist()} == {document.group}
            if document.items:
                count = len(alone.inputs.vision_at)
                assert torch.equal(batch.inputs.vision_at[seen : seen + count] - start, alone.inputs.vision_at)
                seen += count
            if document.clips:
                assert torch.equal(batch.inputs.feature_mask[:, start:end], alone.inputs.feature_mask)
                heard += int(alone.inputs.feature_mask.sum())
        assert batch.inputs.feature_mask is None or int(batch.inputs.feature_mask.sum()) == heard


def test_a_document_that_is_too_long_is_a_bad_line(talk, maker):
    config = DocumentDataConfig(sources=(DataSourceConfig(files=(talk,)),), batch_positions=20)
    _, report = open_sources(config, maker)
    assert report.problems
    assert "more than a batch has (20)" in report.problems[0].reason
