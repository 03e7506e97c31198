"""Two streams: delay, stop rules and budgets on forced logits; a reply reads the same when it is history."""

import pytest
import torch

from kimi_mm.config import ModelConfig
from kimi_mm.errors import UserError
from kimi_mm.generation_speech import SpeechSampling, TokenSampling, TwoStreams, choose
from kimi_mm.model import Model
from kimi_mm.processing import IGNORE, AudioClip, Processor
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.training.recipe import recipes_root

GREEDY = SpeechSampling(audio=TokenSampling(), max_text_tokens=20, max_audio_codes=20)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = Model(ModelConfig.from_yaml(recipes_root() / "models" / "debug-speech.yaml")).eval()
    for parameter in model.backbone.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # logits that differ by more than rounding
    return model


@pytest.fixture(scope="module")
def processor(model):
    return Processor(model.config.vocab, TextTokenizer.train(["a few words"] * 3, 300), audio_delay=3)


def ask(processor, *sizes):
    generator = torch.Generator().manual_seed(0)
    clips = [
        AudioClip(torch.randint(64, (n,), generator=generator), torch.randn(n, 128, generator=generator)) for n in sizes
    ]
    parts = [{"role": "user", "content": [{"type": "audio", "num_codes": n}]} for n in sizes]
    return processor.collate([processor.streams([part], output="speech") for part in parts], [[c] for c in clips])


def script(monkeypatch, model, text, audio):
    """Makes the heads choose the given ids, one a call, and then the last one for ever."""
    vocab = model.config.vocab
    calls = {"text": 0, "audio": 0}

    def head(name, ids):
        def logits(hidden, bound=None):
            out = torch.zeros(len(hidden), vocab.size)
            out[:, ids[min(calls[name], len(ids) - 1)]] = 9.0
            calls[name] += 1
            return out[:, :bound]

        return logits

    monkeypatch.setattr(model.backbone, "text_logits", head("text", text))
    monkeypatch.setattr(model.backbone, "audio_logits", head("audio", audio))
    return calls


def names(model):
    vocab = model.config.vocab
    return vocab.special("text_eos"), vocab.special("msg_end"), vocab.special("media_end"), vocab.audio_offset


def run(model, inputs, sampling=GREEDY, **options):
    streams = TwoStreams(model, inputs, sampling=sampling, delay=3, **options)
    steps = [[(step.text, step.code) for step in given] for given in streams]
    return steps, streams.results


def test_audio_trails_text_and_ends_the_reply(model, processor, monkeypatch):
    eos, end, _, offset = names(model)
    calls = script(monkeypatch, model, [7, 8, eos], [offset + 1, offset + 2, end])
    steps, [result] = run(model, ask(processor, 4))
    assert steps == [[(7, None)], [(8, None)], [(None, None)], [(None, 1)], [(None, 2)], [(None, None)]]
    assert (result.text_ids, result.codes) == ([7, 8], [1, 2])
    assert (result.text_stop, result.audio_stop) == ("eos", "eos")
    assert calls == {"text": 3, "audio": 3}  # neither head runs where its stream is forced


def test_the_end_of_audio_ends_text_too(model, processor, monkeypatch):
    _, _, media_end, offset = names(model)
    script(monkeypatch, model, [7, 8, 9, 10, 11, 12], [offset, media_end])
    _, [result] = run(model, ask(processor, 4))
    assert (result.text_ids, result.codes) == ([7, 8, 9, 10, 11], [0])
    assert (result.text_stop, result.audio_stop) == ("audio", "eos")


def test_budgets_are_separate(model, processor, monkeypatch):
    eos, end, _, offset = names(model)
    script(monkeypatch, model, [7, 8, 9, 10, 11, 12, eos], [offset])
    sampling = SpeechSampling(audio=TokenSampling(), max_text_tokens=50, max_audio_codes=2)
    _, [result] = run(model, ask(processor, 4), sampling)
    assert (result.text_ids, result.codes) == ([7, 8, 9, 10, 11, 12], [0, 0])  # text goes on to its own end
    assert (result.text_stop, result.audio_stop) == ("eos", "budget")

    script(monkeypatch, model, [7, 8, 9], [offset + 5, offset + 6, offset + 7, end])
    sampling = SpeechSampling(audio=TokenSampling(), max_text_tokens=2, max_audio_codes=50)
    _, [result] = run(model, ask(processor, 4), sampling)
    assert (result.text_ids, result.codes) == ([7, 8], [5, 6, 7])
    assert (result.text_stop, result.audio_stop) == ("budget", "eos")

    _, [result] = run(model, ask(processor, 4), SpeechSampling(max_text_tokens=0, max_audio_codes=0))
    assert (result.text_stop, result.audio_stop, result.codes) == ("budget", "budget", [])


def test_text_that_repeats_itself_stops(model, processor, monkeypatch):
    _, end, _, offset = names(model)
    script(monkeypatch, model, [7], [*[offset] * 30, end])
    _, [result] = run(model, ask(processor, 4), SpeechSampling(audio=TokenSampling(), max_text_tokens=99))
    assert (result.text_stop, result.audio_stop, len(result.codes)) == ("loop", "eos", 30)


def test_speech_may_be_kept_from_ending_at_once(model, processor, monkeypatch):
    eos, end, _, _ = names(model)
    script(monkeypatch, model, [eos], [end])
    _, [result] = run(model, ask(processor, 4))
    assert (result.codes, result.audio_stop) == ([], "eos")
    sampling = SpeechSampling(audio=TokenSampling(), min_audio_codes=4)
    _, [result] = run(model, ask(processor, 4), sampling)
    assert (len(result.codes), result.audio_stop) == (4, "eos")


@pytest.mark.parametrize("temperature", [0.0, 6.0])
def test_each_stream_gets_its_own_ids_only(model, processor, temperature):
    both = TokenSampling(temperature=temperature)
    sampling = SpeechSampling(text=both, audio=both, max_text_tokens=30, max_audio_codes=30)
    for result in run(model, ask(processor, 4, 9, 2), sampling)[1]:
        assert all(0 <= id < model.config.vocab.num_text_tokens for id in result.text_ids)
        assert all(0 <= code < 64 for code in result.codes)
        assert result.done


def test_batch_equals_alone(model, processor):
    sampling = SpeechSampling(audio=TokenSampling(), max_text_tokens=9, max_audio_codes=14)
    _, together = run(model, ask(processor, 4, 9, 2), sampling)
    inputs = ask(processor, 4, 9, 2)
    for row in range(3):
        n = int(inputs.lengths[row])
        one = type(inputs)(
            inputs.text_ids[row : row + 1, :n],
            inputs.audio_ids[row : row + 1, :n],
            inputs.lengths[row : row + 1],
            inputs.features[row : row + 1, :n],
            inputs.feature_mask[row : row + 1, :n],
        )
        assert run(model, one, sampling)[1] == [together[row]]


def test_sampling_follows_the_generator(model, processor):
    sampling = SpeechSampling(text=TokenSampling(temperature=1.0), max_text_tokens=9, max_audio_codes=14)

    def draw(seed):
        return run(model, ask(processor, 4, 9), sampling, generator=torch.Generator().manual_seed(seed))[1]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_a_reply_reads_the_same_as_history(model, processor):
    """What was fed step by step is what the processor lays out, and one pass over it predicts the same ids."""
    text = processor.tokenizer.encode("few words")
    prompt = processor.streams([], output="speech")
    sampling = SpeechSampling(audio=TokenSampling(), max_audio_codes=12, min_audio_codes=12)
    streams = TwoStreams(model, processor.collate([prompt], [[]]), sampling=sampling, forced=[text], delay=3)
    [result] = streams.run()
    assert (result.text_ids, result.text_stop) == (text, "eos")
    content = [{"type": "text", "text": "few words"}, {"type": "audio", "codes": result.codes}]
    message = {"role": "assistant", "content": content}
    history = processor.streams([message], output="speech", add_assistant_start=False)
    row = streams._rows[0]
    assert history.audio == [*prompt.audio, *row.audio_history, processor.ids["msg_end"]]
    assert history.text == [*prompt.text, *row.text_history, processor.ids["text_blank"]]
    inputs = processor.collate([history], [[]])
    labels = inputs.audio_labels[0]
    at = (labels >= model.config.vocab.audio_offset).nonzero()[:, 0]
    with torch.inference_mode():
        logits = model.backbone.audio_logits(model(inputs).audio_hidden[0, at])[:, model.config.vocab.audio_offset :]
    assert (logits.argmax(-1)).tolist() == result.codes
    assert labels[at[-1] + 1] == processor.ids["msg_end"]
    assert (labels[: at[0]] == IGNORE).all()
    assert at[0] == len(prompt) - 1 + 3

    inline = processor.collate([history], [[]])
    content[1] = {"type": "audio", "num_codes": 12}
    later = processor.streams([message], output="speech", add_assistant_start=False)
    filled = processor.collate([later], [[AudioClip(torch.tensor(result.codes))]])
    for name in ("audio_ids", "text_ids", "audio_labels", "text_labels"):
        assert torch.equal(getattr(inline, name), getattr(filled, name)), name
    assert filled.features is None


@torch.inference_mode()
def test_free_choice_in_one_pass(model, processor):
    """Both streams chosen by the model, with features in the prompt: prefill of the whole equals the steps."""
    inputs = ask(processor, 5)
    streams = TwoStreams(model, inputs, sampling=GREEDY, delay=3)
    [result] = streams.run()
    row, start = streams._rows[0], int(inputs.lengths[0])
    grown = {
        "text_ids": torch.cat([inputs.text_ids, torch.tensor([row.text_history])], 1),
        "audio_ids": torch.cat([inputs.audio_ids, torch.tensor([row.audio_history])], 1),
    }
    more = len(row.text_history)
    features = torch.nn.functional.pad(inputs.features, (0, 0, 0, more))
    mask = torch.nn.functional.pad(inputs.feature_mask, (0, more))
    with torch.inference_mode():
        whole = model(type(inputs)(**grown, lengths=torch.tensor([start + more]), features=features, feature_mask=mask))
    offset = model.config.vocab.audio_offset
    audio = model.backbone.audio_logits(whole.audio_hidden[0])[:, offset:].argmax(-1)
    first = start - 1 + 3
    assert audio[first : first + len(result.codes)].tolist() == result.codes
    text = model.backbone.text_logits(whole.text_hidden[0], model.config.vocab.num_text_tokens).argmax(-1)
    assert text[start - 1 : start - 1 + len(result.text_ids)].tolist() == result.text_ids


def test_speech_cut_short_waits_for_its_text(processor):
    content = [{"type": "text", "text": "few words few words few words"}, {"type": "audio", "codes": [5]}]
    streams = processor.streams([{"role": "assistant", "content": content}], add_assistant_start=False)
    blank, ids = processor.ids["text_blank"], processor.tokenizer.encode("few words few words few words")
    assert len(ids) > 4
    assert streams.text[1:-1] == [*ids, processor.ids["text_eos"]]
    assert streams.audio[1:] == [blank] * 3 + [processor.vocab.audio_offset + 5] + [blank] * (len(ids) - 3) + [
        processor.ids["msg_end"]
    ]
    assert processor.ids["msg_end"] not in streams.audio_labels
    for wrong in ([], [{"type": "audio", "codes": []}], [{"type": "audio", "codes": [1]}] * 2):
        with pytest.raises(UserError):
            processor.streams([{"role": "assistant", "content": wrong}])


def test_choice_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]])
    generator = torch.Generator().manual_seed(3)

    def draws(**options):
        sampling = TokenSampling(temperature=1.0, **options)
        return {choose(logits.clone(), sampling, [[]], generator)[0] for _ in range(200)}

    assert draws() == {0, 1, 2, 3}
    assert draws(top_k=2) == {0, 1}
    assert draws(top_p=0.5) == {0}
    assert draws(top_p=0.8) == {0, 1}
    penal = TokenSampling(repetition_penalty=3.0, penalty_window=2)
    assert choose(logits.clone(), penal, [[0, 0]], generator) == [0]  # not more steps than the window yet
    assert choose(logits.clone(), penal, [[1, 0, 0]], generator) == [1]
    changed = logits.clone()
    choose(changed, penal, [[9, 0, 3]], generator)
    assert torch.allclose(changed, torch.tensor([[2 / 3, 1.0, 0.5, -3.0]]))
    before = generator.get_state()
    choose(logits.clone(), TokenSampling(), [[]], generator)
    assert torch.equal(before, generator.get_state())


def test_frequencies_are_those_of_the_softmax():
    logits, n = torch.tensor([[1.0, 0.0, -1.0]]), 4000
    generator = torch.Generator().manual_seed(0)
    picked = choose(logits.repeat(n, 1), TokenSampling(temperature=1.0), [[]] * n, generator)
    share = torch.bincount(torch.tensor(picked), minlength=3) / n
    assert torch.allclose(share, logits[0].softmax(-1), atol=0.03)


def test_bad_settings(processor):
    for options in ({"temperature": -1.0}, {"top_p": 0.0}, {"repetition_penalty": 0.5}, {"penalty_window": 0}):
        with pytest.raises(UserError):
            TokenSampling(**options)
    with pytest.raises(UserError, match="budgets"):
        SpeechSampling(max_audio_codes=-1)
    mute = Model(ModelConfig.from_yaml(recipes_root() / "models" / "debug.yaml"))
    with pytest.raises(UserError, match="does not speak"):
        TwoStreams(mute, processor.collate([processor.streams([])], [[]]))
