"""Speech as it comes: the same samples for any cutting, whole codes, sound numbers; sentences; conversations."""

import numpy as np
import pytest
import torch

from kimi_mm.config import ModelConfig
from kimi_mm.conversation import Conversation
from kimi_mm.errors import AudioError, UserError
from kimi_mm.generation_speech import SpeechSampling, TokenSampling
from kimi_mm.model import Model
from kimi_mm.pipeline import KimiMM
from kimi_mm.text.sentences import LONGEST, speakable
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.training.recipe import recipes_root
from kimi_mm.types import CodePiece, Stopped, TextPiece, WavePiece

SHORT = SpeechSampling(max_text_tokens=12, max_audio_codes=17)


def build(name: str) -> KimiMM:
    torch.manual_seed(0)
    model = Model(ModelConfig.from_yaml(recipes_root() / "models" / f"{name}.yaml"))
    if model.detokenizer is not None:
        for parameter in model.detokenizer.dit.parameters():
            torch.nn.init.normal_(parameter, std=0.1)  # gates start at zero, where nothing sees its past
    return KimiMM(model, TextTokenizer.train(["a few words"] * 3, 300))


@pytest.fixture(scope="module")
def engine():
    return build("debug-speech")


@pytest.fixture(scope="module")
def tone():
    return (0.3 * np.sin(np.arange(16_000) * 0.05)).astype(np.float32)


def codes_of(events):
    return [code for event in events if isinstance(event, CodePiece) for code in event.codes]


def wave_of(events):
    return np.concatenate([event.wave for event in events if isinstance(event, WavePiece)])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_stream_equals_its_codes_decoded_at_once(engine, tone):
    message = {"role": "user", "content": [{"type": "audio", "audio": tone}]}
    sampling = SpeechSampling(max_text_tokens=12, max_audio_codes=17, min_audio_codes=17)
    events = list(engine.stream([message], sampling=sampling, generator=seeded()))
    codes, wave = codes_of(events), wave_of(events)
    assert len(codes) == 17
    assert wave.shape == (17 * 1920,)
    noise = seeded(int(torch.randint(2**31, (1,), generator=seeded())))
    whole = engine.detokenizer.decode(codes, generator=noise).numpy()
    assert np.allclose(wave, whole, atol=1e-6)
    assert isinstance(events[-1], Stopped)
    first = next(i for i, event in enumerate(events) if isinstance(event, WavePiece))
    assert len(codes_of(events[:first])) == engine.detokenizer.config.streaming.first_chunk_codes


def test_samples_depend_on_the_seed_alone(engine, tone):
    messages = [{"role": "user", "content": [{"type": "text", "text": "few"}, {"type": "audio", "audio": tone}]}]

    def draw(seed):
        return list(engine.stream(messages, sampling=SHORT, generator=seeded(seed)))

    a, b, c = draw(0), draw(0), draw(1)
    assert codes_of(a) == codes_of(b)
    assert [e.text for e in a if isinstance(e, TextPiece)] == [e.text for e in b if isinstance(e, TextPiece)]
    assert np.array_equal(wave_of(a), wave_of(b))
    assert codes_of(a) != codes_of(c)


def test_speaking_says_every_sentence(engine):
    events = list(engine.speak_stream("One few. Two words!", generator=seeded()))
    assert "".join(e.text for e in events if isinstance(e, TextPiece)) == "One few. Two words!"
    wave = engine.speak("One few. Two words!", generator=seeded())
    assert np.array_equal(wave, wave_of(events))
    assert len(wave) == 1920 * len(codes_of(events))
    assert np.isfinite(wave).all()
    assert np.abs(wave).max() <= 1.0
    assert isinstance(events[-1], Stopped)
    assert events[-1].audio in ("eos", "budget")


def test_a_book_begins_to_sound_at_once(engine):
    text = "few words and more of them " * 400
    assert len(text) > 10_000
    codes = 0
    for event in engine.speak_stream(text):
        codes += isinstance(event, CodePiece)
        if isinstance(event, WavePiece):
            break
    assert codes <= engine.detokenizer.config.streaming.first_chunk_codes


@pytest.mark.parametrize("text", ["", "  \n", "...", "🙂", "—?!", "你好"])
def test_what_cannot_be_spoken_is_refused(engine, text):
    with pytest.raises(UserError, match="nothing that can be spoken"):
        engine.speak(text)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It is 5:30. Call 911!", ["It is five thirty.", "Call nine hundred eleven!"]),
        ("café crème", ["Cafe creme."]),
        ("one\n\ntwo\nthree", ["One.", "Two.", "Three."]),
        ('She said "yes" & left…', ["She said yes and left."]),
        ("... 50% of it", ["Fifty percent of it."]),
    ],
)
def test_sentences(text, sentences):
    assert speakable(text) == sentences


@pytest.mark.parametrize("unit", ["word ", "word, ", "a", "half a clause of words, "])
def test_long_text_is_cut_and_nothing_lost(unit):
    text = unit * (10_000 // len(unit))
    pieces = speakable(text)
    assert max(map(len, pieces)) <= LONGEST + 1
    assert sum(c.isalpha() for piece in pieces for c in piece) == sum(c.isalpha() for c in text)


def test_a_conversation_remembers(engine, tone):
    talk = Conversation(engine, sampling=SHORT, generator=seeded())
    first = list(talk.say(audio=tone))
    second = list(talk.say("few words"))
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[1]["content"][-1] == {"type": "audio", "codes": codes_of(first)}
    assert codes_of(second)
    heard = talk.messages[0]["content"][0]["audio"]
    assert len(heard) == 13  # tokenized once, features kept
    alone = list(Conversation(engine, sampling=SHORT, generator=seeded()).say("few words"))
    again = Conversation(engine, sampling=SHORT, generator=seeded())
    assert codes_of(again.say(audio=tone)) == codes_of(first)
    assert codes_of(again.say("few words")) == codes_of(second) != codes_of(alone)


def test_a_reply_left_early_stays_as_far_as_it_was_said(engine):
    talk = Conversation(engine, sampling=SpeechSampling(max_audio_codes=50, min_audio_codes=50), generator=seeded())
    events, taken = talk.say("few words"), []
    for event in events:
        taken.append(event)
        if len(codes_of(taken)) == 3:
            break
    events.close()
    assert talk.messages[-1]["content"][-1]["codes"] == codes_of(taken)
    assert len(list(talk.say("few"))) > 3


def test_bad_turns_leave_the_conversation_as_it_was(engine, tmp_path):
    talk = Conversation(engine, sampling=SHORT)
    for turn in ({}, {"text": " "}, {"audio": tmp_path / "none.wav"}, {"audio": np.zeros(0, np.float32)}):
        with pytest.raises(UserError):
            talk.say(**turn)
    with pytest.raises(AudioError, match="NaN"):
        talk.say(audio=np.full(1600, np.nan, np.float32))
    with pytest.raises(AudioError, match="sample rate"):
        talk.say(audio=np.zeros(1600, np.float32), sample_rate=10)
    assert talk.messages == []
    said = {"role": "assistant", "content": [{"type": "text", "text": "few"}, {"type": "audio", "codes": [64]}]}
    with pytest.raises(AudioError, match="not in the codebook"):
        engine.stream([said, {"role": "user", "content": "few"}])


def test_a_voice_changes_the_sound(engine, tone):
    plain, other = (engine.speak("few", generator=seeded(), voice=v) for v in (None, engine.voice(tone)))
    assert plain.shape == other.shape
    assert not np.array_equal(plain, other)


def test_damaged_weights_make_no_noise():
    engine = build("debug-speech")
    with torch.no_grad():
        engine.detokenizer.dit.output.weight.fill_(float("nan"))
    with pytest.raises(AudioError, match="damaged"):
        engine.speak("few words", sampling=SpeechSampling(audio=TokenSampling()))


def test_a_mute_model_says_so():
    engine = build("debug")
    for speak in (lambda: engine.speak("Hi."), lambda: engine.stream([]), lambda: Conversation(engine)):
        with pytest.raises(UserError, match="no voice"):
            speak()
