"""Published models in use: prompts with their ids, answers, speech, few bits, layers elsewhere, parts left out."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import kimi_mm
from kimi_mm.config import ConfigError
from kimi_mm.conversion.convert import convert
from kimi_mm.conversion.presets import K2_VOCAB, KIMI_AUDIO_VOCAB
from kimi_mm.errors import CheckpointError, UserError
from kimi_mm.generation import TextSampling, stream_text
from kimi_mm.generation_speech import SpeechSampling, TwoStreams
from kimi_mm.processing import AudioClip, ModelInputs
from kimi_mm.processing_published import K2Processor, KimiAudioProcessor
from kimi_mm.quantized import QuantizedLinear, expand, pack_int4, quantize, unpack_int4
from kimi_mm.text.tiktoken import TiktokenTokenizer, read_ranks
from tests.conversion.tiny import KIMI_K25, KIMI_LINEAR, kimi_audio, text_model, write_vocabulary


@pytest.fixture(scope="module")
def bytes_only(tmp_path_factory) -> TiktokenTokenizer:
    folder = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(folder, extra=0)
    return TiktokenTokenizer.from_folder(folder, "qwen")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name in ("audio", "linear", "k25"):
        (root / name).mkdir()
    kimi_audio(root / "audio")
    text_model(root / "linear", KIMI_LINEAR)
    text_model(root / "k25", KIMI_K25, int4=True)
    convert(root / "audio", root / "audio-ours")
    convert(root / "linear", root / "linear-ours")
    return root


# ---- prompts -------------------------------------------------------------------------------------------------------

START, ASSISTANT, BLANK, EOS = 151670, 151671, 151666, 151667
BEGIN, END, CT, CTD, MSG_END = 151661, 151663, 151675, 151676, 151645


@pytest.fixture
def processor(bytes_only) -> KimiAudioProcessor:
    return KimiAudioProcessor(KIMI_AUDIO_VOCAB, bytes_only, audio_delay=6)


def clip(*codes: int) -> dict:
    return {"type": "audio", "num_codes": len(codes), "codes": list(codes)}


def test_kimi_audio_prompt(processor):
    """The worked example of speech recognition: "Hi" and a clip of three codes."""
    content = [{"type": "text", "text": "Hi"}, clip(0, 1, 2)]
    streams = processor.streams([{"role": "user", "content": content}])
    codes = [152064, 152065, 152066]
    assert streams.audio == [START, BLANK, BLANK, BEGIN, *codes, END, CT, MSG_END, ASSISTANT]
    assert streams.text == [BLANK, 72, 105] + [BLANK] * 8
    assert [i for i, row in enumerate(streams.clip_row) if row >= 0] == [4, 5, 6]
    spoken = processor.streams([{"role": "user", "content": content}], output="speech")
    assert spoken.audio[8] == CTD


def test_kimi_audio_turns(processor):
    """Messages of one role make one turn; audio before text has no ct; histories hold text_eos or delayed codes."""
    messages = [
        {"role": "user", "content": [clip(5)]},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": [{"type": "text", "text": "de"}, clip(7, 8)]},
    ]
    streams = processor.streams(messages, output="speech")
    audio = [START, BEGIN, 152069, END, BLANK, MSG_END]
    text = [BLANK] * 4 + [97, BLANK]
    audio += [ASSISTANT, BLANK, BLANK, MSG_END, START, BLANK, MSG_END]
    text += [BLANK, 98, EOS, BLANK, BLANK, 99, BLANK]
    audio += [ASSISTANT] + [BLANK] * 6 + [152071, 152072, MSG_END, ASSISTANT]
    text += [BLANK, 100, 101] + [BLANK] * 8
    assert streams.audio == audio
    assert streams.text == text
    with pytest.raises(UserError, match="role 'system' must be one of user, assistant"):
        processor.streams([{"role": "system", "content": "x"}])
    with pytest.raises(UserError, match="do not fit beside 1 codes"):
        processor.streams([{"role": "assistant", "content": [{"type": "text", "text": "12345678"}, clip(1)]}])


def test_k2_prompt(bytes_only):
    processor = K2Processor(K2_VOCAB, bytes_only)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "<|im_end|>"}]
    text = processor.streams(messages).text
    middle, end = 163601, 163586
    want = [163594, *b"system", middle, *b"s", end, 163587, *b"user", middle, *b"<|im_end|>", end]
    assert text == [*want, 163588, *b"assistant", middle]
    with pytest.raises(UserError, match="cannot read a part of type 'audio'"):
        processor.streams([{"role": "user", "content": [clip(1)]}])


# ---- vocabularies --------------------------------------------------------------------------------------------------


def test_tiktoken_vocabulary(tmp_path):
    write_vocabulary(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"added_tokens_decoder": {"299": {"content": "<think>", "special": false}, "298": {"content": "[EOS]"}}}'
    )
    tokenizer = TiktokenTokenizer.from_folder(tmp_path, "k2")
    assert len(tokenizer) == 260
    assert tokenizer.encode("the") == [257]
    assert tokenizer.encode("[EOS]") == list(b"[EOS]")
    assert tokenizer.decode([299, 257, 298, 258]) == "<think>the a"
    long = "x" * 60_000 + " the " + "y" * 30_000
    assert tokenizer.decode(tokenizer.encode(long)) == long
    assert tokenizer.encode("你好the") == [*"你好".encode(), 257]


@pytest.mark.parametrize(
    ("content", "message"),
    [("YQ== 0\nnonsense\n", "line 2 is not 'base64 rank'"), ("YQ== 0\nYg== 5\n", "ranks do not count from 0")],
)
def test_damaged_vocabulary(tmp_path, content, message):
    (tmp_path / "tiktoken.model").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_ranks(tmp_path / "tiktoken.model")


# ---- answers -------------------------------------------------------------------------------------------------------


def test_kimi_audio_answers_in_text_and_speech(folders):
    engine = kimi_mm.load(folders / "audio-ours", dtype="float32")
    wave = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).numpy() * 0.1
    assert isinstance(engine.transcribe(wave).text, str)
    heard = engine.tokenizer.encode(wave)
    part = {"type": "audio", "num_codes": len(heard.codes)}
    streams = engine.processor.streams([{"role": "user", "content": [part]}], output="speech")
    inputs = engine.processor.collate([streams], [[AudioClip(heard.codes, heard.features)]])
    sampling = SpeechSampling(max_audio_codes=9, min_audio_codes=9, max_text_tokens=4)
    (result,) = TwoStreams(engine.model, inputs, sampling=sampling).run()
    assert len(result.codes) == 9
    assert len(engine.detokenizer.decode(torch.tensor(result.codes))) == 9 * 1920


def test_text_models_answer(tmp_path):
    """With the real number of ids, so that the roles have theirs; greedy, against the model run afresh each time."""
    folder = text_model(tmp_path / "chat", KIMI_LINEAR | {"vocab_size": 163_840, "eos_token_id": 163_586})
    engine = kimi_mm.load(folder, dtype="float32")
    streams = engine.processor.streams([{"role": "user", "content": "the"}])
    inputs = engine.processor.collate([streams], [[]])
    got = list(stream_text(engine.model, inputs, sampling=TextSampling(max_tokens=4)))
    ids = inputs.text_ids
    for token in got:
        assert int(logits(engine, ids)[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert len(got) == 4
    assert isinstance("".join(engine.reply([{"role": "user", "content": "the"}], max_tokens=3)), str)
    with pytest.raises(UserError, match="does not hear"):
        engine.transcribe(torch.randn(16_000) * 0.1)


def logits(engine, ids: torch.Tensor) -> torch.Tensor:
    inputs = ModelInputs(ids, ids, torch.full((len(ids),), ids.shape[1]))
    with torch.no_grad():
        return engine.model.backbone.text_logits(engine.model(inputs).text_hidden).float()


IDS = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("weights", "error"), [("int8", 0.03), ("int4", 0.3)])
def test_few_bits(folders, weights, error):
    want = logits(kimi_mm.load(folders / "linear", dtype="float32"), IDS)
    got = logits(kimi_mm.load(folders / "linear", dtype="float32", weights=weights), IDS)
    assert 1e-4 < (got - want).norm() / want.norm() < error


def test_int4_experts_are_read_as_they_are(folders):
    """K2.5's experts stay packed with `weights`, and expand to exactly the stored numbers without."""
    whole = kimi_mm.load(folders / "k25", dtype="float32")
    packed = kimi_mm.load(folders / "k25", dtype="float32", weights="int8")
    experts = packed.model.backbone.trunk[1].mlp.experts
    assert experts.gate_up_values.dtype == torch.int32
    stack = whole.model.backbone.trunk[1].mlp.experts.gate_up_proj
    assert torch.equal(expand(experts.gate_up_values, experts.gate_up_scale, torch.float32), stack)
    want, got = logits(whole, IDS), logits(packed, IDS)
    assert (got - want).norm() / want.norm() < 0.03


def test_packing():
    values = torch.randint(-8, 8, (3, 64))
    assert torch.equal(unpack_int4(pack_int4(values)).long(), values)
    # As published: the first of eight in the lowest four bits, moved by 8.
    assert pack_int4(torch.tensor([[-8, -7, 0, 0, 0, 0, 0, 7]])).item() % 2**32 == 0xF8888810
    weight = torch.randn(4, 64)
    with pytest.raises(UserError, match="groups of 32"):
        quantize(weight[:, :40], "int4")


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_layers_elsewhere(folders, place):
    pytest.importorskip("accelerate")
    want = logits(kimi_mm.load(folders / "linear-ours", dtype="float32"), IDS)
    engine = kimi_mm.load(folders / "linear-ours", dtype="float32", offload=place)
    assert engine.model.backbone.trunk[1].mixer.o_proj.weight.is_meta
    torch.testing.assert_close(logits(engine, IDS), want, atol=1e-5, rtol=1e-5)
    assert engine.model.backbone.trunk[1].mixer.o_proj.weight.is_meta


def test_parts_left_out(folders):
    whole = kimi_mm.load(folders / "audio-ours", dtype="float32")
    lean = kimi_mm.load(folders / "audio-ours", dtype="float32", drop=["audio_branch"])
    assert lean.model.backbone.audio is None
    with pytest.raises(UserError, match="no voice"):
        lean.detokenizer.decode(torch.zeros(3))
    torch.testing.assert_close(logits(lean, IDS), logits(whole, IDS))
    with pytest.raises(UserError, match="drop: 'ears' must be one of"):
        kimi_mm.load(folders / "audio-ours", drop=["ears"])


def test_wrong_requests(folders):
    with pytest.raises(UserError, match="must be one of int8, int4"):
        kimi_mm.load(folders / "linear", weights="int3")
    with pytest.raises(UserError, match="dtype 'float31'"):
        kimi_mm.load(folders / "linear", dtype="float31")
    with pytest.raises(UserError, match="convert it first"):
        kimi_mm.load(folders / "linear", offload="disk")
    with pytest.raises(UserError, match="leave out 'weights'"):
        kimi_mm.load(folders / "linear", offload="cpu", weights="int8")
    with pytest.raises(CheckpointError, match="neither a folder nor shipped nor a repository"):
        kimi_mm.load("no-such-model")
    with pytest.raises(ConfigError, match="no token 'media_content'"):
        KIMI_AUDIO_VOCAB.special("media_content")


def test_conversion_needs_little_memory(tmp_path):
    """Some 50 MiB of weights, 24 MiB the largest, are converted within 32 MiB above what the imports take."""
    values = KIMI_LINEAR | {"hidden_size": 1024, "vocab_size": 12_000}
    text_model(tmp_path / "big", values)
    size = sum(file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors"))
    assert size > 48 * 2**20
    code = (
        "import resource, sys; from kimi_mm.conversion.convert import convert;"
        "import kimi_mm.conversion.layouts;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "convert(sys.argv[1], sys.argv[2]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "big"), str(tmp_path / "ours")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 32 * 2**20


@pytest.mark.parametrize("rows", [1, 7, 80])
def test_few_rows_in_bf16_are_what_expanded_weights_give(rows):
    """Of int8 weights, by the CPU's own kernel, by slices of the matrix, and by its first rows alone."""
    torch.manual_seed(0)
    weight, bias = torch.randn(96, 64), torch.randn(96)
    layer = QuantizedLinear(*quantize(weight.bfloat16(), "int8"), bias)
    x = torch.randn(2, rows, 64).bfloat16()
    exact = expand(layer.values, layer.scale, torch.float64)
    want = x.double() @ exact.T + bias
    for size in (None, 40):
        got = layer(x, size).double()
        assert got.shape == (2, rows, size or 96)
        error = (got - want[..., :size]).norm() / want[..., :size].norm()
        assert error < 0.01


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_rounding_by_slices_is_rounding_at_once(bits, monkeypatch):
    weight = torch.randn(3, 50, 64)
    whole = quantize(weight, bits)
    monkeypatch.setattr("kimi_mm.quantized.SLICE", 7 * 64)
    parts = quantize(weight, bits)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert (expand(*whole, torch.float32) - weight).abs().max() < (0.05 if bits == "int8" else 0.5)
