"""What every implementation of Kimi-Audio has to agree on, numbers of its released code, one test each.

| invariant                                                                  | test                                    |
|----------------------------------------------------------------------------|-----------------------------------------|
| n samples: sum over 30 s of (n - 1) // 1280 + 1 codes; features [N, 5120]; | test_codes_frames_and_positions         |
|   4 N encoder frames; N + 2 positions                                      |                                         |
| media span = continuous positions = rows of features; streams and mask are | test_streams_stay_equally_long          |
|   equally long after every message                                         |                                         |
| 1 s = 12.5 codes = 50 mel frames = 24,000 samples; a code = 4 frames       | test_rates                              |
| 34 caches; both heads over 168,448 ids; the branch leaves layer 21 before  | test_branches_and_heads,                |
|   its norm; both streams' logits in float64 to 1e-6                        |   test_logits_in_float64                |
| M codes = 1920 M samples, whatever the chunks (100, chunk 30, ahead 12)    | test_length_does_not_depend_on_chunks   |
| 30 passes for a chunk that is not the last, 29 for the last; times         | test_passes_and_times                   |
|   0, 34, 68, 103, 137, 172 ... 965, and 999                                |                                         |
| call k reads 48 (k > 0) + 120 frames, keeps all but 48; 30, 30, 30, 10     | test_look_ahead_bookkeeping             |
|   codes keep 72, 120, 120, 88                                              |                                         |
| a first chunk that is the last: no look-ahead, no fades, one vocoder call  | test_a_single_chunk                     |
| a short last chunk has the 48 frames before it; 60 codes end with the      | test_last_chunks                        |
|   second chunk                                                             |                                         |
| one randn(T, 80) a call; text is drawn before audio; greedy draws nothing  | test_noise_is_drawn_once_a_call,        |
|                                                                            |   test_text_is_drawn_before_audio       |
| bf16 but for codes, rotations, the table of times and the sampler          | test_sixteen_bits                       |
| logits, not ids, agree between kinds of arithmetic                         | test_logits_agree_between_types         |

Codes, features, prompts and the vocoder's pieces stand beside transformers and by formula in `test_parity`,
`test_published_models`, `tests/audio/test_dit.py` and `tests/audio/test_vocoder.py`.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import kimi_mm
import kimi_mm.processing
from kimi_mm.audio.detokenizer_published import PublishedPiece, published_pieces
from kimi_mm.audio.dit import DiT
from kimi_mm.conversion.presets import PRESETS
from kimi_mm.generation_speech import Reply, SpeechSampling, TokenSampling, choose, next_ids
from kimi_mm.model import Model
from kimi_mm.processing import ModelInputs
from tests.conversion.test_parity import published_state, qwen2
from tests.conversion.tiny import kimi_audio


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return kimi_audio(tmp_path_factory.mktemp("invariants"), torch.float32)


@pytest.fixture(scope="module")
def engine(folder):
    return kimi_mm.load(folder)


def tone(samples: int) -> torch.Tensor:
    return 0.1 * torch.sin(torch.arange(samples) * 0.05)


def pieces(engine, count: int, generator: torch.Generator | None = None) -> list[PublishedPiece]:
    codes = torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(count)).tolist()
    return list(published_pieces(engine.detokenizer, codes, generator))


# ---- audio in --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 1280, 1281, 16_000, 480_000, 480_001])
def test_codes_frames_and_positions(engine, samples):
    heard = engine.tokenizer.encode(tone(samples))
    want = sum((min(480_000, samples - at) - 1) // 1280 + 1 for at in range(0, samples, 480_000))
    assert len(heard.codes) == want
    # Four encoder frames side by side are a row; 1280 channels each in the published encoder.
    assert heard.features.shape == (want, 4 * engine.config.audio.feature_encoder.hidden_size)
    published = PRESETS["kimi-audio-7b"].config
    assert published.audio.feature_size == published.backbone.adaptor_input_size == 5120
    streams = engine.processor.streams([{"role": "user", "content": [{"type": "audio", "num_codes": want}]}])
    begin, end = (streams.audio.index(engine.processor.ids[f"media_{side}"]) for side in ("begin", "end"))
    assert end - begin + 1 == want + 2


def test_streams_stay_equally_long(engine):
    heard = [engine.tokenizer.encode(tone(samples)) for samples in (2000, 5000)]
    clips = [kimi_mm.processing.AudioClip(each.codes, each.features) for each in heard]
    parts = [{"type": "audio", "num_codes": len(each)} for each in heard]
    said = [{"type": "text", "text": "a"}, {"type": "audio", "codes": [1, 2, 3]}]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "in"}, parts[0]]},
        {"role": "assistant", "content": said},
        {"role": "user", "content": [parts[1]]},
        {"role": "assistant", "content": "the"},
    ]
    for count in range(1, len(messages) + 1):
        shown = messages[:count]
        streams = engine.processor.streams(shown, output="speech", add_assistant_start=False)
        assert len({len(values) for values in vars(streams).values()}) == 1
        inputs = engine.processor.collate([streams], [clips[: 1 + (count > 2)]])
        mask = inputs.feature_mask[0]
        ids = engine.processor.ids
        begins = [i for i, id in enumerate(streams.audio) if id == ids["media_begin"]]
        ends = [i for i, id in enumerate(streams.audio) if id == ids["media_end"]]
        for begin, end, clip in zip(begins, ends, clips, strict=False):
            assert end - begin - 1 == len(clip.codes) == len(clip.features) == int(mask[begin : end + 1].sum())
        assert int(mask.sum()) == sum(len(clip.codes) for clip in clips[: len(begins)])


def test_rates(engine):
    audio, voice = PRESETS["kimi-audio-7b"].config.audio, PRESETS["kimi-audio-7b"].config.detokenizer
    assert 16_000 / audio.samples_per_code == 12.5
    assert voice.mel.sample_rate / voice.mel.hop_length == 50
    assert (voice.frames_per_code, voice.samples_per_code) == (4, 1920)
    assert voice.mel.sample_rate == 24_000
    (piece,) = pieces(engine, 25)
    assert (len(piece.mel), len(piece.wave)) == (100, 48_000)  # two seconds


# ---- the language model ----------------------------------------------------------------------------------------------


def test_branches_and_heads():
    config = PRESETS["kimi-audio-7b"].config
    with torch.device("meta"):
        backbone = Model(config.replace(detokenizer=None, hears=False)).backbone
        cache = backbone.new_cache(1, device="meta")
        output = backbone(torch.zeros(1, 3, 3584, device="meta"), cache=cache)
    assert len(cache.layers) == 34
    assert len(config.backbone.trunk) == 22  # layers 0 to 21 are shared
    assert backbone.text_logits(output.text_hidden).shape[-1] == 168_448
    assert backbone.audio_logits(output.audio_hidden).shape[-1] == 168_448


def test_logits_in_float64(folder):
    """Each branch is transformers' Qwen2 over the trunk's raw output: no norm stands between."""
    state = published_state(folder)
    trunk = [f"model.layers.{i}." for i in range(3)]
    names = (
        ("text", [*trunk, "model.layers.3.", "model.layers.4."], "model.norm.weight", "lm_head.weight"),
        (
            "audio",
            [*trunk, "model.mimo_layers.0.", "model.mimo_layers.1."],
            "model.mimo_norm.weight",
            "mimo_output.weight",
        ),
    )
    model = kimi_mm.load(folder, dtype="float64", drop=["voice"]).model
    ids = torch.randint(0, 720, (2, 1, 40), generator=torch.Generator().manual_seed(0))
    table = state["model.embed_tokens.weight"].double()
    with torch.no_grad():
        output = model(ModelInputs(ids[0], ids[1], torch.tensor([40])))
        logits = {
            "text": model.backbone.text_logits(output.text_hidden),
            "audio": model.backbone.audio_logits(output.audio_hidden),
        }
        for branch, layers, norm, head in names:
            want = qwen2(state, layers, norm, head).double()(inputs_embeds=table[ids[0]] + table[ids[1]]).logits
            assert want.std() > 0.1
            torch.testing.assert_close(logits[branch], want, atol=1e-6, rtol=1e-6)


def test_text_is_drawn_before_audio(engine):
    model, delay = engine.model, engine.config.audio_delay
    hidden = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0))
    hot = SpeechSampling(text=TokenSampling(temperature=1.0), audio=TokenSampling(temperature=1.0))
    reply = Reply(engine.config.vocab, delay, hot, generator=torch.Generator().manual_seed(5))
    drawn = []
    for step in range(delay + 2):
        before = reply.generator.get_state()
        texts, codes = next_ids(model, [reply], hidden[0], hidden[1])
        by_hand = torch.Generator()
        by_hand.set_state(before)
        again = Reply(engine.config.vocab, delay, hot, generator=by_hand)
        again.audio_history = list(reply.audio_history)
        assert texts == [again.text(model.backbone.text_logits(hidden[0][0], engine.config.vocab.audio_offset))]
        if step >= delay:
            assert codes == [again.audio(model.backbone.audio_logits(hidden[1][0]))]
        assert torch.equal(by_hand.get_state(), reply.generator.get_state())
        reply.take(engine.processor.ids["text_blank"] - 200, engine.processor.ids["text_blank"])
        drawn.append(codes[0])
    assert set(drawn[:delay]) == {engine.processor.ids["text_blank"]}
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    choose(torch.randn(1, 9), TokenSampling(), [[]], generator)
    assert torch.equal(generator.get_state(), before)


def test_sixteen_bits(folder):
    model = kimi_mm.load(folder, dtype="bfloat16").model
    narrow = (model.backbone, model.audio.feature_encoder, model.detokenizer.dit, model.detokenizer.vocoder)
    assert {p.dtype for part in narrow for p in part.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.audio.encoder.parameters()} == {torch.float32}
    assert model.audio.quantizer.codebook.dtype == torch.float32
    dit = model.detokenizer.dit
    assert dit._sinusoids(torch.tensor(0.5, dtype=torch.bfloat16)).dtype == torch.float32
    assert {angle.dtype for angle in dit._angles(torch.arange(3))} == {torch.float32}
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([20.0, 20.02]).bfloat16()  # one number in bf16: both are drawn
    sampling = SpeechSampling(text=TokenSampling(temperature=0.01))
    vocab = model.config.vocab
    spread = torch.full((vocab.audio_offset,), -1e4).bfloat16()
    spread[:2] = logits
    drawn = {Reply(vocab, 6, sampling, generator=generator).text(spread) for _ in range(40)}
    assert drawn == {0, 1}


def test_logits_agree_between_types(folder):
    ids = torch.randint(0, 720, (2, 1, 60), generator=torch.Generator().manual_seed(2))
    found = []
    for dtype in ("float32", "bfloat16"):
        model = kimi_mm.load(folder, dtype=dtype, drop=["voice"]).model
        with torch.no_grad():
            output = model(ModelInputs(ids[0], ids[1], torch.tensor([60])))
            found.append(model.backbone.text_logits(output.text_hidden)[0].float())
    assert torch.cosine_similarity(*found, dim=-1).min() > 0.999
    assert (found[0].argmax(-1) == found[1].argmax(-1)).float().mean() > 0.9


# ---- the detokenizer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 12, 29, 30, 31, 60, 100])
def test_length_does_not_depend_on_chunks(engine, count):
    assert sum(len(piece.wave) for piece in pieces(engine, count)) == count * 1920
    codes = list(range(count))
    for first, chunk, ahead in ((30, 30, 12), (10, 7, 3)):
        settings = engine.config.detokenizer.streaming
        settings = settings.replace(first_chunk_codes=first, chunk_codes=chunk, look_ahead_codes=ahead, steps=1)
        assert len(engine.detokenizer.decode(codes, streaming=settings)) == count * 1920


class Passes:
    """Notes the flow time, in whole thousandths, and the frames of every pass through a DiT."""

    def __init__(self, dit: DiT) -> None:
        self.times: list[int] = []
        self.frames: list[int] = []
        half = dit.config.time_size // 2
        slowest = math.exp(-(half - 1) * math.log(10_000.0) / half)

        def note_time(_: torch.nn.Module, arguments: tuple) -> None:
            table = arguments[0].double().flatten(0, -2)[0]
            self.times.append(round(float(torch.atan2(table[-1], table[half - 1])) / slowest))

        hooks = [dit.time_mlp.register_forward_pre_hook(note_time)]
        hooks.append(dit.input.register_forward_pre_hook(lambda _, a: self.frames.append(a[0].shape[1])))
        self._hooks = hooks

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def test_passes_and_times(engine):
    with Passes(engine.detokenizer.dit) as passes:
        found = pieces(engine, 70)
    assert [piece.passes for piece in found] == [30, 30, 29]
    euler = [int(k / 29 * 1000) for k in range(29)]
    assert euler[:6] == [0, 34, 68, 103, 137, 172]
    assert euler[-1] == 965
    assert passes.times == [*euler, 999, *euler, 999, *euler]


def test_look_ahead_bookkeeping(engine):
    with Passes(engine.detokenizer.dit) as passes:
        found = pieces(engine, 100)
    assert [piece.solved for piece in found] == [120, 168, 168, 88]
    assert [piece.kept for piece in found] == [72, 120, 120, 88]
    assert passes.frames == [120] * 29 + [72] + ([168] * 29 + [120]) * 2 + [88] * 29
    assert [len(piece.wave) for piece in found] == [17_280, 34_560, 80_640, 59_520]


@pytest.mark.parametrize("count", [1, 30])
def test_a_single_chunk(engine, count):
    calls = []
    hook = engine.detokenizer.vocoder.pre.register_forward_hook(lambda *_: calls.append(1))
    (piece,) = pieces(engine, count)
    hook.remove()
    assert (piece.solved, piece.kept, piece.passes) == (4 * count, 4 * count, 29)
    assert len(calls) == 1
    with torch.inference_mode():
        whole = engine.detokenizer.vocoder(engine.detokenizer.mel.denormalize(piece.mel[None]))[0]
    assert torch.equal(piece.wave, whole)


def test_last_chunks(engine):
    assert [(piece.solved, piece.kept) for piece in pieces(engine, 31)] == [(120, 72), (52, 52)]
    assert [(piece.solved, piece.kept) for piece in pieces(engine, 60)] == [(120, 72), (168, 168)]


def test_noise_is_drawn_once_a_call(engine):
    """All frames of a call at once, held-back ones anew."""
    generator = torch.Generator().manual_seed(3)
    pieces(engine, 70, generator)
    by_hand = torch.Generator().manual_seed(3)
    for frames in (120, 168, 88):
        torch.randn(frames, 80, generator=by_hand)
    assert torch.equal(generator.get_state(), by_hand.get_state())
    again = [pieces(engine, 70, torch.Generator().manual_seed(seed))[0].mel for seed in (3, 3, 4)]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], again[2])
