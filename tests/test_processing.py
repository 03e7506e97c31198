"""The prompt layout against the worked example of the Kimi-Audio layout, and collation of ragged clips."""

import pytest
import torch

from kimi_mm.config import VocabConfig
from kimi_mm.errors import UserError
from kimi_mm.processing import IGNORE, AudioClip, Processor
from kimi_mm.text.tokenizer import TextTokenizer

VOCAB = VocabConfig(num_text_tokens=384, num_audio_codes=64)


@pytest.fixture(scope="module")
def processor():
    return Processor(VOCAB, TextTokenizer.train(["Hi there, please transcribe."] * 9, 384))


def clip(codes):
    return AudioClip(torch.tensor(codes), torch.arange(len(codes) * 4.0).view(-1, 4))


def test_worked_example(processor):
    ids = processor.ids
    blank = ids["text_blank"]
    content = [{"type": "text", "text": "Hi"}, {"type": "audio", "num_codes": 3, "codes": [5, 6, 7]}]
    streams = processor.streams([{"role": "user", "content": content}])
    hi = processor.tokenizer.encode("Hi")
    codes = [VOCAB.audio_offset + c for c in (5, 6, 7)]
    tail = [ids[name] for name in ("media_end", "continue_text", "msg_end", "assistant_start")]
    assert streams.audio == [ids["user_start"], *[blank] * len(hi), ids["media_begin"], *codes, *tail]
    assert streams.text == [blank, *hi, *[blank] * (len(streams) - 1 - len(hi))]
    assert len(streams.audio) == len(streams.text) == len(streams.text_labels)


def test_speech_output_asks_for_speech(processor):
    message = {"role": "user", "content": [{"type": "audio", "num_codes": 1}]}
    streams = processor.streams([message], output="speech")
    assert processor.ids["continue_speech"] in streams.audio
    assert processor.ids["continue_text"] not in streams.audio


def test_labels_sit_one_position_early(processor):
    streams = processor.transcription(2, "Hi there.")
    answer = [*processor.tokenizer.encode("Hi there."), processor.ids["text_eos"]]
    labelled = [(i, label) for i, label in enumerate(streams.text_labels) if label != IGNORE]
    assert [label for _, label in labelled] == answer
    assert all(streams.text[i + 1] == label for i, label in labelled)
    assert streams.audio[labelled[0][0]] == processor.ids["assistant_start"]


def test_markers_in_user_text_stay_text(processor):
    streams = processor.streams([{"role": "user", "content": "text_eos <|media_begin|>"}])
    assert all(i < len(processor.tokenizer) or i == processor.ids["text_blank"] for i in streams.text)


def test_collate_places_codes_and_features(processor):
    two = [{"type": "audio", "num_codes": 2}, {"type": "audio", "num_codes": 1}]
    rows = [processor.transcription(3), processor.streams([{"role": "user", "content": two}])]
    inputs = processor.collate(rows, [[clip([1, 2, 3])], [clip([4, 5]), clip([6])]])
    offset = VOCAB.audio_offset
    assert inputs.audio_ids[0][inputs.feature_mask[0]].tolist() == [offset + c for c in (1, 2, 3)]
    assert inputs.audio_ids[1][inputs.feature_mask[1]].tolist() == [offset + c for c in (4, 5, 6)]
    assert torch.equal(inputs.features[0][inputs.feature_mask[0]], clip([1, 2, 3]).features)
    assert inputs.lengths.tolist() == [len(row) for row in rows]
    shorter = int(inputs.lengths.argmin())
    assert (inputs.text_ids[shorter, inputs.lengths[shorter] :] == processor.ids["pad"]).all()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "robot", "content": "x"}], "role 'robot'"),
        ([{"role": "user", "content": []}], "content"),
        ([{"role": "user", "content": [{"type": "smell"}]}], "part type 'smell'"),
        ([{"role": "user", "content": [{"type": "audio", "num_codes": 0}]}], "at least one code"),
    ],
)
def test_bad_messages(processor, messages, message):
    with pytest.raises(UserError, match=message):
        processor.streams(messages)


def test_clip_of_another_length_is_refused(processor):
    with pytest.raises(UserError, match="placeholder 3"):
        processor.collate([processor.transcription(3)], [[clip([1, 2])]])
