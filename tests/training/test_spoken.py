"""The stage "speech": batches against the processor's own layout, that both streams learn, what is refused."""

from collections import Counter

import numpy as np
import pytest
import torch

import kimi_mm
from kimi_mm.config import ConfigError
from kimi_mm.data.debug import write_debug_data, write_debug_dialogs, write_debug_targets
from kimi_mm.data.loader import training_texts
from kimi_mm.data.manifest import ManifestError
from kimi_mm.data.resample import to_16k
from kimi_mm.data.spoken_loader import END, SpokenLoader
from kimi_mm.errors import CheckpointError
from kimi_mm.generation_speech import SpeechSampling, TokenSampling
from kimi_mm.model import Model
from kimi_mm.processing import IGNORE, Processor
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.training.recipe import load_recipe
from kimi_mm.training.run import train
from kimi_mm.training.schedule import source_of_step
from kimi_mm.training.spoken_objective import SpokenObjective
from kimi_mm.types import CodePiece, Stopped


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Recipe on real files, processor, and objective in evaluation, in which nothing is disturbed."""
    folder = tmp_path_factory.mktemp("spoken")
    recipe, config = load_recipe("speech/nano", debug=True)
    targets, dialogs = (str(write(folder)) for write in (write_debug_targets, write_debug_dialogs))
    spoken = recipe.spoken.replace(targets=(targets,), dialogs=(dialogs,), written_share=0.3)
    _, texts = write_debug_data(folder)
    tokenizer = TextTokenizer.train(training_texts(texts), config.vocab.num_text_tokens)
    recipe = recipe.replace(spoken=spoken)
    torch.manual_seed(0)
    objective = SpokenObjective(Model(config), recipe)
    return recipe, Processor(config.vocab, tokenizer, audio_delay=config.audio_delay), objective.eval()


def codes_of(objective, wave, samples):
    """Codes [N] of one recording [S] float at 16 kHz, heard in a bucket of `samples`."""
    tokenizer, length = objective._tokenizer[0], torch.tensor([wave.shape[-1]])
    count = -(-wave.shape[-1] // 1280)
    padded = torch.nn.functional.pad(wave, (0, samples - wave.shape[-1]))[None]
    mask = (torch.arange(samples // 1280) < count)[None]
    return tokenizer.quantize(tokenizer.features_from_wave(padded, length), mask).codes[0, :count].tolist()


def expected(loader, objective, row, samples):
    """The row as the processor lays it out when it is given the codes."""
    messages = []
    for exchange in row:
        if exchange.question is not None:
            wave = torch.from_numpy(loader.heard.wave(loader.heard.utterances[exchange.question]) / np.float32(32768))
            codes = codes_of(objective, wave, samples)
            part = {"type": "audio", "codes": codes, "num_codes": len(codes)}
            messages.append({"role": "user", "content": [part]})
        elif loader.dialogs:
            messages.append({"role": "user", "content": exchange.written})
        item = loader.targets.utterances[exchange.answer]
        wave = torch.from_numpy(loader.targets.wave(item) / np.float32(32768))
        padded = torch.nn.functional.pad(wave, (0, samples * 3 // 2 - len(wave)))[None]
        codes = codes_of(objective, to_16k(padded)[0, : -(-len(wave) * 2 // 3)], samples)
        parts = [{"type": "text", "text": item.text}, {"type": "audio", "codes": codes}]
        messages.append({"role": "assistant", "content": parts})
    return loader.processor.streams(messages, output="speech", add_assistant_start=False)


def test_words_of_sentences_stand_by_letter_and_are_then_not_learnt(parts):
    recipe, given, objective = parts
    tokenizer = TextTokenizer.train(["buzz hum beep"] * 9, given.vocab.num_text_tokens)  # made-up speech, an id a word
    processor = Processor(given.vocab, tokenizer, audio_delay=40)
    loader = SpokenLoader(recipe.spoken.replace(spelled=(0.4, 1.0)), processor, 0, dialogs=False)
    spelled = learnt = 0
    for (_, rows), batch in zip(loader._plan(0)[:6], loader, strict=False):
        labelled = set((batch.text_positions // batch.text_ids.shape[1]).tolist())
        for b, [exchange] in enumerate(rows):
            item = loader.targets.utterances[exchange.answer]
            ids = loader._spelled(item.text, exchange.answer, -(-item.samples // 1920))
            assert batch.text_ids[b, 1 : 1 + len(ids)].tolist() == ids
            assert processor.tokenizer.decode(ids) == item.text
            by_letter = ids != processor.tokenizer.encode(item.text)
            assert (b in labelled) == (not by_letter)
            spelled, learnt = spelled + by_letter, learnt + (not by_letter)
        metrics = objective(batch, False)
        assert torch.isfinite(metrics["loss"])
        if not labelled:
            assert metrics["speak_text"] == 0
    assert spelled
    assert learnt
    plain = SpokenLoader(recipe.spoken, processor, 0, dialogs=False)
    assert all(len(batch.text_labels) for _, batch in zip(range(6), plain, strict=False))


@pytest.mark.parametrize("dialogs", [False, True])
def test_batches_are_laid_out_as_the_processor_does(parts, dialogs):
    recipe, processor, objective = parts
    loader = SpokenLoader(recipe.spoken, processor, 0, dialogs=dialogs)
    plan = loader._plan(0)
    kinds = set()
    for (seconds, rows), batch in zip(plan[:6], loader, strict=False):
        samples, (size, length) = round(seconds * 16_000), batch.text_ids.shape
        audio, codes = objective._said(batch.answers, batch.answer_lengths, batch.audio_ids, batch.answer_at)
        if dialogs:
            audio, features, mask = objective._questions(
                False, batch.questions, batch.question_lengths, audio, batch.question_at
            )
            assert features.shape[:2] == (size, length)
            assert torch.equal(mask, batch.question_at >= 0)
        text_labels, audio_labels = (torch.full((size * length,), IGNORE) for _ in range(2))
        text_labels[batch.text_positions] = batch.text_labels
        known = codes.flatten()[batch.audio_labels.clamp_min(0)] + processor.vocab.audio_offset
        audio_labels[batch.audio_positions] = torch.where(batch.audio_labels == END, processor.ids["msg_end"], known)
        for b, row in enumerate(rows):
            kinds.add((len(row), *(exchange.question is None for exchange in row)))
            want = expected(loader, objective, row, samples)
            got = {
                "text": batch.text_ids[b],
                "audio": audio[b],
                "text_labels": text_labels.view(size, length)[b],
                "audio_labels": audio_labels.view(size, length)[b],
            }
            for name, values in got.items():
                assert values[: len(want)].tolist() == getattr(want, name), name
            assert set(got["text"][len(want) :].tolist()) <= {processor.ids["pad"]}
            assert set(got["audio_labels"][len(want) - 1 :].tolist()) == {IGNORE}
            # The first code trails the first word by the delay; the last one is followed by the end.
            first_word = int((got["text_labels"] != IGNORE).nonzero()[0])
            assert int((got["audio_labels"] != IGNORE).nonzero()[0]) == first_word + processor.audio_delay
            assert (got["audio_labels"] == processor.ids["msg_end"]).sum() == len(row)
    assert kinds == {(1, True)} if not dialogs else {len(kind) for kind in kinds} == {2, 3} and (1, False) in kinds


def test_wrong_history_leaves_labels_alone(parts):
    recipe, processor, _ = parts
    torch.manual_seed(0)
    model = Model(load_recipe("speech/nano", debug=True)[1])
    objective = SpokenObjective(model, recipe.replace(token_corruption=0.5)).train()
    batch = next(iter(SpokenLoader(recipe.spoken, processor, 0, dialogs=False)))
    given = (batch.answers, batch.answer_lengths, batch.audio_ids, batch.answer_at)
    shown, codes = objective._said(*given)
    right, same = objective.eval()._said(*given)
    assert torch.equal(codes, same)
    differs = shown != right
    assert 0.3 < differs[batch.answer_at >= 0].float().mean() < 0.65
    assert not differs[batch.answer_at < 0].any()


def test_order_and_place_are_those_of_a_loader_that_never_stopped(parts):
    recipe, processor, _ = parts
    whole = SpokenLoader(recipe.spoken, processor, 3, dialogs=True)
    batches = iter(whole)
    for _ in range(len(whole._plan(0)) + 1):  # into the second epoch
        next(batches)
    other = SpokenLoader(recipe.spoken, processor, 3, dialogs=True)
    other.load_state_dict(whole.state_dict())
    a, b = next(batches), next(iter(other))
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))


def test_every_share_has_its_steps():
    recipe, _ = load_recipe("speech/nano")
    drawn = Counter(source_of_step(recipe, step) for step in range(2000))
    shares = {"text": 0.05, "speech": 0.15, "sentences": 0.4, "dialogs": 0.4}
    assert drawn.keys() == shares.keys()
    assert all(abs(drawn[name] / 2000 - share) < 0.04 for name, share in shares.items())
    debug, _ = load_recipe("speech/nano", debug=True)
    assert {source_of_step(debug, step) for step in range(debug.steps)} == shares.keys()
    no_dialogs = recipe.replace(text_share=0.1, speech_share=0.2, tts_share=0.7)
    assert "dialogs" not in {source_of_step(no_dialogs, step) for step in range(2000)}


def test_both_streams_learn(tmp_path):
    chosen = ["text_share=0", "speech_share=0", "tts_share=0.5", "steps=90", "save_every=90", "log_every=6"]
    chosen += ["optim.warmup_steps=5", "optim.lr=5e-3", "token_corruption=0"]
    first = train("speech/nano", debug=True, output=tmp_path, overrides=[*chosen, "stop_after=6"])
    last = train("speech/nano", debug=True, output=tmp_path, overrides=chosen)
    for name in ("speak_text", "speak_audio", "answer_text", "answer_audio"):
        assert last[name] < 0.8 * first[name], name
    assert last["speak_right"] > first["speak_right"]
    # What was read out in training lasts 0.8 s, and so does what the model says now: the layouts agree.
    engine = kimi_mm.load(tmp_path / "model")
    sampling = SpeechSampling(audio=TokenSampling(temperature=0.0))
    events = list(engine.speak_stream("buzz", sampling=sampling, generator=torch.Generator().manual_seed(0)))
    said = [code for event in events if isinstance(event, CodePiece) for code in event.codes]
    assert 8 <= len(said) <= 12
    assert [event.audio for event in events if isinstance(event, Stopped)] == ["eos"]


def test_what_cannot_be_learnt_from_is_refused(parts, tmp_path):
    recipe, processor, _ = parts
    with pytest.raises(CheckpointError, match=r"spoken\.targets: no folder"):
        SpokenLoader(recipe.spoken.replace(targets=()), processor, 0, dialogs=False)
    with pytest.raises(CheckpointError, match="no target shards"):
        SpokenLoader(recipe.spoken.replace(dialogs=(str(tmp_path),)), processor, 0, dialogs=True)
    with pytest.raises(CheckpointError, match="batch_seconds smaller"):
        next(iter(SpokenLoader(recipe.spoken.replace(batch_seconds=1e6), processor, 0, dialogs=False)))
    with pytest.raises(ConfigError, match=r"multiples of 0\.08"):
        recipe.spoken.replace(buckets=(1.0,))
    with pytest.raises(ConfigError, match="add up to more than 1"):
        recipe.replace(text_share=0.5, speech_share=0.3, tts_share=0.3)
    _, deaf = load_recipe("asr/nano", debug=True)
    with pytest.raises(ConfigError, match="no audio branch"):
        SpokenObjective(Model(deaf), recipe)


def test_dialogs_with_a_missing_recording_are_left_out(parts, tmp_path):
    recipe, processor, _ = parts
    folder = write_debug_dialogs(tmp_path)
    config = recipe.spoken.replace(dialogs=(str(folder),))
    before = SpokenLoader(config, processor, 0, dialogs=True).rows
    index = folder / "questions" / "shard-00000.jsonl"
    kept = [line for line in index.read_text().splitlines() if '"say one"' not in line]
    index.write_text("\n".join(kept) + "\n")
    after = SpokenLoader(config, processor, 0, dialogs=True).rows
    assert after == [row for row in before if "say one" not in dict(row)]
    assert 0 < len(after) < len(before)
    (folder / "dialogs.jsonl").unlink()
    with pytest.raises(ManifestError, match="prepare dialogs"):
        SpokenLoader(config, processor, 0, dialogs=True)
