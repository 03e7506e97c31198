"""Layouts of documents: what is heard, what carries labels, and in which stream."""

import json

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from kimi_mm.config import VocabConfig
from kimi_mm.data.document_loader import collate
from kimi_mm.data.documents import DocumentMaker
from kimi_mm.data.rows import RowError, open_rows
from kimi_mm.processing import IGNORE, AudioClip, Processor
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.vision.processing import VisionProcessor
from tests.vision.tiny import EYES

VOCAB = VocabConfig(num_text_tokens=384, num_audio_codes=64)
CODES = [5, 9, 9, 2]
HEARD = [VOCAB.audio_offset + code for code in CODES]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    soundfile.write(folder / "a.wav", np.zeros(4800), 16_000)
    Image.new("RGB", (56, 56)).save(folder / "a.png")
    processor = Processor(VOCAB, TextTokenizer.train(["one two three"] * 9, 384), VisionProcessor(EYES), audio_delay=2)

    def hear(source):
        return AudioClip(torch.tensor(CODES), torch.ones(4, 3))

    def layout(name, value, speaks=True):
        (folder / "row.jsonl").write_text(json.dumps(value))
        maker = DocumentMaker(processor, hear, speaks)
        document = maker.make(open_rows(folder / "row.jsonl")[0], name)
        return processor, document, processor.collate([document.streams], [document.clips], [document.items])

    return layout


def labelled(labels):
    return labels[labels != IGNORE].tolist()


def aligned(inputs):
    """Every label is the id that the next position shows."""
    for ids, labels in ((inputs.text_ids, inputs.text_labels), (inputs.audio_ids, inputs.audio_labels)):
        where = (labels[0, :-1] != IGNORE).nonzero()[:, 0]
        assert torch.equal(labels[0, where], ids[0, where + 1])
        assert labels[0, -1] == IGNORE


SPOKEN = {"audio": "a.wav", "text": "one two"}
SEGMENTS = {"segments": [SPOKEN, {"audio": "a.wav", "text": "three"}, SPOKEN, {"audio": "a.wav", "text": "one"}]}


@pytest.mark.parametrize(
    ("layout", "row", "texts", "clips"),
    [
        ("document", {"text": "one two"}, ["one two"], 0),
        ("document", {"parts": [{"type": "text", "text": "one"}, {"type": "image", "image": "a.png"}]}, ["one"], 0),
        ("audio_to_text", SPOKEN, ["one two"], 0),
        ("image_to_text", {"image": "a.png", "text": "three"}, ["three"], 0),
        ("audio", {"audio": "a.wav"}, [], 1),
        ("text_to_audio", SPOKEN, [], 1),
        ("interleaved_codes", SEGMENTS, [], 2),
        ("interleaved_text", SEGMENTS, ["three", "one"], 0),
        ("interleaved_both", SEGMENTS, ["three", "one"], 2),
    ],
)
def test_what_a_layout_learns(make, layout, row, texts, clips):
    processor, document, inputs = make(layout, row)
    aligned(inputs)
    learnt = [i for i in labelled(inputs.text_labels) if i < VOCAB.num_text_tokens]
    assert processor.tokenizer.decode(learnt).split() == " ".join(texts).split()
    codes = [i for i in labelled(inputs.audio_labels) if i >= VOCAB.audio_offset]
    assert codes == HEARD * clips
    # What is learnt is heard as codes alone; what is only heard comes with features.
    heard = 0 if inputs.feature_mask is None else int(inputs.feature_mask.sum())
    assert heard == 4 * sum(clip.features is not None for clip in document.clips)
    assert all((labels == IGNORE).all() for labels in (inputs.text_labels[0, -1:], inputs.audio_labels[0, -1:]))


def test_speech_trails_its_text_by_the_delay(make):
    processor, _, inputs = make("interleaved_both", {"segments": SEGMENTS["segments"][:2]})
    text, audio = inputs.text_labels[0], inputs.audio_labels[0]
    first_text, first_code = (int((labels != IGNORE).nonzero()[0]) for labels in (text, audio))
    assert first_code - first_text == 2
    assert audio[audio != IGNORE][-1] == processor.ids["msg_end"]


def test_a_spoken_answer_of_a_conversation_is_learnt(make):
    said = [{"type": "text", "text": "one two"}, {"type": "audio", "audio": "a.wav"}]
    messages = [
        {"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]},
        {"role": "assistant", "content": said},
    ]
    processor, document, inputs = make("conversation", {"messages": messages})
    aligned(inputs)
    assert processor.ids["continue_speech"] in inputs.audio_ids[0]
    assert labelled(inputs.audio_labels)[:4] == HEARD
    batch = collate([document], processor, pack=True)
    assert batch.audio_labels.tolist() == labelled(inputs.audio_labels)
    with pytest.raises(RowError, match="no audio head"):
        make("conversation", {"messages": messages}, speaks=False)


@pytest.mark.parametrize(
    ("layout", "row", "message"),
    [
        ("audio_to_text", {"audio": "a.wav"}, "not one 'audio' and one 'text'"),
        ("image_to_text", SPOKEN, "not one 'image'"),
        ("audio", SPOKEN, "audio and text"),
        ("text_to_audio", {"text": "one"}, "not one 'audio'"),
        ("interleaved_text", {"segments": [SPOKEN]}, "two or more"),
        ("interleaved_both", {"segments": [SPOKEN, {"text": "one"}]}, "segment 1"),
        ("document", {"audio": "a.wav"}, "nothing to learn"),
    ],
)
def test_rows_that_do_not_suit_a_layout(make, layout, row, message):
    with pytest.raises(RowError, match=message):
        make(layout, row)
