"""Pictures and clips in the joint model: layout, labels, rows in their places, batches, turns, checkpoints, answers."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from kimi_mm.checkpoint import load_checkpoint
from kimi_mm.errors import ImageError, UserError
from kimi_mm.generation import TextSampling, generate_text
from kimi_mm.pipeline import KimiMM
from kimi_mm.processing import IGNORE, AudioClip, timestamp


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


CLIP = np.random.default_rng(9).integers(0, 256, (6, 30, 40, 3), np.uint8)


def test_layout_of_a_picture_and_a_clip(seeing):
    processor = seeing.processor
    ids, encode = processor.ids, processor.tokenizer.encode
    blank, pad = ids["text_blank"], ids["media_pad"]
    chunks = [(0.0, 2), (3725.25, 1)]
    content = [
        {"type": "image", "num_tokens": 3},
        {"type": "video", "chunks": chunks},
        {"type": "text", "text": "dogs"},
    ]
    streams = processor.streams([{"role": "user", "content": content}])

    def item(word: str, count: int, time: str = "") -> list[tuple[int, int]]:
        texts = [(blank, i) for i in encode(time)]
        opened = [(ids["media_begin"], blank), *((blank, i) for i in encode(word)), (ids["media_content"], blank)]
        return [*texts, *opened, *[(pad, blank)] * count, (ids["media_end"], blank)]

    expected = [
        (ids["user_start"], blank),
        *item("image", 3),
        *item("video", 2, "00:00:00.000"),
        *item("video", 1, "01:02:05.250"),
        *((blank, i) for i in encode("dogs")),
        (ids["msg_end"], blank),
        (ids["assistant_start"], blank),
    ]
    assert list(zip(streams.audio, streams.text, strict=True)) == expected
    pads = [number for number in streams.item_index if number >= 0]
    assert pads == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "00:00:00.000"), (59.9999, "00:00:59.999"), (3600.5, "01:00:00.500"), (9e4, "25:00:00.000")],
)
def test_timestamps_are_cut_not_rounded(seconds, text):
    assert timestamp(seconds) == text


def test_labels_never_sit_on_media(seeing):
    processor = seeing.processor
    conversation = [
        {"role": "user", "content": [{"type": "image", "num_tokens": 5}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "dogs"}, {"type": "image", "num_tokens": 4}]},
        {"role": "user", "content": [{"type": "video", "chunks": [(0.5, 3)]}]},
        {"role": "assistant", "content": "red dogs"},
    ]
    streams = processor.streams(conversation, add_assistant_start=False)
    assert max(streams.item_index) == 2
    answers = [processor.ids["text_eos"], *processor.tokenizer.encode("dogs"), *processor.tokenizer.encode("red dogs")]
    labels = [label for label in streams.text_labels if label != IGNORE]
    assert sorted(labels) == sorted([*answers, processor.ids["text_eos"]])
    for label, item in zip(streams.text_labels, streams.item_index, strict=True):
        assert item < 0 or label == IGNORE


def test_rows_stand_at_the_placeholders(seeing):
    items = seeing.look([picture(50, 30), picture(20, 20)])
    streams = seeing.processor.question(items, "What?")
    inputs = seeing.processor.collate([streams], [[]], [items])
    with torch.no_grad():
        x = seeing.model.embed(inputs)[0]
        rows = torch.cat(seeing.model.vision(inputs.pixel_values, inputs.grid_thw))
        inputs.vision_at = None
        plain = seeing.model.embed(inputs)[0]
    at = torch.tensor(streams.item_index) >= 0
    assert at.sum() == len(rows) == 4 + 1
    torch.testing.assert_close(x[at], rows)
    torch.testing.assert_close(x[~at], plain[~at])
    assert (x[at] - plain[at]).abs().min() > 0


def test_batch_of_all_kinds_equals_rows_alone(seeing):
    """Text, a picture, a clip beside a recording: padded together and alone, the same hidden states."""
    processor = seeing.processor
    two = seeing.look(picture(70, 40)) + processor.vision.clip(CLIP)
    one = seeing.look([picture(28, 56), picture(28, 28, 1), picture(60, 60, 2)])
    recording = AudioClip(torch.tensor([3, 9, 5]), torch.randn(3, 128))
    heard = [{"type": "audio", "num_codes": 3}, {"type": "image", "num_tokens": one[0].num_tokens}]
    rows = [
        processor.streams([{"role": "user", "content": "Only text"}]),
        processor.question(two, "What?"),
        processor.streams([{"role": "user", "content": heard}]),
        processor.question(one, "dogs?"),
    ]
    clips, items = [[], [], [recording], []], [[], two, one[:1], one]
    inputs = processor.collate(rows, clips, items)
    with torch.no_grad():
        together = seeing.model(inputs).text_hidden
        for b, row in enumerate(rows):
            alone = seeing.model(processor.collate([row], [clips[b]], [items[b]])).text_hidden[0]
            torch.testing.assert_close(together[b, : len(row)], alone, atol=1e-5, rtol=1e-4)


def test_rows_computed_before_are_taken(seeing):
    items = seeing.look(picture(40, 40))
    inputs = seeing.question_inputs(items, "What?")
    with torch.no_grad():
        want = seeing.model(inputs).text_hidden
        inputs.vision_rows = seeing.model.see(inputs)
        inputs.pixel_values = inputs.grid_thw = None
        torch.testing.assert_close(seeing.model(inputs).text_hidden, want)


def test_gradients_reach_the_eyes(seeing):
    inputs = seeing.question_inputs(seeing.look(picture(40, 40)), "What?", "red dogs")
    seeing.model.zero_grad()
    seeing.model(inputs).text_hidden.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in seeing.model.vision.parameters())
    seeing.model.zero_grad(set_to_none=True)


def test_wrong_numbers_of_placeholders(seeing):
    items = seeing.look([picture(28, 28), picture(56, 56)])
    streams = seeing.processor.question(items, "What?")
    collate = seeing.processor.collate
    with pytest.raises(UserError, match="row 0 has placeholders for 2 pictures, and 1 pictures"):
        collate([streams], [[]], [items[:1]])
    with pytest.raises(UserError, match="row 0 has placeholders for 2 pictures, and 0 pictures"):
        collate([streams], [[]])
    with pytest.raises(UserError, match="row 0 has placeholders for 0 pictures, and 2 pictures"):
        collate([seeing.processor.question([], "What?")], [[]], [items])
    with pytest.raises(UserError, match="the picture makes 4 rows, its placeholder has 1"):
        collate([streams], [[]], [items[::-1]])
    inputs = collate([streams], [[]], [items])
    inputs.grid_thw, inputs.pixel_values = inputs.grid_thw[:1], inputs.pixel_values[:4]
    with pytest.raises(UserError, match="the pictures make 1 rows, the prompt has 5 placeholders"):
        seeing.model(inputs)
    inputs.pixel_values = None
    with pytest.raises(UserError, match="there are no pictures"):
        seeing.model(inputs)


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_conversation_of_several_turns(seeing):
    """Sources of every kind in several turns give the prompt that sizes given by hand give."""
    messages = [
        {"role": "system", "content": "red"},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture(30, 60)},
                {"type": "text", "text": "What?"},
                {"type": "image_url", "image_url": {"url": data_url(picture(28, 28))}},
            ],
        },
        {"role": "assistant", "content": "dogs"},
        {"role": "user", "content": [{"type": "video", "video": CLIP, "fps": 4.0}, {"type": "text", "text": "dogs?"}]},
    ]
    seen, items = seeing.processor.see(messages)
    assert seen[1]["content"][0] == {"type": "image", "num_tokens": 6}
    assert seen[1]["content"][2] == {"type": "image", "num_tokens": 1}
    assert [round(seconds, 2) for seconds, _ in seen[3]["content"][0]["chunks"]] == [0.0]
    assert [item.grid for item in items] == [(1, 4, 6), (1, 2, 2), (3, 4, 4)]
    reply = "".join(seeing.reply(messages, max_tokens=6))
    inputs = seeing.processor.collate([seeing.processor.streams(seen)], [[]], [items])
    ids = generate_text(seeing.model, inputs, sampling=TextSampling(max_tokens=6))[0].ids
    assert reply == seeing.processor.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("part", "error", "words"),
    [
        ({"type": "image"}, UserError, "message 0: part of type 'image' needs a key 'image'"),
        ({"type": "image_url", "image_url": {"url": "http://x/y.png"}}, ImageError, "not fetched"),
        ({"type": "video", "video": np.zeros((0, 3, 3, 3), np.uint8)}, ImageError, "no frames"),
        ({"type": "image", "image": "nowhere.png"}, ImageError, "no such file"),
        ({"type": "hologram"}, UserError, "'hologram' must be 'text', 'audio', 'image' or 'video'"),
    ],
)
def test_bad_parts(seeing, part, error, words):
    with pytest.raises(error, match=words):
        "".join(seeing.reply([{"role": "user", "content": [part]}]))


def test_unread_pictures_cannot_be_laid_out(seeing):
    for part in ({"type": "image", "image": "x.png"}, {"type": "video", "chunks": []}):
        with pytest.raises(UserError, match="size is not known"):
            seeing.processor.streams([{"role": "user", "content": [part]}])


def test_answers_in_pieces(seeing):
    pieces = list(seeing.describe_stream([picture(40, 70), CLIP[0]], "What is red?", max_tokens=12))
    assert len(pieces) > 1
    assert seeing.describe([picture(40, 70), CLIP[0]], "What is red?", max_tokens=12) == "".join(pieces)
    assert seeing.describe(picture(40, 70), max_tokens=3) != seeing.describe(picture(8, 8, 3), max_tokens=3)
    drawn = [
        seeing.describe(CLIP[0], temperature=1.5, max_tokens=8, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_pieces_are_whole_characters(seeing, monkeypatch):
    """Bytes of one character that come as several ids are held back until it is whole."""
    ids = seeing.processor.tokenizer.encode("dé 🐕 x")
    monkeypatch.setattr("kimi_mm.pipeline.stream_text", lambda *_, **__: iter(ids))
    pieces = list(seeing.describe_stream(CLIP[0]))
    assert "".join(pieces) == "dé 🐕 x"
    assert len(pieces) < len(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_checkpoint_keeps_the_eyes(seeing, checkpoint):
    model, tokenizer = load_checkpoint(checkpoint)
    again = KimiMM(model, tokenizer)
    assert again.config == seeing.config
    assert again.describe(CLIP[0], max_tokens=5) == seeing.describe(CLIP[0], max_tokens=5)


def test_model_without_eyes_says_so(seeing):
    from kimi_mm.model import Model

    blind = KimiMM(Model(seeing.config.replace(name="blind", vision=None)), seeing.processor.tokenizer)
    with pytest.raises(UserError, match="model 'blind' has no eyes"):
        blind.describe(CLIP[0])
    with pytest.raises(UserError, match="no section 'vision'"):
        blind.reply([{"role": "user", "content": [{"type": "image", "image": CLIP[0]}]}])
    with pytest.raises(UserError, match="no section 'vision'"):
        blind.model(seeing.question_inputs(seeing.look(CLIP[0]), "What?"))


def test_nothing_to_describe(seeing):
    with pytest.raises(UserError, match="no picture"):
        seeing.describe([])
    with pytest.raises(UserError, match="question is empty"):
        seeing.describe(CLIP[0], " ")
