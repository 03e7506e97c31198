"""States kept from turn to turn: the same answers, from where the conversation was left, and never of another one."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from kimi_mm.generation import TextSampling
from kimi_mm.generation_speech import Reply, SpeechSampling
from kimi_mm.processing import AudioClip
from kimi_mm.serving.batch import Prompt, Row, RunningBatch, SpokenRow
from kimi_mm.serving.prefixes import Kept, Prefixes, places_of
from kimi_mm.serving.speaking import spoken_row
from kimi_mm.serving.voices import Voice
from kimi_mm.speech import open_voice

SOUND = (0.3 * np.sin(np.arange(16_000) * 0.05)).astype(np.float32)
PICTURE = Image.new("RGB", (40, 30), "red")


def run(batch: RunningBatch, rows: list[Row]) -> None:
    batch.admit(rows)
    while batch.rows:
        batch.step()


def turn(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


ASKED = [
    turn({"type": "text", "text": "What is in the image?"}, {"type": "image", "image": PICTURE}),
    turn({"type": "audio", "audio": SOUND}),
    turn({"type": "text", "text": "red dogs"}),
]


def converse(able, batch: RunningBatch, aloud: bool) -> list[Row]:
    """Three turns, each answered; answers go back as text, or as text and codes."""
    messages: list[dict] = []
    rows: list[Row] = []
    for number, asked in enumerate(ASKED):
        messages.append(asked)
        prompt = Prompt(*able.read(messages, "speech" if aloud else "text"))
        if aloud:
            sampling = SpeechSampling(max_text_tokens=14, max_audio_codes=20, min_audio_codes=5)
            row = spoken_row(able, prompt, sampling, torch.Generator().manual_seed(number))
        else:
            row = Row(prompt, TextSampling(max_tokens=9), kept=True)
        run(batch, [row])
        rows.append(row)
        content = [{"type": "text", "text": able.processor.tokenizer.decode(row.ids)}]
        if aloud:
            content.append({"type": "audio", "codes": row.reply.result.codes})  # type: ignore[attr-defined]
        messages.append({"role": "assistant", "content": content})
    return rows


@pytest.mark.parametrize("aloud", [False, True])
def test_answers_are_the_same_and_earlier_turns_are_not_read_again(able, aloud):
    with_states, without = RunningBatch(able), RunningBatch(able, reuse_bytes=0)
    rows, alone = converse(able, with_states, aloud), converse(able, without, aloud)
    assert [row.ids for row in rows] == [row.ids for row in alone]
    if aloud:
        assert [row.reply.result for row in rows] == [row.reply.result for row in alone]  # type: ignore[attr-defined]
    assert [row.reused for row in alone] == [0, 0, 0]
    assert rows[0].reused == 0
    for before, row in itertools.pairwise(rows):
        assert row.reused >= len(before.prompt)
    assert with_states.prefixes.hits == 2
    assert with_states.prefixes.positions == sum(row.reused for row in rows)
    assert without.prefixes.held_bytes == len(without.prefixes) == 0


def test_what_was_answered_is_not_read_again(able):
    """Where an answer's ids read back as the same ids, nothing of it is read again but its end."""
    batch, tokenizer = RunningBatch(able), able.processor.tokenizer

    def go_on(asked: str, content: list[dict]) -> int:
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": content}, ASKED[2]]
        row = Row(Prompt(*able.read(messages)), TextSampling(max_tokens=1), kept=True)
        run(batch, [row])
        return row.reused

    found = 0
    for number in range(40):
        row = Row(Prompt(*able.read([{"role": "user", "content": str(number)}])), TextSampling(max_tokens=2), kept=True)
        run(batch, [row])
        text = tokenizer.decode(row.ids)
        if tokenizer.encode(text) == row.ids and row.stop_reason == "budget":
            # The last id was chosen and not read.
            assert go_on(str(number), [{"type": "text", "text": text}]) == len(row.prompt) + 1
            found += 1
    assert found

    prompt = Prompt(*able.read([{"role": "user", "content": "dogs"}]))
    said, sampling = tokenizer.encode("red dogs"), SpeechSampling(max_audio_codes=12, min_audio_codes=12)
    reply = Reply(able.config.vocab, able.config.audio_delay, sampling, said)
    row = SpokenRow(prompt, kept=True, reply=reply, voice=Voice(open_voice(able, torch.Generator())))
    run(batch, [row])
    assert len(row.fed) == able.config.audio_delay + 11
    content = [{"type": "text", "text": "red dogs"}, {"type": "audio", "codes": reply.result.codes}]
    assert go_on("dogs", content) == len(prompt) + len(row.fed)
    assert go_on("dogs", [content[0], {"type": "audio", "codes": reply.result.codes[:5]}]) == len(prompt)  # interrupted


def test_rows_that_go_on_and_rows_that_begin_share_a_batch(able):
    batch, fresh = RunningBatch(able), RunningBatch(able, reuse_bytes=0)
    first = Row(Prompt(*able.read(ASKED[:1])), TextSampling(max_tokens=5), kept=True)
    run(batch, [first])

    def rows() -> list[Row]:
        asked = [ASKED[:1], ASKED[1:2], [*ASKED[:1], {"role": "assistant", "content": "dogs"}, ASKED[2]], ASKED[2:]]
        return [Row(Prompt(*able.read(messages)), TextSampling(max_tokens=12), kept=True) for messages in asked]

    found, expected = rows(), rows()
    run(batch, found)
    for row in expected:
        run(fresh, [row])
    assert [row.ids for row in found] == [row.ids for row in expected]
    assert [row.reused for row in found] == [len(first.prompt), 0, len(first.prompt), 0]  # the first as a whole


def test_what_lies_under_the_same_ids_counts(able):
    streams, clips, items = able.read([turn(*ASKED[0]["content"], *ASKED[1]["content"])])
    places = places_of(streams, clips, items)
    assert np.array_equal(places, places_of(streams, clips, items))
    assert clips[0].features is not None
    other_features = [AudioClip(clips[0].codes, clips[0].features + 1e-6)]
    other_codes = [AudioClip((clips[0].codes + 1) % 64, clips[0].features)]
    other_picture = [dataclasses.replace(items[0], pixel_values=items[0].pixel_values * 0.999)]
    for changed in ((other_features, items), (other_codes, items), (clips, other_picture)):
        assert not np.array_equal(places, places_of(streams, *changed))
    store, cache = Prefixes(2**20), able.model.backbone.new_cache(1)
    cut = len(places) - 1
    store.keep(places[:cut], Kept(cache, [torch.zeros(1, 1, 4)]))
    assert store.find(places) is not None
    for changed in ((other_features, items), (other_codes, items), (clips, other_picture)):
        assert store.find(places_of(streams, *changed)) is None
    assert store.find(places[: cut - 1]) is None
    assert (store.hits, store.misses) == (1, 4)


def test_memory_is_bounded_and_the_longest_unused_goes_first(able):
    cache = able.model.backbone.new_cache(1)
    kept = Kept(cache, [torch.zeros(1, 1, 1000)])
    store = Prefixes(3 * kept.bytes)
    places = [np.full((number + 1, 6), number, np.int64) for number in range(5)]
    for number in range(3):
        store.keep(places[number], kept)
    store.keep(places[1], kept)  # again, which takes no room
    assert store.held_bytes == 3 * kept.bytes
    assert store.find(places[0]) is not None
    store.keep(places[3], kept)
    assert store.find(places[2]) is None
    assert all(store.find(places[number]) is not None for number in (0, 1, 3))
    assert store.held_bytes == 3 * kept.bytes
    small = Prefixes(kept.bytes - 1)
    small.keep(places[0], kept)
    assert len(small) == 0


def test_text_goes_on_from_either_kind_of_state_and_speech_from_its_own(able):
    """Rows of text do not run the audio branch, so what they leave behind is no start for a spoken answer."""
    prompt = Prompt(*able.read([ASKED[2]], "text"))

    def written() -> Row:
        return Row(prompt, TextSampling(max_tokens=5), kept=True)

    def spoken() -> SpokenRow:
        sampling = SpeechSampling(max_text_tokens=5, max_audio_codes=12, min_audio_codes=5)
        return spoken_row(able, prompt, sampling, torch.Generator().manual_seed(3))

    alone: list[Row] = [written(), spoken()]
    run(RunningBatch(able, reuse_bytes=0), alone)
    for first, then in itertools.permutations((written, spoken)):
        batch, rows = RunningBatch(able), [first(), then()]
        run(batch, rows[:1])
        run(batch, rows[1:])
        assert (rows[1].reused == len(prompt)) == (first is spoken)
        for row in rows:
            twin = alone[row.aloud]
            assert row.ids == twin.ids
            if isinstance(row, SpokenRow) and isinstance(twin, SpokenRow):
                assert row.reply.result == twin.reply.result
    assert able.model.backbone.new_cache(1, audio=False).layers  # the branch is what is left out, not all


def test_prompts_are_cut_between_turns_only(able):
    prompt = Prompt(*able.read([ASKED[0], {"role": "assistant", "content": "dogs"}, ASKED[1]]))
    picture = [at for at, item in enumerate(prompt.streams.item_index) if item == 0]
    assert prompt.after(picture[0] + 1) is None
    rest = prompt.after(picture[-1] + 1)
    assert rest is not None
    assert (len(rest), len(rest.items), len(rest.clips)) == (len(prompt) - picture[-1] - 1, 0, 1)
    assert max(rest.streams.clip_index) == 0
    assert len(prompt.after(len(prompt)) or ()) == 0


def test_clients_see_what_was_not_read_again(tiny, able):
    messages: list[dict] = [{"role": "user", "content": "What is in the video?"}]
    hits = tiny.metrics()["kimi_mm_prefix_hits"]

    def ask():
        return tiny.client().chat.completions.create(model="able", messages=messages, max_tokens=10)  # type: ignore[arg-type]

    first = ask()
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    said = first.choices[0].message.content
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "red?"}]
    second = ask()
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
    assert second.choices[0].message.content == "".join(able.reply(messages, max_tokens=10))
    assert tiny.metrics()["kimi_mm_prefix_hits"] == hits + 1
    assert 0 < tiny.metrics()["kimi_mm_prefix_bytes"] <= 128 * 2**20
